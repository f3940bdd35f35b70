"""Random small models out of what users of JAX write, and their dense references.

Every construct is one small function in one of the registries of `CONSTRUCTS`: adding one is
writing one function. ``random_model(seed)`` composes a model; each registry is a deck that the
seeds draw from in turn, so that consecutive seeds meet all of it. ``model_of(kind, name)`` has that
construct and otherwise only plain ones. ``verdicts(model)`` holds what the library says against the
dense reference.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun
from jax.flatten_util import ravel_pytree

import fvp

LARGEST = 150  # parameters of a model, for dense Jacobians
MODES = ("features", "sequence")  # (B, D) or (B, T, D) between the layers


# --- The registries -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Construct:
    """``make`` under its own name.

    Flags: "shares" uses a parameter more than once in an example; "single" rounds to float32;
    "batched" needs the example axis; "sequence" needs a time axis; "no reverse" has no VJP in JAX.
    """

    make: Callable
    flags: frozenset[str]

    @property
    def name(self):
        return self.make.__name__


CONSTRUCTS: dict[str, list[Construct]] = {}


def register(kind):
    """The decorator, with flags, of the registry ``kind``; its first entry is the plain one."""
    entries = CONSTRUCTS.setdefault(kind, [])

    def with_flags(*flags):
        def decorate(make):
            entries.append(Construct(make, frozenset(flags)))
            return make

        return decorate

    return with_flags


weights = register("weight")
products = register("product")
biases = register("bias")
blocks = register("block")
sequence_blocks = register("sequence block")
wrappers = register("wrapper")
stems = register("features stem")
sequence_stems = register("sequence stem")
pools = register("pool")
endings = register("ending")
extras = register("extra")
heads = register("head")
weightings = register("weighting")


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a block stands: its inputs are (..., width), or (..., length, width) in a sequence."""

    width: int
    length: int | None = None  # of the time axis, where there is one
    batched: bool = True  # whether the example axis is in sight, first

    @property
    def sequence(self):
        return self.length is not None

    def has(self, flags):
        return (self.batched or "batched" not in flags) and (
            self.sequence or "sequence" not in flags
        )


