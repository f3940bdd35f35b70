"""What a model does to its parameters before it uses them: diagonal, dual solve and K-FAC = dense.

Each case returns ``(model_fn, params, batch)``; references come from the Jacobian alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import quick_jit, relative_error
from jax import lax
from jax.flatten_util import ravel_pytree
from models import normal, weight

import fvp

COMPILE_QUICKLY = True

GAUSSIAN = fvp.Gaussian()
DAMPING = 0.3
CASES = {}


def case(make):
    CASES[make.__name__] = make
    return make


def convolve(x, kernel):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=numbers)


def flat(z):
    return z.reshape(z.shape[0], -1)


@case
def a_reshape_that_reads_axes_in_another_order(rng):
    def model(w, x):  # vmap of a convolution over kernels emits it
        return flat(jnp.moveaxis(jax.vmap(lambda kernel: convolve(x, kernel))(w), 0, 1))

    return model, normal(rng, 2, 3, 2, 2), normal(rng, 3, 4, 2)


OUT_OF_RANGE = jnp.array([[9, 9, 0], [1, 9, 9], [2, 2, -7], [0, 1, 2]])


def summed_lookup(read):
    return lambda table, indices: jnp.tanh(read(table, indices)).sum(1) ** 2


@case
def lookups_out_of_range_that_fill(rng):
    read = lambda table, i: jnp.take(table, i, axis=0, mode="fill", fill_value=0.0)
    return summed_lookup(read), normal(rng, 3, 2), OUT_OF_RANGE


@case
def lookups_out_of_range_that_clip(rng):
    read = lambda table, i: jnp.take(table, i, axis=0, mode="clip")
    return summed_lookup(read), normal(rng, 3, 2), OUT_OF_RANGE


@case
def lookups_of_negative_indices_that_do_not_wrap(rng):
    options = {"mode": "fill", "fill_value": 0.0, "wrap_negative_indices": False}
    read = lambda table, i: table.at[i].get(**options)
    indices = jnp.array([[-1, -1, 0], [1, -1, 2], [2, 2, 0], [0, 1, 2]])
    return summed_lookup(read), normal(rng, 3, 2), indices


@case
def lookups_by_small_integers(rng):
    read = lambda table, i: table[i]
    indices = jnp.asarray(rng.integers(0, 200, (3, 2)), jnp.uint8)
    return summed_lookup(read), normal(rng, 200, 1), indices


@case
def lookups_by_two_indices(rng):
    def model(table, i):
        return jnp.stack([table[i[:, 0], i[:, 1]], table[i[:, 1], i[:, 0]]], 1) ** 2

    return model, normal(rng, 3, 3), jnp.array([[0, 1], [1, 1], [2, 0], [2, 2]])


@case
def rounded_and_compared(rng):
    def model(w, x):
        hard = jnp.round(3 * w).astype(int).astype(float)
        return x @ hard + (x @ w) * (w > 0).astype(float).sum() + x @ (w * (w > 0))

    return model, normal(rng, 3, 2), normal(rng, 4, 3)


@case
def straight_through_and_stopped(rng):
    def model(w, x):
        return x @ (w + lax.stop_gradient(jnp.round(w) - w)) + (x @ lax.stop_gradient(w)) * w.sum()

    return model, normal(rng, 3, 2), normal(rng, 4, 3)


@case
def single_numbers(rng):
    def model(p, x):
        z = jnp.exp(p["temperature"]) * (x @ p["w"]) + p["shift"] - p["other"]
        return jnp.where(z > 0, z, p["slope"] * z)

    names = ("temperature", "shift", "other", "slope")
    return model, {"w": weight(rng, 3, 2), **{n: normal(rng) for n in names}}, normal(rng, 4, 3)


@case
def axes_of_length_zero(rng):
    def model(p, x):
        return x @ p["w"] + jnp.sum(p["none"]) + x[:, :0] @ p["empty"]

    params = {"w": normal(rng, 3, 2), "none": jnp.zeros(0), "empty": jnp.zeros((0, 2))}
    return model, params, normal(rng, 4, 3)


@case
def stacked_padded_reversed_and_rolled(rng):
    def model(p, x):
        w = jnp.stack([p["a"], p["b"]], 1) + jnp.flip(jnp.roll(p["c"], 1, 0), 1)
        return jnp.tanh(x @ w) @ jnp.pad(p["d"], ((1, 0), (0, 1)))

    params = {"a": normal(rng, 3), "b": normal(rng, 3), "c": normal(rng, 3, 2)}
    return model, {**params, "d": normal(rng, 1, 2)}, normal(rng, 4, 3)


@case
def concatenated_features(rng):
    def model(p, x):
        bias = jnp.concatenate([p["a"], p["b"]])
        hidden = jnp.tanh(x @ jnp.concatenate([p["q"], p["k"]], 1) + bias)
        return hidden @ jnp.concatenate([p["q"], p["k"]], 1).T

    params = {"q": normal(rng, 3, 2), "k": normal(rng, 3, 1)}
    return model, {**params, "a": normal(rng, 2), "b": normal(rng, 1)}, normal(rng, 4, 3)


@case
def concatenated_tables(rng):
    model = lambda p, i: jnp.tanh(jnp.concatenate([p["a"], p["b"]])[i]).sum(1) ** 2
    params = {"a": normal(rng, 2, 2), "b": normal(rng, 3, 2)}
    return model, params, jnp.asarray(rng.integers(0, 5, (4, 3)))


def scattered(p, *shape):
    """A weight of two leaves, neither of which is a block of it."""
    return jnp.concatenate([p["a"], p["b"]]).reshape(shape)


def leaves(rng, a, b):
    return {"a": normal(rng, a), "b": normal(rng, b)}


@case
def scattered_weight(rng):
    model = lambda p, x: jnp.tanh(x @ scattered(p, 4, 3))
    return model, leaves(rng, 5, 7), normal(rng, 3, 4)


@case
def scattered_weight_of_rows(rng):
    model = lambda p, x: jnp.tanh(x @ scattered(p, 4, 3)).sum(1)
    return model, leaves(rng, 5, 7), normal(rng, 3, 2, 4)


@case
def scattered_scales_and_shifts(rng):
    def model(p, x):
        scaled = x[..., None] * (2 * scattered(p["scale"], 4, 3)) + scattered(p["shift"], 4, 3)
        return jnp.tanh(scaled).sum(1)

    return model, {"scale": leaves(rng, 5, 7), "shift": leaves(rng, 4, 8)}, normal(rng, 3, 4)


@case
def scattered_table(rng):
    model = lambda p, i: jnp.tanh(scattered(p, 4, 3)[i]).sum(1) ** 2
    return model, leaves(rng, 5, 7), jnp.asarray(rng.integers(0, 4, (3, 2)))


@case
def scattered_kernel(rng):
    model = lambda p, x: flat(jnp.tanh(convolve(x, scattered(p, 3, 2, 2))))
    return model, leaves(rng, 5, 7), normal(rng, 3, 3, 2)


@case
def kernels_of_an_ensemble_flipped_and_scaled(rng):
    numbers = ("NWC", "WIO", "NWC")

    def model(kernels, x):
        options = {"transpose_kernel": True, "dimension_numbers": numbers}
        one = lambda kernel: lax.conv_transpose(x, kernel, (1,), "SAME", **options)
        z = jax.vmap(one, out_axes=-1)(kernels)
        return flat(z * jnp.pad(kernels[:, 0, :1, 0], ((0, 0), (1, 0))).T)

    return model, normal(rng, 2, 2, 2, 3), normal(rng, 3, 3, 3)


@case
def tiled_set_and_accumulated(rng):
    def model(p, x):
        w = jnp.zeros((3, 3)).at[:, 1:].set(p["a"]) + jnp.tile(p["b"], (1, 3))
        return x @ jnp.cumsum(w, 0)

    return model, {"a": normal(rng, 3, 2), "b": normal(rng, 3, 1)}, normal(rng, 4, 3)


@case
def masked(rng):
    mask = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    return lambda w, x: x @ (w * mask), normal(rng, 3, 2), normal(rng, 4, 3)


@case
def low_rank_update(rng):
    params = {"w": normal(rng, 3, 2), "a": normal(rng, 3, 1), "b": normal(rng, 1, 2)}
    return lambda p, x: jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])), params, normal(rng, 4, 3)


@case
def normalised_weight(rng):
    model = lambda p, x: x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0))
    return model, {"g": normal(rng, 2), "v": normal(rng, 3, 2)}, normal(rng, 4, 3)


@case
def kernels_flipped_and_transposed(rng):
    def model(p, x):
        z = convolve(x, jnp.flip(jnp.swapaxes(p["a"], 1, 2), 0))
        numbers = ("NWC", "WIO", "NWC")
        return flat(lax.conv_transpose(z, p["b"], (2,), "SAME", dimension_numbers=numbers))

    return model, {"a": normal(rng, 3, 3, 2), "b": normal(rng, 2, 3, 1)}, normal(rng, 3, 4, 2)


@case
def tokens_of_its_own_and_learned_positions(rng):
    def model(p, batch):
        first = jnp.broadcast_to(p["first"], (4, 1, 3))
        x = jnp.concatenate([first, batch["x"]], 1) + p["positions"][jnp.arange(4)]
        x += lax.dynamic_slice_in_dim(p["more"], batch["offset"], 4)
        return jnp.tanh(x).sum(1) @ p["w"]

    params = {"first": normal(rng, 1, 1, 3), "positions": normal(rng, 5, 3)}
    params |= {"more": normal(rng, 6, 3), "w": normal(rng, 3, 2)}
    return model, params, {"x": normal(rng, 4, 3, 3), "offset": jnp.array(1)}


@case
def initial_states(rng):
    def model(p, x):
        start = jnp.broadcast_to(p["start"], (4, 3))
        cell = lambda h, x: (jnp.tanh(h @ p["w"] + x), None)
        return lax.scan(cell, start, jnp.swapaxes(x, 0, 1))[0]

    return model, {"start": normal(rng, 3), "w": weight(rng, 3, 3)}, normal(rng, 4, 2, 3)


@case
def nothing_but_an_intercept(rng):
    return lambda b, x: jnp.broadcast_to(jnp.exp(b), (4, 2)), normal(rng, 2), normal(rng, 4, 3)


@case
def examples_one_by_one(rng):
    model = lambda p, x: lax.map(lambda row: jnp.tanh(row @ p["w"]) + p["b"], x)
    return model, {"w": normal(rng, 3, 2), "b": normal(rng, 2)}, normal(rng, 4, 3)


@case
def branches_by_example(rng):
    def one(p, row):
        return lax.cond(row[0] > 0, lambda r: r @ p["w"], lambda r: p["b"] - r @ p["w"], row)

    model = lambda p, x: jax.vmap(one, in_axes=(None, 0))(p, x)
    return model, {"w": normal(rng, 3, 2), "b": normal(rng, 2)}, normal(rng, 4, 3)


@case
def branches_in_a_scan(rng):
    def model(p, x):
        def step(h, take):
            first = lambda h: jnp.tanh(h @ p["w"] + p["b"])
            return lax.cond(take > 0, first, lambda h: h * p["s"] + p["b"], h), None

        return lax.scan(step, x, jnp.array([1, 0, 1]))[0]

    params = {"w": weight(rng, 3, 3), "b": normal(rng, 3), "s": normal(rng, 3)}
    return model, params, normal(rng, 4, 3)


@case
def scans_in_scans(rng):
    mask = jnp.array([1.0, 0.0, 1.0])

    def model(p, x):
        def outer(h, layer):
            inner = lambda h, b: (jnp.tanh(h @ layer["w"] + b * mask), None)
            h = lax.scan(inner, h, p["b"])[0]
            unit = lambda h, w: (h @ (w / jnp.linalg.norm(w)), None)
            return lax.scan(unit, h, layer["more"])[0], None

        return lax.scan(outer, x, p["layers"])[0]

    layers = {"w": normal(rng, 2, 3, 3), "more": normal(rng, 2, 2, 3, 3)}
    return model, {"layers": layers, "b": normal(rng, 2, 3)}, normal(rng, 4, 3)


@case
def transforms_and_systems_of_data(rng):
    def model(p, batch):
        spectrum = jnp.fft.fft(batch["x"] @ p["w"]).real
        return spectrum + jnp.linalg.solve(batch["a"], (batch["x"] * p["s"])[..., None])[..., 0]

    params = {"w": normal(rng, 3, 3), "s": normal(rng, 3)}
    batch = {"x": normal(rng, 4, 3), "a": normal(rng, 4, 3, 3) + 3 * jnp.eye(3)}
    return model, params, batch


@case
def exponents_thresholds_and_set_entries(rng):
    def model(p, x):
        x = x.at[:, 0].set(1.0)
        return jnp.maximum(jnp.abs(x) ** jnp.exp(p["power"]), p["least"]) / p["scale"]

    params = {name: normal(rng, 3) for name in ("power", "least", "scale")}
    return model, params, normal(rng, 4, 3)


@case
def words_and_flags_in_the_batch(rng):
    def model(w, batch):
        assert isinstance(batch["mode"], str)
        return jnp.tanh(batch["x"] @ w) if batch["mode"] == "tanh" and batch["on"] else batch["x"]

    return model, normal(rng, 3, 2), {"x": normal(rng, 4, 3), "mode": "tanh", "on": True}


def dense_fisher(model_fn, params, batch):
    vector, unravel = ravel_pytree(params)
    outputs = lambda vector: flat(model_fn(unravel(vector), batch))
    jacobian = np.asarray(quick_jit(jax.jacrev(outputs))(vector))
    return np.einsum("eoi,eoj->ij", jacobian, jacobian) / len(jacobian)


@pytest.mark.parametrize("name", CASES)
def test_diagonal_and_dual_solve_are_exact(name):
    rng = np.random.default_rng(0)
    model_fn, params, batch = CASES[name](rng)
    vector, unravel = ravel_pytree(params)
    rhs = unravel(normal(rng, vector.size))
    fisher = dense_fisher(model_fn, params, batch)

    @quick_jit
    def computed(params, rhs):
        F = fvp.fisher(model_fn, GAUSSIAN, params, batch)
        return (
            fvp.fisher_diagonal(model_fn, GAUSSIAN, params, batch),
            fvp.solve_dual(F, rhs, DAMPING),
        )

    diagonal, solution = computed(params, rhs)
    assert relative_error(ravel_pytree(diagonal)[0], np.diag(fisher)) < 1e-9
    damped = fisher + DAMPING * np.eye(vector.size)
    expected = np.linalg.solve(damped, ravel_pytree(rhs)[0])
    assert relative_error(ravel_pytree(solution)[0], expected) < 1e-9


def block_errors(model_fn, params, batch):
    """How far each diagonal block of K-FAC is from the Fisher's, by path; and its coverage."""
    K = fvp.kfac(model_fn, GAUSSIAN, params, batch)
    fisher, factored = dense_fisher(model_fn, params, batch), np.asarray(K.dense())
    errors, start = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        block = slice(start, start + leaf.size)
        name = "params" + jax.tree_util.keystr(path)
        errors[name] = relative_error(factored[block, block], fisher[block, block])
        start += leaf.size
    return errors, K


