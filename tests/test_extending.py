"""What users write themselves, each one class by public names alone, against dense references."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import product_matrix, relative_error
from jax.flatten_util import ravel_pytree

import fvp

COMPILE_QUICKLY = True

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 3)))
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))}
COUNTS = jnp.asarray(RNG.poisson(2.0, size=(6, 2)), jnp.float64)
WEIGHTS = jnp.asarray(RNG.uniform(0.5, 2.0, size=6)).at[2].set(0)
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def jacobian(params=PARAMS):
    """(examples, outputs, parameters)."""
    return jax.jacobian(lambda flat: model(UNRAVEL(flat), X))(ravel_pytree(params)[0])


def dense_gauss_newton(blocks, weights=WEIGHTS):
    """The weighted mean of J^T H J for blocks (examples, outputs, outputs)."""
    J = jacobian()
    return jnp.einsum("n,nip,nij,njq->pq", weights, J, blocks, J) / weights.sum()


def flat(tree):
    return ravel_pytree(tree)[0]


# A head ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Poisson(fvp.NaturalHead):
    """Counts with log rate z: F_R = exp(z)."""

    def _nll(self, z, y):
        terms = jnp.exp(z) - y * z + jax.scipy.special.gammaln(y + 1)
        return jnp.sum(terms, axis=self.event_axes())

    def _mean(self, z):
        return jnp.exp(z)

    def _sample(self, key, z, dtype):
        return jax.random.poisson(key, jnp.exp(z)).astype(dtype)

    def _score(self, z, y):
        return y - jnp.exp(z)

    def _fisher(self, z, u):
        return jnp.exp(z) * u

    def _sqrt_fisher(self, z, w):
        return jnp.exp(z / 2) * w

    def _sqrt_fisher_transpose(self, z, u):
        return jnp.exp(z / 2) * u

    def _kl(self, z, z_new):
        terms = jnp.exp(z) * (z - z_new) + jnp.exp(z_new) - jnp.exp(z)
        return jnp.sum(terms, axis=self.event_axes())


def poisson_blocks():
    return jax.vmap(lambda z: jnp.diag(jnp.exp(z)))(model(PARAMS, X))


def test_a_head_serves_every_curvature_and_the_dual_solve():
    head, expected = Poisson(), dense_gauss_newton(poisson_blocks())
    problem = (model, head, PARAMS, X)
    F = fvp.fisher(*problem, weights=WEIGHTS)
    assert relative_error(product_matrix(F), expected) < 1e-12
    assert (
        relative_error(product_matrix(fvp.ggn(*problem, COUNTS, weights=WEIGHTS)), expected) < 1e-12
    )
    diagonal = fvp.fisher_diagonal(*problem, weights=WEIGHTS)
    assert relative_error(flat(diagonal), jnp.diag(expected)) < 1e-12
    solution = fvp.solve_dual(F, PARAMS, 0.1)
    damped = expected + 0.1 * jnp.eye(len(FLAT))
    assert relative_error(flat(solution), jnp.linalg.solve(damped, FLAT)) < 1e-10
    # Linear in its parameters, a model's K-FAC of one example is the Fisher itself.
    linear = lambda w, x: x @ w
    K = fvp.kfac(linear, head, PARAMS["w"], X[:1])
    assert relative_error(K.dense(), fvp.fisher(linear, head, PARAMS["w"], X[:1]).dense()) < 1e-12


def test_the_derivatives_of_a_head_are_those_of_its_nll():
    head, z, u = Poisson(), model(PARAMS, X), jnp.ones((6, 2))
    score = -jax.grad(lambda z: head.nll(z, COUNTS).sum())(z)
    assert relative_error(head.score(z, COUNTS), score) < 1e-12
    gradient = lambda z: -head.score(z, COUNTS)
    assert relative_error(head.hessian(z, COUNTS, u), jax.jvp(gradient, (z,), (u,))[1]) < 1e-12


@pytest.mark.parametrize("make", [fvp.natural_gradient, fvp.scale_by_kfac])
def test_a_head_trains(make):
    loss = lambda params: Poisson().nll(model(params, X), COUNTS).mean()
    rate = (1.0,) if make is fvp.natural_gradient else ()
    tx = make(*rate, model, Poisson())
    if make is fvp.scale_by_kfac:
        tx = optax.chain(tx, optax.scale(-1.0))

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params, batch=X, targets=COUNTS)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(15):
        params, state = step(params, state)
    first, last = (jnp.linalg.norm(flat(jax.grad(loss)(p))) for p in (PARAMS, params))
    assert loss(params) < loss(PARAMS) - 0.1
    assert last < 0.1 * first


def test_a_head_that_forgets_its_hessian_is_an_error():
    members = {name: vars(Poisson)[name] for name in vars(Poisson) if name.startswith("_")}
    members = {name: value for name, value in members.items() if not name.startswith("__")}
    forgetful = type("Forgetful", (fvp.Head,), members)
    with pytest.raises(TypeError, match="_hessian"):
        forgetful()


def test_a_natural_head_with_another_hessian_is_an_error():
    with pytest.raises(TypeError, match=r"derive from fvp.Head"):
        type("Robust", (Poisson,), {"_hessian": lambda self, z, y, u: u})


def test_a_root_of_another_head_or_curvature_is_not_inherited():
    with pytest.raises(TypeError, match="_fisher_root"):
        type("Tempered", (fvp.Softmax,), {"_fisher": lambda self, z, u: u})
    with pytest.raises(TypeError, match="root"):
        type("Half", (fvp.FisherCurvature,), {"__call__": lambda self, u: u / 2})


def test_a_head_that_hides_a_field_is_an_error():
    class Hidden(fvp.Softmax):  # not decorated: its field would be lost on the way
        def __init__(self, temperature):
            object.__setattr__(self, "temperature", temperature)

    with pytest.raises(TypeError, match="frozen dataclass"):
        jax.tree.leaves(Hidden(2.0))


def test_the_event_axes_of_a_head_are_static_however_they_are_declared():
    @dataclasses.dataclass(frozen=True)
    class Scalar(Poisson):
        event_ndim: int = 0

    F = fvp.fisher(model, Scalar(), PARAMS, X)
    product = jax.jit(lambda F, v: F @ v)(F, PARAMS)
    expected = dense_gauss_newton(poisson_blocks(), jnp.ones(6)) @ FLAT / 2  # a mean over 12
    assert relative_error(flat(product), expected) < 1e-12


@dataclasses.dataclass(frozen=True)
class LogScaleGaussian(fvp.Head):
    """A Gaussian with z = (mean, log scale), targets (...): the Fisher is not the Hessian."""

    def _check_targets(self, z, y):
        if y.shape != z.shape[:-1]:
            raise ValueError(f"targets: expected {z.shape[:-1]}, got {y.shape}.")

    def _nll(self, z, y):
        m, s = z[..., 0], z[..., 1]
        return 0.5 * ((y - m) * jnp.exp(-s)) ** 2 + s + 0.5 * math.log(2 * math.pi)

    def _mean(self, z):
        return z[..., 0]

    def _sample(self, key, z, dtype):
        return z[..., 0] + jnp.exp(z[..., 1]) * jax.random.normal(key, z.shape[:-1], dtype)

    def _score(self, z, y):
        r = (y - z[..., 0]) * jnp.exp(-z[..., 1])
        return jnp.stack([r * jnp.exp(-z[..., 1]), r**2 - 1], axis=-1)

    def _fisher(self, z, u):
        return jnp.stack([jnp.exp(-2 * z[..., 1]) * u[..., 0], 2 * u[..., 1]], axis=-1)

    def _hessian(self, z, y, u):
        gradient = lambda z: -self._score(z, y)
        return jax.jvp(gradient, (z,), (u,))[1]

    def _sqrt_fisher(self, z, w):
        return jnp.stack([jnp.exp(-z[..., 1]) * w[..., 0], math.sqrt(2) * w[..., 1]], axis=-1)

    def _sqrt_fisher_transpose(self, z, u):
        return self._sqrt_fisher(z, u)

    def _kl(self, z, z_new):
        d, m = z_new[..., 1] - z[..., 1], z_new[..., 0] - z[..., 0]
        return d + 0.5 * (jnp.exp(-2 * d) + (m * jnp.exp(-z_new[..., 1])) ** 2 - 1)


@pytest.mark.parametrize("head", [LogScaleGaussian(), fvp.LearnedScaleGaussian()])
def test_fisher_and_ggn_of_a_learned_scale_are_each_right(head):
    y, z = COUNTS[:, 0], model(PARAMS, X)
    fisher = jax.vmap(lambda z: jnp.diag(jnp.stack([jnp.exp(-2 * z[1]), 2.0])))(z)
    hessian = jax.vmap(jax.hessian(lambda z, y: LogScaleGaussian()._nll(z, y)))(z, y)
    F = fvp.fisher(model, head, PARAMS, X, weights=WEIGHTS)
    G = fvp.ggn(model, head, PARAMS, X, y, weights=WEIGHTS)
    assert relative_error(product_matrix(F), dense_gauss_newton(fisher)) < 1e-12
    assert relative_error(product_matrix(G), dense_gauss_newton(hessian)) < 1e-12
    assert relative_error(F.dense(), G.dense()) > 0.1
    with pytest.raises(TypeError, match=r"fvp.cg"):
        fvp.solve_dual(G, PARAMS, 0.1)
    damped = dense_gauss_newton(fisher) + 0.1 * jnp.eye(len(FLAT))
    solution = flat(fvp.solve_dual(F, PARAMS, 0.1))
    assert relative_error(solution, jnp.linalg.solve(damped, FLAT)) < 1e-10


def test_the_learned_scale_agrees_with_its_twin():
    ours, twin, y = fvp.LearnedScaleGaussian(), LogScaleGaussian(), COUNTS[:, 0]
    z, other = model(PARAMS, X), 1.5 * model(PARAMS, X) + 0.2
    for method, arguments in (
        ("nll", (z, y)),
        ("score", (z, y)),
        ("hessian", (z, y, other)),
        ("fisher", (z, other)),
        ("sqrt_fisher", (z, other)),
        ("kl", (z, other)),
        ("mean", (z,)),
    ):
        actual, expected = (getattr(head, method)(*arguments) for head in (ours, twin))
        assert relative_error(actual, expected) < 1e-12
    # Close to each other the textbook's form has lost its digits, ours has not.
    d = 1e-7
    near = ours.kl(z.astype(jnp.float32), (z + d).astype(jnp.float32))
    step = (z + d).astype(jnp.float32).astype(jnp.float64) - z.astype(jnp.float32)
    expected = step[:, 1] ** 2 + 0.5 * (step[:, 0] * jnp.exp(-z[:, 1])) ** 2
    assert relative_error(near, expected) < 1e-2


def test_the_samples_of_a_learned_scale_have_its_fisher():
    head, z = fvp.LearnedScaleGaussian(), jnp.array([[0.3, -0.5]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    scores = jax.vmap(lambda key: head.score(z, head.sample(key, z))[0])(keys)
    expected = jax.vmap(lambda e: head.fisher(z, e[None])[0], out_axes=1)(jnp.eye(2))
    products = jnp.einsum("ni,nj->nij", scores, scores)
    error = (products.mean(0) - expected) / (products.std(0) / math.sqrt(len(keys)))
    assert jnp.max(jnp.abs(error)) < 4.5
    assert jnp.max(jnp.abs(scores.mean(0) / (scores.std(0) / math.sqrt(len(keys))))) < 4.5


# A damping rule ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DoubleAndHalve(fvp.DampingRule):
    """Twice the damping after a rejection, half of it after a step that was taken."""

    initial: float = 0.5

    def init(self, params):
        return jnp.array(self.initial, jnp.float32)

    def propose(self, state, observation):
        return state, state

    def correct(self, state, step, outcome, accepted):
        return state * jnp.where(accepted, 0.5, 2.0).astype(state.dtype)


@pytest.mark.parametrize("make", [fvp.scale_by_fisher, fvp.scale_by_kfac])
def test_a_damping_rule_works_in_both_transforms(make):
    head = Poisson()
    loss = lambda params: head.nll(model(params, X), COUNTS).mean()
    tx = make(model, head, damping=DoubleAndHalve())
    gradient = jax.grad(loss)(PARAMS)
    arguments = {"batch": X, "targets": COUNTS}

    @jax.jit
    def two_steps(sign):
        state, seen = tx.init(PARAMS), []
        for _ in range(2):
            signed = jax.tree.map(lambda g: sign * g, gradient)
            update, state = tx.update(signed, state, PARAMS, **arguments)
            seen.append((state.damping, state.accepted, update))
        return seen

    (first, taken, update), (second, _, _) = two_steps(1.0)
    assert (first, second) == (0.5, 0.25)
    assert taken
    assert loss(jax.tree.map(jnp.subtract, PARAMS, update)) < loss(PARAMS)
    # Uphill every step is rejected, and comes back as zeros.
    (first, taken, update), (second, _, _) = two_steps(-1.0)
    assert (first, second) == (0.5, 1.0)
    assert not taken
    assert not np.any(flat(update))


# A preconditioner --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExactInverse(fvp.Preconditioner):
    """The inverse matrix itself: conjugate gradients then need one iteration."""

    def init(self, params):
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        return jnp.zeros((size, size))

    def update(self, made, operator, damping):
        return jnp.linalg.inv(operator.dense() + damping * jnp.eye(len(made)))

    def apply(self, made, v):
        flat, unravel = ravel_pytree(v)
        return unravel(made @ flat)


@pytest.mark.parametrize("damping", [0.1, fvp.LevenbergMarquardt()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("preconditioner", [ExactInverse(), fvp.Jacobi(num_samples=None)])
def test_a_preconditioner_reaches_the_transform(preconditioner, damping):
    head, gradient = Poisson(), PARAMS

    def first_step(solver):
        tx = fvp.scale_by_fisher(model, head, damping=damping, solver=solver)
        return tx.update(gradient, tx.init(PARAMS), PARAMS, batch=X, targets=COUNTS)

    plain, plain_state = first_step(fvp.CG(maxiter=100, tol=1e-12))
    solver = fvp.CG(maxiter=100, tol=1e-12, preconditioner=preconditioner)
    update, state = first_step(solver)
    assert relative_error(flat(update), flat(plain)) < 1e-8
    if isinstance(preconditioner, ExactInverse) and damping == 0.1:
        assert state.iterations <= 2 < plain_state.iterations


def test_a_preconditioner_is_refreshed_when_due():
    solver = fvp.CG(maxiter=4, preconditioner=ExactInverse(), refresh_period=2)
    tx = fvp.scale_by_fisher(model, Poisson(), damping=0.1, solver=solver)
    state, made = tx.init(PARAMS), []
    for scale in (1.0, 2.0, 3.0):
        _, state = tx.update(PARAMS, state, PARAMS, batch=scale * X)
        made.append(state.solver.preconditioner)
    assert np.array_equal(made[0], made[1])
    assert not np.allclose(made[1], made[2])


@pytest.mark.parametrize("period", [1, 10])
def test_a_bad_batch_does_not_stay_in_the_preconditioner(period):
    head = fvp.Gaussian()
    loss = lambda params: head.nll(model(params, X), COUNTS).mean()
    solver = fvp.CG(preconditioner=fvp.Jacobi(num_samples=None), refresh_period=period)
    tx = fvp.natural_gradient(1.0, model, head, solver=solver)

    @jax.jit
    def run():
        def step(carry, x):
            params, state = carry
            gradient = jax.grad(loss)(params)
            updates, state = tx.update(gradient, state, params, batch=x, targets=COUNTS)
            return (optax.apply_updates(params, updates), state), state.accepted

        batches = jnp.broadcast_to(X, (6, *X.shape)).at[0, 0].set(jnp.nan)
        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), batches)

    (params, _), accepted = run()
    assert not accepted[0]
    assert accepted[1:].all()
    assert loss(params) < loss(PARAMS)


def test_a_preconditioner_hears_of_the_penalty():
    x = X.at[:, 1].set(0)  # no curvature at all
    solver = fvp.CG(maxiter=50, tol=1e-12, preconditioner=fvp.Jacobi(num_samples=None))
    tx = fvp.scale_by_fisher(model, Poisson(), damping=0.0, l2=0.1, solver=solver)
    update, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=x)
    F = fvp.fisher(model, Poisson(), PARAMS, x).dense()
    assert state.accepted
    expected = jnp.linalg.solve(F + 0.1 * jnp.eye(len(FLAT)), 1.1 * FLAT)
    assert relative_error(flat(update), expected) < 1e-8


def test_a_preconditioner_of_one_device_is_refused_for_many():
    tx = fvp.scale_by_fisher(
        model, Poisson(), damping=0.1, axis_name="d", solver=fvp.CG(preconditioner=fvp.Jacobi())
    )
    update = lambda x: tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=x)[0]
    with pytest.raises(ValueError, match="axis_name"):
        jax.eval_shape(jax.vmap(update, axis_name="d"), X.reshape(2, 3, 3))


# A curvature -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AbsoluteHessian(fvp.OutputCurvature):
    """|H| of the head: the eigenvalues of each example's Hessian by their size."""

    matrices: jax.Array  # (examples, outputs, outputs)

    @classmethod
    def at(cls, problem, z):
        hessian = lambda u: problem.head.hessian(z, problem.targets, jnp.broadcast_to(u, z.shape))
        columns = jax.vmap(hessian, out_axes=-1)(jnp.eye(z.shape[-1]))
        values, vectors = jnp.linalg.eigh(columns)
        return cls(jnp.einsum("nik,nk,njk->nij", vectors, jnp.abs(values), vectors))

    def __call__(self, u):
        return jnp.einsum("nij,nj->ni", self.matrices, u)