class Choices:
    """Draws constructs from the deck of each kind; an empty deck gives the plain one.

    Attributes:
      depth: how many wrappers may still come.
      flags: those of the constructs drawn so far.
    """

    def __init__(self, rng, decks, depth=2):
        self.rng, self.depth, self.flags = rng, depth, set()
        self._decks = {kind: list(deck) for kind, deck in decks.items()}
        self._met = set()

    def pick(self, kind, site=None):
        """The first construct of the deck that fits the site."""
        deck = self._decks.get(kind, [])
        fitting = [entry for entry in deck if site is None or site.has(entry.flags)]
        chosen = fitting[0] if fitting else CONSTRUCTS[kind][0]
        if fitting:
            deck.remove(chosen)
        self._met.add(kind)
        self.flags |= chosen.flags
        return chosen

    def wants(self, kind, site, probability):
        """Whether to draw from this deck: the first time always, and then as often as told."""
        possible = any(site.has(entry.flags) for entry in self._decks.get(kind, []))
        return possible and (kind not in self._met or self.rng.random() < probability)

    def dense(self, site, outputs):
        """A dense layer: a weight, its product with the inputs, and a bias."""
        weight, product, bias = (self.pick(kind, site) for kind in ("weight", "product", "bias"))
        w, matrix = weight.make(self.rng, site.width, outputs)
        b, shifted = bias.make(self.rng, site, outputs)
        apply = lambda p, x: shifted(p["b"], product.make(x, matrix(p["w"])))
        return Piece({"w": w, "b": b}, apply, f"{weight.name}, {product.name}, {bias.name}")

    def block(self, site, outputs):
        """Any block (..., width) -> (..., outputs), maybe inside a wrapper."""
        kind = "block"
        if self.depth and self.wants("wrapper", site, 0.3):
            self.depth -= 1
            kind = "wrapper"
        elif site.sequence and self.wants("sequence block", site, 0.4):
            kind = "sequence block"
        construct = self.pick(kind, site)
        made = construct.make(self, site, outputs)
        if not isinstance(made, Piece):
            return Piece(*made, construct.name)
        return dataclasses.replace(made, text=f"{construct.name}[{made.text}]")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a model: its parameters and what it does with them and its inputs."""

    params: Any
    apply: Callable
    text: str


def draw(rng, *shape):
    """Parameters, scaled by the fan-in: the product of all axes but the last."""
    return rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1])))


def mask_like(rng, *shape):
    """Of zeros and ones, with at least a one."""
    mask = rng.integers(0, 2, shape).astype(float)
    mask[(0,) * len(shape)] = 1
    return mask


# --- Weights: (rng, inputs, outputs) -> parameters, and the (inputs, outputs) matrix of them ------


@weights()
def plain(rng, i, o):
    return draw(rng, i, o), lambda w: w


@weights()
def transposed(rng, i, o):
    return draw(rng, o, i), lambda w: w.T


@weights()
def reshaped(rng, i, o):
    return draw(rng, i * o), lambda w: w.reshape(i, o)


@weights()
def reshaped_with_dimensions(rng, i, o):
    return draw(rng, o, i), lambda w: lax.reshape(w, (i, o), dimensions=(1, 0))


@weights()
def reshaped_with_dimensions_to_other_axes(rng, i, o):
    return draw(rng, o, i, 2), lambda w: lax.reshape(w, (i, 2 * o), dimensions=(1, 2, 0))[:, :o]


@weights()
def squeezed(rng, i, o):
    return draw(rng, 1, i, 1, o), lambda w: jnp.squeeze(w, (0, 2))


@weights()
def moved_axes(rng, i, o):
    return draw(rng, o, 2, i), lambda w: jnp.moveaxis(w, 0, -1)[1]


@weights()
def expanded_and_merged(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.expand_dims(w, (0, 2)).reshape(i, o)


@weights()
def sliced(rng, i, o):
    return draw(rng, i + 1, o + 2), lambda w: w[1:, :o]


@weights()
def sliced_with_strides(rng, i, o):
    return draw(rng, 2 * i, o), lambda w: w[::2]


@weights()
def sliced_backwards(rng, i, o):
    return draw(rng, 2 * i, o), lambda w: w[::-2]


@weights()
def dynamically_sliced(rng, i, o):
    return draw(rng, i + 1, o), lambda w: lax.dynamic_slice(w, (1, 0), (i, o))


@weights()
def indexed(rng, i, o):
    return draw(rng, 3, i, o), lambda w: w[-1]


@weights()
def concatenated(rng, i, o):
    params = {"first": draw(rng, 1, o), "rest": draw(rng, i, o)[1:]}
    return params, lambda w: jnp.concatenate([w["first"], w["rest"]])


@weights()
def concatenated_with_constants(rng, i, o):
    constants = draw(rng, i, 1)
    return draw(rng, i, o)[:, 1:], lambda w: jnp.concatenate([constants, w], axis=1)


@weights()
def concatenated_across_rows(rng, i, o):
    cut = max(1, i * o // 2 - 1)
    flat = draw(rng, i * o)
    params = {"first": flat[:cut], "rest": flat[cut:]}
    return params, lambda w: jnp.concatenate([w["first"], w["rest"]]).reshape(i, o)


@weights("shares")
def concatenated_with_itself(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.concatenate([w, w], axis=1)[:, 1 : o + 1]


@weights()
def padded(rng, i, o):
    return draw(rng, i, o)[1:], lambda w: jnp.pad(w, ((1, 0), (0, 0)))


@weights()
def padded_inside(rng, i, o):
    return draw(rng, i, o), lambda w: lax.pad(w, 0.5, ((0, 0, 1), (0, 0, 0)))[:i]


@weights()
def padded_negatively(rng, i, o):
    return draw(rng, i, o + 2), lambda w: lax.pad(w, 0.0, ((0, 0, 0), (-1, -1, 0)))


@weights("shares")
def padded_by_reflection(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.pad(w, ((1, 0), (0, 0)), mode="edge")[:i]


@weights()
def reversed_rows(rng, i, o):
    return draw(rng, i, o), lambda w: w[::-1]


@weights()
def flipped_both_ways(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.flip(w)


@weights()
def rolled(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.roll(w, 1, axis=0)


@weights("shares")
def tiled(rng, i, o):
    return draw(rng, i, 1), lambda w: jnp.tile(w, (1, o))


@weights("shares")
def tiled_twice(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.tile(w, (2, 1))[i // 2 : i // 2 + i]


@weights("shares")
def repeated(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.repeat(w, 2, axis=1)[:, :o]


@weights("shares")
def broadcast_rows(rng, i, o):
    return draw(rng, o), lambda w: jnp.broadcast_to(w, (i, o))


@weights()
def stacked_rows(rng, i, o):
    return [draw(rng, o) for _ in range(i)], jnp.stack


@weights()
def unstacked_columns(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.stack(jnp.unstack(w, axis=1), axis=1)


@weights()
def split_in_halves(rng, i, o):
    return draw(rng, i, 2 * o), lambda w: jnp.subtract(*jnp.split(w, 2, axis=1))


@weights()
def permuted_rows(rng, i, o):
    order = rng.permutation(i)
    return draw(rng, i, o), lambda w: w[order]


@weights("shares")
def rows_taken_twice(rng, i, o):
    return draw(rng, i, o), lambda w: w[np.arange(i) // 2]


@weights()
def columns_taken(rng, i, o):
    return draw(rng, i, o + 1), lambda w: jnp.take(w, np.arange(o)[::-1], axis=1)


@weights()
def set_into_zeros(rng, i, o):
    return draw(rng, i, o)[:, 1:], lambda w: jnp.zeros((i, o)).at[:, 1:].set(w)


@weights()
def column_replaced(rng, i, o):
    params = {"matrix": draw(rng, i, o), "column": draw(rng, i)}
    return params, lambda w: w["matrix"].at[:, 0].set(w["column"])


@weights()
def added_to_an_entry(rng, i, o):
    params = {"matrix": draw(rng, i, o), "entry": draw(rng)}
    return params, lambda w: w["matrix"].at[0, 0].add(w["entry"])


@weights()
def triangular(rng, i, o):
    rows, columns = np.tril_indices(i, 0, o)
    return draw(rng, rows.size), lambda w: jnp.zeros((i, o)).at[rows, columns].set(w)


@weights()
def tril_of_a_matrix(rng, i, o):
    return draw(rng, i, o), jnp.tril


@weights()
def diagonal(rng, i, o):
    return draw(rng, i), lambda w: w[:, None] * jnp.eye(i, o)


@weights()
def masked(rng, i, o):
    mask = mask_like(rng, i, o)
    return draw(rng, i, o), lambda w: w * mask


@weights()
def masked_by_where(rng, i, o):
    mask = mask_like(rng, i, o) > 0
    return draw(rng, i, o), lambda w: jnp.where(mask, w, 0.0)


@weights()
def masked_after_transposition(rng, i, o):
    mask = mask_like(rng, i, o)
    return draw(rng, o, i), lambda w: w.T * mask


@weights()
def scaled_by_constants(rng, i, o):
    return draw(rng, i, o), lambda w: -2 * w / 3 + 0.1


@weights()
def scaled_row_by_row(rng, i, o):
    scales = draw(rng, i, 1)
    return draw(rng, i, o), lambda w: w * scales


@weights()
def normalised(rng, i, o):
    params = {"g": draw(rng, o), "v": draw(rng, i, o)}
    return params, lambda w: w["g"] * w["v"] / jnp.linalg.norm(w["v"], axis=0)


@weights()
def low_rank_adapted(rng, i, o):
    params = {"w": draw(rng, i, o), "a": draw(rng, i, 1), "b": draw(rng, 1, o)}
    return params, lambda w: w["w"] + w["a"] @ w["b"]


@weights()
def frozen_and_adapted(rng, i, o):
    params = {"w": draw(rng, i, o), "a": draw(rng, i, 1), "b": draw(rng, 1, o)}
    return params, lambda w: lax.stop_gradient(w["w"]) + w["a"] @ w["b"]


@weights()
def outer_product(rng, i, o):
    params = {"u": draw(rng, i), "v": draw(rng, o)}
    return params, lambda w: w["u"][:, None] * w["v"]


@weights()
def times_a_scalar_parameter(rng, i, o):
    params = {"w": draw(rng, i, o), "scale": draw(rng)}
    return params, lambda w: w["w"] * w["scale"]


@weights()
def sum_of_two(rng, i, o):
    return [draw(rng, i, o), draw(rng, i, o)], lambda w: w[0] + w[1]


@weights()
def mean_of_a_stack(rng, i, o):
    return draw(rng, 2, i, o), lambda w: w.mean(0)


@weights("shares")
def plus_its_reverse(rng, i, o):
    return draw(rng, i, o), lambda w: w + w[::-1]


@weights()
def in_a_fixed_basis(rng, i, o):
    basis = draw(rng, i, 2)
    return draw(rng, 2, o), lambda w: basis @ w


@weights("shares")
def accumulated(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.cumsum(w, axis=0)


@weights()
def positive(rng, i, o):
    return draw(rng, i, o), jax.nn.softplus


@weights()
def row_stochastic(rng, i, o):
    return draw(rng, i, o), lambda w: jax.nn.softmax(w, axis=0)


@weights()
def sorted_columns(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.sort(w, axis=1)


@weights("single")
def cast_to_single_and_back(rng, i, o):
    return draw(rng, i, o), lambda w: w.astype(jnp.float32).astype(jnp.float64)


@weights()
def plus_a_rounded_one(rng, i, o):
    params = {"w": draw(rng, i, o), "rounded": draw(rng, i, o)}
    return params, lambda w: w["w"] + jnp.round(w["rounded"])


@weights()
def plus_an_integer_one(rng, i, o):
    params = {"w": draw(rng, i, o), "cast": draw(rng, i, o)}
    return params, lambda w: w["w"] + w["cast"].astype(jnp.int32).astype(jnp.float64)


@weights()
def rounded(rng, i, o):
    return 2 * draw(rng, i, o), lambda w: jnp.round(w) / 2


@weights()
def cast_to_integers(rng, i, o):
    return 2 * draw(rng, i, o), lambda w: w.astype(jnp.int32).astype(jnp.float64)


@weights()
def gated_by_a_sign(rng, i, o):
    params = {"w": draw(rng, i, o), "gate": draw(rng, i, o)}
    return params, lambda w: w["w"] * (w["gate"] > 0)


@weights("shares")
def pruned_by_its_size(rng, i, o):
    return draw(rng, i, o), lambda w: jnp.where(jnp.abs(w) > 0.2, w, 0.0)


@weights()
def stopped(rng, i, o):
    params = {"w": draw(rng, i, o), "stopped": draw(rng, i, o)}
    return params, lambda w: w["w"] + lax.stop_gradient(w["stopped"])


@weights()
def straight_through(rng, i, o):
    return draw(rng, i, o), lambda w: w + lax.stop_gradient(jnp.round(w) - w)


@jax.custom_vjp
def quantised(w):
    return jnp.round(2 * w) / 2


quantised.defvjp(lambda w: (quantised(w), None), lambda _, g: (g,))


@weights()
def straight_through_by_custom_vjp(rng, i, o):
    return draw(rng, i, o), quantised


@jax.custom_jvp
def quantised_forward(w):
    return jnp.round(2 * w) / 2


quantised_forward.defjvp(lambda p, t: (quantised_forward(*p), *t))


@weights()
def straight_through_by_custom_jvp(rng, i, o):
    return draw(rng, i, o), quantised_forward


@jax.custom_vjp
def halved_gradient(x):
    return x


halved_gradient.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@weights()
def identity_with_halved_gradient(rng, i, o):
    return draw(rng, i, o), halved_gradient


@weights()
def named_for_a_policy(rng, i, o):
    return draw(rng, i, o), lambda w: checkpoint_name(w, "w")


@weights()
def selected_by_a_constant(rng, i, o):
    return [draw(rng, i, o), draw(rng, i, o)], lambda w: lax.select(np.array(True), w[0], w[1])


@weights()
def under_a_barrier(rng, i, o):
    return draw(rng, i, o), lax.optimization_barrier


@weights()
def inverted(rng, i, o):
    return draw(rng, i, i), lambda w: jnp.linalg.inv(np.eye(i) + 0.3 * w) @ np.eye(i, o)


# --- Products: (x (..., inputs), matrix) -> (..., outputs) ---------------------------------------


@products()
def matmul(x, w):
    return x @ w


@products()
def einsum_of_the_transpose(x, w):
    return jnp.einsum("oi,...i->...o", w.T, x)


@products()
def weight_on_the_left(x, w):
    return jnp.moveaxis(lax.dot_general(w, x, (((0,), (x.ndim - 1,)), ((), ()))), 0, -1)


@products()
def tensordot(x, w):
    return jnp.tensordot(x, w, axes=1)


@products()
def sum_of_elementwise_products(x, w):
    return (x[..., None] * w).sum(-2)


@products()
def vmapped_matvec(x, w):
    return jnp.vectorize(lambda x: w.T @ x, signature="(i)->(o)")(x)


@products()
def weight_repeated_for_each_row(x, w):
    repeated = jnp.broadcast_to(w, (*x.shape[:-1], *w.shape))
    return jnp.einsum("...i,...io->...o", x, repeated)


@products()
def inputs_split_in_two(x, w):
    return x[..., :1] @ w[:1] + x[..., 1:] @ w[1:]


@products()
def outputs_one_by_one(x, w):
    return jnp.stack([x @ w[:, j] for j in range(w.shape[1])], axis=-1)


@products()
def outputs_in_two_parts(x, w):
    return jnp.concatenate([x @ w[:, :1], x @ w[:, 1:]], axis=-1)


@products("shares")
def used_twice(x, w):
    return x @ w + jnp.sin(x) @ w


@products("shares")
def used_by_both_branches_of_a_cond(x, w):
    predicate = jnp.sum(lax.stop_gradient(w)) > 0
    return lax.cond(predicate, lambda: x @ w, lambda: jnp.sin(x) @ w)


@products("shares")
def minus_a_dense_layer_without_inputs(x, w):
    return x @ w - w.sum(0)


@products()
def loop_over_the_inputs(x, w):
    def add(i, y):
        column = lax.dynamic_index_in_dim(x, i, x.ndim - 1)
        return y + column * lax.dynamic_index_in_dim(w, i, 0, keepdims=False)

    return lax.fori_loop(0, w.shape[0], add, jnp.zeros((*x.shape[:-1], w.shape[1])))


@products()
def scan_over_the_rows(x, w):
    step = lambda y, row: (y + row[0][..., None] * row[1], None)
    zero = jnp.zeros((*x.shape[:-1], w.shape[1]))
    return lax.scan(step, zero, (jnp.moveaxis(x, -1, 0), w))[0]


@products()
def scan_over_the_columns(x, w):
    return jnp.moveaxis(lax.scan(lambda _, column: (None, x @ column), None, w.T)[1], 0, -1)


@products()
def mapped_over_the_columns(x, w):
    return jnp.moveaxis(lax.map(lambda column: x @ column, w.T), 0, -1)


@products()
def one_by_one_convolution(x, w):
    rows = x.reshape(-1, 1, x.shape[-1])
    y = lax.conv_general_dilated(
        rows, w[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y.reshape(*x.shape[:-1], w.shape[1])


@products()
def convolution_as_long_as_its_input(x, w):
    rows = x.reshape(-1, 1, x.shape[-1])
    y = lax.conv_general_dilated(rows, w.T[:, None], (1,), "VALID")
    return y.reshape(*x.shape[:-1], w.shape[1])


@jax.custom_jvp
def product_with_its_own_jvp(x, w):
    return x @ w


product_with_its_own_jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


@products()
def custom_jvp_of_its_body(x, w):
    return product_with_its_own_jvp(x, w)


def pull_product(residuals, cotangent):
    x, w = residuals
    return cotangent @ w.T, x.reshape(-1, w.shape[0]).T @ cotangent.reshape(-1, w.shape[1])


@jax.custom_vjp
def product_with_its_own_vjp(x, w):
    return x @ w


product_with_its_own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), pull_product)


@products()
def custom_vjp_of_its_body(x, w):
    return product_with_its_own_vjp(x, w)


@jax.custom_vjp
def rounded_product(x, w):
    return x @ jnp.round(2 * w)


rounded_product.defvjp(lambda x, w: (rounded_product(x, w), (x, w)), pull_product)


@products()
def custom_vjp_of_another_function(x, w):
    return rounded_product(x, w)


@products("single")
def accumulated_in_single(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(jnp.float64)


@products("single")
def computed_in_single(x, w):
    return (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(jnp.float64)


@products()
def of_an_inner_jit(x, w):
    return jax.jit(jnp.matmul)(x, w)


@products()
def solved_for(x, w):
    return jnp.linalg.solve(np.eye(w.shape[0]) + 0.1 * w @ w.T, x[..., None])[..., 0] @ w


# --- Biases: (rng, site, outputs) -> parameters, and what they do to (..., outputs) --------------


@biases()
def added(rng, site, o):
    return draw(rng, o), lambda b, y: y + b


@biases()
def no_bias(rng, site, o):
    return None, lambda b, y: y


@biases()
def subtracted(rng, site, o):
    return draw(rng, o), lambda b, y: y - b


@biases()
def subtracted_from(rng, site, o):
    return draw(rng, o), lambda b, y: b - y


@biases()
def cut_from_a_joint_vector(rng, site, o):
    return draw(rng, o + 2), lambda b, y: y + b[1:-1]


@biases()
def two_cut_from_one_vector(rng, site, o):
    return draw(rng, 2 * o), lambda b, y: (1 + b[:o]) * y + b[o:]


@biases("shares")
def overlapping_cuts_of_one_vector(rng, site, o):
    return draw(rng, o + 1), lambda b, y: (1 + b[:-1]) * y + b[1:]


@biases("shares")
def one_for_all_outputs(rng, site, o):
    return draw(rng), lambda b, y: y + b


@biases()
def of_shape_one(rng, site, o):
    return draw(rng, 1), lambda b, y: y + b


@biases()
def broadcast_by_hand(rng, site, o):
    return draw(rng, o), lambda b, y: y + jnp.broadcast_to(b, y.shape)


@biases()
def tiled_over_the_rows(rng, site, o):
    return draw(rng, o), lambda b, y: y + jnp.tile(b, (*y.shape[:-1], 1))


@biases()
def times_a_mask(rng, site, o):
    mask = mask_like(rng, o)
    return draw(rng, o), lambda b, y: y + b * mask


@biases()
def times_a_number(rng, site, o):
    return draw(rng, o), lambda b, y: y + 0.1 * b


@biases()
def times_an_array_over_the_batch(rng, site, o):
    return draw(rng, o), lambda b, y: y + jnp.linspace(0, 1, y.size).reshape(y.shape) * b


@biases("shares")
def added_twice(rng, site, o):
    return draw(rng, o), lambda b, y: jnp.tanh(y + b) + b


@biases()
def sum_of_two_biases(rng, site, o):
    return [draw(rng, o), draw(rng, o)], lambda b, y: y + (b[0] + b[1])


@biases()
def two_in_a_row(rng, site, o):
    return [draw(rng, o), draw(rng, o)], lambda b, y: y + b[0] + b[1]


@biases()
def concatenated_of_two(rng, site, o):
    return [draw(rng, 1), draw(rng, o)[1:]], lambda b, y: y + jnp.concatenate(b)


@biases()
def of_one_output_only(rng, site, o):
    return draw(rng), lambda b, y: y.at[..., 0].add(b)


@biases()
def set_as_one_output(rng, site, o):
    return draw(rng), lambda b, y: y.at[..., 0].set(b)


@biases()
def scale(rng, site, o):
    return draw(rng, o), lambda b, y: y * b


@biases()
def scale_and_shift(rng, site, o):
    return {"scale": draw(rng, o), "shift": draw(rng, o)}, lambda b, y: y * b["scale"] + b["shift"]


@biases("shares")
def scale_used_twice(rng, site, o):
    return draw(rng, o), lambda b, y: jnp.tanh(y * b) * b


@biases("shares")
def both_scale_and_shift(rng, site, o):
    return draw(rng, o), lambda b, y: y * b + b


@biases("shares")
def scalar_scale(rng, site, o):
    return draw(rng), lambda b, y: y * b


@biases("shares")
def temperature(rng, site, o):
    return draw(rng), lambda b, y: y / (1 + b**2)


@biases("shares")
def log_temperature(rng, site, o):
    return draw(rng), lambda b, y: y * jnp.exp(b)


@biases()
def divided_by(rng, site, o):
    return 2 + 0.1 * draw(rng, o), lambda b, y: y / b


@biases("shares")
def scalar_slope_of_the_negative_part(rng, site, o):
    return draw(rng), lambda b, y: jnp.where(y > 0, y, b * y)


@biases()
def slope_of_the_negative_part(rng, site, o):
    return draw(rng, o), lambda b, y: jnp.maximum(y, 0) + b * jnp.minimum(y, 0)


@biases()
def lower_bound(rng, site, o):
    return draw(rng, o), jnp.maximum


@biases()
def in_a_logaddexp(rng, site, o):
    return draw(rng, o), lambda b, y: jnp.logaddexp(y, b)


@biases()
def exponent(rng, site, o):
    return 1 + 0.1 * draw(rng, o), lambda b, y: jnp.exp(0.1 * y) ** b


@biases("single")
def in_single(rng, site, o):
    return draw(rng, o), lambda b, y: y + b.astype(jnp.float32).astype(jnp.float64)


@biases()
def plus_a_rounded_bias(rng, site, o):
    return [draw(rng, o), 2 * draw(rng, o)], lambda b, y: y + b[0] + jnp.round(b[1])


@biases()
def for_each_time_step(rng, site, o):
    shape = (site.length, o) if site.sequence else (o,)
    return draw(rng, *shape), lambda b, y: y + b


@biases()
def column_for_each_time_step(rng, site, o):
    shape = (site.length, 1) if site.sequence else (1,)
    return draw(rng, *shape), lambda b, y: y + b


@biases()
def added_by_vmap_over_the_outputs(rng, site, o):
    return draw(rng, o), lambda b, y: jax.vmap(jnp.add, in_axes=(-1, 0), out_axes=-1)(y, b)


@biases()
def added_after_a_reshape(rng, site, o):
    return draw(rng, o), lambda b, y: (y.reshape(-1, 1, o) + b).reshape(y.shape)


@biases()
def added_with_the_outputs_first(rng, site, o):
    return draw(rng, o, 1), lambda b, y: (y.reshape(-1, o).T + b).T.reshape(y.shape)


# --- Blocks: (choices, site, outputs) -> parameters and (..., width) -> (..., outputs) -----------


@blocks()
def dense(choices, site, outputs):
    return choices.dense(site, outputs)


@blocks()
def dense_and_tanh(choices, site, outputs):
    piece = choices.dense(site, outputs)
    return dataclasses.replace(piece, apply=lambda p, x: jnp.tanh(piece.apply(p, x)))


@blocks()
def residual(choices, site, outputs):
    skip, piece = draw(choices.rng, site.width, outputs), choices.dense(site, outputs)
    apply = lambda p, x: x @ p["skip"] + jax.nn.gelu(piece.apply(p["inner"], x))
    return Piece({"skip": skip, "inner": piece.params}, apply, piece.text)


@blocks()
def gated(choices, site, outputs):
    first, second = choices.dense(site, outputs), choices.dense(site, outputs)
    apply = lambda p, x: jax.nn.sigmoid(first.apply(p[0], x)) * second.apply(p[1], x)
    return Piece([first.params, second.params], apply, f"{first.text}; {second.text}")


@blocks()
def dense_relu_dense(choices, site, outputs):
    first = choices.dense(site, 2)
    second = choices.dense(dataclasses.replace(site, width=2), outputs)
    apply = lambda p, x: second.apply(p[1], jax.nn.relu(first.apply(p[0], x)))
    return Piece([first.params, second.params], apply, f"{first.text}; {second.text}")


@blocks("shares")
def tied_to_its_transpose(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, 2), "out": draw(choices.rng, site.width, outputs)}
    return params, lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["out"]


@blocks("shares")
def one_layer_twice(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, site.width), "b": draw(choices.rng, site.width)}
    layer = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    out = np.eye(site.width, outputs)
    return params, lambda p, x: layer(p, layer(p, x)) @ out


@blocks()
def several_axes_of_features(choices, site, outputs):
    rng, width = choices.rng, site.width
    params = {"in": draw(rng, width, 2, 2), "b": draw(rng, 2, 2), "out": draw(rng, 2, 2, outputs)}

    def apply(p, x):
        h = jnp.tanh(jnp.einsum("...i,iab->...ab", x, p["in"]) + p["b"])
        return jnp.einsum("...ab,abo->...o", h, p["out"])

    return params, apply


@blocks()
def per_head_weights(choices, site, outputs):
    rng, width = choices.rng, site.width
    params = {"in": draw(rng, width, 2, 2), "mix": draw(rng, 2, 2, 2), "b": draw(rng, 2, 2)}
    out = draw(rng, 4, outputs)

    def apply(p, x):
        h = jnp.einsum("...i,iha->...ha", x, p["in"])
        h = jnp.tanh(jnp.einsum("...ha,hab->...hb", h, p["mix"]) + p["b"])
        return h.reshape(*x.shape[:-1], 4) @ out

    return params, apply


@blocks()
def grouped_dense(choices, site, outputs):
    rng, width = choices.rng, site.width
    params = {"w": draw(rng, width, 1, 2), "b": draw(rng, width, 2)}
    out = draw(rng, 2 * width, outputs)

    def apply(p, x):
        h = jax.vmap(jnp.matmul, in_axes=(-2, 0), out_axes=-2)(x[..., None], p["w"]) + p["b"]
        return jnp.tanh(h).reshape(*x.shape[:-1], 2 * width) @ out

    return params, apply


@blocks()
def bilinear(choices, site, outputs):
    params = draw(choices.rng, site.width, site.width, outputs)
    return params, lambda w, x: jnp.einsum("...i,ijo,...j->...o", x, w, x)


@blocks()
def layer_norm(choices, site, outputs):
    rng = choices.rng
    params = {"scale": 1 + draw(rng, site.width), "bias": draw(rng, site.width)}
    out = draw(rng, site.width, outputs)

    def apply(p, x):
        centred = x - x.mean(-1, keepdims=True)
        h = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-2)
        return (p["scale"] * h + p["bias"]) @ out

    return params, apply


@blocks("batched")
def batch_norm_in_training(choices, site, outputs):
    rng = choices.rng
    params = {"scale": 1 + draw(rng, site.width), "bias": draw(rng, site.width)}
    out = draw(rng, site.width, outputs)
    apply = lambda p, x: (p["scale"] * (x - x.mean(0)) / (x.std(0) + 0.1) + p["bias"]) @ out
    return params, apply


@blocks("batched")
def attention_between_examples(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, outputs)}

    def apply(p, x):
        scores = jnp.einsum("b...d,c...d->bc", x, x)
        return jnp.einsum("bc,c...o->b...o", jax.nn.softmax(scores), x @ p["w"])

    return params, apply


@blocks("batched")
def neighbour_along_the_batch(choices, site, outputs):
    params = draw(choices.rng, site.width, outputs)
    return params, lambda w, x: (x + jnp.roll(x, 1, axis=0)) @ w


@blocks("batched")
def statistics_of_the_batch_as_constants(choices, site, outputs):
    params = draw(choices.rng, site.width, outputs)
    return params, lambda w, x: (x - lax.stop_gradient(x.mean(0))) @ w


@blocks("batched")
def sorted_and_unsorted_examples(choices, site, outputs):
    params = draw(choices.rng, site.width, outputs)

    def apply(w, x):
        order = jnp.argsort(x.reshape(x.shape[0], -1)[:, 0])
        return jnp.zeros((*x.shape[:-1], outputs)).at[order].set(x[order] @ w)

    return params, apply


@blocks()
def routed_to_experts(choices, site, outputs):
    rng = choices.rng
    params = {"gate": draw(rng, site.width, 2), "experts": draw(rng, 2, site.width, outputs)}

    def apply(p, x):
        gate = jax.nn.softmax(x @ p["gate"])
        chosen = gate.argmax(-1)
        y = jnp.einsum("...i,...io->...o", x, p["experts"][chosen])
        return y * jnp.take_along_axis(gate, chosen[..., None], axis=-1)

    return params, apply


@blocks()
def mixture_of_all_experts(choices, site, outputs):
    rng = choices.rng
    params = {"gate": draw(rng, site.width, 2), "experts": draw(rng, 2, site.width, outputs)}

    def apply(p, x):
        gate = jax.nn.softmax(x @ p["gate"])
        return jnp.einsum("...e,...i,eio->...o", gate, x, p["experts"])

    return params, apply


def bucket(x, size):
    """A whole number below ``size`` for each row of features."""
    return jnp.floor(jnp.abs(7 * x.sum(-1))).astype(jnp.int32) % size


@blocks()
def lookup_by_a_rounded_feature(choices, site, outputs):
    params = draw(choices.rng, 3, outputs)
    return params, lambda table, x: table[bucket(x, 3)] + x.mean(-1, keepdims=True)


@blocks("shares")
def tied_lookup(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, 2), "table": draw(choices.rng, outputs, 2)}

    def apply(p, x):
        return jnp.tanh(p["table"][bucket(x, outputs)] + x @ p["w"]) @ p["table"].T

    return params, apply


@blocks()
def one_hot_rows(choices, site, outputs):
    params = draw(choices.rng, 3, outputs)
    return params, lambda table, x: jax.nn.one_hot(bucket(x, 3), 3) @ table + x.mean(-1)[..., None]


@blocks("shares")
def entries_by_two_indices(choices, site, outputs):
    params = draw(choices.rng, 3, outputs)
    columns = np.arange(outputs)
    return params, lambda table, x: table[bucket(x, 3)[..., None], columns] * x[..., :1]


@blocks("shares")
def columns_by_a_rounded_feature(choices, site, outputs):
    params = draw(choices.rng, 2, outputs)
    return (
        params,
        lambda table, x: (
            jnp.moveaxis(table[:, bucket(x, outputs)], 0, -1).sum(-1, keepdims=True)
            + x @ np.eye(site.width, outputs)
        ),
    )


@blocks()
def dynamic_slice_at_a_feature(choices, site, outputs):
    params = draw(choices.rng, outputs + 2)

    def row(w, x):
        return lax.dynamic_slice(w, (bucket(x, 3),), (outputs,)) + x.mean()

    return params, lambda w, x: jnp.vectorize(functools.partial(row, w), signature="(i)->(o)")(x)


@blocks()
def sign_activation_straight_through(choices, site, outputs):
    piece = choices.dense(site, outputs)
    apply = lambda p, x: quantised(jnp.tanh(piece.apply(p, x)))
    return Piece(piece.params, apply, piece.text)


@blocks()
def halved_gradient_activation(choices, site, outputs):
    piece = choices.dense(site, outputs)
    apply = lambda p, x: halved_gradient(jnp.tanh(piece.apply(p, x)))
    return Piece(piece.params, apply, piece.text)


@blocks()
def hard_threshold(choices, site, outputs):
    piece = choices.dense(site, outputs)

    def apply(p, x):
        y = piece.apply(p, x)
        return y * (y > 0) + 0.1 * jnp.round(y)

    return Piece(piece.params, apply, piece.text)


@blocks("single")
def activations_in_single(choices, site, outputs):
    piece = choices.dense(site, outputs)
    apply = lambda p, x: jnp.tanh(piece.apply(p, x).astype(jnp.float32)).astype(jnp.float64)
    return Piece(piece.params, apply, piece.text)


@blocks()
def dropout(choices, site, outputs):
    piece = choices.dense(site, outputs)

    def apply(p, x):
        y = piece.apply(p, x)
        return jnp.where(jax.random.bernoulli(jax.random.key(3), 0.7, y.shape), y / 0.7, 0)

    return Piece(piece.params, apply, piece.text)


@blocks("shares")
def gradient_of_an_energy(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, 3), "out": draw(choices.rng, site.width, outputs)}
    energy = lambda x, w: jnp.sum(jnp.tanh(x @ w))
    return params, lambda p, x: jax.grad(energy)(x, p["w"]) @ p["out"]


@blocks("shares")
def derivative_along_a_direction(choices, site, outputs):
    params = draw(choices.rng, site.width, outputs)
    return params, lambda w, x: jax.jvp(lambda x: jnp.tanh(x @ w), (x,), (jnp.ones_like(x),))[1]


@blocks()
def matrix_exponential(choices, site, outputs):
    params = 0.3 * draw(choices.rng, site.width, site.width)
    out = draw(choices.rng, site.width, outputs)
    return params, lambda w, x: x @ jax.scipy.linalg.expm(w) @ out


@blocks("no reverse")
def while_loop_over_a_parameter(choices, site, outputs):
    params = draw(choices.rng, site.width, site.width)
    out = draw(choices.rng, site.width, outputs)

    def apply(w, x):
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ w))
        return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1] @ out

    return params, apply


@blocks()
def while_loop_over_the_inputs(choices, site, outputs):
    params = draw(choices.rng, site.width, outputs)

    def apply(w, x):
        halve = lambda x: x / 2
        small = lax.while_loop(lambda x: jnp.abs(x).max() > 1, halve, lax.stop_gradient(x))
        return (x + small) @ w

    return params, apply


@blocks()
def custom_root(choices, site, outputs):
    """A layer defined by an equation, differentiated implicitly."""
    params = {"w": 0.3 * draw(choices.rng, site.width, site.width)}
    out = draw(choices.rng, site.width, outputs)

    def apply(p, x):
        equation = lambda z: z - jnp.tanh(0.5 * z @ p["w"] + x)
        iterate = lambda f, z: lax.fori_loop(0, 60, lambda _, z: z - f(z), z)
        matrix = lambda g, y: jax.jacobian(lambda v: g(v.reshape(y.shape)).ravel())(
            jnp.zeros(y.size)
        )
        solve = lambda g, y: jnp.linalg.solve(matrix(g, y), y.ravel()).reshape(y.shape)
        return lax.custom_root(equation, jnp.zeros_like(x), iterate, solve) @ out

    return params, apply


@blocks("shares")
def convolution_along_the_features(choices, site, outputs):
    params = {"kernel": draw(choices.rng, 2), "out": draw(choices.rng, site.width, outputs)}
    convolve = lambda x, k: jnp.convolve(x, k, mode="same")
    vectorized = jnp.vectorize(convolve, signature="(i),(k)->(i)")
    return params, lambda p, x: jnp.tanh(vectorized(x, p["kernel"])) @ p["out"]


@blocks()
def intercept_only(choices, site, outputs):
    params = draw(choices.rng, outputs)
    return params, lambda b, x: jnp.broadcast_to(b, (*x.shape[:-1], outputs))


@blocks()
def intercept_by_a_product_with_ones(choices, site, outputs):
    params = draw(choices.rng, 1, outputs)
    return params, lambda b, x: jnp.ones((*x.shape[:-1], 1)) @ b


@blocks("shares")
def learned_basis_functions(choices, site, outputs):
    params = {"centres": draw(choices.rng, 3, site.width), "out": draw(choices.rng, 3, outputs)}

    def apply(p, x):
        distances = jnp.square(x[..., None, :] - p["centres"]).sum(-1)
        return jnp.exp(-distances) @ p["out"]

    return params, apply


@blocks()
def hypernetwork(choices, site, outputs):
    params = draw(choices.rng, site.width, site.width * outputs)

    def apply(w, x):
        matrix = (x @ w).reshape(*x.shape[:-1], site.width, outputs)
        return jnp.einsum("...i,...io->...o", x, matrix)

    return params, apply


# --- Blocks with a time axis: (..., length, width) -> (..., length, outputs) ---------------------


@sequence_blocks()
def dense_of_each_step(choices, site, outputs):
    return choices.dense(site, outputs)


def attend(q, k, v):
    """Causal, on (..., T, D)."""
    scores = jnp.einsum("...qd,...kd->...qk", q, k)
    causal = np.tril(np.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v


@sequence_blocks("shares", "sequence")
def causal_attention(choices, site, outputs):
    rng, width = choices.rng, site.width
    params = {"q": draw(rng, width, 2), "k": draw(rng, width, 2), "v": draw(rng, width, outputs)}
    return params, lambda p, x: attend(x @ p["q"], x @ p["k"], x @ p["v"])


@sequence_blocks("shares", "sequence")
def attention_with_joint_weights(choices, site, outputs):
    params = {"qkv": draw(choices.rng, site.width, 6), "out": draw(choices.rng, 2, outputs)}
    return params, lambda p, x: attend(*jnp.split(x @ p["qkv"], 3, axis=-1)) @ p["out"]


@sequence_blocks("shares", "sequence")
def attention_with_stacked_weights(choices, site, outputs):
    params = {"qkv": draw(choices.rng, 3, site.width, 2), "out": draw(choices.rng, 2, outputs)}
    return params, lambda p, x: attend(*jnp.einsum("...i,cio->c...o", x, p["qkv"])) @ p["out"]


@sequence_blocks("shares", "sequence")
def attention_in_heads(choices, site, outputs):
    rng, width = choices.rng, site.width
    params = {"q": draw(rng, width, 2, 1), "v": draw(rng, width, 2, 2), "b": draw(rng, 2, 1)}
    params["out"] = draw(rng, 2, 2, outputs)

    def apply(p, x):
        q = jnp.einsum("...td,dhk->...htk", x, p["q"]) + p["b"][:, None]
        attended = attend(q, jnp.tanh(q), jnp.einsum("...td,dhk->...htk", x, p["v"]))
        return jnp.einsum("...htk,hko->...to", attended, p["out"])

    return params, apply


@sequence_blocks("shares", "sequence")
def learned_queries(choices, site, outputs):
    rng = choices.rng
    params = {"queries": draw(rng, site.length, site.width), "v": draw(rng, site.width, outputs)}
    return (
        params,
        lambda p, x: jax.nn.softmax(jnp.einsum("qd,...kd->...qk", p["queries"], x)) @ (x @ p["v"]),
    )


@sequence_blocks("shares", "sequence")
def leading_tokens_learned(choices, site, outputs):
    params = {
        "tokens": draw(choices.rng, 1, site.width),
        "w": draw(choices.rng, site.width, outputs),
    }

    def apply(p, x):
        tokens = jnp.broadcast_to(p["tokens"], (*x.shape[:-2], 1, site.width))
        x = jnp.concatenate([tokens, x], axis=-2)
        return attend(x, x, x @ p["w"])[..., 1:, :]

    return params, apply


@sequence_blocks("sequence")
def learned_positions_by_index(choices, site, outputs):
    params = {
        "position": draw(choices.rng, 5, site.width),
        "w": draw(choices.rng, site.width, outputs),
    }
    steps = jnp.arange
    return params, lambda p, x: jnp.tanh(x + p["position"][steps(site.length)]) @ p["w"]


@sequence_blocks("sequence")
def learned_positions_by_slice(choices, site, outputs):
    params = {
        "position": draw(choices.rng, 5, site.width),
        "w": draw(choices.rng, site.width, outputs),
    }
    return params, lambda p, x: jnp.tanh(x + p["position"][: site.length]) @ p["w"]


@sequence_blocks("sequence")
def learned_positions_by_dynamic_slice(choices, site, outputs):
    params = {
        "position": draw(choices.rng, 5, site.width),
        "w": draw(choices.rng, site.width, outputs),
    }

    def apply(p, x):
        rows = lax.dynamic_slice_in_dim(p["position"], 1, site.length)
        return jnp.tanh(x * rows) @ p["w"]

    return params, apply


@sequence_blocks("sequence")
def relative_positions(choices, site, outputs):
    params = {
        "bias": draw(choices.rng, 2 * site.length - 1),
        "w": draw(choices.rng, site.width, outputs),
    }
    offsets = np.arange(site.length)[:, None] - np.arange(site.length) + site.length - 1
    return params, lambda p, x: jax.nn.softmax(p["bias"][offsets]) @ (x @ p["w"])


@sequence_blocks("sequence")
def a_weight_for_each_step(choices, site, outputs):
    params = {"w": draw(choices.rng, site.length, site.width, outputs)}
    return params, lambda p, x: jnp.einsum("...ti,tio->...to", x, p["w"])


@sequence_blocks("sequence")
def mixing_of_time(choices, site, outputs):
    rng = choices.rng
    params = {"time": draw(rng, site.length, site.length), "w": draw(rng, site.width, outputs)}
    return params, lambda p, x: jnp.einsum("...ti,ts->...si", x, p["time"]) @ p["w"]


@sequence_blocks("shares", "sequence")
def recurrence_from_a_learned_state(choices, site, outputs):
    rng = choices.rng
    params = {"x": draw(rng, site.width, outputs), "h": draw(rng, outputs, outputs)}
    params |= {"b": draw(rng, outputs), "h0": draw(rng, outputs)}

    def apply(p, x):
        def cell(h, x):
            h = jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"])
            return h, h

        start = jnp.broadcast_to(p["h0"], (*x.shape[:-2], outputs))
        return jnp.moveaxis(lax.scan(cell, start, jnp.moveaxis(x, -2, 0))[1], 0, -2)

    return params, apply


@sequence_blocks("shares", "sequence")
def gated_recurrence_backwards(choices, site, outputs):
    rng = choices.rng
    params = {"w": draw(rng, site.width + outputs, 2 * outputs), "b": draw(rng, 2 * outputs)}

    def apply(p, x):
        def cell(h, x):
            gate, new = jnp.split(jnp.concatenate([x, h], -1) @ p["w"] + p["b"], 2, axis=-1)
            h = jax.nn.sigmoid(gate) * h + jnp.tanh(new)
            return h, h

        start = jnp.zeros((*x.shape[:-2], outputs))
        states = lax.scan(cell, start, jnp.moveaxis(x, -2, 0), reverse=True)[1]
        return jnp.moveaxis(states, 0, -2)

    return params, apply


@sequence_blocks("sequence")
def recurrence_with_weights_of_each_step(choices, site, outputs):
    rng = choices.rng
    params = {"w": draw(rng, site.length, site.width, outputs), "decay": draw(rng, outputs)}

    def apply(p, x):
        def cell(h, step):
            h = jnp.tanh(p["decay"] * h + step[0] @ step[1])
            return h, h

        start = jnp.zeros((*x.shape[:-2], outputs))
        return jnp.moveaxis(lax.scan(cell, start, (jnp.moveaxis(x, -2, 0), p["w"]))[1], 0, -2)

    return params, apply


@sequence_blocks("shares", "sequence")
def linear_recurrence_by_associative_scan(choices, site, outputs):
    params = {"decay": draw(choices.rng, outputs), "w": draw(choices.rng, site.width, outputs)}

    def apply(p, x):
        h = jnp.moveaxis(x @ p["w"], -2, 0)
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), h.shape)
        combine = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
        return jnp.moveaxis(lax.associative_scan(combine, (decay, h))[1], 0, -2)

    return params, apply


def convolve(x, kernel, numbers, **options):
    """On (..., T, C), with SAME padding unless told."""
    rows = x.reshape(-1, *x.shape[-2:])
    options = {"window_strides": (1,), "padding": "SAME"} | options
    y = lax.conv_general_dilated(rows, kernel, dimension_numbers=numbers, **options)
    return y.reshape(*x.shape[:-2], *y.shape[1:])


CHANNELS_LAST = ("NWC", "WIO", "NWC")


@sequence_blocks("shares", "sequence")
def convolution(choices, site, outputs):
    params = {"kernel": draw(choices.rng, 2, site.width, outputs), "b": draw(choices.rng, outputs)}
    return params, lambda p, x: convolve(x, p["kernel"], CHANNELS_LAST) + p["b"]


@sequence_blocks("shares", "sequence")
def convolution_outputs_first(choices, site, outputs):
    params = draw(choices.rng, outputs, site.width, 2)
    return params, lambda k, x: convolve(x, k, ("NWC", "OIW", "NWC"))


@sequence_blocks("shares", "sequence")
def dilated_causal_convolution(choices, site, outputs):
    params = draw(choices.rng, 2, site.width, outputs)
    options = {"rhs_dilation": (2,), "padding": [(2, 0)]}
    return params, lambda k, x: convolve(x, k, CHANNELS_LAST, **options)


@sequence_blocks("shares", "sequence")
def depthwise_convolution(choices, site, outputs):
    params = {
        "kernel": draw(choices.rng, 2, 1, site.width),
        "w": draw(choices.rng, site.width, outputs),
    }
    options = {"feature_group_count": site.width}
    return params, lambda p, x: convolve(x, p["kernel"], CHANNELS_LAST, **options) @ p["w"]


@sequence_blocks("shares", "sequence")
def grouped_convolution(choices, site, outputs):
    params = {"kernel": draw(choices.rng, 2, 1, 4), "w": draw(choices.rng, 4, outputs)}
    doubled = np.eye(site.width, 2)

    def apply(p, x):
        h = convolve(x @ doubled, p["kernel"], CHANNELS_LAST, feature_group_count=2)
        return jnp.tanh(h) @ p["w"]

    return params, apply


@sequence_blocks("shares", "sequence")
def transposed_convolution(choices, site, outputs):
    params = draw(choices.rng, 2, site.width, outputs)

    def apply(k, x):
        rows = x.reshape(-1, *x.shape[-2:])
        y = lax.conv_transpose(rows, k, (2,), "SAME", dimension_numbers=CHANNELS_LAST)
        return y[:, ::2].reshape(*x.shape[:-1], outputs)

    return params, apply


@sequence_blocks("shares", "sequence")
def transposed_convolution_of_the_kernel(choices, site, outputs):
    params = draw(choices.rng, 2, outputs, site.width)

    def apply(k, x):
        rows = x.reshape(-1, *x.shape[-2:])
        y = lax.conv_transpose(
            rows, k, (1,), "SAME", dimension_numbers=CHANNELS_LAST, transpose_kernel=True
        )
        return y.reshape(*x.shape[:-1], outputs)

    return params, apply


@sequence_blocks("shares", "sequence")
def convolution_of_upsampled_inputs(choices, site, outputs):
    params = draw(choices.rng, 2, site.width, outputs)
    options = {"lhs_dilation": (2,), "padding": [(1, 1)], "window_strides": (2,)}
    return params, lambda k, x: convolve(x, k, CHANNELS_LAST, **options)


@sequence_blocks("shares", "sequence")
def kernels_under_vmap(choices, site, outputs):
    params = draw(choices.rng, outputs, 2, site.width, 1)
    one = lambda x, k: convolve(x, k, CHANNELS_LAST)[..., 0]
    return params, lambda w, x: jnp.moveaxis(jax.vmap(lambda k: one(x, k))(w), 0, -1)


@sequence_blocks("shares", "sequence")
def flipped_kernel(choices, site, outputs):
    params = draw(choices.rng, 2, site.width, outputs)
    return params, lambda k, x: convolve(x, k[::-1], CHANNELS_LAST)


@sequence_blocks("shares", "sequence")
def masked_kernel(choices, site, outputs):
    params, mask = draw(choices.rng, 3, site.width, outputs), np.array([1.0, 1, 0])[:, None, None]
    return params, lambda k, x: convolve(x, k * mask, CHANNELS_LAST)


@sequence_blocks("shares", "sequence")
def convolution_and_pooling(choices, site, outputs):
    params = draw(choices.rng, 2, site.width, outputs)

    def apply(k, x):
        h = convolve(x, k, CHANNELS_LAST)
        window = (1,) * (h.ndim - 2) + (2, 1)
        return lax.reduce_window(h, 0.0, lax.add, window, (1,) * h.ndim, "SAME") / 2

    return params, apply


@sequence_blocks("sequence")
def merged_rows(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, outputs), "b": draw(choices.rng, outputs)}

    def apply(p, x):
        rows = jnp.tanh(x.reshape(-1, site.width) @ p["w"] + p["b"])
        return rows.reshape(*x.shape[:-1], outputs)

    return params, apply


@sequence_blocks("sequence")
def time_axis_first(choices, site, outputs):
    params = {"w": draw(choices.rng, site.width, outputs), "b": draw(choices.rng, outputs)}

    def apply(p, x):
        return jnp.moveaxis(jnp.tanh(jnp.moveaxis(x, -2, 0) @ p["w"] + p["b"]), 0, -2)

    return params, apply


# --- Wrappers: (choices, site, outputs) -> a piece around an inner block -------------------------


def around(inner, apply, params=None):
    """The same parameters unless told, another way to apply them."""
    return Piece(inner.params if params is None else params, apply, inner.text)


def stack(pieces):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[piece.params for piece in pieces])


def square(choices, site, outputs):
    """An inner block that keeps the width, and a constant matrix to the outputs."""
    inner = choices.block(site, site.width)
    return inner, lambda x: x @ np.eye(site.width, outputs) if outputs != site.width else x


def several(choices, inner, site, outputs, count):
    """Copies of a block with parameters of their own."""
    perturbed = lambda leaf: np.stack(
        [leaf + 0.1 * draw(choices.rng, *leaf.shape) for _ in range(count)]
    )
    return jax.tree.map(perturbed, inner.params)


@wrappers()
def jitted(choices, site, outputs):
    inner = choices.block(site, outputs)
    return around(inner, lambda p, x: jax.jit(inner.apply)(p, x))


@wrappers()
def remated(choices, site, outputs):
    inner = choices.block(site, outputs)
    return around(inner, lambda p, x: jax.checkpoint(inner.apply)(p, x))


@wrappers()
def remated_with_a_policy(choices, site, outputs):
    inner = choices.block(site, outputs)
    policy = jax.checkpoint_policies.dots_saveable
    return around(inner, lambda p, x: jax.checkpoint(inner.apply, policy=policy)(p, x))


@wrappers("batched")
def vmapped_over_the_examples(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, batched=False), outputs)
    return around(inner, jax.vmap(inner.apply, in_axes=(None, 0)))


@wrappers("batched")
def mapped_over_the_examples(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, batched=False), outputs)
    return around(inner, lambda p, x: lax.map(lambda x: inner.apply(p, x), x))


@wrappers("batched", "sequence", "shares")
def vmapped_over_the_steps(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, length=None), outputs)
    return around(inner, jax.vmap(inner.apply, in_axes=(None, 1), out_axes=1))


@wrappers("sequence", "shares")
def scanned_over_the_steps(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, length=None), outputs)

    def apply(p, x):
        steps = lax.scan(lambda _, x: (None, inner.apply(p, x)), None, jnp.moveaxis(x, -2, 0))[1]
        return jnp.moveaxis(steps, 0, -2)

    return around(inner, apply)


@wrappers("shares")
def scanned_with_shared_weights(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    step = lambda p: lambda x, _: (jnp.tanh(x + inner.apply(p, x)), None)
    return around(inner, lambda p, x: out(lax.scan(step(p), x, None, length=2)[0]))


@wrappers()
def scanned_with_stacked_weights(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    step = lambda x, p: (jnp.tanh(x + inner.apply(p, x)), None)
    params = several(choices, inner, site, outputs, 2)
    return around(inner, lambda p, x: out(lax.scan(step, x, p)[0]), params)


@wrappers()
def scanned_in_reverse_over_a_part_of_a_stack(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    step = lambda x, p: (jnp.tanh(inner.apply(p, x)), None)
    params = several(choices, inner, site, outputs, 3)
    part = lambda p: jax.tree.map(lambda leaf: leaf[1:], p)
    return around(inner, lambda p, x: out(lax.scan(step, x, part(p), reverse=True)[0]), params)


@wrappers("shares")
def scanned_with_weights_stacked_and_shared(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = {
        "stacked": several(choices, inner, site, outputs, 2),
        "w": draw(choices.rng, site.width, site.width),
        "b": draw(choices.rng, 2, site.width),
    }

    def apply(p, x):
        def step(x, slices):
            inner_params, b = slices
            return jnp.tanh(inner.apply(inner_params, x) + x @ p["w"] + b), None

        return out(lax.scan(step, x, (p["stacked"], p["b"]))[0])

    return around(inner, apply, params)


@wrappers("shares")
def nested_scans_of_shared_weights(choices, site, outputs):
    inner, out = square(choices, site, outputs)

    def apply(p, x):
        inside = lambda x, _: (jnp.tanh(inner.apply(p, x)), None)
        outside = lambda x, _: (lax.scan(inside, x, None, length=2)[0], None)
        return out(lax.scan(outside, x, None, length=2)[0])

    return around(inner, apply)


@wrappers("shares")
def shared_scan_in_a_stacked_one(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = several(choices, inner, site, outputs, 2)

    def apply(p, x):
        def outside(x, p):
            return lax.scan(lambda x, _: (jnp.tanh(inner.apply(p, x)), None), x, None, length=2)[
                0
            ], None

        return out(lax.scan(outside, x, p)[0])

    return around(inner, apply, params)


@wrappers("shares")
def stacked_scan_in_a_shared_one(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = several(choices, inner, site, outputs, 2)

    def apply(p, x):
        inside = lambda x, p: (jnp.tanh(inner.apply(p, x)), None)
        outside = lambda x, _: (lax.scan(inside, x, p)[0], None)
        return out(lax.scan(outside, x, None, length=2)[0])

    return around(inner, apply, params)


@wrappers()
def stacked_scan_in_a_stacked_one(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    once = several(choices, inner, site, outputs, 2)
    params = jax.tree.map(lambda leaf: np.stack([leaf, 0.9 * leaf]), once)

    def apply(p, x):
        inside = lambda x, p: (jnp.tanh(inner.apply(p, x)), None)
        return out(lax.scan(lambda x, p: (lax.scan(inside, x, p)[0], None), x, p)[0])

    return around(inner, apply, params)


@wrappers("shares")
def bias_and_weight_stacked_by_different_scans(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = {"inner": inner.params, "w": draw(choices.rng, 2, site.width, site.width)}
    params["b"] = draw(choices.rng, 2, site.width)

    def apply(p, x):
        def outside(x, w):
            inside = lambda x, b: (jnp.tanh(x @ w + b), None)
            return lax.scan(inside, x, p["b"])[0], None

        return out(inner.apply(p["inner"], lax.scan(outside, x, p["w"])[0]))

    return around(inner, apply, params)


@wrappers("shares")
def fori_loop(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    step = lambda p: lambda _, x: jnp.tanh(inner.apply(p, x))
    return around(inner, lambda p, x: out(lax.fori_loop(0, 2, step(p), x)))


@wrappers()
def fori_loop_that_indexes_a_stack(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = several(choices, inner, site, outputs, 2)

    def apply(p, x):
        at = lambda i: jax.tree.map(lambda leaf: leaf[i], p)
        return out(lax.fori_loop(0, 2, lambda i, x: jnp.tanh(inner.apply(at(i), x)), x))

    return around(inner, apply, params)


@wrappers("shares")
def parameters_carried_by_a_scan(choices, site, outputs):
    inner, out = square(choices, site, outputs)

    def apply(p, x):
        step = lambda state, _: ((state[0], jnp.tanh(inner.apply(*state))), None)
        return out(lax.scan(step, (p, x), None, length=2)[0][1])

    return around(inner, apply)


@wrappers("shares")
def python_loop(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    return around(inner, lambda p, x: out(jnp.tanh(inner.apply(p, jnp.tanh(inner.apply(p, x))))))


@wrappers("shares")
def on_two_inputs(choices, site, outputs):
    inner = choices.block(site, outputs)
    return around(inner, lambda p, x: inner.apply(p, x) - inner.apply(p, jnp.sin(x)))


@wrappers()
def cond_that_may_skip(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    taken = lambda p, x: lax.cond(x.sum() < 1e9, inner.apply, lambda p, x: x, p, x)
    return around(inner, lambda p, x: out(taken(p, x)))


@wrappers()
def cond_on_a_constant(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    taken = lambda p, x: lax.cond(np.array(True), inner.apply, lambda p, x: x, p, x)
    return around(inner, lambda p, x: out(taken(p, x)))


@wrappers("shares")
def cond_with_the_parameters_in_both_branches(choices, site, outputs):
    inner = choices.block(site, outputs)
    other = lambda p, x: inner.apply(p, jnp.sin(x))
    return around(inner, lambda p, x: lax.cond(x.sum() > 0, inner.apply, other, p, x))


@wrappers()
def switch_between_copies(choices, site, outputs):
    inner = choices.block(site, outputs)
    params = several(choices, inner, site, outputs, 2)

    def apply(p, x):
        at = lambda i: lambda p, x: inner.apply(jax.tree.map(lambda leaf: leaf[i], p), x)
        return lax.switch((x.sum() > 0).astype(int), [at(0), at(1)], p, x)

    return around(inner, apply, params)


@wrappers("batched")
def cond_for_each_example(choices, site, outputs):
    inner, out = square(choices, dataclasses.replace(site, batched=False), outputs)
    one = lambda p, x: lax.cond(x.sum() > 0, inner.apply, lambda p, x: x, p, x)
    return around(inner, lambda p, x: out(jax.vmap(one, in_axes=(None, 0))(p, x)))


@wrappers()
def cond_on_a_parameter(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    params = {"inner": inner.params, "threshold": draw(choices.rng)}

    def apply(p, x):
        return out(
            lax.cond(p["threshold"] > 0, inner.apply, lambda p, x: jnp.sin(x), p["inner"], x)
        )

    return around(inner, apply, params)


@wrappers()
def ensemble(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, batched=False), outputs)
    params = several(choices, inner, site, outputs, 2)
    members = jax.vmap(inner.apply, in_axes=(0, None))
    return around(inner, lambda p, x: jnp.tanh(members(p, x)).mean(0), params)


@wrappers()
def ensemble_with_outputs_last(choices, site, outputs):
    inner = choices.block(dataclasses.replace(site, batched=False), outputs)
    params = jax.tree.map(
        lambda leaf: np.moveaxis(leaf, 0, -1), several(choices, inner, site, outputs, 2)
    )
    members = jax.vmap(inner.apply, in_axes=(-1, None), out_axes=-1)
    return around(inner, lambda p, x: members(p, x) @ np.array([0.3, 0.7]), params)


@wrappers()
def residual_around(choices, site, outputs):
    inner, out = square(choices, site, outputs)
    return around(inner, lambda p, x: out(x + inner.apply(p, x)))


@wrappers()
def custom_jvp_around(choices, site, outputs):
    inner = choices.block(site, outputs)

    def apply(p, x):
        function = jax.custom_jvp(inner.apply)
        function.defjvp(lambda primals, tangents: jax.jvp(inner.apply, primals, tangents))
        return function(p, x)

    return around(inner, apply)


@wrappers()
def custom_vjp_around(choices, site, outputs):
    inner = choices.block(site, outputs)

    def apply(p, x):
        function = jax.custom_vjp(inner.apply)
        function.defvjp(
            lambda p, x: (inner.apply(p, x), (p, x)),
            lambda residuals, g: jax.vjp(inner.apply, *residuals)[1](g),
        )
        return function(p, x)

    return around(inner, apply)


@wrappers()
def custom_vjp_that_halves_the_gradient(choices, site, outputs):
    inner = choices.block(site, outputs)

    def apply(p, x):
        function = jax.custom_vjp(inner.apply)
        function.defvjp(
            lambda p, x: (inner.apply(p, x), (p, x)),
            lambda residuals, g: jax.vjp(inner.apply, *residuals)[1](g / 2),
        )
        return function(p, x)

    return around(inner, apply)


@wrappers("single")
def parameters_rounded_to_single(choices, site, outputs):
    inner = choices.block(site, outputs)
    single = lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(leaf.dtype), p)
    return around(inner, lambda p, x: inner.apply(single(p), x))


# --- Stems: (choices, examples, length) -> batch, parameters, and (params, batch) -> features ----


@stems()
def features(choices, examples, length):
    return choices.rng.normal(size=(examples, 3)), None, lambda p, x: x


@stems()
def features_of_a_dict(choices, examples, length):
    rng = choices.rng
    batch = {"x": rng.normal(size=(examples, 2)), "flag": rng.integers(0, 2, examples)}
    return batch, None, lambda p, b: jnp.concatenate([b["x"], b["flag"][:, None] * 1.0], axis=-1)


@stems()
def column_of_a_table(choices, examples, length):
    rng = choices.rng
    batch = {"x": rng.normal(size=(examples, 3)), "row": rng.integers(0, 4, examples)}
    return batch, draw(rng, 4, 3), lambda table, b: b["x"] + table[b["row"]]


def image_stem(choices, examples, kernel, numbers, channels=1, **options):
    """A convolution of images and the mean of its squared features."""
    last = numbers[0] == "NHWC"
    shape = (examples, 4, 3, channels) if last else (examples, channels, 4, 3)
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def apply(k, x):
        h = lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)
        return jnp.square(jnp.tanh(h)).mean((1, 2) if last else (2, 3))

    return choices.rng.normal(size=shape), kernel, apply


@stems("shares")
def convolution_of_images(choices, examples, length):
    return image_stem(choices, examples, draw(choices.rng, 2, 2, 1, 3), ("NHWC", "HWIO", "NHWC"))


@stems("shares")
def convolution_channels_first(choices, examples, length):
    return image_stem(choices, examples, draw(choices.rng, 3, 1, 2, 2), ("NCHW", "OIHW", "NCHW"))


@stems("shares")
def strided_convolution(choices, examples, length):
    kernel = draw(choices.rng, 3, 2, 1, 3)
    return image_stem(
        choices, examples, kernel, ("NHWC", "HWIO", "NHWC"), window_strides=(2, 1), padding="VALID"
    )


@stems("shares")
def dilated_convolution(choices, examples, length):
    kernel = draw(choices.rng, 2, 2, 1, 3)
    return image_stem(choices, examples, kernel, ("NHWC", "HWIO", "NHWC"), rhs_dilation=(2, 1))


@stems("shares")
def grouped_convolution_of_images(choices, examples, length):
    kernel, numbers = draw(choices.rng, 2, 2, 1, 4), ("NHWC", "HWIO", "NHWC")
    return image_stem(choices, examples, kernel, numbers, channels=2, feature_group_count=2)


@stems("shares")
def upsampling_convolution(choices, examples, length):
    kernel, numbers = draw(choices.rng, 2, 2, 1, 3), ("NHWC", "HWIO", "NHWC")
    padding = [(1, 1), (1, 1)]
    return image_stem(choices, examples, kernel, numbers, lhs_dilation=(2, 2), padding=padding)


@stems("shares")
def patches_of_images(choices, examples, length):
    def apply(w, x):
        patches = x.reshape(examples, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(examples, 4, 4)
        return jnp.tanh(patches @ w).mean(1)

    return choices.rng.normal(size=(examples, 4, 4)), draw(choices.rng, 4, 3), apply


@stems("shares")
def bag_of_tokens(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, 3))
    return tokens, draw(choices.rng, 4, 3), lambda table, tokens: table[tokens].mean(1)


@stems("shares")
def bag_by_counts(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, 3))

    def apply(table, tokens):
        return jax.nn.one_hot(tokens, 4).sum(1) @ table

    return tokens, draw(choices.rng, 4, 3), apply


@stems("shares")
def bag_by_segment_sum(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, 3))

    def apply(table, tokens):
        owner = jnp.repeat(jnp.arange(examples), 3)
        return jax.ops.segment_sum(table[tokens.ravel()], owner, num_segments=examples)

    return tokens, draw(choices.rng, 4, 3), apply


@sequence_stems()
def sequences(choices, examples, length):
    return choices.rng.normal(size=(examples, length, 2)), None, lambda p, x: x


def token_stem(choices, examples, length, lookup, tokens=None, low=0, high=4):
    """Sequences of tokens by ``lookup(table, tokens)`` in a table of four."""
    rng = choices.rng
    tokens = rng.integers(low, high, (examples, length)) if tokens is None else tokens
    return tokens, draw(rng, 4, 2), lookup


@sequence_stems("shares")
def embedding(choices, examples, length):
    return token_stem(choices, examples, length, lambda table, tokens: table[tokens])


@sequence_stems("shares")
def embedding_by_take_that_clips(choices, examples, length):
    lookup = lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip")
    return token_stem(choices, examples, length, lookup, low=-2, high=6)


@sequence_stems("shares")
def embedding_by_take_that_wraps(choices, examples, length):
    lookup = lambda table, tokens: jnp.take(table, tokens, axis=0, mode="wrap")
    return token_stem(choices, examples, length, lookup, low=-5, high=9)


@sequence_stems("shares")
def embedding_by_take_that_fills(choices, examples, length):
    lookup = lambda table, tokens: jnp.take(table, tokens, axis=0, mode="fill", fill_value=0)
    return token_stem(choices, examples, length, lookup, high=7)


@sequence_stems("shares")
def padding_out_of_range_twice(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, length))
    tokens[0, :] = 4
    lookup = lambda table, tokens: table.at[tokens].get(mode="fill", fill_value=0.5)
    return token_stem(choices, examples, length, lookup, tokens)


@sequence_stems("shares")
def negative_indices(choices, examples, length):
    return token_stem(choices, examples, length, lambda t, i: t[i], low=-4, high=4)


@sequence_stems("shares")
def negative_indices_out_of_range(choices, examples, length):
    lookup = lambda t, i: t.at[i].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return token_stem(choices, examples, length, lookup, low=-3, high=4)


@sequence_stems("shares")
def negative_indices_clipped(choices, examples, length):
    lookup = lambda t, i: t.at[i].get(mode="clip", wrap_negative_indices=False)
    return token_stem(choices, examples, length, lookup, low=-3, high=6)


@sequence_stems("shares")
def promised_indices(choices, examples, length):
    lookup = lambda t, i: t.at[i].get(mode="promise_in_bounds")
    return token_stem(choices, examples, length, lookup)


@sequence_stems("shares")
def one_hot_embedding(choices, examples, length):
    return token_stem(choices, examples, length, lambda t, i: jax.nn.one_hot(i, 4) @ t, high=5)


@sequence_stems("shares")
def embedding_of_a_transposed_table(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, length))
    lookup = lambda t, i: t.T[i]
    return tokens, draw(choices.rng, 2, 4), lookup


@sequence_stems("shares")
def embedding_of_columns(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, length))
    return tokens, draw(choices.rng, 2, 4), lambda t, i: jnp.moveaxis(t[:, i], 0, -1)


@sequence_stems("shares")
def embedding_by_two_indices(choices, examples, length):
    rng = choices.rng
    batch = {"row": rng.integers(0, 2, (examples, length)), "tokens": None}
    batch["tokens"] = rng.integers(0, 3, (examples, length))
    return batch, draw(rng, 2, 3, 2), lambda t, b: t[b["row"], b["tokens"]]


@sequence_stems("shares")
def embedding_of_a_flat_table(choices, examples, length):
    tokens = choices.rng.integers(0, 4, (examples, length))
    lookup = lambda t, i: t[2 * i[..., None] + np.arange(2)]
    return tokens, draw(choices.rng, 8), lookup


@sequence_stems("shares")
def embedding_under_vmap(choices, examples, length):
    lookup = lambda t, i: jax.vmap(lambda i: t[i])(i)
    return token_stem(choices, examples, length, lookup)


@sequence_stems("shares")
def embedding_scaled_and_normalised(choices, examples, length):
    def lookup(table, tokens):
        rows = table[tokens] * np.sqrt(2)
        return rows / (1 + jnp.abs(rows).sum(-1, keepdims=True))

    return token_stem(choices, examples, length, lookup)


@sequence_stems("shares")
def hashed_embedding(choices, examples, length):
    return token_stem(choices, examples, length, lambda t, i: t[i % 4] + t[(3 * i + 1) % 4], high=9)


@sequence_stems("shares")
def embedding_of_single_precision(choices, examples, length):
    choices.flags.add("single")
    lookup = lambda t, i: t.astype(jnp.float32)[i].astype(jnp.float64)
    return token_stem(choices, examples, length, lookup)


@sequence_stems("shares")
def embedding_looked_up_in_a_scan(choices, examples, length):
    def lookup(table, tokens):
        return jnp.swapaxes(lax.scan(lambda _, i: (None, table[i]), None, tokens.T)[1], 0, 1)

    return token_stem(choices, examples, length, lookup)


@sequence_stems("shares")
def embedding_masked(choices, examples, length):
    lookup = lambda t, i: jnp.where((i > 0)[..., None], t[i], 0.0)
    return token_stem(choices, examples, length, lookup)


# --- Pools: (choices, site) -> parameters, and (B, T, D) -> (B, D'), or the sequence as it is ----


@pools()
def mean_over_time(choices, site):
    return None, lambda p, x: x.mean(1)


@pools()
def every_step(choices, site):
    return None, lambda p, x: x


@pools()
def last_step(choices, site):
    return None, lambda p, x: x[:, -1]


@pools()
def all_steps_side_by_side(choices, site):
    return None, lambda p, x: x.reshape(x.shape[0], -1)


@pools()
def learned_weights_of_time(choices, site):
    return draw(choices.rng, site.length), lambda p, x: jnp.einsum("btd,t->bd", x, p)


@pools()
def attention_pool(choices, site):
    weigh = lambda p, x: jax.nn.softmax(x @ p, axis=1)
    return draw(choices.rng, site.width), lambda p, x: jnp.einsum("bt,btd->bd", weigh(p, x), x)


@pools("shares")
def class_token(choices, site):
    def apply(p, x):
        token = jnp.broadcast_to(p, (x.shape[0], 1, site.width))
        x = jnp.concatenate([token, x], axis=1)
        return attend(x, x, x)[:, 0] + x[:, 1:].mean(1) * p

    return draw(choices.rng, site.width), apply


@pools()
def all_but_the_last_step(choices, site):
    return None, lambda p, x: x[:, :-1]


# --- Endings: (rng, width of z) -> parameters, and z -> z ----------------------------------------


@endings()
def nothing(rng, width):
    return None, lambda p, z: z


@endings()
def output_used_twice(rng, width):
    return None, lambda p, z: z + 0.3 * jnp.tanh(z[..., ::-1])


@endings("shares")
def calibrated(rng, width):
    return {
        "temperature": 1 + 0.1 * draw(rng),
        "b": draw(rng, width),
    }, lambda p, z: z / p["temperature"] + p["b"]


@endings("shares")
def learned_row_added_to_the_output(rng, width):
    return draw(rng, 1, width), lambda p, z: z + p


@endings()
def some_outputs_are_parameters(rng, width):
    return draw(rng, 1), lambda p, z: jnp.concatenate(
        [z[..., 1:], jnp.broadcast_to(p, (*z.shape[:-1], 1))], axis=-1
    )


@endings()
def clipped_outputs(rng, width):
    return None, lambda p, z: jnp.clip(z, -2, 2)


# --- Extras: rng -> parameters that a model has beside those of its layers -----------------------


@extras()
def no_extra(rng):
    return None


@extras()
def unused_matrix(rng):
    return draw(rng, 2, 2)


@extras()
def unused_scalar(rng):
    return draw(rng)


@extras()
def empty_leaf(rng):
    return {"w": draw(rng, 0, 3), "none": None}


# --- Heads: rng -> the head, the width of z, and F_R of rows z (N, E) by its formula -------------


def softmax_fisher(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.eye(z.shape[1]) * p[:, None] - p[:, :, None] * p[:, None]


def sigmoid_fisher(z):
    p = 1 / (1 + np.exp(-z))
    return np.eye(z.shape[1]) * (p * (1 - p))[:, None]


def gaussian_fisher(precision):
    return lambda z: np.broadcast_to(precision, (len(z), *precision.shape))


@heads()
def gaussian(rng):
    return fvp.Gaussian(), 2, gaussian_fisher(np.eye(2))


@heads()
def softmax(rng):
    return fvp.Softmax(), 3, softmax_fisher


@heads()
def sigmoid(rng):
    return fvp.Sigmoid(), 2, sigmoid_fisher


@heads()
def gaussian_with_a_scale(rng):
    return fvp.Gaussian(scale=0.6), 3, gaussian_fisher(np.eye(3) / 0.6**2)


@heads()
def gaussian_with_scales(rng):
    scales = np.array([0.5, 1.5, 2.0])
    return fvp.Gaussian(scale=scales), 3, gaussian_fisher(np.diag(scales**-2))


@heads()
def gaussian_with_a_precision(rng):
    precision = np.array([[2.0, 0.5], [0.5, 1.0]])
    return fvp.Gaussian(precision=precision), 2, gaussian_fisher(precision)


@heads()
def gaussian_of_one_output(rng):
    return fvp.Gaussian(scale=1.3), 1, gaussian_fisher(np.eye(1) / 1.3**2)


# --- Weightings: (rng, batch axes) -> the weight of each row, or None ----------------------------


@weightings()
def unweighted(rng, shape):
    return None


@weightings()
def mask_of_rows(rng, shape):
    return mask_like(rng, *shape)


@weightings()
def fractional_weights(rng, shape):
    return rng.uniform(0.1, 2, shape)


@weightings()
def fractional_weights_with_zeros(rng, shape):
    return rng.uniform(0.1, 2, shape) * mask_like(rng, *shape)


@weightings()
def weights_of_examples_only(rng, shape):
    return rng.uniform(0.1, 2, (shape[0], *(1 for _ in shape[1:])))


# --- Models --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RandomModel:
    """A model with its problem.

    Attributes:
      text: what it was composed of.
      output_fisher: F_R of rows z (N, E), by its formula: (N, E, E).
      flags: those of its constructs.
    """

    name: str
    text: str
    model_fn: Callable
    params: Any
    batch: Any
    head: Any
    output_fisher: Callable
    weights: Any
    flags: frozenset[str]

    @functools.cached_property
    def flat(self):
        return ravel_pytree(self.params)

    @functools.cached_property
    def leaves(self):
        """The path, and the place in the flat parameters, of each leaf."""
        found, start = [], 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            found.append(("params" + jax.tree_util.keystr(path), slice(start, start + leaf.size)))
            start += leaf.size
        return found

    @functools.cached_property
    def direction(self):
        """A vector of no special direction."""
        return np.random.default_rng(1).normal(size=sum(leaf.size for leaf in self.arrays))

    @property
    def arrays(self):
        return jax.tree.leaves(self.params)

    @functools.cached_property
    def primitives(self):
        """The names of all primitives in the model."""
        return primitives_of(jax.make_jaxpr(self.model_fn)(self.params, self.batch).jaxpr)

    def traced(self):
        """The same model as the equations that it was traced to: quicker to trace again."""
        closed = jax.make_jaxpr(self.model_fn)(self.params, self.batch)
        run = jaxpr_as_fun(closed)
        model_fn = lambda params, batch: run(*jax.tree.leaves((params, batch)))[0]
        return dataclasses.replace(self, model_fn=model_fn)


def primitives_of(jaxpr):
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        parts = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        )
        for part in parts:
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                names |= primitives_of(inner)
    return names


def compose(choices, mode, number, name):
    """A model of ``number`` blocks out of the draws of ``choices``."""
    rng = choices.rng
    examples, length = int(rng.integers(3, 6)), int(rng.integers(2, 4))
    stem = choices.pick(f"{mode} stem")
    batch, stem_params, read = stem.make(choices, examples, length)
    batch = jax.tree.map(jnp.asarray, batch)
    width = jax.eval_shape(read, stem_params, batch).shape[-1]
    site = Site(width, length if mode == "sequence" else None)
    pieces = []
    for _ in range(number):
        pieces.append(choices.block(site, 3))
        site = dataclasses.replace(site, width=3)
    pool_params, pool, texts = None, lambda p, x: x, [stem.name, *(p.text for p in pieces)]
    if mode == "sequence":
        construct = choices.pick("pool")
        pool_params, pool = construct.make(choices, site)
        texts.append(construct.name)
    pooled = jax.eval_shape(pool, pool_params, jax.ShapeDtypeStruct((examples, length, 3), float))
    steps = pooled.shape[1] if len(pooled.shape) == 3 and mode == "sequence" else None
    last = Site(pooled.shape[-1] if mode == "sequence" else 3, steps)
    head, outputs, output_fisher = (head_construct := choices.pick("head")).make(rng)
    readout = choices.dense(last, outputs)
    ending = choices.pick("ending")
    ending_params, end = ending.make(rng, outputs)
    extra, weighting = choices.pick("extra"), choices.pick("weighting")
    axes = (examples,) if steps is None else (examples, steps)
    params = {
        "stem": stem_params,
        "blocks": [piece.params for piece in pieces],
        "pool": pool_params,
        "readout": readout.params,
        "ending": ending_params,
        "extra": extra.make(rng),
    }

    def model_fn(params, batch):
        x = read(params["stem"], batch)
        for piece, p in zip(pieces, params["blocks"], strict=True):
            x = piece.apply(p, x)
        x = pool(params["pool"], x)
        return end(params["ending"], readout.apply(params["readout"], jnp.tanh(x)))

    texts += [readout.text, ending.name, extra.name, head_construct.name, weighting.name]
    rows = weighting.make(rng, axes)
    return RandomModel(
        name,
        " > ".join(texts),
        model_fn,
        jax.tree.map(jnp.asarray, params),
        batch,
        head,
        output_fisher,
        None if rows is None else jnp.asarray(rows),
        frozenset(choices.flags | ({"sequence"} if mode == "sequence" else set())),
    )


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def deck(kind, start):
    """The constructs of a registry, shuffled anew in each round, from place ``start`` on."""
    entries = CONSTRUCTS[kind]

    def entry(place):
        order = np.random.default_rng(place // len(entries)).permutation(len(entries))
        return entries[order[place % len(entries)]]

    return [entry(start + i) for i in range(len(entries))]


def decks(seed):
    """Each deck goes on about where that of the seed before stopped."""
    number = seed // len(MODES)
    drawn = {"weight": 2 * seed, "product": 2 * seed, "bias": 2 * seed, "block": seed}
    return {kind: deck(kind, drawn.get(kind, number)) for kind in CONSTRUCTS}


def random_model(seed, blocks=2):
    """A model of at most LARGEST parameters; even seeds are on features, odd ones on sequences.

    Of ``blocks`` blocks, or of one where more are too large.
    """
    mode = MODES[seed % len(MODES)]
    for attempt in itertools.count():
        rng = np.random.default_rng((seed, attempt))
        # Fewer wrappers where the model became too large.
        choices = Choices(rng, decks(seed), depth=max(0, 2 - attempt // 5))
        model = compose(choices, mode, blocks if attempt < 15 else 1, str(seed))
        if 0 < size(model.params) <= LARGEST:
            return model


def model_of(kind, name):
    """A model with the construct ``name`` of the registry ``kind``, all others plain."""
    construct = next(entry for entry in CONSTRUCTS[kind] if entry.name == name)
    kinds = ("sequence stem", "sequence block", "pool")
    mode = "sequence" if "sequence" in construct.flags or kind in kinds else "features"
    choices = Choices(np.random.default_rng(0), {kind: [construct]})
    return compose(choices, mode, 1, f"{kind}:{name}")


def everything():
    """The kind and name of every construct."""
    return [(kind, entry.name) for kind in CONSTRUCTS for entry in CONSTRUCTS[kind]]


def not_met(texts):
    """The names of the constructs that none of the models has."""
    met = {word for text in texts for word in re.findall(r"\w+", text)}
    return [name for _, name in everything() if name not in met]


# --- References ----------------------------------------------------------------------------------


def reference(model):
    """The dense Fisher (P, P) of the mean loss: sum_n w_n J_n^T F_R(z_n) J_n / sum_n w_n."""
    flat, unravel = model.flat

    def outputs(flat, batch):
        z = model.model_fn(unravel(flat), batch)
        return z, z

    mode = jax.jacfwd if "no reverse" in model.flags else jax.jacrev
    jacobian, z = jax.jit(mode(outputs, has_aux=True))(flat, model.batch)
    rows, event = z.shape[:-1], z.shape[-1]
    jacobian = np.asarray(jacobian).reshape(-1, event, flat.size)
    weights = np.ones(rows) if model.weights is None else np.asarray(model.weights)
    weights = np.broadcast_to(weights, rows).ravel()
    fisher = model.output_fisher(np.asarray(z).reshape(-1, event))
    return np.einsum("n,nip,nij,njq->pq", weights / weights.sum(), jacobian, fisher, jacobian)


# --- Verdicts ------------------------------------------------------------------------------------

DAMPINGS = (1.0, 1e-2, 1e-4)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one method did with one model.

    Attributes:
      outcome: "exact", "refused", "silent miss" or "crash".
      detail: the primitive of a refusal, else what is wrong.
    """

    method: str
    outcome: str
    detail: str = ""

    @property
    def fine(self):
        return self.outcome in ("exact", "refused")


