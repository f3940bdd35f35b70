"""Every use of every parameter is found and named, and together they are the gradient."""

import functools

import framework_models  # noqa: F401  (registers them)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import product_matrix, relative_error
from models import MODELS, affine, conv, layer, normal, weight

import fvp
from fvp.layers.groups import GroupGradients
from fvp.tracing.capture import capture
from fvp.tracing.coverage import coverage_of

COMPILE_QUICKLY = True

GAUSSIAN = fvp.Gaussian()
ARCHITECTURES = {}


def architecture(**expected):
    """Registers ``make(rng) -> (model_fn, params, batch)`` with the treatments by leaf name."""

    def register(make):
        ARCHITECTURES[make.__name__] = make, expected
        return make

    return register


def dense_with_bias(path):
    return {f"{path}['w']": "dense", f"{path}['b']": f"shift of params{path}['w']"}


@architecture(**dense_with_bias("[0]"), **dense_with_bias("[1]"))
def jitted_and_remated_mlp(rng):
    def model_fn(params, x):
        hidden = jax.jit(jax.checkpoint(lambda p, x: jnp.tanh(affine(p, x))))(params[0], x)
        return jax.jit(affine)(params[1], hidden)

    return model_fn, [layer(rng, 4, 5), layer(rng, 5, 3)], normal(rng, 6, 4)


@architecture(**dense_with_bias("['layers']"))
def stacked_layers_in_a_scan(rng):
    layers = jax.tree.map(lambda *p: jnp.stack(p), *[layer(rng, 4, 4) for _ in range(3)])

    def model_fn(params, x):
        step = lambda x, p: (jnp.tanh(affine(p, x)), None)
        return jax.lax.scan(step, x, params["layers"])[0]

    return model_fn, {"layers": layers}, normal(rng, 5, 4)


@architecture(**{"['x']": "dense", "['h']": "dense", "['b']": "shift"})
def recurrence_in_a_scan(rng):
    params = {"x": weight(rng, 3, 4), "h": weight(rng, 4, 4), "b": normal(rng, 4)}

    def model_fn(params, x):
        cell = lambda h, x: (jnp.tanh(x @ params["x"] + h @ params["h"] + params["b"]), None)
        return jax.lax.scan(cell, jnp.zeros((5, 4)), jnp.swapaxes(x, 0, 1))[0]

    return model_fn, params, normal(rng, 5, 6, 3)


@architecture(**{"[0]": "dense", "[1]": "dense", "[2]": "shift of params[1]"})
def transposed_and_vmapped_products(rng):
    def model_fn(params, x):
        first, second, bias = params
        hidden = jnp.tanh(x @ first.T)
        return jax.vmap(lambda h: second @ h + bias)(hidden)

    return model_fn, (weight(rng, 5, 4), weight(rng, 3, 5), normal(rng, 3)), normal(rng, 6, 4)


def pull_product(residuals, cotangent):
    x, w = residuals
    return cotangent @ w.T, x.T @ cotangent


@architecture(**dense_with_bias("['layers']"), **{"['out']": "dense"})
def products_with_rules_of_their_own(rng):
    layers = jax.tree.map(lambda *p: jnp.stack(p), *[layer(rng, 4, 4) for _ in range(2)])
    fused = jax.custom_vjp(lambda p, x: jnp.log1p(jnp.exp(affine(p, x))))

    def pull(residuals, cotangent):
        p, x = residuals
        cotangent = cotangent * jax.nn.sigmoid(affine(p, x))
        pulled, weights = pull_product((x, p["w"]), cotangent)
        return {"w": weights, "b": cotangent.sum(0)}, pulled

    fused.defvjp(lambda p, x: (fused(p, x), (p, x)), pull)
    product = jax.custom_jvp(lambda x, w: x @ w)
    product.defjvp(lambda p, t: (product(*p), t[0] @ p[1] + p[0] @ t[1]))

    def model_fn(params, x):
        x = jax.lax.scan(lambda x, p: (fused(p, x), None), x, params["layers"])[0]
        return product(x, params["out"])

    return model_fn, {"layers": layers, "out": weight(rng, 4, 3)}, normal(rng, 5, 4)


