"""What products alone tell of an operator: its trace, and its largest eigenvalues."""

from fvp.estimation.eigenpairs import eigenpairs
from fvp.estimation.trace import trace

__all__ = ["eigenpairs", "trace"]