def verdicts(model):
    """A verdict for each method; for the ones that refuse a second one with their fallback."""
    whole, model = model, model.traced()
    try:
        fisher = reference(model)
    except TypeError as error:  # a while loop around a custom VJP: JAX has neither mode for it
        if "no reverse" not in model.flags:
            raise
        return [Verdict("reference", "undefined", first_line(error))]
    if not np.all(np.isfinite(fisher)):  # such as batch normalisation behind a sign
        return [Verdict("reference", "undefined", "")]
    found = [judge(model, "products", products_of, check_products, fisher)]
    for name, run, check in (
        ("diagonal", diagonal_of, check_diagonal),
        ("kfac", kfac_of, check_kfac),
    ):
        found.append(judge(model, name, run, check, fisher))
        if found[-1].outcome != "exact" and "no reverse" not in model.flags:
            if name == "kfac" and "mixes" in found[-1].detail:
                check = functools.partial(check, mixes=True)
            with_fallback = functools.partial(run, fallback="per_example")
            found.append(judge(model, name + " with fallback", with_fallback, check, fisher))
    found.append(judge(model, "dual", dual_of, check_dual, fisher))
    if "shares" not in model.flags and "sequence" not in model.flags:
        one = one_example(whole).traced()
        found.append(judge(one, "kfac of one example", kfac_of, check_one_example, reference(one)))
    return found