@dataclasses.dataclass(frozen=True)
class RootedAbsoluteHessian(AbsoluteHessian):
    """The same, which knows its root."""

    def root(self):
        values, vectors = jnp.linalg.eigh(self.matrices)
        roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
        return fvp.Root(roots.shape[-1], lambda k: jnp.take(roots, k, axis=-1))


def absolute_reference():
    head = LogScaleGaussian()
    hessian = jax.vmap(jax.hessian(lambda z, y: head._nll(z, y)))(model(PARAMS, X), COUNTS[:, 0])
    values, vectors = np.linalg.eigh(hessian)
    return dense_gauss_newton(np.einsum("nik,nk,njk->nij", vectors, np.abs(values), vectors))


@pytest.mark.parametrize("kind", [AbsoluteHessian, RootedAbsoluteHessian])
def test_a_curvature_is_served_everywhere(kind):
    expected, head, y = absolute_reference(), fvp.LearnedScaleGaussian(), COUNTS[:, 0]
    arguments, data = (kind, model, head, PARAMS, X), {"targets": y, "weights": WEIGHTS}
    G = fvp.gauss_newton(*arguments, **data)
    assert relative_error(G.dense(), expected) < 1e-12
    product = fvp.gauss_newton_vector_product(*arguments, PARAMS, **data)
    assert relative_error(flat(product), expected @ FLAT) < 1e-12
    chunked = fvp.gauss_newton(*arguments, **data, chunk_size=4)
    assert relative_error(flat(chunked @ PARAMS), expected @ FLAT) < 1e-12
    solution = jnp.linalg.solve(expected + 0.1 * jnp.eye(len(FLAT)), FLAT)
    assert relative_error(flat(fvp.cg(G, PARAMS, damping=0.1, tol=1e-12)[0]), solution) < 1e-8
    if kind is RootedAbsoluteHessian:
        assert relative_error(flat(fvp.solve_dual(G, PARAMS, 0.1)), solution) < 1e-9
    else:
        with pytest.raises(TypeError, match=r"AbsoluteHessian.*fvp.cg"):
            fvp.solve_dual(G, PARAMS, 0.1)
    options = {"damping": 0.1, "curvature": kind, "maxiter": 100, "tol": 1e-12}
    tx = fvp.scale_by_fisher(model, head, **options)
    update, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=X, targets=y, weights=WEIGHTS)
    assert relative_error(flat(update), solution) < 1e-8


