"""One linearisation of a function, from which both J v and J^T u are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr

from fvp.compatibility import ClosedJaxpr
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

    ``jax.linearize`` keeps the residuals, as leaves of a pytree, so that it crosses ``jit``
    boundaries; its linear transpose is the VJP. A model with a VJP rule alone (``custom_vjp``) goes
    the other way round: ``jax.vjp``, whose transpose is the JVP, some 10% slower in scans.
    """

    output: Any
    params: Any
    pushforward: Any  # v -> J v, or None
    pullback: Any  # u -> (J^T u,), where that is None

    @classmethod
    def of(cls, function: Callable[[Any], Any], params: Any) -> Linearization:
        """Evaluates ``function`` at ``params`` and keeps its residuals."""
        output, pushforward = jax.linearize(function, params)
        if not _has(jax.make_jaxpr(pushforward)(params).jaxpr, "custom_lin"):
            return cls(output, params, pushforward, None)
        output, pullback = jax.vjp(function, params)
        return cls(output, params, None, pullback)

    def jvp(self, v: Any) -> Any:
        """J v; ``v`` like the parameters."""
        if self.pushforward is not None:
            return fast_convolutions(self.pushforward)(v)
        # The pullback returns a one-tuple, and so its transpose takes and returns one.
        transpose = lambda v: jax.linear_transpose(self.pullback, self.output)((v,))
        try:
            (u,) = fast_convolutions(transpose)(v)
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise TypeError(_NOT_TRANSPOSABLE) from error
        return u

    def vjp(self, u: Any) -> Any:
        """J^T u; ``u`` like the output."""
        pullback = self.pullback
        if self.pushforward is not None:
            pullback = lambda u: jax.linear_transpose(self.pushforward, self.params)(u)
        (v,) = fast_convolutions(pullback)(u)
        return v


def _has(jaxpr: Any, name: str) -> bool:
    """Whether ``jaxpr``, or one inside it, has an equation of that primitive."""
    is_jaxpr = lambda value: isinstance(value, (Jaxpr, ClosedJaxpr))
    for equation in jaxpr.eqns:
        params = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        inner = (getattr(value, "jaxpr", value) for value in params if is_jaxpr(value))
        if equation.primitive.name == name or any(_has(value, name) for value in inner):
            return True
    return False