def judge(model, method, run, check, fisher):
    """Runs one method and compares."""
    try:
        complaints = check(model, run(model), fisher)
    except (TypeError, ValueError) as error:
        primitive = refused_primitive(model, method, str(error))
        if primitive is not None and not method.endswith("fallback"):
            return Verdict(method, "refused", primitive)
        return Verdict(method, "crash", f"{type(error).__name__}: {first_line(error)}")
    except Exception as error:
        return Verdict(method, "crash", f"{type(error).__name__}: {first_line(error)}")
    return (
        Verdict(method, "silent miss", "; ".join(complaints))
        if complaints
        else Verdict(method, "exact")
    )


def first_line(error):
    return str(error).strip().split("\n")[0][:300]


def refused_primitive(model, method, message):
    """The primitive that a refusal names, if it is one of the model's; None if it names none.

    A refusal names the parameter as well. Of a model that JAX itself can't differentiate in reverse
    its message is enough.
    """
    if "no reverse" in model.flags and "while_loop" in message:
        return "while"
    if method == "products" or not any(path in message for path, _ in model.leaves):
        return None
    words = message
    for path, _ in sorted(model.leaves, key=lambda leaf: -len(leaf[0])):
        words = words.replace(path, "")
    quoted = re.findall(r"'([\w-]+)'", words)
    listed = re.findall(r"[\w-]+", " ".join(re.findall(r"uses \(([^)]*)\)", words)))
    named = [name for name in (*quoted, *listed) if name in model.primitives]
    if named:
        mixes = "mixes" in words or "cannot be followed" in words
        return named[0] + (" (overlap)" if listed else " (mixes)" if mixes else "")
    return "the model's output" if "the model's output" in words else None