@dataclasses.dataclass(frozen=True)
class Scaled(fvp.OutputCurvature):
    """By a number of each example, which comes as a tree of targets."""

    factors: jax.Array

    @classmethod
    def at(cls, problem, z):
        return cls(problem.targets["factor"])

    def __call__(self, u):
        return self.factors[:, None] * u


def test_a_curvature_reads_what_it_likes_as_targets_in_chunks_too():
    factors = jnp.arange(1.0, 7.0)
    blocks = factors[:, None, None] * jnp.eye(2)
    for chunk_size in (None, 4):
        arguments = (Scaled, model, Poisson(), PARAMS, X)
        options = {"targets": {"factor": factors}, "chunk_size": chunk_size}
        product = fvp.gauss_newton(*arguments, **options) @ PARAMS
        expected = dense_gauss_newton(blocks, jnp.ones(6)) @ FLAT
        assert relative_error(flat(product), expected) < 1e-12
    with pytest.raises(ValueError, match="targets: expected the 6 examples"):
        fvp.gauss_newton(*arguments, targets={"factor": factors[:3]}, chunk_size=4)


def test_a_curvature_of_examples_along_another_axis_in_chunks():
    factors = jnp.arange(1.0, 7.0)
    arguments = (Scaled, lambda params, x: model(params, x.T), Poisson(), PARAMS, X.T)
    options = {"targets": {"factor": factors}, "weights": WEIGHTS, "chunk_size": 2, "batch_axes": 1}
    expected = dense_gauss_newton(factors[:, None, None] * jnp.eye(2)) @ FLAT
    product = fvp.gauss_newton_vector_product(*arguments, PARAMS, **options)
    for actual in (fvp.gauss_newton(*arguments, **options) @ PARAMS, product):
        assert relative_error(flat(actual), expected) < 1e-12


