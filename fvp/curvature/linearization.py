"""One linearisation of a function, from which both J v and J^T u are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from fvp.curvature.convolutions import fast_convolutions

_NOT_TRANSPOSABLE = (
    "model_fn: its backward pass can't be transposed, which is how J v is made of it. Every"
    " operation of a backward pass, those of a custom_vjp rule too, has to be linear in the"
    " cotangent and transposable: no jnp.isnan or other test of the cotangent, no callback, no"
    " while_loop over it. Give the function a custom_jvp rule instead, or keep such operations to"
    " the residuals."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linearization:
    """The value and the Jacobian J of ``function`` at ``params``.

    ``jax.vjp`` alone is enough: its pullback is a pytree whose leaves are the residuals, so it
    crosses ``jit`` boundaries, and its linear transpose is the JVP. That also serves models that
    have a VJP rule and no JVP rule (``custom_vjp``), and stores the residuals once for both.
    """

    output: Any
    pullback: Any

    @classmethod
    def of(cls, function: Callable[[Any], Any], params: Any) -> Linearization:
        """Evaluates ``function`` at ``params`` and keeps its residuals."""
        return cls(*jax.vjp(function, params))

    def jvp(self, v: Any) -> Any:
        """J v; ``v`` like the parameters."""
        # The pullback returns a one-tuple, and so its transpose takes and returns one.
        transpose = lambda v: jax.linear_transpose(self.pullback, self.output)((v,))
        try:
            (u,) = fast_convolutions(transpose)(v)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise TypeError(_NOT_TRANSPOSABLE) from error
        return u

    def vjp(self, u: Any) -> Any:
        """J^T u; ``u`` like the output."""
        (v,) = fast_convolutions(self.pullback)(u)
        return v
