"""Confidence intervals, and the table of estimates that regression packages print."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import ndtr, ndtri

from fvp.checks import check_inexact_tree, check_like
from fvp.numerics import widen
from fvp.statistics.parameter_names import entry_names
from fvp.typing import Params


def confidence_intervals(
    params: Params, standard_errors: Params, *, level: float = 0.95
) -> tuple[Params, Params]:
    r"""Wald intervals, params +- q standard errors with the normal quantile q of ``level``.

    Args:
      params: the estimates; a pytree.
      standard_errors: a pytree like it, from `fvp.standard_errors`.
      level: probability that an interval covers the truth in large samples, between 0 and 1.

    Returns:
      The lower and the upper ends, two pytrees like ``params``.

    Raises:
      ValueError: for another structure, another shape, or a ``level`` that is no probability.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> lower, upper = fvp.confidence_intervals(jnp.array([1.0]), jnp.array([0.5]))
      >>> print(f"{lower[0]:.2f} to {upper[0]:.2f}")
      0.02 to 1.98
    """
    if not isinstance(level, Tracer) and not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, such as 0.95, got {level}.")
    params = check_inexact_tree(params, "params")
    errors = check_like(standard_errors, params, "standard_errors", "params", cast=False)
    quantile = ndtri(jnp.asarray(0.5 + 0.5 * level))

    def end(sign: int) -> Params:
        move = lambda x, e: (widen(x) + sign * quantile * widen(e)).astype(x.dtype)
        return jax.tree.map(move, params, errors)

    return end(-1), end(1)


class Summary(NamedTuple):
    """One row for each number of the parameters; prints as a table.

    Attributes:
      names: such as ``params['w'][2, 0]``.
      estimates: (P,) the parameters.
      standard_errors: (P,).
      z: (P,) estimates over standard errors.
      p_values: (P,) of the two-sided test that the parameter is zero.
      lower: (P,) lower end of the confidence interval.
      upper: (P,) upper end.
      level: of the intervals.
    """

    names: tuple[str, ...]
    estimates: np.ndarray
    standard_errors: np.ndarray
    z: np.ndarray
    p_values: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    level: float

    def __str__(self) -> str:
        tail = (1 - self.level) / 2
        head = ("", "coef", "std err", "z", "P>|z|", f"[{tail:.3g}", f"{1 - tail:.3g}]")
        columns = (self.estimates, self.standard_errors, self.z, self.p_values)
        forms = ("{:.4f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.3f}")
        numbers = zip(*columns, self.lower, self.upper, strict=True)
        cells = [[f.format(x) for f, x in zip(forms, row, strict=True)] for row in numbers]
        rows = [head, *((name, *row) for name, row in zip(self.names, cells, strict=True))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [_line(row, widths) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _line(row: Any, widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *numbers])


def summary(
    params: Params, standard_errors: Params, *, level: float = 0.95, name: str = "params"
) -> Summary:
    """Estimates, standard errors, z statistics, p-values and intervals, as a printable table.

    Args:
      params: the estimates; a pytree.
      standard_errors: a pytree like it, from `fvp.standard_errors`.
      level: of the intervals.
      name: what the names of the rows begin with.

    Returns:
      A `Summary` of NumPy arrays.

    Raises:
      ValueError: as `confidence_intervals`.

    Examples:
      >>> import jax.numpy as jnp, fvp
      >>> print(fvp.summary({"slope": jnp.array([1.0, 0.2])}, {"slope": jnp.array([0.25, 0.2])}))
                            coef  std err      z  P>|z|  [0.025  0.975]
      -----------------------------------------------------------------
      params['slope'][0]  1.0000    0.250  4.000  0.000   0.510   1.490
      params['slope'][1]  0.2000    0.200  1.000  0.317  -0.192   0.592
    """
    lower, upper = confidence_intervals(params, standard_errors, level=level)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    estimates, errors = flat(params), flat(standard_errors)
    z = estimates / errors
    p_values = np.asarray(2 * ndtr(-np.abs(z)))
    names = tuple(entry_names(params, name))
    return Summary(names, estimates, errors, z, p_values, flat(lower), flat(upper), level)