@dataclasses.dataclass(frozen=True)
class ByLargestOutput(fvp.OutputCurvature):
    """By a number that all examples have a part in."""

    largest: jax.Array

    @classmethod
    def at(cls, problem, z):
        return cls(jnp.max(jnp.abs(z)))

    def __call__(self, u):
        return self.largest * u


def test_a_curvature_sees_zeros_where_an_example_has_no_weight():
    offsets = jnp.where(WEIGHTS == 0, jnp.nan, 0)
    shifted = lambda params, batch: model(params, batch[0]) + offsets[batch[1]][:, None]
    G = fvp.gauss_newton(
        ByLargestOutput, shifted, Poisson(), PARAMS, (X, jnp.arange(6)), weights=WEIGHTS
    )
    largest = jnp.max(jnp.abs(model(PARAMS, X)[WEIGHTS != 0]))
    expected = dense_gauss_newton(jnp.tile(largest * jnp.eye(2), (6, 1, 1))) @ FLAT
    assert relative_error(flat(G @ PARAMS), expected) < 1e-12


@dataclasses.dataclass(frozen=True)
class WideAlone(fvp.OutputCurvature):
    """The identity, of changes that are not narrow."""

    @classmethod
    def at(cls, problem, z):
        return cls()

    def __call__(self, u):
        assert u.dtype == jnp.float32
        return u