@architecture(**{"['q']": "dense", "['out']": "dense", "['bias']": "shift of params['q']"})
def attention_heads_by_einsum(rng):
    params = {"q": weight(rng, 4, 2, 3), "out": weight(rng, 2, 3, 4), "bias": normal(rng, 2, 3)}

    def model_fn(params, x):
        q = jnp.einsum("btd,dhk->bthk", x, params["q"]) + params["bias"]
        attended = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, q))
        return jnp.einsum("bhqs,bshk,hkd->bqd", attended, q, params["out"])

    return model_fn, params, normal(rng, 2, 3, 4)


@architecture(
    **{"['conv']": "convolution", "['bias']": "shift of params['conv']", "['line']": "convolution"}
)
def grouped_and_one_dimensional_convolutions(rng):
    params = {"conv": weight(rng, 3, 3, 2, 6), "bias": normal(rng, 6), "line": weight(rng, 2, 6, 3)}

    def model_fn(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["conv"], (2, 1), "SAME", rhs_dilation=(1, 2), feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ) + params["bias"]  # fmt: skip
        h = jnp.tanh(h).reshape(*h.shape[:1], -1, 6)
        h = jax.lax.conv_general_dilated(
            h, params["line"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return h.mean(1)

    return model_fn, params, normal(rng, 3, 4, 5, 4)


@architecture(**{"['kernel']": "convolution", "['out']": "dense"})
def three_dimensional_convolution_under_vmap(rng):
    params = {"kernel": weight(rng, 2, 2, 2, 1, 3), "out": weight(rng, 3, 2)}

    def one(params, x):
        numbers = ("NDHWC", "DHWIO", "NDHWC")
        h = jax.lax.conv_general_dilated(
            x[None], params["kernel"], (1, 1, 1), "VALID", dimension_numbers=numbers
        )
        return jnp.tanh(h)[0].mean((0, 1, 2)) @ params["out"]

    return jax.vmap(one, in_axes=(None, 0)), params, normal(rng, 4, 3, 3, 3, 1)


@architecture(**{"['embedding']": "lookup + dense", "['scale']": "scale", "['position']": "shift"})
def tied_embedding(rng):
    params = {
        "embedding": normal(rng, 5, 4),
        "scale": normal(rng, 4),
        "position": normal(rng, 3, 4),
    }

    def model_fn(params, tokens):
        x = params["embedding"][tokens] + params["position"][jnp.arange(3)]
        return jnp.tanh((1 + params["scale"]) * x) @ params["embedding"].T

    return model_fn, params, jnp.asarray(rng.integers(0, 5, (4, 3)))


@architecture(**{"['qkv']": "3 dense", "['w']": "2 dense", "['unused']": "unused"})
def slices_branches_and_repeated_layers(rng):
    params = {"qkv": weight(rng, 4, 12), "w": weight(rng, 4, 4), "unused": normal(rng, 2)}

    def model_fn(params, batch):
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        x = jnp.tanh(batch["x"] @ q) * (batch["x"] @ k) + batch["x"] @ v
        used, left = (lambda x: jnp.sin(x @ params["w"])), (lambda x: x @ -params["w"])
        return jax.lax.cond(batch["flag"], used, left, x)

    return model_fn, params, {"x": normal(rng, 3, 4), "flag": jnp.array(False)}


@architecture(**dense_with_bias(""))
def tokens_apart(rng):
    return lambda params, x: jnp.tanh(affine(params, x)), layer(rng, 4, 2), normal(rng, 3, 2, 4)


@architecture(**{"": "dense"})
def examples_along_three_axes(rng):
    def model_fn(w, x):
        h = jnp.tanh(x @ w)
        return h - h.mean(2, keepdims=True)

    return model_fn, weight(rng, 3, 2), normal(rng, 2, 3, 4, 3)


@architecture(**{".layers[0].weight": "dense", ".layers[0].bias": "shift of .layers[0].weight"})
def equinox(rng):
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(4, 3, 6, 1, dtype=jnp.float64, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return (lambda p, x: jax.vmap(eqx.combine(p, static))(x)), params, normal(rng, 5, 4)


@architecture(
    **{
        "['Embed_0']['embedding']": "lookup",
        "['LayerNorm_0']['scale']": "scale",
        "['LayerNorm_0']['bias']": "shift",
        "['MultiHeadDotProductAttention_0']['query']['kernel']": "dense",
        "['MultiHeadDotProductAttention_0']['out']['bias']": "shift of"
        " params['MultiHeadDotProductAttention_0']['out']['kernel']",
        "['Conv_0']['kernel']": "convolution",
        "['Conv_0']['bias']": "shift of params['Conv_0']['kernel']",
        "['Dense_0']['kernel']": "dense",
        "['Dense_0']['bias']": "shift of params['Dense_0']['kernel']",
    }
)
def linen(rng):
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            f64 = {"param_dtype": jnp.float64}
            x = nn.LayerNorm(**f64)(nn.Embed(5, 4, **f64)(tokens))
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, **f64)(x)
            return nn.Dense(3, **f64)(nn.Conv(4, (2,), **f64)(x))

    tokens = jnp.asarray(rng.integers(0, 5, (2, 3)))
    params = Net().init(jax.random.key(0), tokens)["params"]
    return lambda p, x: Net().apply({"params": p}, x), params, tokens


@architecture(
    **{
        "['embedding']['embedding']": "lookup + dense",
        "['norm']['scale']": "scale",
        "['attention']['query']['kernel']": "dense",
        "['attention']['query']['bias']": "shift of params['attention']['query']['kernel']",
        "['mlp']['layers'][2]['kernel']": "dense",
    }
)
def nnx(rng):
    pytest.importorskip("flax.nnx")
    return MODELS["nnx_transformer"].make(rng)


@functools.cache
def captured(name):
    model_fn, params, batch = ARCHITECTURES[name][0](np.random.default_rng(0))
    u = normal(np.random.default_rng(1), *jax.eval_shape(model_fn, params, batch).shape)
    found = []

    @jax.jit
    def contributions(params, batch):
        layers = capture(model_fn, GAUSSIAN, params, batch)
        found[:] = coverage_of(layers), layers.examples
        total = [jnp.zeros(shape.shape) for shape in layers.shapes]
        for use, x, delta in zip(layers.uses, layers.inputs, layers.outputs(u[None]), strict=True):
            total[use.view.leaf] += GroupGradients((use,), (x,), (delta,)).gradients().sum((0, 1))
        plain = jax.vjp(lambda p: model_fn(p, batch), params)[1](u)[0]
        return layers.unflatten(total), plain

    return contributions(params, batch), *found


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_uses_add_up_to_the_gradient(name):
    (total, gradient), _, _ = captured(name)
    assert relative_error(total, gradient) < 1e-10


@every_architecture
def test_coverage_names_the_treatment_of_each_parameter(name):
    _, coverage, _ = captured(name)
    for path, expected in ARCHITECTURES[name][1].items():
        matching = [p for p in coverage if p.removeprefix("params").endswith(path)]
        assert matching, coverage
        assert expected.removeprefix("shift of ") in coverage[matching[0]], str(coverage)
        assert coverage[matching[0]].split()[0] == expected.split()[0], str(coverage)
    assert len(str(coverage).splitlines()) == len(coverage) + 1


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("attention_heads_by_einsum", (0,)),
        ("linen", (0,)),
        ("tokens_apart", (0, 1)),
        ("examples_along_three_axes", (0, 1)),
    ],
)
def test_axes_along_which_rows_meet_are_found(name, axes):
    assert captured(name)[2] == axes