def exact_scales(rng):
    def model(p, x):
        first = lambda x: (x @ p["w"] * p["s"] + 1) ** 2 * p["s"]
        z = lax.cond(p["t"] > 1e6, lambda x: x @ p["w"] * p["s"], first, x)
        return jnp.exp(p["t"]) * z - p["b"] + p["b"][::-1]

    params = {"w": normal(rng, 3, 2), "s": normal(rng, 2), "t": normal(rng), "b": normal(rng, 2)}
    return model, params, normal(rng, 4, 3)


def test_scales_and_shifts_used_several_times_have_their_exact_block():
    errors, _ = block_errors(*exact_scales(np.random.default_rng(0)))
    assert max(errors[f"params['{name}']"] for name in "stb") < 1e-10


def test_a_weight_in_both_branches_counts_where_it_is_used():
    # One row of one example: a Kronecker product is exact.
    def model(p, x):
        first = lambda x: jnp.tanh(x @ p["w"] + p["b"])
        return lax.cond(x.sum() > -1e6, first, lambda x: x @ p["w"] + p["b"], x)

    rng = np.random.default_rng(0)
    params = {"w": normal(rng, 3, 2), "b": normal(rng, 2)}
    errors, _ = block_errors(model, params, normal(rng, 1, 3))
    assert max(errors.values()) < 1e-10