def test_a_curvature_of_a_narrow_model_sees_wide_changes():
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (PARAMS, X))
    for chunk_size in (None, 4):
        arguments = (WideAlone, model, Poisson(), params, x)
        G = jax.eval_shape(lambda n=chunk_size, a=arguments: fvp.gauss_newton(*a, chunk_size=n))
        jax.eval_shape(lambda G: (G @ params, G.mv_and_form(params), G.quadratic_form(params)), G)
    whole = fvp.gauss_newton(*arguments)
    jax.eval_shape(whole.transpose_product, whole.output)


def test_targets_of_another_loss_do_not_meet_the_head_of_a_fisher():
    loss = lambda params, batch: jnp.mean(model(params, batch) ** 2)
    for chunk_size in (None, 4):
        tx = fvp.scale_by_fisher(model, Poisson(), damping=0.1, chunk_size=chunk_size)
        arguments = {"batch": X, "targets": jnp.arange(6), "value_fn": loss}
        update, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **arguments)
        assert np.any(flat(update))


def test_a_curvature_without_what_it_reads_is_an_error():
    with pytest.raises(ValueError, match="targets: expected the labels"):
        fvp.gauss_newton(fvp.HessianCurvature, model, Poisson(), PARAMS, X)
    with pytest.raises(ValueError, match="targets: expected the labels"):
        fvp.gauss_newton_vector_product(fvp.HessianCurvature, model, Poisson(), PARAMS, X, PARAMS)
    with pytest.raises(ValueError, match=r"fvp.mc_fisher"):
        fvp.gauss_newton(fvp.SampledCurvature, model, Poisson(), PARAMS, X)


