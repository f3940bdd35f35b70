"""The ground state of a quantum spin chain, by stochastic reconfiguration.

    python examples/ising_chain.py
    python examples/ising_chain.py --field 0.5

H = -sum_i s^z_i s^z_{i+1} - field sum_i s^x_i on a ring of 12 spins. Each step is the natural
gradient of the energy in the quantum geometric tensor of log psi, both estimated from samples of
psi^2, which so short a chain lets one draw without a Markov chain. Draws the relative error of the
exact energy of psi, against exact diagonalisation.

Reference: S. Sorella, Green function Monte Carlo with stochastic reconfiguration, 1998; G. Carleo
and M. Troyer, Solving the quantum many-body problem with artificial neural networks, 2017.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import eigsh
from tqdm import tqdm

import fvp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SITES, FEATURES = 12, 8
# The bits of a state's number are its spins; neighbours of a state differ by one spin.
STATES = np.arange(2**SITES)
SPINS = 1.0 - 2.0 * (STATES[:, None] >> np.arange(SITES) & 1)
NEIGHBOURS = STATES[:, None] ^ (1 << np.arange(SITES))
DIAGONAL = -(SPINS * np.roll(SPINS, 1, axis=1)).sum(1)


def initial(key):
    weights, bias = jax.random.split(key)
    return {
        "w": 0.1 * jax.random.normal(weights, (SITES, FEATURES)),
        "b": 0.1 * jax.random.normal(bias, (FEATURES,)),
    }


def log_psi(params, spins):
    """A restricted Boltzmann machine, invariant under translations; psi is positive."""
    translated = jnp.stack([jnp.roll(spins, shift) for shift in range(SITES)])
    x = translated @ params["w"] + params["b"]
    return jnp.logaddexp(x, -x).sum()


def apply_hamiltonian(psi, field):
    """H psi, both at all states."""
    return DIAGONAL * psi - field * psi[NEIGHBOURS].sum(1)


def ground_energy(field):
    """By exact diagonalisation."""
    rows = np.repeat(STATES, SITES)
    flips = csr_array((np.ones(rows.size), (rows, NEIGHBOURS.ravel())))
    hamiltonian = diags_array(DIAGONAL) - field * flips
    return eigsh(hamiltonian, k=1, which="SA", return_eigenvectors=False)[0]


def train(params, arguments):
    """The exact energies before each step and after the last."""

    @jax.jit
    def state(params):
        """psi, normalised, its local energies H psi / psi and its energy."""
        log = jax.vmap(log_psi, (None, 0))(params, SPINS)
        psi = jnp.exp(log - jax.nn.logsumexp(2 * log) / 2)
        local = apply_hamiltonian(psi, arguments.field) / psi
        return psi, local, jnp.sum(psi**2 * local)

    @jax.jit
    def step(params, psi, local, last, key):
        samples = jax.random.categorical(key, 2 * jnp.log(psi), shape=(arguments.samples,))
        S = fvp.score_fisher(log_psi, params, jnp.asarray(SPINS)[samples])
        # The covariance of scores and local energies: half the gradient of the energy.
        force = S.transpose_product(local[samples, None])
        options = {"damping": arguments.damping, "maxiter": arguments.maxiter, "x0": last}
        direction, _ = fvp.cg(S, force, **options)
        # An Euler step in imaginary time, shorter where psi would turn by more than 0.1.
        time = jnp.minimum(arguments.time, 0.1 / jnp.sqrt(S.quadratic_form(direction)))
        return jax.tree.map(lambda p, d: p - time * d, params, direction), direction

    direction, energies = jax.tree.map(jnp.zeros_like, params), []
    keys = jax.random.split(jax.random.key(1), arguments.steps)
    for key in (progress := tqdm(keys, "training")):
        psi, local, energy = state(params)
        params, direction = step(params, psi, local, direction, key)
        energies.append(float(energy))
        progress.set_postfix(energy=f"{energies[-1]:.5f}")
    return np.array([*energies, float(state(params)[2])])


def draw(error, path):
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    axes.semilogy(error)
    axes.axhline(1e-4, color="0.5", linestyle=":")
    axes.set(xlabel="step", ylabel="relative error of the energy")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--field", type=float, default=1.0, help="transverse field")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1000, help="of each step")
    parser.add_argument("--time", type=float, default=0.2, help="of a step, imaginary")
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--maxiter", type=int, default=20, help="conjugate-gradient iterations")
    parser.add_argument("--output", type=Path, default=Path("out/ising_chain.png"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    exact = ground_energy(arguments.field)
    energies = train(initial(jax.random.key(0)), arguments)
    error = (energies - exact) / abs(exact)
    print(f"energy {energies[-1]:.8f}, exact {exact:.8f}: relative error {error[-1]:.1e}")
    draw(error, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