def window_by_example(params, batch):
    """Each example reads another part of the parameter."""
    x, start = batch
    window = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(params["table"], i, 2))(start)
    return x * window @ params["w"]


def test_a_use_without_a_rule_raises_with_parameter_and_primitive():
    params = {"table": jnp.ones(5), "w": jnp.ones((2, 3))}
    batch = jnp.ones((4, 2)), jnp.arange(4)
    with pytest.raises(ValueError, match=r"params\['table'\].*'gather'"):
        fvp.fisher_diagonal(window_by_example, GAUSSIAN, params, batch)


def straight_through(rule):
    """x @ round(w) with the derivative of x @ w, by a rule of that name."""
    rounded = getattr(jax, rule)(lambda x, w: x @ jnp.round(w))
    if rule == "custom_jvp":
        jvp = lambda p, t: (p[0] @ jnp.round(p[1]), t[0] @ p[1] + p[0] @ t[1])
        rounded.defjvp(jvp)
    else:
        rounded.defvjp(lambda x, w: (rounded(x, w), (x, w)), pull_product)
    return rounded


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_a_rule_that_its_body_does_not_follow_is_not_opened(rule):
    product = straight_through(rule)
    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match=rule):
        fvp.fisher_diagonal(lambda w, x: product(x, w), GAUSSIAN, w, x)


