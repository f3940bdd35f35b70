"""Where the noise of the batches leads: when that is noticed, and the steps that are taken then."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import quick_jit, rarely
from sklearn.datasets import load_digits

import fvp
from fvp.control.claims import Claims
from fvp.control.iterate_average import IterateAverage
from fvp.control.learned_length import LearnedLength
from fvp.preconditioners.moments import Moments
from fvp.transforms.noise import gradients_for_one_step

COMPILE_QUICKLY = True

HEAD = fvp.Softmax()
EPS = float(jnp.finfo(jnp.float32).eps)


# Claims ------------------------------------------------------------------------------------------


def led(losses, claims, reductions):
    """Whether noise leads after each batch, whose loss before its step is one of ``losses``."""
    found = []
    for before, reduction in zip(losses, reductions, strict=True):
        claims = claims.held_against(jnp.float32(before), jnp.float32(1), EPS)
        found.append(bool(claims.noise_leads))
        claims = claims.after(*map(jnp.float32, (before, 2 * reduction, reduction)))
    return found


def test_one_batch_over_and_over_refutes_nothing():
    # What a step leaves is what the next one finds, but for rounding, to the floor of the loss.
    losses = 3.0 * 0.5 ** np.arange(60)
    rounded = losses * (1 + 2 * EPS * np.random.default_rng(0).choice([-1, 1], 60))
    assert not any(led(rounded, Claims.zeros(), losses / 2))


def test_steps_that_only_fit_their_batch_are_refuted_at_once():
    assert led([1.0, 1.0, 1.0], Claims.zeros(), [0.9] * 3) == [False, True, True]


@pytest.mark.parametrize(("kept", "leads"), [(0.7, True), (0.8, False)])
def test_a_quarter_of_what_is_claimed_decides(kept, leads):
    losses = 10 - 0.1 * kept * np.arange(40)
    assert led(losses, Claims.zeros(), [0.1] * 40)[-1] == leads


def test_losses_that_are_not_finite_say_nothing():
    one, half = jnp.float32(1), jnp.float32(0.5)
    claims = Claims.zeros().after(one, one, half)
    assert claims.held_against(one, one, EPS).noise_leads
    assert not claims.held_against(jnp.float32(jnp.nan), one, EPS).noise_leads
    assert not claims.held_against(jnp.float32(jnp.inf), one, EPS).noise_leads
    bad = claims.after(jnp.float32(jnp.nan), one, half)
    assert not bad.held_against(jnp.float32(9), one, EPS).noise_leads


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 1.5])
def test_a_shortened_step_is_held_to_a_shortened_claim(part):
    # Of 1/2 (1 - s)^2 the whole step s = 1 claims 1/2, with slope 1.
    one, half, part = jnp.float32(1), jnp.float32(0.5), jnp.float32(part)
    claims = Claims.zeros().after(half, one, half)
    loss = 0.5 * (1 - part) ** 2
    assert jnp.abs(claims.held_against(loss, part, EPS).refuted) < 1e-6


# The learned length, and steps to the average ----------------------------------------------------


def descend(noise, scale=1.0, steps=3000, seed=0):
    """Lengths that are learned on 1/2 |x|^2 with noisy gradients, and the losses."""

    def step(carry, key):
        x, trail, learned, average = carry
        gradient = scale * (x + noise * jax.random.normal(key, x.shape))
        last, slope = learned.length, jnp.vdot(gradient, trail)
        learned = learned.learned(slope, slope)
        learned = learned._replace(length=jnp.where(last == 0, 0.01, learned.length))
        longer = learned.length / jnp.where(last == 0, learned.length, last)
        average, taken = average.stepped(gradient / scale, learned.length, longer, False)
        carry = x - taken, 29 / 30 * trail + taken, learned, average
        return carry, (learned.length, 0.5 * jnp.vdot(x, x))

    x = jnp.full(10, 10.0)
    start = x, jnp.zeros(10), LearnedLength.zeros(), IterateAverage.of(x)
    keys = jax.random.split(jax.random.key(seed), steps)
    return jax.lax.scan(step, start, keys)[1]


def test_without_noise_the_length_is_found_within_twenty_steps():
    lengths, losses = descend(0.0, steps=100)
    assert 0.2 < lengths[15] < 2
    assert losses[-1] < 1e-5 * losses[0]


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_under_noise_the_loss_ends_below_that_of_every_fixed_length(noise):
    def fixed(length, steps=3000):
        def step(x, key):
            gradient = x + noise * jax.random.normal(key, x.shape)
            return x - length * gradient, 0.5 * jnp.vdot(x, x)

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, jnp.full(10, 10.0), keys)[1]

    _, losses = descend(noise)
    best = min(fixed(length)[-500:].mean() for length in 2.0 ** -np.arange(0, 8))
    assert losses[-500:].mean() < best
    assert losses[20:].max() <= losses[0]


def test_units_of_the_loss_do_not_matter():
    a, b = descend(1.0, steps=200)[0], descend(1.0, scale=2.0**20, steps=200)[0]
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_the_parameters_are_near_the_weighted_average_of_a_longer_sequence():
    rng = np.random.default_rng(0)
    lengths, directions = np.exp(rng.normal(size=30)), rng.normal(size=(30, 4))
    y = np.ones(4)
    average, z, points, weights = IterateAverage.of(jnp.asarray(y)), y.copy(), [], []
    for i, (length, d) in enumerate(zip(lengths, directions, strict=True)):
        longer = length / lengths[max(i - 1, 0)]
        average, step = average.stepped(jnp.asarray(d), jnp.asarray(length), longer, False)
        y = y - np.asarray(step)
        z = z - length * d
        points.append(z)
        weights.append((i + 1) * length)
        x = np.average(points, axis=0, weights=weights)
        np.testing.assert_allclose(y, 0.1 * z + 0.9 * x, rtol=1e-5)


def test_an_average_that_starts_anew_forgets_what_is_left_of_all_directions():
    one = jnp.ones(3)
    average = IterateAverage.of(one)
    for _ in range(5):
        average, _ = average.stepped(one, jnp.float32(0.1), jnp.float32(1), False)
    assert np.all(average.ahead > 0)
    anew, step = average.stepped(one, jnp.float32(0.1), jnp.float32(1), True)
    expected, first = IterateAverage.of(one).stepped(one, jnp.float32(0.1), jnp.float32(1), False)
    jax.tree.map(np.testing.assert_allclose, (anew, step), (expected, first))


def test_steps_that_only_lead_uphill_are_noticed():
    learned, rng = LearnedLength.zeros(), np.random.default_rng(0)
    for slope in rng.normal(size=200):
        learned = learned.learned(jnp.float32(slope), jnp.float32(slope))
        assert not learned.only_uphill
    for slope in rng.normal(size=40) - 3:
        learned = learned.learned(jnp.float32(slope), jnp.float32(slope))
    assert learned.only_uphill


@pytest.mark.parametrize("slope", [jnp.nan, jnp.inf, -jnp.inf, 1e30, -1e30])
def test_no_single_slope_moves_the_length_far(slope):
    learned = LearnedLength.zeros()._replace(length=jnp.float32(0.1))
    for _ in range(100):
        learned = learned.learned(*[jnp.float32(1e-3) * (-1) ** _] * 2)
    after = learned.learned(jnp.float32(slope), jnp.float32(1e-3))
    assert 0.85 < after.length / learned.length < 1.2


def test_no_direction_is_more_than_twice_as_long_as_those_before_it():
    learned = LearnedLength.zeros()._replace(length=jnp.float32(0.5))
    learned, length = learned.shortened(jnp.float32(9))
    assert length == 0.5
    for square in [1.0, 0.0, 4.0] * 60:
        learned, length = learned.shortened(jnp.float32(square))
        assert length == 0.5
    _, length = learned.shortened(jnp.float32(1e4))
    typical = (1 + 4) / 2  # zeros do not count
    np.testing.assert_allclose(length * 1e2, 0.5 * 2 * typical**0.5, rtol=0.1)
    _, of_four = learned.shortened(jnp.float32(1e4), 4)  # their mean varies half as much
    np.testing.assert_allclose(of_four / length, 1.5 / 2, rtol=1e-6)
    # Where they stay that long, steps follow by 5% each.
    lengths = []
    for _ in range(100):
        learned, length = learned.shortened(jnp.float32(1e4))
        lengths.append(float(length))
    assert max(np.divide(lengths[1:], lengths[:-1])) < 1.06
    assert lengths[-1] == 0.5


def test_steps_that_are_never_taken_leave_everything_finite():
    # A learning rate of zero behind the transformation: every slope is downhill.
    x, y = digits()
    tx = optax.chain(natural_gradient(), optax.scale(0.0))
    params, step = start(), stepper(tx)
    state = with_noise(tx.init(params))
    learned = noise_of(state).learned._replace(length=jnp.float32(3e38))
    state = optax.tree.set(state, learned=learned)
    for _ in range(5):
        params, state, updates = step(params, state, x[:4], y[:4])
    for leaf in jax.tree.leaves((noise_of(state), updates)):
        assert np.all(np.isfinite(leaf))


# Moments in eigenbases ---------------------------------------------------------------------------


def gradients(count, shapes, dtype=np.float64, seed=0):
    """Gradients whose outer products have the same eigenvectors all the time."""
    rng = np.random.default_rng(seed)
    mixes = [[rng.normal(size=(size, size)) for size in shape] for shape in shapes]
    for _ in range(count):
        tree = []
        for shape, matrices in zip(shapes, mixes, strict=True):
            g = rng.normal(size=shape)
            for axis, matrix in enumerate(matrices):
                g = np.moveaxis(np.tensordot(matrix, g, axes=(1, axis)), 0, axis)
            tree.append(jnp.asarray(g, dtype))
        yield tree


def run(shapes, count, dtype=np.float64):
    trees = list(gradients(count, shapes, dtype))
    moments, directions = Moments.of(trees[0]), []
    update = quick_jit(lambda m, g: m.whitened(g, 200))
    for tree in trees:
        moments, direction = update(moments, tree)
        directions.append(direction)
    return trees, moments, directions


def reference(gs, count):
    """The direction of one matrix in NumPy, one line for each line of the method."""
    a, b = gs[0].shape
    sides = [np.zeros((a, a)), np.zeros((b, b))]
    bases = [np.eye(a), np.eye(b)]
    square = np.zeros((a, b))
    for i, g in enumerate(gs[:count]):
        if i % (10 if i < 200 else 40) == 0:
            sides = [0.97 * sides[0] + g @ g.T, 0.97 * sides[1] + g.T @ g]
            new = []
            for side, basis in zip(sides, bases, strict=True):
                product = side @ basis + 2.0**-16 * np.trace(side) * basis
                new.append(np.linalg.qr(product)[0])
            turns = [old.T @ now for old, now in zip(bases, new, strict=True)]
            square = (turns[0] ** 2).T @ square @ turns[1] ** 2
            bases = new
        turned = bases[0].T @ g @ bases[1]
        square = 0.95 * square + 0.05 * turned**2
    square = np.maximum(square, 2.0**-32 * square.max()) / (1 - 0.95**count)
    return bases[0] @ (turned / np.sqrt(square)) @ bases[1].T


def test_directions_are_those_of_a_plain_reference():
    trees, _, directions = run([(4, 3)], 25)
    flat = [np.asarray(tree[0]) for tree in trees]
    for count in (1, 10, 11, 25):
        expected = reference(flat, count)
        np.testing.assert_allclose(directions[count - 1][0], expected, rtol=1e-5, atol=1e-7)


def test_bases_become_the_eigenvectors_of_the_averaged_outer_products():
    _, moments, _ = run([(5, 4)], 4000)
    for outer, basis in zip(moments.outer[0], moments.bases[0], strict=True):
        basis = np.asarray(basis)
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-10)
        turned = basis.T @ np.asarray(outer) @ basis
        rest = turned - np.diag(np.diag(turned))
        assert np.linalg.norm(rest) < 0.1 * np.linalg.norm(turned)


def test_vectors_get_what_adam_gives_them():
    trees, _, directions = run([(6,), ()], 20)
    adam = optax.scale_by_adam(b1=0.0, b2=0.95, eps=0.0)
    state = adam.init(trees[0])
    for tree, direction in zip(trees, directions, strict=True):
        expected, state = adam.update(tree, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), direction, expected)


def test_axes_of_three_and_of_length_one_and_empty_leaves():
    _, moments, directions = run([(2, 3, 4), (1, 5), (0, 3), (1, 1)], 12)
    assert [len(bases) for bases in moments.bases] == [3, 0, 0, 0]
    assert all(np.all(np.isfinite(leaf)) for leaf in directions[-1])


def test_long_axes_keep_their_coordinates():
    moments = Moments.of([jnp.zeros((2000, 1500)), jnp.zeros((640, 32)), jnp.zeros((639, 32))])
    sizes = [[len(basis) for basis in bases] for bases in moments.bases]
    assert sizes == [[], [32], [639, 32]]


def test_a_coordinate_that_was_silent_takes_no_long_step():
    # Rare features: a gradient is large against a second moment of nothing. It counts in that, so
    # that no coordinate of the bases is longer than 1 / sqrt(0.05).
    rng, moments = np.random.default_rng(0), Moments.of([jnp.zeros((30, 4))])
    update = quick_jit(lambda m, g: m.whitened(g, 200))
    for _ in range(200):
        row = (rng.uniform(size=30) < 0.03) * rng.normal(size=30)
        g = [jnp.asarray(np.outer(row, rng.normal(size=4)), jnp.float32)]
        moments, (direction,) = update(moments, g)
        left, right = moments.bases[0]
        assert np.abs(left.T @ direction @ right).max() <= 0.05**-0.5 * (1 + 1e-5)


# The transformations -----------------------------------------------------------------------------


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)


def model_fn(params, x):
    (w, b), (v, c) = params
    return jnp.tanh(x @ w + b) @ v + c


def start(seed=0, width=32):
    rng = np.random.default_rng(seed)
    layer = lambda i, o: (
        jnp.asarray(rng.normal(size=(i, o)) / i**0.5, jnp.float32),
        jnp.zeros(o, jnp.float32),
    )
    return [layer(64, width), layer(width, 10)]


def natural_gradient(rate=1.0, **options):
    return fvp.natural_gradient(rate, model_fn, HEAD, **options)


def scale_by_kfac(rate=1.0, **options):
    return optax.chain(fvp.scale_by_kfac(model_fn, HEAD, **options), optax.scale(-rate))


TRANSFORMS = {"natural_gradient": natural_gradient, "scale_by_kfac": scale_by_kfac}
both = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
# Under noise the two are one rule.
either = pytest.mark.parametrize("make", [natural_gradient, rarely(scale_by_kfac)], ids=TRANSFORMS)


def loss(params, x, y):
    return HEAD.nll(model_fn(params, x), y).mean()


def to_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def noise_of(state):
    return optax.tree.get(state, "noise")


def with_noise(state):
    """The same state where noise leads."""
    noise = noise_of(state)
    claims = noise.claims._replace(claimed=jnp.float32(1))
    return optax.tree.set(state, noise=noise._replace(leads=jnp.array(True), claims=claims))


def stepper(tx):
    def step(params, state, x, y, **keywords):
        gradient = jax.grad(loss)(params, x, y)
        updates, state = tx.update(gradient, state, params, batch=x, targets=y, **keywords)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step)


def train_on(batches, tx, params, x, y):
    """The loss on all examples after a step on each of ``batches``, rows of them; and the end."""

    def step(carry, rows):
        params, state = carry
        gradient = jax.grad(loss)(params, x[rows], y[rows])
        updates, state = tx.update(gradient, state, params, batch=x[rows], targets=y[rows])
        params = optax.apply_updates(params, updates)
        return (params, state), loss(params, x, y)

    carry, losses = jax.jit(lambda c: jax.lax.scan(step, c, batches))((params, tx.init(params)))
    return np.asarray(losses), carry


def train(tx, batch_size, steps, seed=0):
    """The loss on all digits before, and after every step on a batch that is drawn anew."""
    x, y = digits()
    draw = lambda key: jax.random.randint(key, (batch_size,), 0, len(x))
    batches = jax.vmap(draw)(jax.random.split(jax.random.key(seed), steps))
    params = start(seed)
    return float(loss(params, x, y)), *train_on(batches, tx, params, x, y)


@pytest.mark.parametrize(("make", "batch_size"), [(natural_gradient, 1), (scale_by_kfac, 8)])
def test_small_batches_with_nothing_set_never_rise_above_the_start(make, batch_size):
    first, losses, (_, state) = train(make(), batch_size, 1000)
    assert noise_of(state).leads
    assert losses[20:].max() <= first
    assert losses[-1] < 0.6


@pytest.mark.parametrize(("make", "seed"), [(natural_gradient, 0), (scale_by_kfac, 1)])
def test_batches_that_are_all_fitted_stay_so(make, seed):
    """Long after the loss is below rounding, in epochs: the batch that is least fitted leads then.

    Its direction is ten or more times as long as all others; the loss jumped by that to 1.
    """
    x, y = (2 * digits()[0] - 1)[::4], digits()[1][::4]
    rng, size = np.random.default_rng(seed), 8
    epochs = [rng.permutation(len(x))[: len(x) // size * size] for _ in range(60)]
    batches = jnp.asarray(np.concatenate(epochs)).reshape(-1, size)
    losses, _ = train_on(batches, make(), start(seed, 64), x, y)
    fitted = np.argmax(losses < 1e-6)
    assert 0 < fitted < len(losses) // 2
    assert losses[fitted:].max() < 1e-4


@either
def test_batches_of_one_from_many_starts_never_rise_above_them(make):
    # One example alone may confirm what was fitted to another.
    (x, y), tx, seeds = digits(), make(), range(12)

    def losses(start_and_key):
        params, key = start_and_key

        def step(carry, row):
            params, state = carry
            gradient = jax.grad(loss)(params, x[row], y[row])
            updates, state = tx.update(gradient, state, params, batch=x[row], targets=y[row])
            params = optax.apply_updates(params, updates)
            return (params, state), loss(params, x, y)

        rows = jax.random.randint(key, (40, 1), 0, len(x))
        return loss(params, x, y), jax.lax.scan(step, (params, tx.init(params)), rows)[1]

    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start(seed, 128) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(seeds)))
    first, after = jax.jit(lambda x: jax.lax.map(losses, x))((starts, keys))
    assert np.all(after[:, 19:] <= first[:, None])


@both
def test_full_batches_are_stepped_as_if_noise_were_nothing(make):
    x, y = digits()
    rule = {natural_gradient: fvp.LevenbergMarquardt(), scale_by_kfac: fvp.ReductionRatio()}[make]
    runs, wide = [], jax.tree.map(lambda p: p.astype(jnp.float64), start())
    for tx in (make(), make(damping=rule)):
        params, state, step = wide, tx.init(wide), stepper(tx)
        for _ in range(12):
            params, state, _ = step(params, state, x, y)
        runs.append((params, state))
    (params, state), (expected, plain) = runs
    assert not noise_of(state).leads
    assert noise_of(plain) is None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected
    )


@pytest.mark.parametrize(
    ("make", "rate"), [rarely(fvp.scale_by_fisher, 0.1), (fvp.scale_by_kfac, 1.0)]
)
def test_full_batches_stay_so_where_others_change_the_steps(make, rate):
    x, y = digits()
    others = optax.add_decayed_weights(1e-3), optax.scale(-rate)
    tx = optax.chain(make(model_fn, HEAD), *others)
    params, state, step = start(), tx.init(start()), stepper(tx)
    for _ in range(30):
        params, state, _ = step(params, state, x, y)
        assert not noise_of(state).leads


@pytest.mark.each_value
@pytest.mark.parametrize(("make", "rate"), [(natural_gradient, 1.0), (scale_by_kfac, 0.25)])
@pytest.mark.parametrize(("seed", "size", "risen"), [(3, 3, True), (3, 32, False)])
def test_the_steps_that_show_it_are_taken_back(make, rate, seed, size, risen):
    x, y = digits()
    order = np.random.default_rng(seed).permutation(len(x))
    tx = make(rate)
    params, state, step = start(), tx.init(start()), stepper(tx)
    path = [params]
    for i in range(len(x) // size):
        rows = order[size * i : size * (i + 1)]
        params, state, _ = step(params, state, x[rows], y[rows])
        path.append(params)
        if noise_of(state).leads:
            break
    noise = noise_of(state)
    assert noise.leads
    assert noise.claims.loss_has_risen == risen
    # The update that finds it goes back to where the first step started, or the last one where the
    # loss has fallen on the whole.
    expected = path[0 if risen else -3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, expected)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(start()))


@both
def test_a_batch_without_a_finite_gradient_says_nothing_of_noise(make):
    x, y = (v[:64] for v in digits())
    params, step = start(), stepper(tx := make())
    params, state, _ = step(params, tx.init(params), x, y)
    bad = x.at[:, 0].set(jnp.inf)  # tanh saturates: the loss is finite, its gradient is not
    assert jnp.isfinite(loss(params, bad, y))
    before = noise_of(state).claims
    after, kept, _ = step(params, state, bad, y)
    noise = noise_of(kept)
    assert not noise.leads
    assert not optax.tree.get(kept, "accepted")
    assert noise.claims.claimed == before.claimed
    assert noise.claims.refuted == before.refuted
    jax.tree.map(np.testing.assert_array_equal, after, params)
    for _ in range(3):  # the one batch that is left is no noise
        after, kept, _ = step(after, kept, x, y)
        assert not noise_of(kept).leads


@either
def test_a_batch_that_is_not_finite_changes_nothing_where_noise_leads(make):
    x, y = digits()
    params, step = start(), stepper(tx := make())
    state = with_noise(tx.init(params))
    for i in range(3):
        params, state, _ = step(params, state, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
    bad = x[:4].at[1, 2].set(jnp.nan)
    after, kept, updates = step(params, state, bad, y[:4])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))
    assert not optax.tree.get(kept, "accepted")
    jax.tree.map(np.testing.assert_array_equal, noise_of(kept), noise_of(state))
    jax.tree.map(np.testing.assert_array_equal, after, params)
    _, recovered, updates = step(after, kept, x[:4], y[:4])
    assert optax.tree.get(recovered, "accepted")
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))


def with_bases(state):
    """The same state where noise has led for long."""
    noise = noise_of(state)
    old = noise.moments._replace(gradients=jnp.int32(200))
    return optax.tree.set(state, noise=noise._replace(moments=old))


def in_all_of(tx, batches):
    """Parameters and state under noise after a step on each of these batches of digits, float64."""
    x, y = digits()
    x, params, step = x.astype(jnp.float64), to_float64(start()), stepper(tx)
    state = with_bases(with_noise(tx.init(params)))
    for rows in batches:
        params, state, _ = step(params, state, x[rows], y[rows])
    return params, state


@pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.__version_info__ < (0, 11),
    reason="counts what today's compiler for CPUs does",
)
def test_no_branch_copies_what_it_does_not_change():
    x, y = digits()
    params, step = start(), stepper(tx := natural_gradient())

    def steps(carry, rows):
        one = lambda carry, rows: (step(*carry, x[rows], y[rows])[:2], None)
        return jax.lax.scan(one, carry, rows)[0]

    rows = jnp.zeros((9, 4), jnp.int32)
    text = jax.jit(steps).lower((params, tx.init(params)), rows).compile().as_text()
    loop = text[: text.index("\nENTRY ")]
    bodies = re.findall(r"^%(?!\S*(?:copy|fused))[^\n]*{\n(.*?)^}", loop, re.M | re.S)
    copies = sum(len(re.findall(r"= f32\[64,32\]\S* copy\(", body)) for body in bodies)
    assert len(bodies) > 20
    assert copies == 0


@either
def test_gradients_that_wait_are_averaged_for_one_step(make, monkeypatch):
    rows = np.arange(24).reshape(8, 3)
    together = in_all_of(make(), rows)
    monkeypatch.setattr("fvp.transforms.noise._MOST", 1)
    in_one = in_all_of(make(), [rows[:4].ravel(), rows[4:].ravel()])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-8),
        (together[0], noise_of(together[1]).moments.second_moment),
        (in_one[0], noise_of(in_one[1]).moments.second_moment),
    )
    counts = [optax.tree.get(state, "count") for _, state in (together, in_one)]
    assert counts == [8, 2]


def test_steps_of_more_gradients_are_longer_by_the_root():
    x, y = digits()
    params, step = start(), stepper(tx := natural_gradient())
    params, state, _ = step(params, with_noise(tx.init(params)), x[:4], y[:4])

    def length(steps):
        noise = noise_of(state)
        moments = noise.moments._replace(gradients=jnp.int32(steps))
        later = noise._replace(moments=moments, waiting=jnp.int32(3))
        _, after, _ = step(params, optax.tree.set(state, noise=later), x[4:8], y[4:8])
        return float(noise_of(after).learned.length)

    found = {steps: length(steps) / length(99) for steps in (50, 98, 100, 101, 150, 151, 250)}
    expected = {50: 2**0.5, 98: 1, 100: 1.5**0.5, 101: 1, 150: (4 / 3) ** 0.5, 151: 1, 250: 1}
    assert found == pytest.approx(expected, rel=0.02)


@either
def test_a_gradient_that_is_not_finite_does_not_wait(make):
    x, y = digits()
    params, step = start(), stepper(tx := make())
    state = with_bases(with_noise(tx.init(params)))
    told = []
    for i, scale in enumerate([1, 1, np.nan, np.inf, 1, 1, 1]):
        rows = slice(4 * i, 4 * i + 4)
        params, state, updates = step(params, state, scale * x[rows], y[rows])
        moved = any(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))
        told.append((int(fvp.diagnostics(state)["waiting"]), moved))
    assert told == [
        (1, False),
        (2, False),
        (2, False),
        (2, False),
        (3, False),
        (0, True),
        (1, False),
    ]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert "1 gradient waiting for one step" in fvp.describe(state)


def test_a_batch_that_needs_not_wait_steps_by_itself():
    x, y = digits()
    params, step = start(), stepper(tx := natural_gradient())
    state = with_bases(with_noise(tx.init(params)))
    _, waiting, _ = step(params, state, x[:4], y[:4])
    assert noise_of(waiting).waiting == 1
    expected, _, _ = step(params, state, x[:1700], y[:1700])
    found, after, _ = step(params, waiting, x[:1700], y[:1700])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert noise_of(after).waiting == 0


@pytest.mark.parametrize(
    ("batch_size", "number"), [(1, 4), (800, 4), (1000, 3), (2000, 2), (3000, 1)]
)
def test_gradients_wait_where_turning_them_is_more_work_than_they_are(batch_size, number):
    # To the bases and back 2 x (784 x 128 x (784 + 128) + 128 x 10 x (128 + 10)) multiplications,
    # 1805 times those of one example's forward pass.
    gradient = {"one": jnp.zeros((784, 128)), "two": jnp.zeros((128, 10)), "bias": jnp.zeros(128)}
    forward = batch_size * (784 * 128 + 128 * 10)
    assert gradients_for_one_step(gradient, forward) == number


def test_directions_that_were_wrong_are_given_up(monkeypatch):
    # As others may make them that shorten steps: what is left of old directions leads uphill.
    monkeypatch.setattr("fvp.transforms.noise._MOST", 1)
    x, y = digits()
    tx, params = natural_gradient(), start()
    state = with_noise(tx.init(params))

    def some(carry, steps, seed):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (32,), 0, len(x))
            gradient = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = tx.update(gradient, state, params, batch=x[rows], targets=y[rows])
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(seed), steps))[0]

    run = jax.jit(some, static_argnums=1)
    params, state = run((params, state), 200, 0)
    noise, gradient = state.noise, jax.grad(loss)(start(), x, y)
    uphill = jax.tree.map(lambda g: -500 * g / optax.tree.norm(gradient), gradient)
    average = noise.average._replace(ahead=uphill)
    state = state._replace(noise=noise._replace(average=average))
    params, state = run((params, state), 400, 1)
    assert state.noise.average.steps < 600  # it has started anew
    assert loss(params, x, y) < loss(start(), x, y)  # without: a hundred times that


def test_half_precision_parameters_keep_their_dtypes():
    x, y = digits()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start())
    tx = natural_gradient()
    state = with_noise(tx.init(params))
    step = stepper(tx)
    for i in range(3):
        new, state, updates = step(
            params, state, x[4 * i : 4 * i + 4].astype(jnp.bfloat16), y[4 * i : 4 * i + 4]
        )
        assert {leaf.dtype for leaf in jax.tree.leaves((new, updates))} == {jnp.dtype(jnp.bfloat16)}
        assert all(np.all(np.isfinite(leaf.astype(float))) for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.1},
        {"damping": fvp.LevenbergMarquardt()},
        {"max_kl": 0.01},
        {"line_search": "loss"},
        {"geodesic": True},
    ],
    ids=str,
)
def test_what_is_asked_for_is_not_overridden(options):
    assert natural_gradient(**options).init(start()).noise is None


def test_the_loss_is_the_one_that_value_fn_gives():
    # A sum over the batch, whose gradient the head's mean nll does not have.
    x, y = digits()
    total = lambda params, batch: HEAD.nll(model_fn(params, batch[0]), batch[1]).sum()
    tx = fvp.natural_gradient(1.0, lambda p, batch: model_fn(p, batch[0]), HEAD)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (4,), 0, len(x))
        batch = x[rows], y[rows]
        value, gradient = jax.value_and_grad(total)(params, batch)
        updates, state = tx.update(
            gradient, state, params, batch=batch, value=value, value_fn=total
        )
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 300)
    run = jax.jit(lambda c: jax.lax.scan(step, c, keys)[0])
    params, state = run((start(), tx.init(start())))
    assert state.noise.leads
    assert loss(params, x, y) < 0.5 * loss(start(), x, y)


@either
def test_a_policy_learns_from_advantages_of_either_sign(make):
    # Five arms whose rewards depend on ten numbers; actions are those of the policy itself.
    rng = np.random.default_rng(0)
    single = lambda x: jnp.asarray(x, jnp.float32)
    x, hidden, arms = (single(rng.normal(size=s)) for s in [(2000, 10), (10, 5), (5, 5)])
    rewards = jax.nn.sigmoid(2 * jnp.tanh(x @ hidden) @ arms)
    policy = lambda params, batch: model_fn(params, batch["x"])
    make = {natural_gradient: fvp.natural_gradient, scale_by_kfac: fvp.scale_by_kfac}[make]
    if make is fvp.natural_gradient:
        tx = make(1.0, policy, HEAD)
    else:
        tx = optax.chain(make(policy, HEAD), optax.scale(-1.0))

    def surrogate(params, batch):
        return jnp.mean(batch["advantage"] * HEAD.nll(policy(params, batch), batch["action"]))

    def regret(params):
        chosen = jax.nn.softmax(model_fn(params, x))
        return jnp.mean(rewards.max(axis=1) - jnp.sum(chosen * rewards, axis=1))

    def step(carry, key):
        params, state = carry
        rows, actions, noise = jax.random.split(key, 3)
        rows = jax.random.randint(rows, (64,), 0, len(x))
        action = jax.random.categorical(actions, model_fn(params, x[rows]))
        reward = rewards[rows, action] + 0.3 * jax.random.normal(noise, (64,), jnp.float32)
        batch = {"x": x[rows], "action": action, "advantage": reward - reward.mean()}
        gradient = jax.grad(surrogate)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch, value_fn=surrogate)
        params = optax.apply_updates(params, updates)
        return (params, state), regret(params)

    def run(params, key):
        keys = jax.random.split(key, 300)
        return regret(params), jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    def layers(seed):
        rng = np.random.default_rng(seed)
        return [
            (single(rng.normal(size=s) / s[0] ** 0.5), jnp.zeros(s[1], jnp.float32))
            for s in [(10, 32), (32, 5)]
        ]

    run = jax.jit(run)
    for seed in range(3):
        first, after = run(layers(seed), jax.random.key(seed))
        assert after[19:].max() <= first
        assert after[-50:].mean() < 0.2 * first
