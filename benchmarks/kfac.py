"""Layer capture in numbers: cost in gradients, K-FAC beside kfac-jax, CG preconditioned by K-FAC.

    python benchmarks/kfac.py
    python benchmarks/kfac.py --parts peer

Flops come from the compiled programs, so they mean the same on every machine; LAPACK's eigen- and
Cholesky decompositions are not counted in them. Seconds are of one run.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _environments import environment
from _measure import timed
from jax.flatten_util import ravel_pytree
from no_tuning import Runner
from peers import METHODS, PEERS, candidates, head_of
from tasks import TASKS, UNTRAINABLE, init_mlp, mlp, transformer
from tqdm import tqdm

import fvp

HEAD = fvp.Softmax()


def costs() -> dict[str, dict[str, float]]:
    """Flops in gradients, temporary memory and compile time, on 784-512-512-10 at batch 256."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(jnp.asarray, init_mlp((784, 512, 512, 10), 0))
    x = jnp.asarray(rng.normal(size=(256, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, 256))
    key = jax.random.key(0)
    gradient = jax.grad(lambda p, x: HEAD.nll(mlp(p, x), y).mean())
    tx = fvp.scale_by_kfac(mlp, HEAD)

    def dual(p: Any, x: jax.Array) -> Any:
        return fvp.solve_dual(fvp.fisher(mlp, HEAD, p, x), p, 1e-3)

    def step(p: Any, x: jax.Array) -> Any:
        return tx.update(gradient(p, x), tx.init(p), p, batch=x, targets=y)

    programs: dict[str, Callable[..., Any]] = {
        "gradient": gradient,
        "diagonal": lambda p, x: fvp.fisher_diagonal(mlp, HEAD, p, x),
        "diagonal, Monte Carlo": lambda p, x: fvp.fisher_diagonal(mlp, HEAD, p, x, key=key),
        "kfac": lambda p, x: fvp.kfac(mlp, HEAD, p, x),
        "kfac, Monte Carlo": lambda p, x: fvp.kfac(mlp, HEAD, p, x, key=key),
        "dual solve": dual,
        "scale_by_kfac step": step,
    }
    compile_program = lambda program: jax.jit(program).lower(params, x).compile()
    rows: dict[str, dict[str, float]] = {}
    for name, program in programs.items():
        compiled, seconds = timed(compile_program, program)
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        flops = float(analysis["flops"]) if analysis else float("nan")
        rows[name] = {
            "gradients": flops / rows["gradient"]["flops"] if rows else 1.0,
            "flops": flops,
            "MiB": memory.temp_size_in_bytes / 2**20 if memory else float("nan"),
            "compile_seconds": seconds,
        }
    return rows


def beside_kfac_jax(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Losses on digits full batch, cost of a step and compile time, in processes of their own.

    kfac-jax runs in an environment that is made for it, with every candidate of its options; its
    cost is that of the documented ones.
    """
    shutil.rmtree(output / "runs", ignore_errors=True)
    with tqdm(unit="run") as progress:
        train = Runner("digits", 20, output, progress)
        cost = Runner("wide", UNTRAINABLE["wide"]().steps, output, progress)
        python = environment("kfac-jax", PEERS["kfac-jax"], output)
        gradient = seconds_per_step(cost.run("sgd", {"learning_rate": 0.01}))
        rows: dict[str, dict[str, Any]] = {}
        for name, interpreter in (("fvp-kfac", sys.executable), ("kfac-jax", python)):
            grid = candidates(name, TASKS["digits"]()) if name == "kfac-jax" else [{}]
            curves = [train.run(name, options, python=interpreter)["curve"] for options in grid]
            timed = cost.run(name, grid[0], python=interpreter)
            rows[name] = {
                f"loss after {step}": min(
                    point[-1] for curve in curves for point in curve if point[0] == step
                )
                for step in (10, 20)
            }
            rows[name]["gradients per step"] = seconds_per_step(timed) / gradient
            rows[name]["compile_seconds"] = timed["compile_seconds"]
    return rows


def seconds_per_step(record: dict[str, Any]) -> float:
    """Of a run of peers.py."""
    steps, seconds, *_ = record["curve"][-1]
    return seconds / steps


def preconditioned_cg(name: str, maxiter: int = 3000) -> list[dict[str, Any]]:
    """CG iterations to 1e-3 on a task of tasks.py, with and without K-FAC, as training goes on.

    Ten labels per example: with one alone, K-FAC's noise takes the gain on CURVES.
    """
    task = TASKS[name]()
    train, batches = METHODS["fvp"](task), task.batches(0)

    @jax.jit
    def iterations(params: Any, batch: Any, damping: Any) -> dict[str, jax.Array]:
        inputs, targets, _ = batch
        operator = fvp.fisher(task.model_fn, head_of(task), params, inputs)
        _, gradient = operator.value_and_grad(targets)
        drawn: Any = {"key": jax.random.key(0), "num_samples": 10}
        factors = fvp.kfac(task.model_fn, head_of(task), params, inputs, **drawn)
        count = lambda M: _iterations(operator, gradient, damping, M, maxiter)
        return {"plain": count(None), "K-FAC": count(factors.inverse(damping))}

    params = jax.tree.map(jnp.asarray, task.init(0))
    state, rows = train.init(params, next(batches)), []
    for trained in (0, 20):
        for _ in range(trained):
            params, state = train.step(params, state, batches)
        batch = next(batches)
        for damping in (1e-4, 1e-6):
            counts = {key: int(n) for key, n in iterations(params, batch, damping).items()}
            rows.append({"task": name, "steps": trained, "damping": damping, **counts})
            print(f"{rows[-1]} of at most {maxiter}", flush=True)
    return rows


def block_diagonal_limit(damping: float = 1e-4, trained: int = 60) -> list[dict[str, Any]]:
    """The same of a transformer so small that the exact block diagonal can be inverted.

    A block is a dense layer with its bias, or a normalisation. What these blocks do not gain, no
    block-diagonal approximation will.
    """
    task = transformer(width=8, heads=2, context=16)
    train, batches = METHODS["fvp"](task), task.batches(0)

    @jax.jit
    def iterations(params: Any, batch: Any) -> dict[str, jax.Array]:
        inputs, targets, _ = batch
        operator = fvp.fisher(task.model_fn, head_of(task), params, inputs)
        _, gradient = operator.value_and_grad(targets)
        unravel = ravel_pytree(gradient)[1]
        same = blocks[:, None] == blocks[None, :]
        damped = jnp.where(same, operator.dense(), 0) + damping * jnp.eye(len(blocks))
        root = jax.scipy.linalg.cho_factor(damped)
        exact = lambda v: unravel(jax.scipy.linalg.cho_solve(root, ravel_pytree(v)[0]))
        factors = fvp.kfac(task.model_fn, head_of(task), params, inputs)
        methods = {"plain": None, "K-FAC": factors.inverse(damping), "exact blocks": exact}
        return {
            name: _iterations(operator, gradient, damping, M, 3000) for name, M in methods.items()
        }

    params = jax.tree.map(jnp.asarray, task.init(0))
    names = [str(path[:-1] or path) for path, _ in jax.tree.leaves_with_path(params)]
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    blocks = np.repeat(np.unique(names, return_inverse=True)[1], sizes)
    state, rows = train.init(params, next(batches)), []
    for steps in (0, trained):
        for _ in range(steps):
            params, state = train.step(params, state, batches)
        counts = {key: int(n) for key, n in iterations(params, next(batches)).items()}
        rows.append({"task": "small transformer", "steps": steps, "damping": damping, **counts})
        print(rows[-1], flush=True)
    return rows


def _iterations(operator: Any, rhs: Any, damping: Any, M: Any, maxiter: int) -> jax.Array:
    return fvp.cg(operator, rhs, damping=damping, tol=1e-3, maxiter=maxiter, M=M)[1].iterations


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """A line for each program."""
    columns = list(next(iter(rows.values())))
    print(" " * 24 + "".join(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{row[column]:>20.3g}" for column in columns), flush=True)


PARTS: dict[str, Callable[[pathlib.Path], Any]] = {
    "costs": lambda output: costs(),
    "peer": beside_kfac_jax,
    "limit": lambda output: block_diagonal_limit(),
    "cg": lambda output: [*preconditioned_cg("curves"), *preconditioned_cg("transformer")],
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/kfac"))
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := {*names} - {*PARTS}:
        parser.error(f"unknown {', '.join(sorted(unknown))}; see --help")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        result = PARTS[name](arguments.output)
        if isinstance(result, dict):
            print_table(result)
        (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