def test_mixed_examples_raise_with_the_primitive():
    model = lambda w, x: (x - x.mean(0)) @ w
    with pytest.raises(ValueError, match=r"reduce_sum.*mixes"):
        fvp.fisher_diagonal(model, GAUSSIAN, jnp.ones((3, 2)), jnp.ones((4, 3)))


def test_a_convolution_over_merged_axes_keeps_its_examples():
    rng = np.random.default_rng(0)
    kernel = weight(rng, 2, 2, 1, 3)

    def model_fn(kernel, x):
        h = conv(x.reshape(-1, *x.shape[2:]), kernel)
        return jnp.tanh(h).reshape(*x.shape[:2], -1)

    layers = {}

    def run(kernel, x):
        layers["it"] = capture(model_fn, GAUSSIAN, kernel, x)
        return layers["it"].inputs[0]

    x = normal(rng, 2, 3, 3, 3, 1)
    patches = jax.jit(run)(kernel, x)
    assert layers["it"].examples == (0, 1)
    assert patches.shape == (6, 9, 1, 4)


def test_keys_of_their_own_keep_examples_apart():
    def one(w, example):
        kept = jax.random.bernoulli(example["key"], 0.5, (3,))
        return (kept * example["x"]) @ w

    batch = {"x": jnp.ones((4, 3)), "key": jax.random.split(jax.random.key(0), 4)}
    model_fn, w = jax.vmap(one, in_axes=(None, 0)), jnp.ones((3, 2))
    actual = fvp.fisher_diagonal(model_fn, GAUSSIAN, w, batch)
    expected = jnp.diagonal(product_matrix(fvp.fisher(model_fn, GAUSSIAN, w, batch)))
    assert relative_error(actual.ravel(), expected) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_softmax_needs_a_column_less_than_it_has_classes(scale):
    z = scale * jax.random.normal(jax.random.key(0), (6, 5))
    z = z.at[0, -1].set(-jnp.inf).at[1, 2].set(-jnp.inf)
    head = fvp.Softmax()
    root = head.fisher_root(z)
    columns = jax.vmap(root.column)(jnp.arange(root.size))
    assert root.size == 4
    u = jax.random.normal(jax.random.key(1), z.shape)
    product = jnp.einsum("kni,nk->ni", columns, jnp.einsum("kni,ni->nk", columns, u))
    assert relative_error(product, head.fisher(z, u)) < 1e-6
    labels = jax.random.categorical(jax.random.key(2), z)
    rebuilt = jnp.einsum("kni,nk->ni", columns, root.score(labels))
    assert relative_error(rebuilt, -head.score(z, labels)) < 1e-6
