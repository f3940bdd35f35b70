"""Distribution objects of other libraries against the heads of the same distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import quick_jit, rarely, relative_error

import fvp

COMPILE_QUICKLY = True

# The libraries warn of their own dependencies; they are no part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
Z, U, Z_NEW = jnp.asarray(RNG.normal(size=(3, 5, 3)))
KEY = jax.random.key(0)
LABELS, BITS = jnp.asarray(RNG.integers(0, 3, 5)), jnp.asarray(RNG.integers(0, 2, (5, 3)))
REALS, COUNTS = jnp.asarray(RNG.normal(size=(5, 3))), jnp.asarray(RNG.poisson(2.0, (5, 3)))


def numpyro():
    return pytest.importorskip("numpyro.distributions")


def distrax():
    return pytest.importorskip("distrax")


def of_numpyro(name, **options):
    def make():
        dist = numpyro()
        distribution = {
            "categorical": lambda z: dist.Categorical(logits=z),
            "bernoulli": lambda z: dist.Bernoulli(logits=z),
            "normal": lambda z: dist.Normal(z, 0.7).to_event(1),
        }[name]
        return fvp.FromDistribution(distribution, **options)

    return make


def of_distrax(name, **options):
    def make():
        library = distrax()
        distribution = {
            "categorical": lambda z: library.Categorical(logits=z),
            "bernoulli": lambda z: library.Bernoulli(logits=z),
        }[name]
        return fvp.FromDistribution(distribution, **options)

    return make


HEADS = {
    "numpyro categorical": (of_numpyro("categorical"), fvp.Softmax(), LABELS),
    "numpyro bernoulli": (of_numpyro("bernoulli"), fvp.Sigmoid(), BITS),
    "numpyro normal": (
        of_numpyro(
            "normal",
            fisher_matrix=lambda z: jnp.eye(3) / 0.7**2,
            divergence=lambda z, z_new: 0.5 * jnp.sum((z - z_new) ** 2) / 0.7**2,
        ),
        fvp.Gaussian(0.7),
        REALS,
    ),
    "distrax categorical": (of_distrax("categorical", support=np.arange(3)), fvp.Softmax(), LABELS),
    "distrax bernoulli": (of_distrax("bernoulli", support=np.arange(2)), fvp.Sigmoid(), BITS),
}
every_head = pytest.mark.parametrize(
    "name", [rarely(name) if name.startswith("distrax") else name for name in HEADS]
)


@every_head
def test_equals_the_head_of_the_same_distribution(name):
    make, twin, y = HEADS[name]
    head = make()
    for method, arguments in (
        ("nll", (y,)),
        ("score", (y,)),
        ("fisher", (U,)),
        ("hessian", (y, U)),
        ("kl", (Z_NEW,)),
    ):
        expected = getattr(twin, method)(Z, *arguments)
        # Distrax computes logarithms of probabilities in its own way.
        assert relative_error(getattr(head, method)(Z, *arguments), expected) < 1e-6, method
    square = head.sqrt_fisher(Z, head.sqrt_fisher_transpose(Z, U))
    assert relative_error(square, twin.fisher(Z, U)) < 1e-6
    np.testing.assert_allclose(head.kl(Z, Z), 0, atol=1e-12)


@every_head
def test_serves_the_curvatures_with_two_batch_axes(name):
    make, twin, y = HEADS[name]
    x = jnp.asarray(RNG.normal(size=(5, 1, 2)))
    w = jnp.asarray(RNG.normal(size=(2, 3)))
    model = lambda w, x: jnp.tanh(x @ w)
    expected = fvp.fisher(model, twin, w, x) @ w
    head = make()
    assert relative_error(fvp.fisher(model, head, w, x) @ w, expected) < 1e-6
    assert relative_error(fvp.fisher(model, head, w, x, chunk_size=2) @ w, expected) < 1e-6
    G = fvp.ggn(model, head, w, x, y[:, None])
    assert relative_error(G @ w, fvp.ggn(model, twin, w, x, y[:, None]) @ w) < 1e-6
    solution = fvp.solve_dual(fvp.fisher(model, head, w, x), w, 0.1)
    twins = fvp.solve_dual(fvp.fisher(model, twin, w, x), w, 0.1)
    assert relative_error(solution, twins) < 1e-6


@every_head
def test_samples_have_the_moments_of_the_head(name):
    make, twin, y = HEADS[name]
    head, count = make(), 20_000

    @quick_jit
    def draw(key):
        many = jnp.broadcast_to(Z[:1], (count, 3))
        sample = head.sample(key, many)
        return sample, head.score(many, sample)

    sample, score = draw(KEY)
    assert sample.shape == (count, *y.shape[1:])
    score = np.asarray(score)
    error = score.std(0) / np.sqrt(count)
    assert (np.abs(score.mean(0)) / error).max() < 5
    squares = score[:, :, None] * score[:, None]
    fisher = jax.vmap(lambda u: twin.fisher(Z[:1], u[None])[0])(jnp.eye(3))
    assert (np.abs(squares.mean(0) - fisher) / (squares.std(0) / np.sqrt(count) + 1e-9)).max() < 5


# --- Without any library ------------------------------------------------------------------------


class Normal:
    """Unit scale, one component for each location."""

    event_shape = ()

    def __init__(self, location):
        self.mean, self.batch_shape = location, location.shape

    def log_prob(self, y):
        return -0.5 * (y - self.mean) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

    def sample(self, key):
        return self.mean + jax.random.normal(key, self.batch_shape)


def test_draws_are_used_where_they_are_asked_for():
    """Fisher and KL of 20,000 draws for each example; z-scores below 5."""
    head, count = fvp.FromDistribution(Normal, num_samples=20_000, key=KEY), 20_000
    twin = fvp.Gaussian()
    matrix = jax.vmap(lambda u: head.fisher(Z, jnp.broadcast_to(u, Z.shape)), 0, 2)(jnp.eye(3))
    deviation = np.where(np.eye(3), np.sqrt(2), 1.0) / np.sqrt(count)
    assert (np.abs(matrix - np.eye(3)) / deviation).max() < 5
    assert len(np.unique(np.asarray(matrix[:, 0, 0]))) == 5  # each example draws its own
    np.testing.assert_array_equal(head.fisher(Z, U), head.fisher(Z, U))
    near = Z + 0.1 * U
    np.testing.assert_allclose(head.kl(Z, near), twin.kl(Z, near), rtol=0.1)
    np.testing.assert_allclose(head.mean(Z), Z)
    np.testing.assert_allclose(head.nll(Z, REALS), twin.nll(Z, REALS), rtol=1e-12)


def test_nothing_is_drawn_in_silence():
    head = fvp.FromDistribution(Normal)
    with pytest.raises(ValueError, match=r"Fisher is not known.*fisher_matrix=, support= or num_s"):
        head.fisher(Z, U)
    with pytest.raises(ValueError, match=r"KL divergence is not known.*divergence=, support="):
        head.kl(Z, Z_NEW)
    with pytest.raises(ValueError, match="num_samples, key: FromDistribution takes both"):
        fvp.FromDistribution(Normal, num_samples=3)


def test_the_sampled_fisher_needs_no_closed_form():
    head, x = fvp.FromDistribution(Normal), jnp.asarray(RNG.normal(size=(5, 2)))
    w = jnp.asarray(RNG.normal(size=(2, 3)))
    F = fvp.mc_fisher(lambda w, x: x @ w, head, w, x, KEY, num_samples=5000)
    expected = fvp.fisher(lambda w, x: x @ w, fvp.Gaussian(), w, x)
    assert relative_error(F.dense(), expected.dense()) < 0.1


def test_a_head_of_a_distribution_is_a_record():
    head = fvp.FromDistribution(Normal, num_samples=4, key=KEY)
    expected = head.fisher(Z, U)
    assert relative_error(jax.jit(lambda h, z: h.fisher(z, U))(head, Z), expected) < 1e-12
    plain = fvp.FromDistribution(Normal, fisher_matrix=lambda z: jnp.eye(3))
    assert hash(plain) == hash(fvp.FromDistribution(Normal, fisher_matrix=plain.fisher_matrix))
    static = jax.jit(lambda h, z: h.fisher(z, U), static_argnums=0)
    np.testing.assert_allclose(static(plain, Z), U)


def test_targets_and_functions_are_checked():
    with pytest.raises(ValueError, match=r"targets: expected shape \(5, 3\)"):
        fvp.FromDistribution(Normal).nll(Z, REALS[:, :2])
    with pytest.raises(TypeError, match="make_distribution: expected a function"):
        fvp.FromDistribution(1.0)
