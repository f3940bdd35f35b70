"""Dense float64 references, from the definitions alone.

Every matrix is (P, P) in `ravel_pytree` order, on the scale of the mean loss
L = sum_i w_i nll_i / sum_i w_i. Log-probabilities are written row by row, without a thought for
large logits; scores, Fisher matrices, divergences and means follow from them by autodiff and by
enumerating the outcomes, so no closed form of a head is written twice.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fvp


def known(options):
    """Those of ``options`` that this version of XLA knows."""

    def is_known(name):
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]}).lower().compile()
        except Exception:  # jax has changed the class
            return False
        return True

    return {name: options[name] for name in options if is_known(name)}


# The problems are tiny and compile time is all there is: emit kernels by the older and quicker of
# XLA's two ways where it has two, all in one piece, and leave out LLVM's optimisations.
QUICK_KERNELS = known(
    {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
)
QUICKLY = QUICK_KERNELS | known(
    {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
quick_jit = functools.partial(jax.jit, compiler_options=QUICKLY)

CURVATURES = ("fisher", "ggn", "empirical_fisher", "hessian")


def softmax_log_prob(z, y):
    return z[y] - jnp.log(jnp.sum(jnp.exp(z)))


def softmax_rows_log_prob(z, y):
    return jnp.sum(y * (z - jnp.log(jnp.sum(jnp.exp(z)))))


def sigmoid_log_prob(z, y):
    p = 1 / (1 + jnp.exp(-z))
    return jnp.sum(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


def gaussian_log_prob(precision, z, y):
    r = y - z
    log_det = jnp.linalg.slogdet(precision)[1]
    return -0.5 * r @ precision @ r + 0.5 * log_det - 0.5 * r.size * jnp.log(2 * jnp.pi)


def poisson_log_prob(z, y):
    return jnp.sum(y * z - jnp.exp(z) - jax.scipy.special.gammaln(y + 1))


def poisson_divergence(z, z_new):
    return jnp.exp(z) * (z - z_new) + jnp.exp(z_new) - jnp.exp(z)


def multinomial_log_prob(z, y):
    factorials = jax.scipy.special.gammaln(jnp.append(y, jnp.sum(y)) + 1)
    return softmax_rows_log_prob(z, y) + factorials[-1] - jnp.sum(factorials[:-1])


def student_t_log_prob(df, scale, z, y):
    r, log_gamma = (y - z) / scale, jax.scipy.special.gammaln
    constant = log_gamma((df + 1) / 2) - log_gamma(df / 2) - 0.5 * jnp.log(df * jnp.pi)
    return jnp.sum(constant - jnp.log(scale) - (df + 1) / 2 * jnp.log(1 + r**2 / df))


class StudentTIntegrals:
    """Expectations over y = z + scale sqrt(df) tan(theta), by Gauss-Legendre quadrature in theta.

    For whole df the integrands are analytic up to the ends.
    """

    def __init__(self, df, scale):
        x, w = np.polynomial.legendre.leggauss(400)
        self.df, self.scale, self.tan = df, scale, np.tan(np.pi / 2 * x)[:, None]
        density = w[:, None] * np.cos(np.pi / 2 * x)[:, None] ** (df - 1)
        self.weights = density / density.sum(0)

    def variance(self, z):
        score = (self.df + 1) * self.tan / (np.sqrt(self.df) * self.scale * (1 + self.tan**2))
        return jnp.sum(self.weights * score**2, 0) + 0 * z

    def divergence(self, z, z_new):
        shift = (z_new - z) / (self.scale * np.sqrt(self.df))
        log_ratio = jnp.log((1 + (self.tan - shift) ** 2) / (1 + self.tan**2))
        return (self.df + 1) / 2 * jnp.sum(self.weights * log_ratio, 0)


@dataclasses.dataclass(frozen=True)
class Independent:
    """Of independent outputs: variance of the score, KL and mean of each."""

    variance: Callable
    divergence: Callable
    mean: Callable


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One output distribution: the library's head by name, and its definition on flat rows."""

    name: str
    family: str
    arguments: dict
    event_shape: tuple[int, ...]
    log_prob: Callable
    outcomes: np.ndarray | None = None  # every y, for the discrete ones
    precision: np.ndarray | None = None  # of the Gaussians
    independent: Independent | None = None  # of other infinite outcomes

    @property
    def head(self):
        return getattr(fvp, self.family)(**self.arguments)

    @property
    def size(self):
        return int(np.prod(self.event_shape, dtype=int))

    @property
    def integer_targets(self):
        return self.outcomes is not None and self.outcomes.ndim == 1

    def targets(self, rng, batch_axes):
        if self.integer_targets:
            return jnp.asarray(rng.integers(0, self.size, batch_axes))
        shape = batch_axes + self.event_shape
        if self.family == "Softmax":
            return jnp.asarray(rng.dirichlet(np.ones(self.size), batch_axes))
        if self.family == "Sigmoid":
            return jnp.asarray(rng.integers(0, 2, shape).astype(float))
        if self.family == "Multinomial":
            return jnp.asarray(rng.choice(self.outcomes, batch_axes))
        if self.family in ("Poisson", "ExponentialFamily"):
            return jnp.asarray(rng.poisson(2.0, shape).astype(float))
        return jnp.asarray(rng.normal(size=shape))

    def rows(self, y):
        """Targets as one flat row per example."""
        return y.reshape(-1) if self.integer_targets else y.reshape(-1, self.size)

    def score(self, z, y):
        return jax.grad(self.log_prob)(z, y)

    def probabilities(self, z):
        return jax.vmap(lambda y: jnp.exp(self.log_prob(z, y)))(self.outcomes)

    def fisher(self, z):
        """E_y[score score^T] of one flat row: (E, E)."""
        if self.independent is not None:
            return jnp.diag(self.independent.variance(z))
        if self.outcomes is None:
            return jnp.asarray(self.precision)  # E[P e e^T P] with e ~ N(0, P^-1)
        scores = jax.vmap(lambda y: self.score(z, y))(self.outcomes)
        return jnp.einsum("y,yi,yj->ij", self.probabilities(z), scores, scores)

    def kl(self, z, z_new):
        if self.independent is not None:
            return jnp.sum(self.independent.divergence(z, z_new))
        if self.outcomes is None:
            return 0.5 * (z_new - z) @ self.precision @ (z_new - z)
        log_ratio = jax.vmap(lambda y: self.log_prob(z, y) - self.log_prob(z_new, y))
        return jnp.sum(self.probabilities(z) * log_ratio(self.outcomes))

    def mean(self, z):
        if self.independent is not None:
            return self.independent.mean(z)
        if self.outcomes is None:
            return z
        values = np.eye(self.size) if self.integer_targets else self.outcomes
        return self.probabilities(z) @ values