def test_parts_of_a_weight_have_factors_and_inverses_of_their_own():
    rng = np.random.default_rng(0)
    model = lambda p, x: x @ jnp.concatenate([p["q"], jnp.stack([p["a"], p["b"]], 1)], 1)
    params = {"q": normal(rng, 3, 2), "a": normal(rng, 3), "b": normal(rng, 3)}
    batch = normal(rng, 4, 3)
    errors, K = block_errors(model, params, batch)
    assert max(errors.values()) < 1e-10
    v = jax.tree.map(jnp.ones_like, params)
    expected = np.linalg.solve(
        np.asarray(K.dense()) + DAMPING * np.eye(12), np.asarray(ravel_pytree(v)[0])
    )
    assert relative_error(ravel_pytree(K.solve(v, DAMPING))[0], expected) < 1e-10


@pytest.mark.parametrize("make", [scattered_weight, scattered_table, scattered_kernel])
def test_scattered_weights_have_no_factors(make):
    model, params, batch = make(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\['a'\].*scattered"):
        fvp.kfac(model, GAUSSIAN, params, batch)
    K = fvp.kfac(model, GAUSSIAN, params, batch, fallback="per_example")
    fisher = dense_fisher(model, params, batch)
    np.testing.assert_allclose(K.dense(), np.diag(np.diag(fisher)), atol=1e-10)


def test_scattered_scales_and_shifts_have_their_exact_blocks():
    model, params, batch = scattered_scales_and_shifts(np.random.default_rng(0))
    errors, K = block_errors(model, params, batch)
    assert max(errors.values()) < 1e-10
    v = jax.tree.map(jnp.ones_like, params)
    damped = np.asarray(K.dense()) + DAMPING * np.eye(24)
    expected = np.linalg.solve(damped, np.asarray(ravel_pytree(v)[0]))
    assert relative_error(ravel_pytree(K.solve(v, DAMPING))[0], expected) < 1e-10


def test_a_bias_that_another_scan_stacks_keeps_a_block_of_its_own():
    def model(p, x):
        return lax.scan(lambda h, b: (jnp.tanh(h @ p["w"] + b), None), x, p["b"])[0]

    rng = np.random.default_rng(0)
    params = {"w": weight(rng, 3, 3), "b": normal(rng, 2, 3)}
    batch = normal(rng, 4, 3)
    _, K = block_errors(model, params, batch)
    fisher = dense_fisher(model, params, batch)
    for step in range(2):  # the bias of each step has its exact block
        block = slice(3 * step, 3 * step + 3)
        assert relative_error(K.dense()[block, block], fisher[block, block]) < 1e-10


def test_a_function_of_a_weight_has_no_factors_and_the_message_names_it():
    rng = np.random.default_rng(0)
    model, params, batch = normalised_weight(rng)
    with pytest.raises(ValueError, match=r"params\['v'\].*dense through.*div"):
        fvp.kfac(model, GAUSSIAN, params, batch)
    K = fvp.kfac(model, GAUSSIAN, params, batch, fallback="per_example")
    assert K.coverage["params['v']"].startswith("row by row: dense through")
    fisher = dense_fisher(model, params, batch)
    np.testing.assert_allclose(np.diag(K.dense())[2:], np.diag(fisher)[2:], rtol=1e-9)


def test_batch_normalisation_is_named_with_what_to_do():
    model = lambda w, x: (x - x.mean(0)) @ w
    with pytest.raises(ValueError, match=r"'reduce_sum' mixes.*BatchNorm.*running averages"):
        fvp.fisher_diagonal(model, GAUSSIAN, jnp.ones((3, 2)), jnp.ones((4, 3)))


def test_a_primitive_that_nothing_is_known_of_is_not_said_to_mix():
    def model(w, x):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1] @ w

    with pytest.raises(ValueError, match=r"cannot be followed through 'while'"):
        fvp.fisher_diagonal(model, GAUSSIAN, jnp.ones((3, 2)), jnp.ones((4, 3)))


def custom_product(change):
    """A product with weights whose rule is ``change`` of the true cotangent of the weight."""
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, change(r[0].T, g, r[1])))
    return product


RULES = {
    "a little less": lambda xt, g, w: 0.991 * (xt @ g),
    "clipped far out": lambda xt, g, w: jnp.where(jnp.abs(xt) > 5, 0, xt) @ g,
    "another sign far out": lambda xt, g, w: xt @ g * jnp.where(jnp.abs(w) > 30, -1, 1),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_nearly_the_derivative_of_its_body_is_not_opened(rule):
    product = custom_product(RULES[rule])
    batch = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    model = lambda w, x: product(x, w)
    with pytest.raises(ValueError, match="custom_vjp_call"):
        fvp.fisher_diagonal(model, GAUSSIAN, jnp.ones((3, 2), jnp.float32), batch)