def test_a_curvature_that_is_none_is_an_error():
    with pytest.raises(TypeError, match=r"kind: expected a subclass of fvp.OutputCurvature"):
        fvp.gauss_newton("fisher", model, Poisson(), PARAMS, X)
    with pytest.raises(TypeError, match=r"kind: expected a subclass of fvp.OutputCurvature"):
        fvp.gauss_newton_vector_product("fisher", model, Poisson(), PARAMS, X, PARAMS)
    with pytest.raises(TypeError, match=r"curvature: expected a subclass of fvp.OutputCurvature"):
        fvp.scale_by_fisher(model, Poisson(), curvature=Poisson)


# A solver ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByEigenvalues(fvp.DampedSystem):
    damped: fvp.DampedCurvature

    def solve(self, rhs, start):
        values, vectors = jnp.linalg.eigh(self.damped.operator.dense())
        flat, unravel = ravel_pytree(rhs)
        x = unravel(vectors @ ((vectors.T @ flat) / (values + self.damped.damping)))
        return x, self.damped.record(x, rhs)


@dataclasses.dataclass(frozen=True)
class EigenSolver(fvp.DampedSolver):
    """By eigenvalues; counts its steps."""

    def init(self, setting):
        return jnp.zeros((), jnp.int32)

    def prepare(self, damped, moment, state):
        return ByEigenvalues(damped), state + 1