def _bits(size):
    return np.array(list(itertools.product([0.0, 1.0], repeat=size)))


def _sigmoid(name, event_shape, **arguments):
    size = int(np.prod(event_shape, dtype=int))
    return Case(name, "Sigmoid", arguments, event_shape, sigmoid_log_prob, outcomes=_bits(size))


def _gaussian(name, event_shape, matrix, **arguments):
    log_prob = functools.partial(gaussian_log_prob, matrix)
    return Case(name, "Gaussian", arguments, event_shape, log_prob, precision=matrix)


def _student_t(name, event_shape, df, scale, **arguments):
    log_prob = functools.partial(student_t_log_prob, df.ravel(), scale.ravel())
    integrals = StudentTIntegrals(df.ravel(), scale.ravel())
    independent = Independent(integrals.variance, integrals.divergence, lambda z: z)
    arguments = {"df": df, "scale": scale} | arguments
    return Case(name, "StudentT", arguments, event_shape, log_prob, independent=independent)


def _counts(size, total):
    return np.array(
        [y for y in itertools.product(range(total + 1), repeat=size) if sum(y) == total]
    )


def _sample_counts(key, z):
    return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)


POISSON = Independent(jnp.exp, poisson_divergence, jnp.exp)
_POISSON_FAMILY = {
    "log_partition": lambda z: jnp.sum(jnp.exp(z)),
    "sufficient_statistic": lambda y: y,
    "sampler": _sample_counts,
}
_SCALES = np.array([0.5, 1.3, 2.0])
_SCALE_GRID = np.array([[0.5, 1.3], [2.0, 0.8]])
_PRECISION = np.array([[2.0, 0.6, -0.3], [0.6, 1.5, 0.4], [-0.3, 0.4, 0.9]])

