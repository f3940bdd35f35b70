"""What is measured, and the form in which a library says how it computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

MARGINAL = "marginal product"
DAMPING = 0.1  # of conjugate gradients and of K-FAC
DUAL_DAMPING = 0.01
ITERATIONS = 10  # of conjugate gradients, and products whose mean is the marginal one

MEASURES = {
    "gradient": "of the mean loss",
    "product": "Fisher-vector product from scratch: forward pass, JVP and VJP",
    MARGINAL: f"(the loop of {ITERATIONS + 1} products - that of one) / {ITERATIONS}",
    "Monte Carlo product": "one label sampled for each row",
    "quadratic form": "v^T F v from scratch",
    "ten CG iterations": f"damping {DAMPING}, from scratch",
    "diagonal": "of the Fisher, exact",
    "Monte Carlo diagonal": "from one sampled label for each row",
    "K-FAC factors": "exact: a backward pass for each class",
    "K-FAC factors, Monte Carlo": "from one sampled label for each row",
    "K-FAC product": "given the factors",
    "K-FAC solve": f"(K + {DAMPING} I)^-1 v exactly, decompositions included, given the factors",
    "EK-FAC product": "factors, eigenbases and corrected eigenvalues included",
    "dual solve": f"(F + {DUAL_DAMPING} I)^-1 v exactly, in the space of rows x outputs",
    "score product": "covariance of the scores (quantum geometric tensor) times v, from scratch",
    "score CG": f"ten CG iterations on that covariance, damping {DAMPING}",
}
SAMPLED = {name for name in MEASURES if "Monte Carlo" in name}  # no two libraries draw the same


@dataclasses.dataclass(frozen=True)
class Program:
    """How a library computes a measure.

    Attributes:
      function: of ``args()``; for the marginal product of a number of products, too.
      args: makes the arguments, off the clock.
      value: of the result, as arrays named and laid out like the parameters, or one array; what
        is of another type is not compared.
      note: what a reader of the number has to know.
    """

    function: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    value: Callable[[Any], Any] = lambda result: result
    note: str = ""


Programs = Mapping[str, Program | str]  # a text says why the library is not run on a measure
