"""Trust region policy optimisation of CartPole: steps of a bounded KL divergence.

    python examples/trpo.py
    python examples/trpo.py --seeds 3 4 5

The policy takes natural-gradient steps that are as long as the bound allows, by `max_kl=` and
`constant_kl=`: their exact divergence is at most 5% above it. `line_search=` halves a step until
the surrogate improves. The natural gradient also fits the value of a state, the baseline of
generalised advantage estimation. Draws the return against environment steps, and evaluates the
final policy, whose actions are sampled there too.

J. Schulman et al., Trust region policy optimization, 2015, and High-dimensional continuous control
using generalized advantage estimation, 2016.
"""

import argparse
import time
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POLICY, VALUE = fvp.Softmax(), fvp.Gaussian()
LONGEST, SOLVED = 500, 475  # steps of an episode; the mean return that counts as solved
DISCOUNT, TRACE_DECAY = 0.99, 0.97
MAX_KL = 0.01


def network(params, x):
    """Logits of the actions, or the value of the state."""
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def initial(key, outputs, inputs=4, width=32):
    layer = lambda key, i, o: {
        "w": jax.random.normal(key, (i, o)) / np.sqrt(i),
        "b": jnp.zeros(o),
    }
    first, last = jax.random.split(key)
    return {"hidden": layer(first, inputs, width), "out": layer(last, width, outputs)}


def make_environments(count, seed):
    environments = gymnasium.make_vec("CartPole-v1", count, vectorization_mode="sync")
    environments.reset(seed=seed)
    return environments


@jax.jit
def act(policy, observations, key, step):
    return POLICY.sample(jax.random.fold_in(key, step), network(policy, observations))


def collect(environments, policy, key):
    """LONGEST steps of every environment from a reset, as arrays (steps, environments, ...).

    The step after the last of an episode only resets its environment: its weight is zero.
    """
    observations, _ = environments.reset()
    weights, steps = np.ones(environments.num_envs), []
    for number in range(LONGEST):
        actions = np.asarray(act(policy, observations, key, number))
        following, rewards, terminated, truncated, _ = environments.step(actions)
        steps.append(
            {
                "observations": observations,
                "actions": actions,
                "rewards": rewards,
                "following": following,
                "terminated": terminated,
                "ended": terminated | truncated,
                "weights": weights,
            }
        )
        observations, weights = following, 1.0 - steps[-1]["ended"]
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def returns(batch):
    """The return of the first episode in each environment: it ends within LONGEST steps."""
    return np.sum(batch["rewards"] * np.cumprod(batch["weights"], axis=0), axis=0)


@jax.jit
def estimate_advantages(value, batch):
    """Generalised advantage estimates, and the returns to fit the value to.

    Termination ends the rewards; truncation ends the episode only: there the value goes on.
    """
    now = network(value, batch["observations"])[..., 0]
    later = jnp.where(batch["terminated"], 0, network(value, batch["following"])[..., 0])
    errors = batch["rewards"] + DISCOUNT * later - now

    def accumulate(following, step):
        error, ended = step
        advantage = error + DISCOUNT * TRACE_DECAY * jnp.where(ended, 0, following)
        return advantage, advantage

    start = jnp.zeros(errors.shape[1])
    _, advantages = jax.lax.scan(accumulate, start, (errors, batch["ended"]), reverse=True)
    return advantages, advantages + now


def standardise(x, weights):
    x = x - jnp.average(x, weights=weights)
    return x / jnp.sqrt(jnp.average(x**2, weights=weights))


def logits(policy, batch):
    return network(policy, batch["observations"])


def surrogate(policy, batch):
    """Minus the mean advantage, each times how much likelier its action is than it was."""
    before = POLICY.nll(batch["logits"], batch["actions"])
    ratio = jnp.exp(before - POLICY.nll(logits(policy, batch), batch["actions"]))
    return -jnp.average(ratio * batch["advantages"], weights=batch["weights"])