CASES = {
    case.name: case
    for case in [
        Case("softmax", "Softmax", {}, (3,), softmax_log_prob, outcomes=np.arange(3)),
        Case("softmax-rows", "Softmax", {}, (3,), softmax_rows_log_prob, outcomes=np.eye(3)),
        _sigmoid("sigmoid", (3,)),
        _sigmoid("sigmoid-0d", (), event_ndim=0),
        _sigmoid("sigmoid-2d", (2, 2), event_ndim=2),
        _gaussian("gaussian", (3,), np.eye(3) / 0.7**2, scale=0.7),
        _gaussian("gaussian-0d", (), np.eye(1) / 1.7**2, scale=1.7, event_ndim=0),
        _gaussian("gaussian-2d", (2, 2), np.eye(4) / 0.7**2, scale=0.7, event_ndim=2),
        _gaussian("gaussian-vector", (3,), np.diag(_SCALES**-2), scale=_SCALES),
        _gaussian(
            "gaussian-vector-2d",
            (2, 2),
            np.diag(_SCALE_GRID.ravel() ** -2),
            scale=_SCALE_GRID,
            event_ndim=2,
        ),
        _gaussian("gaussian-precision", (3,), _PRECISION, precision=_PRECISION),
        Case("poisson", "Poisson", {}, (3,), poisson_log_prob, independent=POISSON),
        _student_t("student-t", (3,), np.array([3.0, 5.0, 30.0]), _SCALES),
        _student_t("student-t-0d", (), np.array(4.0), np.array(0.7), event_ndim=0),
        Case(
            "multinomial",
            "Multinomial",
            {"total": 4},
            (3,),
            multinomial_log_prob,
            outcomes=_counts(3, 4).astype(float),
        ),
        Case(
            "exponential-family",  # of independent counts, without their base measure
            "ExponentialFamily",
            _POISSON_FAMILY,
            (3,),
            lambda z, y: jnp.sum(y * z - jnp.exp(z)),
            independent=POISSON,
        ),
        Case(
            "exponential-family-2d",
            "ExponentialFamily",
            _POISSON_FAMILY | {"event_ndim": 2},
            (2, 2),
            lambda z, y: jnp.sum(y * z - jnp.exp(z)),
            independent=POISSON,
        ),
    ]
}


def rarely(*values):
    """One of the parameters of a test, left to `--exhaustive`."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


# One head of each kind is enough where a test is about something else.
KINDS = ("softmax", "sigmoid-2d", "gaussian-precision", "student-t", "exponential-family")
each_kind_of_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in KINDS else pytest.mark.exhaustive)
        for name, case in CASES.items()
    ],
)


@functools.cache
def mlp(event_shape):
    """tanh network 2-3-E on the last axis of a bare array, one function object per shape."""

    def model_fn(params, batch):
        hidden = jnp.tanh(batch @ params["hidden"]["w"] + params["hidden"]["b"])
        z = hidden @ params["out"]["w"] + params["out"]["b"]
        return z.reshape(batch.shape[:-1] + event_shape)

    return model_fn


@functools.cache
def linear(event_shape):
    """Linear map 2-E: Fisher, GGN and Hessian coincide."""

    def model_fn(params, batch):
        z = batch @ params["out"]["w"] + params["out"]["b"]
        return z.reshape(batch.shape[:-1] + event_shape)

    return model_fn


def parameters(rng, size):
    """Parameters of `mlp`: 9 + 4 E numbers, in no alphabetical order."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return {
        "out": {"w": normal(3, size), "b": normal(size)},
        "hidden": {"w": normal(2, 3), "b": normal(3)},
    }


def linear_parameters(rng, size):
    """Parameters of `linear`."""
    return {"out": {"w": jnp.asarray(rng.normal(size=(2, size))), "b": jnp.zeros(size)}}


@functools.partial(quick_jit, static_argnames=("case", "model_fn"))
def reference(case, model_fn, params, batch, targets, weights):
    """Loss, gradient and all curvature matrices; `weights` has the shape of the batch axes."""
    flat, unravel = ravel_pytree(params)
    y, w = case.rows(targets), weights.reshape(-1)

    def outputs(flat):
        return model_fn(unravel(flat), batch).reshape(-1, case.size)

    def nll(z):
        return -jax.vmap(case.log_prob)(z, y)

    def loss(flat):
        return jnp.sum(w * nll(outputs(flat))) / jnp.sum(w)

    z, jacobian = outputs(flat), jax.jacobian(outputs)(flat)

    def linearised_loss(flat_new):
        return jnp.sum(w * nll(z + jacobian @ (flat_new - flat))) / jnp.sum(w)

    fisher_rows = jax.vmap(case.fisher)(z)
    gradients = jax.jacobian(lambda flat: nll(outputs(flat)))(flat)
    return {
        "loss": loss(flat),
        "gradient": jax.grad(loss)(flat),
        "fisher": jnp.einsum("n,nip,nij,njq->pq", w / w.sum(), jacobian, fisher_rows, jacobian),
        "ggn": jax.hessian(linearised_loss)(flat),
        "empirical_fisher": jnp.einsum("n,np,nq->pq", w / w.sum(), gradients, gradients),
        "hessian": jax.hessian(loss)(flat),
    }


def product_matrix(operator):
    """The (P, P) matrix of a linear operator, column by column; its own ``dense`` goes by rows."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), operator.like))
    column = lambda e: ravel_pytree(operator.mv(unravel(e)))[0]
    return jax.vmap(column, out_axes=1)(jnp.eye(flat.size, dtype=flat.dtype))


def relative_error(actual, expected):
    """Largest deviation in units of the largest expected entry; trees of one structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)
