"""Heads against the definitions of their distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from dense import (
    CASES,
    quick_jit,
    rarely,
    relative_error,
    sigmoid_log_prob,
    softmax_rows_log_prob,
)

import fvp

COMPILE_QUICKLY = True

SAMPLED = [case for case in CASES.values() if case.name != "softmax-rows"]  # the head is softmax's

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
sampled_case = pytest.mark.parametrize(
    "case",
    [case if case.name[-2:] not in ("0d", "2d") else rarely(case) for case in SAMPLED],
    ids=[case.name for case in SAMPLED],
)


def draw(case, batch_axes, seed=0):
    """z, y, a tangent u of the shape of z, and a second z."""
    rng = np.random.default_rng(seed)
    shape = batch_axes + case.event_shape
    z, u, step = rng.normal(size=(3, *shape))
    return jnp.asarray(z), case.targets(rng, batch_axes), jnp.asarray(u), jnp.asarray(z + step)


@functools.partial(quick_jit, static_argnames="case")
def methods(case, z, y, u, z_new):
    head = case.head
    return {
        "nll": head.nll(z, y),
        "mean": head.mean(z),
        "score": head.score(z, y),
        "fisher": head.fisher(z, u),
        "hessian": head.hessian(z, y, u),
        "kl": head.kl(z, z_new),
        "sqrt_fisher_transpose": head.sqrt_fisher_transpose(z, u),
        "sqrt_fisher": head.sqrt_fisher(z, jnp.ones_like(head.sqrt_fisher_transpose(z, u))),
    }


@functools.partial(quick_jit, static_argnames="case")
def definitions(case, z, y, u, z_new):
    """The same by definition, on flat rows."""

    def row(z, y, u, z_new):
        return {
            "nll": -case.log_prob(z, y),
            "mean": case.mean(z),
            "score": case.score(z, y),
            "fisher": case.fisher(z) @ u,
            "hessian": -jax.hessian(case.log_prob)(z, y) @ u,
            "kl": case.kl(z, z_new),
        }

    z_rows, u_rows, new_rows = (a.reshape(-1, case.size) for a in (z, u, z_new))
    return jax.vmap(row)(z_rows, case.rows(y), u_rows, new_rows)


@functools.cache
def evaluated(case, batch_axes):
    arrays = draw(case, batch_axes)
    return methods(case, *arrays), definitions(case, *arrays)


@functools.partial(quick_jit, static_argnames="case")
def fisher_blocks(case, z):
    return jax.vmap(case.fisher)(z.reshape(-1, case.size))


# --- Each method against its definition -------------------------------------------------------


@every_case
@pytest.mark.parametrize("batch_axes", [rarely((6,)), (2, 3)], ids=["B", "BT"])
@pytest.mark.parametrize("method", ["nll", "mean", "score", "fisher", "hessian", "kl"])
def test_method_equals_its_definition(case, batch_axes, method):
    actual, expected = evaluated(case, batch_axes)
    event_shape = () if method in ("nll", "kl") else case.event_shape
    expected = expected[method].reshape(batch_axes + event_shape)
    assert relative_error(actual[method], expected) < 1e-12


@every_case
def test_nll_can_be_differentiated_twice(case):
    some, y, u, _ = draw(case, (6,))

    @quick_jit
    def derivatives(z, u):
        gradient = jax.grad(lambda z: case.head.nll(z, y).sum())
        return jax.jvp(gradient, (z,), (u,))

    for z in (some, 0 * some):  # zero logits are where every network starts
        gradient, hessian = derivatives(z, u)
        expected = definitions(case, z, y, u, z)
        assert relative_error(gradient, -expected["score"].reshape(z.shape)) < 1e-12
        assert relative_error(hessian, expected["hessian"].reshape(z.shape)) < 1e-12


@every_case
def test_kl_of_equal_distributions_is_exactly_zero(case):
    z, *_ = draw(case, (2, 3))
    kl = quick_jit(lambda z, z_new: case.head.kl(z, z_new))
    assert np.array_equal(kl(z, z), np.zeros((2, 3)))


# --- Normalisation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "softmax-rows", "sigmoid", "sigmoid-0d", "sigmoid-2d"])
def test_probabilities_of_all_outcomes_sum_to_one(name):
    case = CASES[name]
    z, *_ = draw(case, (5,))
    event = () if case.integer_targets else case.event_shape
    total = sum(
        jnp.exp(-case.head.nll(z, jnp.broadcast_to(outcome.reshape(event), (5, *event))))
        for outcome in case.outcomes
    )
    np.testing.assert_allclose(total, 1.0, rtol=1e-13)


@every_case
def test_relative_nll_is_the_nll_up_to_a_term_of_the_targets(case):
    z, y, _, z_new = draw(case, (6,))
    gaps = [case.head.nll(z, y) - case.head.relative_nll(z, y) for z in (z, z_new)]
    np.testing.assert_allclose(*gaps, rtol=1e-12, atol=1e-12)


HEADS_WITH_CONSTANTS = {
    "gaussian": (fvp.Gaussian(scale=0.5), [[2e-9, 0.0]], [[0.0, 0.0]], 0.5 * 16e-18),
    "student-t": (fvp.StudentT(df=3.0), [[1e-9]], [[0.0]], 2 / 3 * 1e-18),
    "product": (
        fvp.Product({"a": fvp.Gaussian(event_ndim=0)}, {"a": 4.0}),
        {"a": [1e-9]},
        {"a": [0.0]},
        2e-18,
    ),
}


@pytest.mark.parametrize("name", HEADS_WITH_CONSTANTS)
def test_no_constant_hides_a_small_relative_nll(name):
    head, z, y, expected = HEADS_WITH_CONSTANTS[name]
    as_arrays = lambda tree: jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: isinstance(x, list))
    actual = head.relative_nll(as_arrays(z), as_arrays(y))
    np.testing.assert_allclose(actual, [expected], rtol=1e-12)


def test_a_head_with_a_new_nll_does_not_keep_the_relative_one_of_its_parent():
    class Absolute:
        def _nll(self, z, y):
            return jnp.sum(jnp.abs(z - y) + jnp.log(2.0), axis=self.event_axes())

    class Laplace(fvp.Gaussian):
        _nll = Absolute._nll

    class Inherits(Laplace):
        pass

    class Mixed(Absolute, fvp.Gaussian):
        pass

    for head in (Laplace(), Inherits(), Mixed()):
        value = head.relative_nll(jnp.array([[3.0]]), jnp.array([[1.0]]))
        np.testing.assert_allclose(value, 2 + np.log(2), rtol=1e-6)


def test_gaussian_nll_equals_scipy():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(2, 5, 3))
    scale = np.array([0.5, 1.3, 2.0])
    independent = -scipy.stats.norm.logpdf(y, z, scale).sum(-1)
    np.testing.assert_allclose(fvp.Gaussian(scale=scale).nll(z, y), independent, rtol=1e-13)
    precision = CASES["gaussian-precision"].precision
    joint = -scipy.stats.multivariate_normal(cov=np.linalg.inv(precision)).logpdf(y - z)
    np.testing.assert_allclose(fvp.Gaussian(precision=precision).nll(z, y), joint, rtol=1e-12)


def test_gaussian_default_is_the_unit_gaussian():
    z, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = -scipy.stats.norm.logpdf(y, z).sum(-1)
    np.testing.assert_allclose(fvp.Gaussian().nll(z, y), expected, rtol=1e-13)


def test_binary_targets_may_be_integers():
    z, y, *_ = draw(CASES["sigmoid"], (6,))
    head = fvp.Sigmoid()
    for method in (head.nll, head.score):
        assert np.array_equal(method(z, y.astype(jnp.int32)), method(z, y))


# --- The square root of the Fisher matrix -----------------------------------------------------


@every_case
def test_sqrt_fisher_is_a_square_root_with_at_most_one_column_per_output(case):
    z, *_ = draw(case, (6,))
    columns = jax.eval_shape(case.head.sqrt_fisher_transpose, z, z)
    count = columns.size // 6
    assert columns.shape[0] == 6
    assert count <= case.size
    basis = np.broadcast_to(np.eye(count)[:, None], (count, 6, count))
    basis = basis.reshape(count, *columns.shape)
    s = quick_jit(jax.vmap(lambda w: case.head.sqrt_fisher(z, w)))(basis)
    s = s.reshape(count, 6, case.size)
    assert relative_error(np.einsum("kni,knj->nij", s, s), fisher_blocks(case, z)) < 1e-13


@every_case
def test_sqrt_fisher_transpose_is_the_adjoint(case):
    z, _, u, _ = draw(case, (2, 3))
    actual, _ = evaluated(case, (2, 3))
    transposed = actual["sqrt_fisher_transpose"]  # S^T u
    w = jnp.asarray(np.random.default_rng(1).normal(size=transposed.shape))
    s_w = quick_jit(lambda w: case.head.sqrt_fisher(z, w))(w)
    np.testing.assert_allclose(np.vdot(s_w, u), np.vdot(w, transposed), rtol=1e-12)


# --- Samples ----------------------------------------------------------------------------------

SAMPLES = 200_000


def z_scores(values, expected):
    """Deviation of the mean over axis 0 in standard errors."""
    values = np.asarray(values)
    deviation = np.abs(values.mean(0) - expected)
    # An entry that is the same in every sample has no error but rounding.
    return deviation / (values.std(0) / np.sqrt(len(values)) + 1e-12)


@sampled_case
def test_samples_are_independent_and_have_the_moments_of_the_head(case):
    z, y, *_ = draw(case, (2,))

    @quick_jit
    def sample_and_score(key):
        z_many = jnp.broadcast_to(z, (SAMPLES, *z.shape))
        sample = case.head.sample(key, z_many)
        return sample, case.head.score(z_many, sample)

    sample, score = sample_and_score(jax.random.key(0))
    assert sample.shape == (SAMPLES, *y.shape)
    score = np.asarray(score).reshape(SAMPLES, 2, case.size)
    assert z_scores(score, 0.0).max() < 5
    # F_R on the diagonal blocks; rows know nothing of each other.
    fisher = jax.scipy.linalg.block_diag(*fisher_blocks(case, z))
    score_rows = score.reshape(SAMPLES, -1)
    assert z_scores(score_rows[:, :, None] * score_rows[:, None, :], fisher).max() < 5
    values = jax.nn.one_hot(sample, case.size) if case.integer_targets else sample
    values = np.asarray(values).reshape(SAMPLES, 2, case.size)
    assert z_scores(values, jax.vmap(case.mean)(z.reshape(2, -1))).max() < 5


# --- KL and Fisher ----------------------------------------------------------------------------


@every_case
def test_fisher_is_the_curvature_of_kl(case):
    z, y, u, _ = draw(case, (6,))
    d = 1e-4 * u
    actual = methods(case, z, y, d, z + d)
    quadratic = (d * actual["fisher"]).reshape(6, -1).sum(-1)
    np.testing.assert_allclose(2 * actual["kl"] / quadratic, 1.0, atol=1e-3)


@every_case
def test_float32_kl_keeps_its_digits(case):
    rng = np.random.default_rng(2)
    z, u = rng.normal(size=(2, 6, *case.event_shape))
    z[:2] *= 6.0  # confident predictions too
    kl, definition = quick_jit(lambda *z: case.head.kl(*z)), quick_jit(jax.vmap(case.kl))
    for size in (1e-1, 5e-3, 1e-4):  # KL around 1e-2, 1e-5, 1e-8
        z32 = jnp.asarray(z, jnp.float32), jnp.asarray(z + size * u, jnp.float32)
        z64 = (a.astype(jnp.float64).reshape(6, -1) for a in z32)
        actual = kl(*z32)
        assert actual.dtype == jnp.float32
        assert (actual >= 0).all()
        # The definition's sum loses nine digits at 1e-8; atol is what float64 keeps of it.
        np.testing.assert_allclose(actual, definition(*z64), rtol=1e-3, atol=1e-14)


# --- Extreme logits and narrow dtypes ---------------------------------------------------------

EXTREMES = [(jnp.float32, 1e4), (jnp.bfloat16, 3e4), (jnp.float16, 3e4)]
extreme = pytest.mark.parametrize(
    ("dtype", "size"), EXTREMES, ids=["float32-1e4", "bfloat16-3e4", "float16-3e4"]
)


@extreme
def test_softmax_is_exact_at_extreme_logits(dtype, size):
    head = fvp.Softmax()
    z = jnp.asarray([[size, -size, 0.0], [-size, size, size], [size, size, size]], dtype)
    y = jnp.array([1, 0, 2])
    u = jnp.asarray([[1.0, -2.0, 3.0]] * 3, dtype)
    z64 = np.asarray(z, np.float64)
    log_p = scipy.special.log_softmax(z64, axis=-1)
    rounding = float(jnp.finfo(dtype).eps) * (4 if dtype == jnp.float32 else 1)

    def check(actual, expected):
        assert actual.dtype == dtype
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding)

    @jax.jit
    def computed(z, u):
        return {
            "nll": head.nll(z, y),
            "nll of rows": head.nll(z, jax.nn.one_hot(y, 3, dtype=dtype)),
            "score": head.score(z, y),
            "gradient": -jax.grad(lambda z: head.nll(z, y).sum())(z),
            "fisher": head.fisher(z, u),
            "kl": head.kl(z, -z),
            "kl backwards": head.kl(-z, z),
        }

    p, u64 = np.exp(log_p), np.asarray(u, np.float64)
    log_q = scipy.special.log_softmax(-z64, axis=-1)
    nll, score = -log_p[np.arange(3), y], np.eye(3)[y] - np.exp(log_p)
    expected = {
        "nll": nll,
        "nll of rows": nll,
        "score": score,
        "gradient": score,
        "fisher": p * (u64 - (p * u64).sum(-1, keepdims=True)),
        "kl": (p * (log_p - log_q)).sum(-1),
        "kl backwards": (np.exp(log_q) * (log_q - log_p)).sum(-1),
    }
    jax.tree.map(check, computed(z, u), expected)


@extreme
def test_sigmoid_is_exact_at_extreme_logits(dtype, size):
    head = fvp.Sigmoid()
    z = jnp.asarray([[size, -size], [-size, 0.5], [size, 0.0]], dtype)
    y = jnp.asarray([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], dtype)
    u = jnp.asarray([[1.0, -2.0]] * 3, dtype)
    z64, y64, u64 = (np.asarray(a, np.float64) for a in (z, y, u))
    p, log_p, log_not_p = scipy.special.expit(z64), *map(scipy.special.log_expit, (z64, -z64))
    rounding = float(jnp.finfo(dtype).eps) * (4 if dtype == jnp.float32 else 1)

    def check(actual, expected):
        assert actual.dtype == dtype
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rounding)

    @jax.jit
    def computed(z, y, u):
        gradient = jax.grad(lambda z: head.nll(z, y).sum())(z)
        products = head.score(z, y), -gradient, head.fisher(z, u)
        return head.nll(z, y), products, head.kl(z, -z)

    nll = -(y64 * log_p + (1 - y64) * log_not_p).sum(-1)
    kl = p * (log_p - log_not_p) + (1 - p) * (log_not_p - log_p)  # KL(r(z) to r(-z))
    expected = nll, (y64 - p, y64 - p, p * (1 - p) * u64), kl.sum(-1)
    jax.tree.map(check, computed(z, y, u), expected)


def test_kl_counts_classes_whose_probability_underflows():
    z, z_new = jnp.array([[200.0, 0.0, 0.0], [0.0, 0.0, 0.0]], jnp.float32)[:, None]
    np.testing.assert_allclose(fvp.Softmax().kl(z, z_new), [np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(fvp.Sigmoid().kl(z, z_new), [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-vector", "gaussian-precision"])
def test_gaussian_is_finite_at_extreme_means(name):
    head = CASES[name].head
    z = jnp.asarray([[1e4, -1e4, 0.0]], jnp.float32)
    y = jnp.zeros_like(z)
    values = head.nll(z, y), head.score(z, y), head.fisher(z, z), head.kl(z, -z)
    assert all(value.dtype == jnp.float32 and jnp.isfinite(value).all() for value in values)


@pytest.mark.each_value
@every_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_results_are_the_float64_results_rounded(case, dtype):
    def cast(arrays, dtype):
        return [a.astype(dtype) if a.dtype.kind != "i" else a for a in arrays]

    arrays = cast(draw(case, (6,)), dtype)
    actual, expected = methods(case, *arrays), methods(case, *cast(arrays, jnp.float64))
    # One rounding of the result; the rest is float32 arithmetic inside.
    rounding = 1e-5 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for name, value in actual.items():
        assert value.dtype == dtype, name
        value = np.asarray(value, np.float64)
        np.testing.assert_allclose(value, expected[name], rtol=rounding, atol=2e-6, err_msg=name)


@pytest.mark.each_value
@sampled_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_samples_are_targets_of_the_same_dtype(case, dtype):
    z = jax.ShapeDtypeStruct((4, *case.event_shape), dtype)
    sample = jax.eval_shape(case.head.sample, jax.random.key(0), z)
    if case.integer_targets:
        assert jnp.issubdtype(sample.dtype, jnp.integer)
    else:
        assert sample.dtype == dtype
    assert jax.eval_shape(case.head.nll, z, sample).dtype == dtype


@pytest.mark.parametrize("name", ["poisson", "student-t", "multinomial"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, rarely(jnp.float64)])
def test_everything_is_finite_at_extreme_outputs(name, dtype):
    case = CASES[name]
    z = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 1e4, 1e4]], dtype)
    y = case.targets(np.random.default_rng(0), (3,)).astype(dtype)
    actual = methods(case, z, y, jnp.ones_like(z), -z)
    gradient = jax.grad(lambda z: case.head.nll(z, y).astype(jnp.float32).sum())(z)
    for value in (*actual.values(), gradient, methods(case, z, y, z, z)["kl"]):
        assert value.dtype == dtype
        assert jnp.isfinite(value).all()
    np.testing.assert_allclose(gradient, -actual["score"], rtol=1e-6)


def test_poisson_keeps_its_derivatives_where_the_rate_ends():
    z, y, u = jnp.asarray([[500.0]]), jnp.asarray([[3.0]]), jnp.ones((1, 1))
    head = fvp.Poisson()
    gradient = jax.grad(lambda z: head.nll(z, y).sum())
    assert gradient(z) > 1e150
    np.testing.assert_array_equal(gradient(z), -head.score(z, y))
    hessian = jax.jvp(gradient, (z,), (u,))[1]
    np.testing.assert_array_equal(hessian, head.hessian(z, y, u))
    np.testing.assert_array_equal(hessian, head.fisher(z, u))


def test_poisson_nll_equals_scipy():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    y = jnp.arange(15).reshape(5, 3)
    expected = -scipy.stats.poisson.logpmf(y, np.exp(z)).sum(-1)
    np.testing.assert_allclose(fvp.Poisson().nll(z, y), expected, rtol=1e-13)


def test_multinomial_nll_equals_scipy():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    y = jnp.asarray([[2, 0, 3], [1, 4, 0]])
    expected = -scipy.stats.multinomial.logpmf(y, 5, scipy.special.softmax(z, -1))
    np.testing.assert_allclose(fvp.Multinomial(5).nll(z, y), expected, rtol=1e-13)


def test_a_multinomial_of_one_draw_is_the_softmax_and_any_other_a_weighted_one():
    rng = np.random.default_rng(0)
    z, u, z_new = jnp.asarray(rng.normal(size=(3, 4, 3)))
    y = jnp.asarray(rng.multinomial(7, [0.2, 0.3, 0.5], 4))
    many, one, softmax = fvp.Multinomial(7), fvp.Multinomial(1), fvp.Softmax()
    for name, arguments in (("fisher", (u,)), ("kl", (z_new,))):
        expected = getattr(softmax, name)(z, *arguments)
        np.testing.assert_allclose(getattr(one, name)(z, *arguments), expected, rtol=1e-13)
        np.testing.assert_allclose(getattr(many, name)(z, *arguments), 7 * expected, rtol=1e-13)
    np.testing.assert_allclose(many.score(z, y), 7 * softmax.score(z, y / 7), rtol=1e-12)
    # Counts of another sum count by it, in every derivative of the nll.
    gradient = jax.grad(lambda z: many.nll(z, 2 * y).sum())
    np.testing.assert_allclose(gradient(z), -many.score(z, 2 * y), rtol=1e-12)
    hessian = jax.jvp(gradient, (z,), (u,))[1]
    np.testing.assert_allclose(hessian, many.hessian(z, 2 * y, u), rtol=1e-12)
    np.testing.assert_allclose(hessian, 2 * many.fisher(z, u), rtol=1e-12)


@pytest.mark.parametrize("df", [0.5, 1.0, 2.5, 80.0, 1e5])
def test_student_t_nll_equals_scipy(df):
    z, y = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = -scipy.stats.t.logpdf(y, df, z, 0.7).sum(-1)
    np.testing.assert_allclose(fvp.StudentT(df, 0.7).nll(z, y), expected, rtol=1e-9)
    in_float32 = fvp.StudentT(df, 0.7).nll(*(jnp.asarray(x, jnp.float32) for x in (z, y)))
    np.testing.assert_allclose(in_float32, expected, rtol=1e-4)


# The KL divergence at shifts of 0.5, 30 and 1e4 scale sqrt(df), by mpmath at 25 digits.
STUDENT_T_KL = {
    0.3: (0.014423035624723218, 1.9652445769110896, 8.512268878232275),
    2.0: (0.14432437366786247, 9.278902850828969, 26.710462531560154),
    30.0: (3.2031000049471294, 104.92844541663175, 284.9952786763176),
    1e6: (111571.62722898493, 3401755.530002339, 9210349.087315805),
}


@pytest.mark.parametrize("df", STUDENT_T_KL)
def test_student_t_kl_at_every_distance(df):
    head, scale = fvp.StudentT(df, 2.0), 2.0 * np.sqrt(df)
    for shift, expected in zip((0.5, 30.0, 1e4), STUDENT_T_KL[df], strict=True):
        far, zero = jnp.asarray([[scale * shift]]), jnp.zeros((1, 1))
        for z, z_new in ((far, zero), (zero, far)):
            np.testing.assert_allclose(head.kl(z, z_new), [expected], rtol=1e-5)
            narrow = head.kl(z.astype(jnp.float32), z_new.astype(jnp.float32))
            np.testing.assert_allclose(narrow, [expected], rtol=1e-4)


def test_student_t_kl_of_cauchy_distributions_is_elementary():
    z = jnp.linspace(-30, 30, 40)[:, None]
    expected = np.log1p(z[:, 0] ** 2 / 4)
    np.testing.assert_allclose(fvp.StudentT(1.0).kl(0 * z, z), expected, rtol=1e-8)


def test_student_t_of_many_degrees_of_freedom_is_the_gaussian():
    z, y, u = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)))
    student, gaussian = fvp.StudentT(1e9, 0.7), fvp.Gaussian(0.7)
    for name, arguments in (("nll", (y,)), ("fisher", (u,)), ("hessian", (y, u)), ("kl", (y,))):
        expected = getattr(gaussian, name)(z, *arguments)
        np.testing.assert_allclose(getattr(student, name)(z, *arguments), expected, rtol=1e-6)


# --- Exponential families ---------------------------------------------------------------------

LOG_SUM = fvp.ExponentialFamily(jax.nn.logsumexp, lambda y: y)


def test_the_exponential_family_of_logsumexp_is_the_softmax():
    rng = np.random.default_rng(0)
    z, u, z_new = jnp.asarray(rng.normal(size=(3, 2, 4, 3)))
    y = jax.nn.one_hot(rng.integers(0, 3, (2, 4)), 3)
    softmax = fvp.Softmax()
    for name, arguments in (
        ("nll", (y,)),
        ("mean", ()),
        ("score", (y,)),
        ("fisher", (u,)),
        ("hessian", (y, u)),
        ("kl", (z_new,)),
    ):
        expected = getattr(softmax, name)(z, *arguments)
        assert relative_error(getattr(LOG_SUM, name)(z, *arguments), expected) < 1e-12
    square = LOG_SUM.sqrt_fisher(z, LOG_SUM.sqrt_fisher_transpose(z, u))
    assert relative_error(square, softmax.fisher(z, u)) < 1e-12


def test_an_exponential_family_takes_targets_of_any_shape():
    """A normal distribution of unknown mean and variance, of a pair of numbers."""
    log_partition = lambda z: -(z[0] ** 2) / (2 * z[1]) - jnp.log(-2 * z[1])
    head = fvp.ExponentialFamily(log_partition, lambda y: jnp.stack([jnp.sum(y), jnp.sum(y**2)]))
    mean, variance = 0.3, 1.7
    z = jnp.asarray([[mean / variance, -1 / (2 * variance)]] * 4)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    expected = -scipy.stats.norm.logpdf(y, mean, np.sqrt(variance)).sum(-1)
    base = np.log(2 * np.pi)  # minus log h of two numbers
    np.testing.assert_allclose(head.nll(z, y) + base, expected, rtol=1e-12)


def test_an_exponential_family_says_what_does_not_fit():
    z, y = jnp.zeros((4, 3)), jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"log_partition: expected a scalar"):
        fvp.ExponentialFamily(lambda z: z, lambda y: y).nll(z, y)
    with pytest.raises(ValueError, match=r"sufficient_statistic: expected the event shape"):
        fvp.ExponentialFamily(jnp.sum, lambda y: y[:2]).nll(z, y)
    with pytest.raises(ValueError, match=r"targets: .* batch axes of z first"):
        LOG_SUM.nll(z, y[:3])
    with pytest.raises(ValueError, match=r"sampler: .* draws no targets without one"):
        LOG_SUM.sample(jax.random.key(0), z)
    with pytest.raises(TypeError, match=r"log_partition: expected a function"):
        fvp.ExponentialFamily(1.0, lambda y: y)


@pytest.mark.parametrize("name", ["df", "scale"])
def test_student_t_says_what_does_not_fit(name):
    fields = {"df": 3.0, "scale": 1.0}
    with pytest.raises(ValueError, match=f"{name}: expected .*positive"):
        fvp.StudentT(**fields | {name: -1.0})
    with pytest.raises(ValueError, match=f"{name}: expected a number or an array over the event"):
        fvp.StudentT(**fields | {name: np.ones((2, 3))})
    with pytest.raises(ValueError, match=rf"StudentT\({name} of shape \(2,\)\)"):
        fvp.StudentT(**fields | {name: np.ones(2)}).mean(jnp.zeros((4, 3)))


def test_multinomial_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"total: .* one number .* Softmax with rows"):
        fvp.Multinomial(np.ones(3))
    with pytest.raises(ValueError, match=r"total: expected one draw or more, got 0"):
        fvp.Multinomial(0)
    with pytest.raises(ValueError, match="two classes"):
        fvp.Multinomial(3).mean(jnp.zeros((4, 1)))


# --- Targets at the edge ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, jnp.int32, jnp.uint32])
def test_labels_of_every_integer_type_name_the_same_class(dtype):
    """Also where the type holds fewer numbers than there are classes."""
    rng = np.random.default_rng(0)
    z, u = jnp.asarray(rng.normal(size=(2, 5, 300)))
    y = jnp.asarray([0, 3, 44, 100, 127])
    head = fvp.Softmax()
    for method in (head.nll, head.score, lambda z, y: head.hessian(z, y, u)):
        assert np.array_equal(method(z, y.astype(dtype)), method(z, y))


@jax.jit
def of_labels(z, y, u):
    """Nll, score and product with the Hessian; gradient and curvature where a row has no weight."""
    head, weights = fvp.Softmax(), jnp.asarray([0.0, 2.0])

    @jax.grad
    def gradient(z):
        return jnp.sum(jnp.where(weights == 0, 0, weights * head.nll(z, y)))

    by_row = head.nll(z, y), head.score(z, y), head.hessian(z, y, u)
    return by_row, jax.jvp(gradient, (z,), (u,))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.int64])
@pytest.mark.parametrize("label", [-1, -100, 3, 100])
def test_label_out_of_range_is_no_class_in_every_method(dtype, label):
    """NaN, loudly; and in a row of weight zero nothing, under differentiation too."""
    rng = np.random.default_rng(0)
    z, u = jnp.asarray(rng.normal(size=(2, 2, 3)))
    by_row, of_the_rest = of_labels(z, jnp.asarray([label, 1], dtype), u)
    good_by_row, good_of_the_rest = of_labels(z, jnp.asarray([0, 1], dtype), u)
    for actual, expected in zip(by_row, good_by_row, strict=True):
        assert jnp.isnan(actual[0]).all()
        assert np.array_equal(actual[1], expected[1])
    jax.tree.map(np.testing.assert_array_equal, of_the_rest, good_of_the_rest)


@pytest.mark.parametrize("head", [fvp.Softmax(), fvp.Sigmoid()], ids=str)
def test_score_and_hessian_are_those_of_nll_for_targets_of_any_sum(head):
    """Zeros for "ignore", several hot classes, and targets beyond [0, 1]."""
    rng = np.random.default_rng(0)
    z, u = jnp.asarray(rng.normal(size=(2, 5, 3)))
    z = z.at[4, 0].add(20)
    y = jnp.asarray([[0, 0, 0], [1, 0, 1], [0.2, 0.1, 0.3], [2, -1, 4], [0.5, 3, 0]])
    gradient = jax.grad(lambda z: head.nll(z, y).sum())
    assert relative_error(head.score(z, y), -gradient(z)) < 1e-13
    assert relative_error(head.hessian(z, y, u), jax.jvp(gradient, (z,), (u,))[1]) < 1e-13
    kind = softmax_rows_log_prob if isinstance(head, fvp.Softmax) else sigmoid_log_prob
    score = jax.vmap(jax.grad(kind))(z, y)
    assert relative_error(head.score(z, y), score) < 1e-7  # the definition cancels at 20


# --- Confident predictions --------------------------------------------------------------------

GAPS = [0.0, 1.0, 5.0, 15.0, 20.0, 40.0, 80.0]


@pytest.mark.parametrize("gap", GAPS)
def test_float32_softmax_keeps_its_digits_at_every_gap(gap):
    """The definitions in float64, without a difference of nearly equal numbers."""
    rng = np.random.default_rng(0)
    z, u, w = np.float32(rng.normal(size=(3, 20, 6)))
    z[:, 1] += np.float32(gap)
    y = np.broadcast_to([0, 1], (10, 2)).ravel()  # wrong, and right
    e = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    p, others = e / e.sum(-1, keepdims=True), (e @ (1 - np.eye(6))) / e.sum(-1, keepdims=True)
    differences = u[:, :, None].astype(np.float64) - u[:, None, :]
    fisher = np.einsum("ni,nj,nij->ni", p, p, differences)
    root = np.sqrt(p)
    s_w = root * (others * w - root * ((root * w) @ (1 - np.eye(6))))
    score = np.where(np.eye(6)[y] == 1, others, -p)
    of_label = lambda x: x[np.arange(20), y]
    nll = np.where(
        of_label(p) > 0.5, -np.log1p(-np.minimum(of_label(others), 0.5)), -np.log(of_label(p))
    )
    head, rounding = fvp.Softmax(), 4e-6 * (1 + gap / 10)  # z - max z is rounded, then exp
    underflow = 20 * np.finfo(np.float32).tiny

    def check(actual, expected, entrywise=False):
        assert actual.dtype == np.float32
        size = np.abs(expected) if entrywise else np.linalg.norm(expected, axis=-1, keepdims=True)
        assert (np.abs(actual - expected) <= rounding * size + underflow).all()

    check(head.fisher(z, u), fisher)
    check(head.sqrt_fisher(z, w), s_w)
    check(head.sqrt_fisher(z, head.sqrt_fisher_transpose(z, u)), fisher)
    check(head.score(z, y), score, entrywise=True)
    check(head.score(z, np.eye(6, dtype=np.float32)[y]), score, entrywise=True)
    check(head.nll(z, y), nll, entrywise=True)
    check(-jax.grad(lambda z: head.nll(z, y).sum())(z), score, entrywise=True)


@pytest.mark.parametrize("gap", GAPS)
def test_float32_softmax_fisher_is_symmetric_at_every_gap(gap):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6)), jnp.float32).at[0, 1].add(gap)
    columns = jax.vmap(lambda e: fvp.Softmax().fisher(z, e[None])[0])(jnp.eye(6, dtype=z.dtype))
    np.testing.assert_allclose(columns, columns.T, rtol=1e-6)
    assert (np.linalg.eigvalsh(columns) > -1e-6 * np.abs(columns).max()).all()


@pytest.mark.parametrize("logit", [5.0, 20.0, 80.0])
def test_float32_sigmoid_keeps_the_digits_of_a_confident_score(logit):
    z = jnp.asarray([[logit, -logit]], jnp.float32)
    wrong = np.exp(-logit) / (1 + np.exp(-logit))
    expected = [[wrong, -wrong]]
    np.testing.assert_allclose(fvp.Sigmoid().score(z, jnp.asarray([[1, 0]])), expected, rtol=1e-6)


def test_infinite_sigmoid_logits_are_certain_outcomes():
    inf = np.inf
    z, y = jnp.asarray([inf, inf, -inf, -inf, 1.0]), jnp.asarray([1.0, 0.0, 0.0, 1.0, 1.0])
    head = fvp.Sigmoid(event_ndim=0)
    finite = head.nll(z[4:], y[4:])[0]
    np.testing.assert_array_equal(head.nll(z, y), [0, inf, 0, inf, finite])
    np.testing.assert_array_equal(head.score(z, y)[:4], [0, -1, 0, 1])
    gradient = jax.grad(lambda z: head.nll(z, y).sum())(z)
    np.testing.assert_allclose(gradient, -head.score(z, y), rtol=1e-15)
    np.testing.assert_array_equal(head.fisher(z, jnp.ones(5))[:4], 0)
    np.testing.assert_array_equal(head.sqrt_fisher(z, jnp.ones(5))[:4], 0)
    np.testing.assert_array_equal(head.kl(z, z), 0)
    np.testing.assert_array_equal(head.kl(z, -z)[:4], inf)
    softplus = np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(head.kl(z[:1], z[4:]), [softplus], rtol=1e-14)
    np.testing.assert_array_equal(head.kl(z[4:], z[:1]), [inf])


def test_softmax_without_the_classes_of_logit_minus_infinity():
    """A masked class is not there: all else is that of the other classes."""
    rng = np.random.default_rng(0)
    z, u, z_new = rng.normal(size=(3, 4, 5))
    kept = np.array([0, 2, 4])
    rows = rng.dirichlet(np.ones(3), 4)
    mask = np.full((4, 5), -np.inf)
    mask[:, kept] = 0
    full = np.zeros((4, 5))
    full[:, kept] = rows
    y = rng.integers(0, 3, 4)
    head = fvp.Softmax()

    @jax.jit
    def everything(z, u, z_new, y, rows):
        of = lambda f: jax.value_and_grad(lambda z: f(z).sum())(z)
        return {
            "nll": of(lambda z: head.nll(z, y)),
            "nll of rows": of(lambda z: head.nll(z, rows)),
            "kl": of(lambda z: head.kl(z, z_new)),
            "kl backwards": of(lambda z: head.kl(z_new, z)),
            "kl near": of(lambda z: head.kl(z, jnp.where(z == -jnp.inf, z, z + 1e-3 * u))),
            "score": head.score(z, y),
            "score of rows": head.score(z, rows),
            "fisher": head.fisher(z, u),
            "hessian": head.hessian(z, rows, u),
            "sqrt_fisher": head.sqrt_fisher(z, u),
            "sqrt_fisher_transpose": head.sqrt_fisher_transpose(z, u),
        }

    actual = everything(z + mask, u, z_new + mask, kept[y], full)
    few = everything(z[:, kept], u[:, kept], z_new[:, kept], y, rows)

    def check(actual, expected):
        if actual.ndim:
            assert not np.any(np.delete(actual, kept, 1))
            actual = actual[:, kept]
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)

    jax.tree.map(check, actual, few)
    assert (head.nll(z + mask, jnp.ones(4, int)) == jnp.inf).all()
    assert (head.kl(z, z_new + mask) == jnp.inf).all()
    assert jnp.isfinite(head.kl(z + mask, z_new)).all()


# --- Many rows --------------------------------------------------------------------------------

ROWS = 70_000  # some compilers miscompile batched quadratic forms from 32,769 rows on


@pytest.mark.compile_in_full
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_gaussian_precision_of_many_rows_equals_numpy(dtype, tolerance):
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(4, 4))
    precision = factor @ factor.T + np.eye(4)
    z, y, u = (np.asarray(a, dtype) for a in rng.normal(size=(3, ROWS, 4)))
    head = fvp.Gaussian(precision=jnp.asarray(precision, dtype))
    z64, y64, u64 = np.float64(z), np.float64(y), np.float64(u)
    r = y64 - z64
    constant = 2 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    nll = 0.5 * np.einsum("ni,ij,nj->n", r, precision, r) + constant
    kl = 0.5 * np.einsum("ni,ij,nj->n", u64, precision, u64)
    assert relative_error(jax.jit(head.nll)(z, y), nll) < tolerance
    assert relative_error(jax.jit(head.kl)(z, np.asarray(z64 + u64, dtype)), kl) < 10 * tolerance
    assert relative_error(jax.jit(head.fisher)(z, u), u64 @ precision) < tolerance

    @jax.jit
    def through_square_root(z, u):
        return head.sqrt_fisher(z, head.sqrt_fisher_transpose(z, u))

    assert relative_error(through_square_root(z, u), u64 @ precision) < tolerance
    rowwise = jax.jit(jax.vmap(lambda z, y: head.nll(z[None], y[None])[0]))
    assert relative_error(rowwise(z, y), nll) < tolerance


@pytest.mark.compile_in_full
def test_softmax_of_many_rows_equals_numpy():
    rng = np.random.default_rng(3)
    head = fvp.Softmax()
    z, u = rng.normal(size=(2, ROWS, 4))
    y = rng.integers(0, 4, ROWS)
    log_p = scipy.special.log_softmax(z, axis=-1)
    p = np.exp(log_p)
    fisher = p * (u - (p * u).sum(-1, keepdims=True))
    assert relative_error(jax.jit(head.nll)(z, y), -log_p[np.arange(ROWS), y]) < 1e-12
    assert relative_error(jax.jit(head.fisher)(z, u), fisher) < 1e-12
    s = jax.jit(lambda z, u: head.sqrt_fisher(z, head.sqrt_fisher_transpose(z, u)))(z, u)
    assert relative_error(s, fisher) < 1e-12
    kl = (p * (log_p - scipy.special.log_softmax(z + u, axis=-1))).sum(-1)
    assert relative_error(jax.jit(head.kl)(z, z + u), kl) < 1e-11


# --- Heads as records -------------------------------------------------------------------------

HEADS = [
    fvp.Softmax(),
    fvp.Sigmoid(),
    fvp.Sigmoid(event_ndim=2),
    fvp.Gaussian(scale=2.0),
    fvp.Poisson(),
    fvp.StudentT(4.0, 2.0),
    fvp.Multinomial(5),
    CASES["exponential-family"].head,
]
every_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)


@every_head
def test_head_is_a_frozen_record(head):
    assert not callable(head)
    assert dataclasses.is_dataclass(head)
    with pytest.raises(AttributeError):
        head.event_ndim = 3
    copy = dataclasses.replace(head)
    assert copy == head
    assert hash(copy) == hash(head)


def test_heads_that_differ_are_unequal():
    heads = [*HEADS, fvp.Gaussian(scale=3.0), fvp.Gaussian(scale=2.0, event_ndim=2)]
    assert len(set(heads)) == len(heads)


@every_head
def test_head_as_closure_constant_jit_argument_and_static_argument(head):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)))

    def product(head, z):
        return head.fisher(z, 2 * z)

    expected = product(head, z)
    as_argument = quick_jit(lambda head, z: product(head, z))
    as_static = quick_jit(lambda head, z: product(head, z), static_argnums=0)
    np.testing.assert_allclose(quick_jit(lambda z: product(head, z))(z), expected, rtol=1e-13)
    for compiled in (as_argument, as_static):
        np.testing.assert_allclose(compiled(head, z), expected, rtol=1e-13)
        compiled(dataclasses.replace(head), z)
        assert compiled._cache_size() == 1  # an equal head is the same static argument


def test_only_the_numeric_fields_of_a_head_are_leaves():
    assert jax.tree.leaves(fvp.Softmax()) == jax.tree.leaves(fvp.Sigmoid(event_ndim=2)) == []
    assert jax.tree.leaves(fvp.Gaussian(scale=2.0, event_ndim=0)) == [2.0]
    assert len(jax.tree.leaves(fvp.Gaussian(precision=np.eye(3)))) == 1
    # Transformations rebuild pytrees around placeholders, so rebuilding must not check fields.
    placeholder = jax.tree.map(lambda _: object(), fvp.Gaussian(precision=np.eye(3)))
    assert isinstance(placeholder, fvp.Gaussian)


def test_gradient_with_respect_to_the_scale():
    z, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    gradient = quick_jit(jax.grad(lambda s: fvp.Gaussian(scale=s).nll(z, y).sum()))(0.7)
    expected = (-((y - z) ** 2) / 0.7**3 + 1 / 0.7).sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-13)


def test_gradient_with_respect_to_the_precision():
    z, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    precision = jnp.asarray(CASES["gaussian-precision"].precision)
    gradient = jax.grad(lambda p: fvp.Gaussian(precision=p).nll(z, y).sum())(precision)
    r = y - z
    expected = 0.5 * r.T @ r - 0.5 * 5 * jnp.linalg.inv(precision)
    symmetric = (gradient + gradient.T) / 2
    assert relative_error(symmetric, expected) < 1e-12


def test_vmap_over_the_scale_and_over_a_stacked_head():
    z, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    scales = jnp.array([0.5, 1.0, 2.0])
    expected = jnp.stack([fvp.Gaussian(scale=s).nll(z, y) for s in (0.5, 1.0, 2.0)])
    built_inside = jax.vmap(lambda s: fvp.Gaussian(scale=s).nll(z, y))(scales)
    np.testing.assert_allclose(built_inside, expected, rtol=1e-13)
    stacked = jax.vmap(lambda s: fvp.Gaussian(scale=s))(scales)
    through_head = jax.vmap(lambda head: head.nll(z, y))(stacked)
    np.testing.assert_allclose(through_head, expected, rtol=1e-13)
