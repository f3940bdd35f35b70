"""Products of convolutional models: the same in the fast layout, and in it everywhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fvp
from fvp.curvature.convolutions import fast_convolutions

COMPILE_QUICKLY = True

LAYOUTS = {
    "1-d, channels first": ((2, 3, 9), (4, 3, 3), ("NCH", "OIH", "NCH"), {}),
    "2-d": ((2, 7, 6, 3), (3, 3, 3, 4), ("NHWC", "HWIO", "NHWC"), {}),
    "2-d, strided": ((2, 7, 6, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NCHW"), {"strides": (2, 3)}),
    "2-d, dilated": ((2, 9, 8, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"rhs": (2, 3)}),
    "2-d, transposed": ((2, 4, 5, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"lhs": (2, 3)}),
    "2-d, grouped": ((2, 7, 6, 4), (6, 2, 3, 3), ("NHWC", "OIHW", "NHWC"), {"groups": 2}),
    "3-d": ((2, 4, 5, 3, 2), (2, 2, 2, 2, 3), ("NHWDC", "HWDIO", "NHWDC"), {"strides": (2, 1, 1)}),
}


def convolution(layout):
    _, kernel, numbers, options = layout

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            options.get("strides", (1,) * (len(kernel) - 2)),
            "SAME" if "lhs" not in options else ((1, 2), (0, 1)),
            lhs_dilation=options.get("lhs"),
            rhs_dilation=options.get("rhs"),
            dimension_numbers=numbers,
            feature_group_count=options.get("groups", 1),
        )

    return convolve


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_transposes_do_not_change(layout):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size)) for size in layout[:2])
    convolve = convolution(layout)
    z = convolve(x, w)
    by_input = lambda z: jax.linear_transpose(lambda x: convolve(x, w), x)(z)[0]
    by_kernel = lambda z: jax.linear_transpose(lambda w: convolve(x, w), w)(z)[0]
    inner = lambda x: {"z": jax.jit(convolve)(x, w) + 1}
    for function, argument in ((by_input, z), (by_kernel, z), (inner, x)):
        actual, expected = fast_convolutions(function)(argument), function(argument)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere it is left as it is")
def test_every_convolution_in_the_loop_has_the_fast_layout():
    convolve = convolution(((), (3, 2, 3, 4), ("NCHW", "HWIO", "NCHW"), {}))
    model_fn = lambda w, x: jnp.tanh(convolve(x, w)).reshape(2, -1)
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(2, 3, 7, 6))), jnp.asarray(rng.normal(size=(3, 2, 3, 4)))
    solve = lambda w: fvp.cg(fvp.fisher(model_fn, fvp.Gaussian(), w, x), w, damping=1.0)[0]
    labels = re.findall(r"dim_labels=(\S+)", jax.jit(solve).lower(w).compile().as_text())
    assert len(labels) >= 3  # forward, JVP and VJP
    assert {label.rstrip(",") for label in labels} == {"b01f_01io->b01f"}