def one_example(model):
    """The model at its first example alone, whose weight is one."""
    batch = jax.tree.map(lambda x: x[:1], model.batch)
    return dataclasses.replace(model, batch=batch, weights=None)


# Each method, compiled in one piece.


def compiled(model, function):
    """The results, in NumPy, of a function of parameters, a vector like them, batch and weights."""
    v = model.flat[1](model.direction)
    return jax.device_get(jax.jit(function)(model.params, v, model.batch, model.weights))


def products_of(model):
    def run(params, v, batch, weights):
        operator = fvp.fisher(model.model_fn, model.head, params, batch, weights=weights)
        column = lambda e: ravel_pytree(operator @ model.flat[1](e))[0]
        matrix = jax.vmap(column, out_axes=1)(jnp.eye(len(model.direction)))
        return operator.dense(), matrix, ravel_pytree(operator @ v)[0]

    return compiled(model, run)


def diagonal_of(model, fallback=None):
    def run(params, v, batch, weights):
        options = {"weights": weights, "fallback": fallback}
        diagonal = fvp.fisher_diagonal(model.model_fn, model.head, params, batch, **options)
        return ravel_pytree(diagonal)[0]

    return compiled(model, run)


def dual_of(model):
    def run(params, v, batch, weights):
        operator = fvp.fisher(model.model_fn, model.head, params, batch, weights=weights)
        solutions = fvp.solve_dual(operator, v, jnp.array(DAMPINGS))
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(solutions)

    return compiled(model, run)


