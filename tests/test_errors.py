"""Wrong input raises at trace time and says which argument, what came and what is expected."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvp

SOFTMAX, SIGMOID, GAUSSIAN = fvp.Softmax(), fvp.Sigmoid(), fvp.Gaussian()
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
BATCH = jnp.ones((6, 2))
LABELS = jnp.zeros(6, jnp.int32)
KEY = jax.random.key(0)
CURVATURES = ["fisher", "ggn", "empirical_fisher", "mc_fisher", "hessian"]

every_curvature = pytest.mark.parametrize("curvature", CURVATURES)
with_targets = pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher", "hessian"])
whole_and_chunked = pytest.mark.parametrize("chunk_size", [None, 4], ids=["whole", "chunked"])


def model(params, x):
    return x @ params["w"] + params["b"]


def raises(error, *parts):
    """The message holds every part, whatever stands between them."""
    return pytest.raises(error, match="".join(f"(?=(?s:.*)(?:{part}))" for part in parts))


def trace(build, curvature, model_fn=model, head=SOFTMAX, params=PARAMS, batch=BATCH,
          targets=LABELS, **options):  # fmt: skip
    """Build and apply under abstract evaluation: no number is ever computed."""

    def product(params, batch, targets):
        operator = build(curvature, model_fn, head, params, batch, targets, KEY, **options)
        return operator.mv(params)

    return jax.eval_shape(product, params, batch, targets)


@every_curvature
def test_valid_input_traces(build, curvature):
    assert jax.tree.structure(trace(build, curvature)) == jax.tree.structure(PARAMS)


# --- The output of the model ------------------------------------------------------------------


@every_curvature
@whole_and_chunked
@pytest.mark.parametrize("head", [SIGMOID, GAUSSIAN], ids=["sigmoid", "gaussian"])
def test_output_without_event_axis(build, curvature, head, chunk_size):
    with raises(ValueError, r"z\[:, None\]", r"\(6,\)"):
        trace(
            build, curvature, lambda p, x: model(p, x)[:, 0], head,
            targets=jnp.zeros(6), chunk_size=chunk_size,
        )  # fmt: skip


@pytest.mark.parametrize("head", [SIGMOID, GAUSSIAN], ids=["sigmoid", "gaussian"])
def test_one_output_for_each_example_is_told_both_ways(head):
    z, y = jnp.zeros(6), jnp.zeros(6)
    with raises(ValueError, r"targets y\[:, None\]", r"event_ndim=0"):
        head.nll(z, y)
    with raises(ValueError, r"y\[:, None\] has it"):
        head.nll(z[:, None], y)
    kind = type(head)
    assert jnp.allclose(head.nll(z[:, None], y[:, None]), kind(event_ndim=0).nll(z, y))


def test_softmax_output_without_batch_axis(build):
    with raises(ValueError, r"z\[:, None\]", r"\(3,\)"):
        trace(build, "fisher", lambda p, x: model(p, x)[0])


def test_one_call_products_check_the_output():
    calls = {
        fvp.fisher_vector_product: (),
        fvp.ggn_vector_product: (jnp.zeros(6),),
        fvp.empirical_fisher_vector_product: (jnp.zeros(6),),
    }
    for product, targets in calls.items():
        with raises(ValueError, r"z\[:, None\]", r"\(6,\)"):
            product(lambda p, x: model(p, x)[:, 0], GAUSSIAN, PARAMS, BATCH, *targets, PARAMS)


def test_scalar_output_with_event_ndim_zero(build):
    with raises(ValueError, "batch ax", r"\(\)"):
        trace(build, "fisher", lambda p, x: model(p, x).sum(), fvp.Gaussian(event_ndim=0))


@every_curvature
@whole_and_chunked
def test_output_that_is_not_an_array(build, curvature, chunk_size):
    with raises(TypeError, "model", "tuple"):
        trace(build, curvature, lambda p, x: (model(p, x), x), chunk_size=chunk_size)
    with raises(TypeError, "model", "dict"):
        trace(build, curvature, lambda p, x: {"logits": model(p, x)}, chunk_size=chunk_size)


@every_curvature
@whole_and_chunked
def test_integer_output(build, curvature, chunk_size):
    with raises(TypeError, r"model_fn|\bz\b", "int32"):
        trace(
            build, curvature, lambda p, x: model(p, x).argmax(-1)[:, None].astype(jnp.int32),
            chunk_size=chunk_size,
        )  # fmt: skip


@every_curvature
@whole_and_chunked
def test_empty_batch(build, curvature, chunk_size):
    with raises(ValueError, "batch", r"\(0, 3\)|empty|no examples"):
        trace(build, curvature, batch=BATCH[:0], targets=LABELS[:0], chunk_size=chunk_size)


def test_model_that_is_not_callable(build):
    with raises(TypeError, "model_fn"):
        trace(build, "fisher", model_fn=PARAMS["w"])


def test_head_that_is_not_a_head(build):
    with raises(TypeError, "head", "softmax"):
        trace(build, "fisher", head="softmax")
    with raises(TypeError, "head"):
        trace(build, "fisher", head=fvp.Softmax)  # the class, not called


# --- Heads and their outputs ------------------------------------------------------------------


def test_scale_that_does_not_fit_the_output(build):
    with raises(ValueError, "scale", r"\(4,\)", r"3"):
        trace(build, "fisher", head=fvp.Gaussian(scale=np.ones(4)))


def test_precision_that_does_not_fit_the_output(build):
    with raises(ValueError, "precision", r"\(4, 4\)", r"3"):
        trace(build, "fisher", head=fvp.Gaussian(precision=np.eye(4)))


@pytest.mark.parametrize("scale", [-1.0, 0.0, np.array([1.0, -2.0]), np.nan], ids=str)
def test_scale_that_is_not_positive(scale):
    with raises(ValueError, "scale", "positive"):
        fvp.Gaussian(scale=scale)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (), (2, 2, 2)], ids=str)
def test_precision_that_is_not_square(shape):
    with raises(ValueError, "precision", str(shape).replace("(", r"\(").replace(")", r"\)")):
        fvp.Gaussian(precision=np.ones(shape))


def test_precision_with_a_shape_known_only_under_trace():
    with raises(ValueError, "precision", r"\(2, 3\)"):
        jax.eval_shape(
            lambda p: fvp.Gaussian(precision=p).nll(jnp.ones((6, 3)), jnp.ones((6, 3))),
            jnp.ones((2, 3)),
        )


def test_scale_and_precision_together():
    with raises(ValueError, "scale", "precision"):
        fvp.Gaussian(scale=2.0, precision=np.eye(2))


@pytest.mark.parametrize("family", [fvp.Sigmoid, fvp.Gaussian])
def test_event_ndim_that_counts_no_axes(family):
    with raises(ValueError, "event_ndim", "-1"):
        family(event_ndim=-1)
    for wrong in (1.0, "1", None):
        with raises(TypeError, "event_ndim", str(wrong)):
            family(event_ndim=wrong)


# --- Targets and weights ----------------------------------------------------------------------


@with_targets
@whole_and_chunked
@pytest.mark.parametrize("shape", [(5,), (6, 1), (), (1,)], ids=str)
def test_labels_of_the_wrong_shape(build, curvature, shape, chunk_size):
    with raises(ValueError, "targets", str(shape).replace("(", r"\(").replace(")", r"\)"), r"\(6"):
        trace(build, curvature, targets=jnp.zeros(shape, jnp.int32), chunk_size=chunk_size)


@with_targets
@pytest.mark.parametrize("head", [SIGMOID, GAUSSIAN], ids=["sigmoid", "gaussian"])
def test_targets_never_broadcast(build, curvature, head):
    for shape in [(6,), (6, 1), (1, 3)]:
        pattern = str(shape).replace("(", r"\(").replace(")", r"\)")
        with raises(ValueError, "targets", pattern, r"\(6, 3\)"):
            trace(build, curvature, head=head, targets=jnp.zeros(shape))


def test_floating_point_labels(build):
    with raises((TypeError, ValueError), "targets", "integer"):
        trace(build, "ggn", targets=jnp.zeros(6))


@with_targets
def test_targets_that_are_missing(build, curvature):
    with raises((TypeError, ValueError), "targets", "None"):
        trace(build, curvature, targets=None)


@whole_and_chunked
def test_value_and_grad_checks_its_targets(chunk_size):
    operator = fvp.fisher(model, SOFTMAX, PARAMS, BATCH, chunk_size=chunk_size)
    with raises(ValueError, "targets", r"\(5,\)", "6"):
        operator.value_and_grad(LABELS[:5])


@every_curvature
@whole_and_chunked
@pytest.mark.parametrize("shape", [(5,), (6, 1), (1, 6), (6, 3), (2, 6), (0,)], ids=str)
def test_weights_of_the_wrong_shape(build, curvature, shape, chunk_size):
    pattern = str(shape).replace("(", r"\(").replace(")", r"\)")
    with raises(ValueError, "weights", pattern, r"\(6,\)"):
        trace(build, curvature, weights=jnp.ones(shape), chunk_size=chunk_size)


@whole_and_chunked
def test_weights_that_may_be_of_examples_or_positions(build, chunk_size):
    """Aligning one axis with the last batch axis is silent where both are as long."""
    model_fn = lambda p, x: model(p, x)[:, None].repeat(6, 1)
    trace_with = lambda weights: trace(
        build, "fisher", model_fn, weights=weights, chunk_size=chunk_size
    )
    with raises(ValueError, "weights", r"\(6,\)", r"\(6, 6\)", r"weights\[:, None\]",
                r"weights\[None, :\]"):  # fmt: skip
        trace_with(jnp.ones(6))
    for shape in [(), (1,), (6, 1), (1, 6), (6, 6)]:
        trace_with(jnp.ones(shape))


def test_weights_of_examples_that_lack_an_axis_are_told_how_to_get_it(build):
    model_fn = lambda p, x: model(p, x)[:, None].repeat(5, 1)
    with raises(ValueError, "weights", r"\(6,\)", r"\(6, 5\)", r"weights\[:, None\]"):
        trace(build, "fisher", model_fn, weights=jnp.ones(6))


# --- Parameters and vectors -------------------------------------------------------------------


@every_curvature
@whole_and_chunked
def test_integer_parameter(build, curvature, chunk_size):
    params = {**PARAMS, "steps": jnp.zeros(2, jnp.int32)}
    with raises(TypeError, "params", "steps", "int32"):
        trace(build, curvature, params=params, chunk_size=chunk_size)


WRONG_VECTORS = {
    "missing leaf": ({"w": PARAMS["w"]}, ["structure"]),
    "extra leaf": ({**PARAMS, "c": jnp.zeros(1)}, ["structure"]),
    "other container": ([PARAMS["b"], PARAMS["w"]], ["structure"]),
    "bare array": (jnp.zeros(9), ["structure"]),
    "wrong shape": ({**PARAMS, "w": jnp.ones((3, 2))}, ["w", r"\(3, 2\)", r"\(2, 3\)"]),
    "broadcastable": ({**PARAMS, "b": jnp.ones(())}, ["b", r"\(\)", r"\(3,\)"]),
}
wrong_vector = pytest.mark.parametrize(
    ("vector", "parts"), WRONG_VECTORS.values(), ids=WRONG_VECTORS.keys()
)


@wrong_vector
@whole_and_chunked
def test_vector_unlike_the_params(vector, parts, chunk_size):
    operator = fvp.fisher(model, SOFTMAX, PARAMS, BATCH, chunk_size=chunk_size)
    for product in (operator.mv, operator.quadratic_form, lambda v: operator @ v):
        with raises(ValueError, r"\bv(ector)?\b", *parts):
            jax.eval_shape(product, vector)


@wrong_vector
def test_one_call_vector_unlike_the_params(vector, parts):
    with raises(ValueError, r"\bvector\b", *parts):
        fvp.fisher_vector_product(model, SOFTMAX, PARAMS, BATCH, vector)


def test_integer_vector():
    operator = fvp.fisher(model, SOFTMAX, PARAMS, BATCH)
    vector = {**PARAMS, "b": jnp.zeros(3, jnp.int32)}
    with raises(TypeError, r"\bv(ector)?\b", "b", "int32"):
        operator.mv(vector)


def test_a_dense_matrix_says_how_many_bytes_it_would_take():
    shapes = jax.ShapeDtypeStruct((50_000,), jnp.float32)
    build = lambda params: fvp.fisher(lambda p, x: x * p[:3], GAUSSIAN, params, jnp.ones((4, 1)))
    operator = jax.eval_shape(build, shapes)
    with raises(ValueError, "dense", "10,000,000,000 bytes", "max_bytes"):
        jax.eval_shape(lambda F: F.dense(), operator)
    matrix = jax.eval_shape(lambda F: F.dense(max_bytes=2e10), operator)
    assert matrix.shape == (50_000, 50_000)
    small = fvp.fisher(model, SOFTMAX, PARAMS, BATCH)
    with raises(ValueError, "dense", "648 bytes"):
        small.dense(max_bytes=100)


# --- Backward passes that can't be transposed -------------------------------------------------


def with_backward(backward):
    @jax.custom_vjp
    def function(x):
        return jnp.sin(x)

    function.defvjp(lambda x: (function(x), x), lambda x, g: (backward(g) * jnp.cos(x),))
    return lambda p, x: function(model(p, x))


def call_back(g):
    return jax.pure_callback(lambda g: g, jax.ShapeDtypeStruct(g.shape, g.dtype), g)


def loop(g):
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, 2 * c[1]), (0, g))[1]


NOT_LINEAR = {
    "a test": lambda g: jnp.where(jnp.isnan(g), 0, g),
    "a callback": call_back,
    "a loop": loop,
    "a square": lambda g: g * g,
}


@pytest.mark.parametrize("backward", NOT_LINEAR.values(), ids=NOT_LINEAR)
@pytest.mark.parametrize("compiled", [False, True])
@whole_and_chunked
def test_a_backward_pass_that_is_not_transposable(backward, compiled, chunk_size):
    def product(params):
        return fvp.fisher(
            with_backward(backward), SOFTMAX, params, BATCH, chunk_size=chunk_size
        ).mv(params)

    with raises(TypeError, "model_fn", "transpos", "linear in the cotangent", "custom_jvp"):
        (jax.jit(product) if compiled else product)(PARAMS)


# --- Options ----------------------------------------------------------------------------------


@every_curvature
def test_chunk_size_that_counts_no_examples(build, curvature):
    for wrong in (0, -1):
        with raises(ValueError, "chunk_size", str(wrong)):
            trace(build, curvature, chunk_size=wrong)
    for wrong in (2.0, "2", True):
        with raises(TypeError, "chunk_size", str(wrong)):
            trace(build, curvature, chunk_size=wrong)


def test_num_samples_that_counts_no_samples(build):
    with raises(ValueError, "num_samples", "0"):
        trace(build, "mc_fisher", num_samples=0)
    with raises(TypeError, "num_samples", "1.5"):
        trace(build, "mc_fisher", num_samples=1.5)


def test_chunks_of_leaves_with_different_numbers_of_examples(build):
    with raises(ValueError, "batch_axes", r"\[5, 6\]"):
        trace(
            build, "fisher", lambda p, b: model(p, b[0]), batch=(BATCH, jnp.ones(5)), chunk_size=4
        )


def test_chunks_of_a_model_whose_outputs_are_not_those_of_the_examples(build):
    with raises(ValueError, "chunk_size", r"6 examples", r"\(3, 3\)"):
        trace(build, "fisher", lambda p, x: model(p, x)[:3], chunk_size=4)


def test_chunks_along_axes_that_do_not_exist(build):
    with raises(ValueError, "batch_axes"):
        trace(build, "fisher", chunk_size=4, batch_axes=2)
    with raises(ValueError, "batch_axes"):
        trace(build, "fisher", chunk_size=4, batch_axes=(0, 0))
    with raises(ValueError, "batch_axes"):
        trace(build, "fisher", chunk_size=4, batch_axes=None)


# --- Parameters of the transformations --------------------------------------------------------

TRANSFORMS = {
    "adaptive": lambda: fvp.natural_gradient(1.0, model, SOFTMAX),
    "damping": lambda: fvp.scale_by_fisher(model, SOFTMAX, damping=0.1),
    "kfac": lambda: fvp.scale_by_kfac(model, SOFTMAX),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_parameters_that_are_not_arrays_name_the_leaf(make):
    for leaf in (jax.nn.relu, "relu", object()):
        with raises(TypeError, r"params\['act'\]", type(leaf).__name__, "eqx.partition"):
            make().init({**PARAMS, "act": leaf})


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_parameters_that_are_absent_masked_or_shapes_are_none_of_these(make):
    init = make().init
    shapes = jax.eval_shape(lambda: PARAMS)
    rest = {"none": None, "masked": optax.MaskedNode(), "numpy": np.ones(2)}
    for params in ({**PARAMS, **rest}, shapes):
        init(params)
    jax.eval_shape(init, {**shapes, "none": None})


# --- Errors of the model's own ----------------------------------------------------------------


def test_an_error_of_the_model_says_what_it_was_called_with():
    step = lambda: fvp.natural_gradient(1.0, model, SOFTMAX)
    uses = (
        lambda batch: fvp.fisher(model, SOFTMAX, PARAMS, batch),
        lambda batch: fvp.fisher_vector_product(model, SOFTMAX, PARAMS, batch, PARAMS),
        lambda batch: step().update(
            PARAMS, step().init(PARAMS), PARAMS, batch=batch, targets=LABELS
        ),
        lambda batch: fvp.kfac(model, SOFTMAX, PARAMS, batch),
    )
    for use in uses:
        with pytest.raises(TypeError) as caught:
            use((BATCH, LABELS))
        (note,) = (note for note in caught.value.__notes__ if note.startswith("fvp called"))
        for part in ("[1] int32[6]", "['w'] float64[2, 3]", "targets="):
            assert part in note


def test_an_error_of_a_model_stays_what_it_was_whatever_its_parameters_are():
    @jax.tree_util.register_pytree_node_class
    class Strict:  # takes arrays alone
        def __init__(self, w):
            self.w = w + 0.0

        def tree_flatten(self):
            return (self.w,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    def fails(params, batch):
        raise KeyError("own")

    with pytest.raises(KeyError, match="own") as caught:
        fvp.fisher(fails, SOFTMAX, Strict(jnp.ones(2)), BATCH)
    assert any("[2]" in note for note in caught.value.__notes__)


def test_a_module_in_place_of_a_model_function_is_told_how_it_is_wrapped():
    class Module:
        def __call__(self, x):
            return x

    with pytest.raises(TypeError) as caught:
        fvp.fisher(Module(), SOFTMAX, PARAMS, BATCH)
    assert "A module is wrapped" in caught.value.__notes__[0]