def test_a_solver_serves_the_transforms():
    expected = dense_gauss_newton(poisson_blocks(), jnp.ones(6)) + 0.1 * jnp.eye(len(FLAT))
    tx = fvp.scale_by_fisher(model, Poisson(), damping=0.1, solver=EigenSolver())
    update, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=X)
    assert relative_error(flat(update), jnp.linalg.solve(expected, FLAT)) < 1e-10
    assert state.solver == 1
    assert state.accepted
    # Under adaptive damping, momentum and a search as well.
    tx = fvp.natural_gradient(1.0, model, Poisson(), solver=EigenSolver(), line_search="loss")
    loss = lambda params: Poisson().nll(model(params, X), COUNTS).mean()
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params, batch=X, targets=COUNTS)
        params = optax.apply_updates(params, updates)
    assert state.solver == 3
    assert loss(params) < loss(PARAMS) - 0.1


def test_options_of_conjugate_gradients_beside_another_solver_are_an_error():
    with pytest.raises(ValueError, match=r"fvp.CG"):
        fvp.scale_by_fisher(model, Poisson(), solver=EigenSolver(), maxiter=3)
    with pytest.raises(ValueError, match="solver: expected one of"):
        fvp.scale_by_fisher(model, Poisson(), solver="lu")
    with pytest.raises(ValueError, match="momentum"):
        fvp.scale_by_fisher(model, Poisson(), solver=fvp.KFACSolver(), momentum=0.9)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("cg", fvp.CG()),
        ("dual", fvp.Dual()),
        ("dense", fvp.Dense()),
        ("auto", fvp.Auto()),
    ],
)
def test_strings_are_short_names_of_objects(name, solver):
    def first(solver):
        tx = fvp.scale_by_fisher(model, Poisson(), damping=0.1, solver=solver)
        return flat(tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=X)[0])

    assert np.array_equal(first(name), first(solver))
