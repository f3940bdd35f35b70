"""The measures as one writes them in JAX alone, in two ways.

``programs`` linearises the model once where products repeat, and forms Jacobians an example at a
time. ``textbook`` has the products that do everything anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from comparison.models import MODELS, data_of, loss_of, mean_loss
from comparison.program import DAMPING, DUAL_DAMPING, ITERATIONS, MARGINAL, Program, Programs
from comparison.workloads import Workload

Multiply = Callable[[Any], Any]
JACOBIAN_BYTES = 2**31


def add(a: Any, b: Any, scale: float = 1.0) -> Any:
    """A + scale b."""
    return jax.tree.map(lambda a, b: a + scale * b, a, b)


def conjugate_gradients(multiply: Multiply, v: Any) -> Any:
    """JAX's, on the damped product."""
    damped = lambda u: add(multiply(u), u, DAMPING)
    return jax.scipy.sparse.linalg.cg(damped, v, tol=0.0, maxiter=ITERATIONS)[0]


def loop(multiply: Multiply, v: Any, count: Any) -> Any:
    """The product added so many times."""
    return jax.lax.fori_loop(0, count, lambda _, u: add(u, multiply(u)), v)


def root(head: str, z: Array) -> Array:
    """The matrix S of each row, S S^T = F_R."""
    if head == "gaussian":
        return jnp.broadcast_to(jnp.eye(z.shape[-1]), (*z.shape, z.shape[-1]))
    p = jax.nn.softmax(z)
    q = jnp.sqrt(p)
    return q[..., None] * jnp.eye(z.shape[-1]) - p[..., :, None] * q[..., None, :]


def output_product(head: str, z: Array, u: Array) -> Array:
    """The mean loss' Hessian in z, times u."""
    rows = z.size // z.shape[-1]
    if head == "gaussian":
        return u / rows
    p = jax.nn.softmax(z)
    return (p * u - p * (p * u).sum(-1, keepdims=True)) / rows


def sampled_score(head: str, z: Array, key: Array) -> Array:
    """The score in z of a label drawn for each row."""
    if head == "gaussian":
        return jax.random.normal(key, z.shape)
    return jax.nn.one_hot(jax.random.categorical(key, z), z.shape[-1]) - jax.nn.softmax(z)


def programs(work: Workload) -> Programs:
    """All measures but those of K-FAC."""
    model, head = MODELS[work.kind], work.head
    params, x, y, v = data_of(work)
    key = jax.random.key(0)

    def linearized(p: Any, x: Any) -> Multiply:
        z, jvp = jax.linearize(lambda p: model(p, x), p)
        vjp = jax.linear_transpose(jvp, p)
        return lambda u: vjp(output_product(head, z, jvp(u)))[0]

    def quadratic_form(p: Any, x: Any, v: Any) -> Array:
        z, u = jax.jvp(lambda p: model(p, x), (p,), (v,))
        return jnp.sum(u * output_product(head, z, u))

    def sampled_product(p: Any, x: Any, v: Any, key: Any) -> Any:
        f = lambda p: model(p, x)
        z, pullback = jax.vjp(f, p)
        score = sampled_score(head, z, key)
        u = jax.jvp(f, (p,), (v,))[1]
        rows = z.size // z.shape[-1]
        return pullback(score * (score * u).sum(-1, keepdims=True) / rows)[0]

    def example_columns(p: Any, x: Any) -> Any:
        """S^T J of one example, a column for each of its outputs."""
        z, pullback = jax.vjp(lambda p: model(p, x[None])[0], p)
        rows = z.reshape(-1, z.shape[-1])
        columns = jnp.einsum("rs,rck->rksc", jnp.eye(len(rows)), root(head, rows))
        return jax.vmap(pullback)(columns.reshape(-1, *z.shape))[0]

    def example_score(p: Any, x: Any, key: Any) -> Any:
        z, pullback = jax.vjp(lambda p: model(p, x[None])[0], p)
        return jax.tree.map(lambda g: g[None], pullback(sampled_score(head, z, key))[0])

    def squares(columns: Callable[..., Any], p: Any, *data: Any) -> Any:
        """Of all examples' columns, sixteen examples at a time."""

        def step(total: Any, chunk: Any) -> Any:
            each = jax.vmap(lambda d: columns(p, *d))(chunk)
            return jax.tree.map(lambda t, c: t + (c * c).sum((0, 1)), total, each), None

        size = min(16, work.x.shape[0])
        chunks = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), data)
        total = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, p), chunks)[0]
        return jax.tree.map(lambda t: t / work.rows, total)

    def dual(p: Any, x: Any, v: Any) -> Any:
        each = jax.vmap(lambda x: example_columns(p, x))(x)
        flat = lambda tree, axes: jnp.concatenate(
            [leaf.reshape(*leaf.shape[:axes], -1) for leaf in jax.tree.leaves(tree)], -1
        )
        A = flat(each, 2).reshape(-1, work.size) / work.rows**0.5
        rhs, unravel = ravel_pytree(v)
        factor = jax.scipy.linalg.cho_factor(A @ A.T + DUAL_DAMPING * jnp.eye(len(A)))
        return unravel((rhs - A.T @ jax.scipy.linalg.cho_solve(factor, A @ rhs)) / DUAL_DAMPING)

    product = lambda: (params, x, v)
    keys = lambda: jax.random.split(key, len(work.x))
    measures: dict[str, Program | str] = {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(lambda p, x, v: linearized(p, x)(v), product),
        MARGINAL: Program(lambda p, x, v, count: loop(linearized(p, x), v, count), product),
        "Monte Carlo product": Program(sampled_product, lambda: (params, x, v, key)),
        "quadratic form": Program(quadratic_form, product),
        "ten CG iterations": Program(
            lambda p, x, v: conjugate_gradients(linearized(p, x), v), product
        ),
        "diagonal": Program(lambda p, x: squares(example_columns, p, x), lambda: (params, x)),
        "Monte Carlo diagonal": Program(
            lambda p, x, keys: squares(example_score, p, x, keys), lambda: (params, x, keys())
        ),
        "dual solve": Program(dual, product),
    }
    rows = work.rows * model(params, x[:1]).shape[-1]
    if (gibibytes := 4 * rows * work.size / 2**30) > JACOBIAN_BYTES / 2**30:
        measures["dual solve"] = f"a Jacobian of {gibibytes:.1f} GiB"
    if work.kind == "transformer":
        measures["diagonal"] = f"{rows:,} backward passes: tokens meet in attention"
    return measures


def textbook(work: Workload) -> Programs:
    """JVP, the loss' Hessian by differentiation, and VJP, all of them in every product."""
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)

    def multiply(p: Any, x: Any) -> Multiply:
        f = lambda p: model(p, x)

        def product(u: Any) -> Any:
            z, jv = jax.jvp(f, (p,), (u,))
            hjv = jax.jvp(jax.grad(lambda z: loss_of(work.head, z, y)), (z,), (jv,))[1]
            return jax.vjp(f, p)[1](hjv)[0]

        return product

    data = lambda: (params, x, v)
    return {
        "product": Program(lambda p, x, v: multiply(p, x)(v), data),
        MARGINAL: Program(lambda p, x, v, count: loop(multiply(p, x), v, count), data),
        "ten CG iterations": Program(lambda p, x, v: conjugate_gradients(multiply(p, x), v), data),
    }