TRPO = fvp.natural_gradient(
    1.0, logits, POLICY, damping=1e-3, max_kl=MAX_KL, constant_kl=True, line_search="loss"
)


@jax.jit
def improve(policy, state, batch, advantages):
    """The policy and the state after one step, and its exact divergence from the one before."""
    weights = batch["weights"]
    advantages = standardise(advantages, weights)
    batch = {**batch, "advantages": advantages, "logits": logits(policy, batch)}
    gradient = jax.grad(surrogate)(policy, batch)
    data = {"batch": batch, "weights": weights, "value_fn": surrogate}
    updates, state = TRPO.update(gradient, state, policy, **data)
    new = optax.apply_updates(policy, updates)
    return new, state, fvp.kl_divergence(logits, POLICY, policy, new, batch, weights=weights)


@jax.jit
def fit_value(value, batch, targets):
    """Ten natural-gradient steps on the squared error of the value."""
    tx = fvp.natural_gradient(1.0, network, VALUE, damping=fvp.LevenbergMarquardt())
    observations, targets, weights = batch["observations"], targets[..., None], batch["weights"]

    def step(_, carry):
        value, state = carry
        fisher = fvp.fisher(network, VALUE, value, observations, weights=weights)
        _, gradient = fisher.value_and_grad(targets)
        data = {"batch": observations, "targets": targets, "weights": weights}
        updates, state = tx.update(gradient, state, value, operator=fisher, **data)
        return optax.apply_updates(value, updates), state

    return jax.lax.fori_loop(0, 10, step, (value, tx.init(value)))[0]


def train(seed, environments, iterations):
    """The policy, its (environment steps, mean return) while it learned, and each divergence."""
    for_policy, for_value, for_actions = jax.random.split(jax.random.key(seed), 3)
    policy, value = initial(for_policy, outputs=2), initial(for_value, outputs=1)
    state, curve, divergences, steps = TRPO.init(policy), [], [], 0
    for number in (progress := tqdm(range(iterations), f"seed {seed}")):
        batch = collect(environments, policy, jax.random.fold_in(for_actions, number))
        advantages, targets = estimate_advantages(value, batch)
        policy, state, kl = improve(policy, state, batch, advantages)
        value = fit_value(value, batch, targets)
        steps += int(batch["weights"].sum())
        curve.append((steps, returns(batch).mean()))
        divergences.append(float(kl))
        progress.set_postfix({"return": f"{curve[-1][1]:.0f}", "divergence": f"{kl:.4f}"})
    return policy, np.array(curve), divergences


def draw(curves, path):
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    axes.axhline(SOLVED, color="0.7", linestyle="--", label=f"solved: {SOLVED}")
    for seed, curve in curves.items():
        axes.plot(curve[:, 0] / 1000, curve[:, 1], "o-", markersize=3, label=f"seed {seed}")
    axes.set(title="CartPole-v1", ylim=0)
    axes.set(xlabel="thousands of environment steps", ylabel="mean return")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=25, help="steps of the policy")
    parser.add_argument("--environments", type=int, default=16, help="for one iteration")
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation")
    parser.add_argument("--output", type=Path, default=Path("out/trpo.png"))
    arguments = parser.parse_args()

    curves = {}
    for seed in arguments.seeds:
        start = time.perf_counter()
        environments = make_environments(arguments.environments, seed)
        policy, curves[seed], divergences = train(seed, environments, arguments.iterations)
        unseen = make_environments(arguments.episodes, seed + 1_000_000)
        result = returns(collect(unseen, policy, jax.random.key(seed)))
        print(
            f"seed {seed}: mean return {result.mean():.1f} of {len(result)} episodes"
            f" after {curves[seed][-1, 0]:,.0f} steps,"
            f" largest divergence {max(divergences):.5f} of {MAX_KL},"
            f" {time.perf_counter() - start:.0f} s"
        )
    draw(curves, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
