"""Curvatures of more examples than one batch holds: means over batches, read one at a time."""

from fvp.datasets.mean import mean_over_batches
from fvp.datasets.operator import DatasetOperator, dataset_operator

__all__ = ["DatasetOperator", "dataset_operator", "mean_over_batches"]