def kfac_of(model, fallback=None):
    """The matrix, its trace, a damped solution and how each parameter is treated."""
    coverage = {}

    def run(params, v, batch, weights):
        options = {"weights": weights, "fallback": fallback}
        operator = fvp.kfac(model.model_fn, model.head, params, batch, **options)
        coverage["it"] = operator.coverage
        solution = ravel_pytree(operator.solve(v, DAMPINGS[0]))[0]
        return operator.dense(), operator.trace(), solution

    return *compiled(model, run), coverage["it"]


# Each check returns complaints.


def tolerance(model, exact=1e-9, single=1e-4):
    return single if "single" in model.flags else exact


def off(actual, expected, allowed, scale=None):
    """Whether two arrays differ by more than ``allowed``, in units of the largest expected entry.

    Entries below rounding of ``scale`` count as zero.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    if not actual.size:
        return False
    largest = np.abs(expected).max()
    floor = 1e-14 * (largest if scale is None else scale)
    return not np.abs(actual - expected).max() <= allowed * largest + floor


def compare_leaves(model, actual, expected, allowed, take=lambda x, s: x[s]):
    """Complaints with the names of the leaves that are off."""
    scale = np.abs(expected).max(initial=0)
    complaints = []
    for path, s in model.leaves:
        a, e = np.asarray(take(actual, s)), take(expected, s)
        if off(a, e, allowed, scale):
            worst = np.abs(a - e).max()
            complaints.append(f"{path}: off by {worst:.2g} where {np.abs(e).max():.2g}")
    return complaints


def check_products(model, result, fisher):
    dense, matrix, product = result
    allowed, scale = tolerance(model), np.abs(fisher).max()
    complaints = ["dense() is off"] if off(dense, fisher, allowed, scale) else []
    complaints += ["the matrix of products is off"] if off(matrix, fisher, allowed) else []
    wrong = off(product, fisher @ model.direction, allowed, scale)
    return complaints + (["F @ v is off"] if wrong else [])


def check_diagonal(model, result, fisher):
    return compare_leaves(model, result, np.diagonal(fisher), tolerance(model))


def check_dual(model, result, fisher):
    v, eye = model.direction, np.eye(len(fisher))
    complaints = []
    for damping, solution in zip(DAMPINGS, result, strict=True):
        expected = np.linalg.solve(fisher + damping * eye, v)
        if off(solution, expected, tolerance(model, 1e-8, 1e-2)):
            worst = np.abs(np.asarray(solution) - expected).max()
            complaints.append(f"damping {damping}: off by {worst:.2g}")
    return complaints


def block(matrix, s):
    return matrix[s, s]


def check_kfac(model, result, fisher, mixes=False):
    """What holds of every K-FAC: see the complaints; ``mixes``: of a model that mixes examples."""
    dense, trace, solution, coverage = result
    allowed, complaints = tolerance(model), []
    if not np.all(np.isfinite(dense)):
        return ["not finite"]
    if off(dense, dense.T, allowed):
        complaints.append("not symmetric")
    elif np.linalg.eigvalsh(dense).min(initial=0) < -allowed * np.abs(dense).max():
        complaints.append("not positive semidefinite")
    if off(trace, np.trace(dense), allowed):
        complaints.append("trace() is not that of dense()")
    damped = dense + DAMPINGS[0] * np.eye(len(dense))
    if off(damped @ solution, model.direction, 10 * allowed):
        complaints.append("solve() is not the inverse of dense()")
    scale = np.abs(fisher).max()
    for path, s in model.leaves:
        pair = block(dense, s), block(fisher, s)
        found = (
            check_kfac_leaf(coverage[path], *pair, allowed, scale, mixes) if pair[0].size else []
        )
        complaints += [f"{path} ({coverage[path]}): {complaint}" for complaint in found]
    return complaints


def check_kfac_leaf(treatment, actual, expected, allowed, scale, mixes):
    curved = np.diagonal(expected) > 1e-12 * scale
    if treatment == "unused":
        return ["it has curvature"] if curved.any() else []
    if np.any(np.diagonal(actual)[curved] <= 0):
        return ["no curvature where the Fisher has some"]
    if treatment.startswith("row by row"):
        # Factors of all rows, where examples mix, and else the exact diagonal.
        wrong = off(actual, np.diag(np.diagonal(expected)), allowed, scale)
        return ["not the exact diagonal"] if wrong and not mixes else []
    if kinds_of(treatment) <= {"shift", "scale"}:
        complaints = compare_blocks(actual, expected, allowed, scale)
        whole = treatment in ("shift", "scale")  # not two parts of one leaf, each with its block
        if whole and not complaints and off(actual, expected, allowed, scale):
            complaints.append("entries of its exact block are missing")
        return complaints
    return []


def kinds_of(treatment):
    """The kinds of uses in a line of the coverage; a bias with its layer is a "shift of" it."""
    parts = [part.split(" in ")[0] for part in treatment.split(" + ")]  # "scale in 3 blocks"
    return {part.lstrip("0123456789 ") for part in parts}


def compare_blocks(actual, expected, allowed, scale):
    """Complaints where a block is not the Fisher's, as far as it has entries at all.

    The groups of a weight (heads, the members of a stack) are layers of their own, and have blocks
    of their own.
    """
    if off(np.diagonal(actual), np.diagonal(expected), allowed, scale):
        return ["not the diagonal of its exact block"]
    wrong = off(actual, np.where(actual != 0, expected, 0), allowed, scale)
    return ["not its exact block"] if wrong else []


def check_one_example(model, result, fisher):
    """Of one example without weight sharing the block of each layer is exact."""
    dense, *_, coverage = result
    complaints = check_kfac(model, result, fisher)
    for path, s in model.leaves:
        pair, scale = (block(dense, s), block(fisher, s)), np.abs(fisher).max()
        if kinds_of(coverage[path].split(" of ")[0]) <= {"dense", "lookup", "shift", "scale"}:
            found = compare_blocks(*pair, tolerance(model), scale)
            complaints += [f"{path} ({coverage[path]}): {complaint}" for complaint in found]
    return list(dict.fromkeys(complaints))
