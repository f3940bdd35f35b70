"""How much a function multiplies."""

import jax
import jax.numpy as jnp
import pytest

from fvp.tracing.work import multiplications

X, W = jnp.ones((4, 5)), jnp.ones((5, 5))


def thrice(w, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ (w @ w)), None), x, None, length=3)[0]


def with_rule(w, x):
    function = jax.custom_vjp(thrice)
    function.defvjp(lambda w, x: (thrice(w, x), w), lambda w, c: (w @ w, c))
    return function(w, x)


def larger_of_two(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: thrice(w, x), lambda: x @ w)


def unknown_times(w, x):
    return jax.lax.while_loop(lambda c: c[0, 0] < 0, lambda c: c @ w, x)


THRICE = 3 * (5 * 5 * 5 + 4 * 5 * 5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda w, x: x @ w, 100),
        (lambda w, x: jnp.sin(x) + w[0], 0),
        (lambda w, x: jnp.einsum("bni,nij->bnj", jnp.ones((2, 3, 5)), jnp.stack([w] * 3)), 150),
        (thrice, THRICE),
        (jax.jit(thrice), THRICE),
        (jax.checkpoint(thrice), THRICE),
        (with_rule, THRICE),
        (larger_of_two, THRICE),
        (unknown_times, 100),
        (lambda w, x: jax.vmap(lambda row: row @ w)(x), 100),
    ],
)
def test_matrix_products_count_wherever_they_are(function, expected):
    assert multiplications(function, W, X) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    kernel, image = jnp.ones((3, 3, 4 // groups, 8)), jnp.ones((2, 10, 10, 4))

    def convolve(kernel, image):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    # For each output of 2 x 5 x 5 x 8 the nine places of 4 / groups channels.
    assert multiplications(convolve, kernel, image) == 400 * 9 * 4 // groups
    flops = jax.jit(convolve).lower(kernel, image).compile().cost_analysis()["flops"]
    assert flops <= 2 * 400 * 9 * 4 // groups  # XLA leaves out what the padding has of them
