"""Random models against dense references: exact, refused, missed in silence, or crashed.

    python benchmarks/random_models.py --models 500
    python benchmarks/random_models.py --only 17 bias:temperature
    python benchmarks/random_models.py --alone          # every construct in a plain model

The models are those of tests/random_models.py. Exits with 1 where something was missed or crashed.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import multiprocessing
import pathlib
import sys
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"
FAILURES = ("silent miss", "crash")
CHUNK = 20  # models for each process: compiled programs use up its memory maps


def build(name: str) -> Any:
    """The model of a seed, or of one construct alone: "17", or "weight:transposed"."""
    random_models = importlib.import_module("random_models")

    if name.isdecimal():
        return random_models.random_model(int(name))
    return random_models.model_of(*name.split(":"))


def prepare() -> None:
    """A process of its own: computes in float64, and compiles quickly as the tests do.

    Compilation is all the time there is, and JAX takes the options of its compiler with each
    ``jax.jit`` alone: hence the patch of a private function.
    """
    sys.path.insert(0, str(TESTS))
    import jax

    jax.config.update("jax_enable_x64", True)
    QUICKLY = importlib.import_module("dense").QUICKLY

    compiler = importlib.import_module("jax._src.compiler")
    original = compiler.get_compile_options

    def quick(*args: Any, env_options_overrides: Any, **kwargs: Any) -> Any:
        return original(*args, env_options_overrides=QUICKLY | env_options_overrides, **kwargs)

    vars(compiler)["get_compile_options"] = quick


def run(name: str) -> tuple[str, str, list[tuple[str, str, str]]]:
    """The verdicts of one model."""
    random_models = importlib.import_module("random_models")

    model = build(name)
    found = random_models.verdicts(model)
    return name, model.text, [(v.method, v.outcome, v.detail) for v in found]


def run_all(names: list[str], jobs: int) -> list[Any]:
    """The verdicts of all models, a few processes at a time."""
    from tqdm import tqdm

    context, results = multiprocessing.get_context("spawn"), []
    with context.Pool(jobs, prepare, maxtasksperchild=CHUNK) as pool:
        for result in tqdm(pool.imap_unordered(run, names), total=len(names), unit="model"):
            results.append(result)
            if failures := [v for v in result[2] if v[1] in FAILURES]:
                tqdm.write(f"{result[0]}: {failures}")
    return sorted(results, key=lambda result: result[0].zfill(6))


def print_failures(results: list[Any]) -> bool:
    """Prints the misses and crashes, and says whether there were any."""
    failed = False
    for name, text, found in results:
        bad = [v for v in found if v[1] in FAILURES]
        if bad:
            failed = True
            print(f"\n{name}: {text}")
            for method, outcome, detail in bad:
                print(f"  {method}: {outcome}: {detail}")
    return failed


def print_table(results: list[Any]) -> None:
    """Prints the number of models for each method and outcome."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _, _, found in results:
        for method, outcome, detail in found:
            counts[method][f"refused: {detail}" if outcome == "refused" else outcome] += 1
    print(f"\n{len(results)} models")
    for method, outcomes in counts.items():
        print(method)
        for outcome, count in outcomes.most_common():
            print(f"  {count:5d}  {outcome}")


def main() -> None:
    """Parses the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", type=int, default=500, help="number of models")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--only", nargs="+", help="seeds, or constructs such as bias:temperature")
    parser.add_argument("--alone", action="store_true", help="every construct in a plain model")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments = parser.parse_args()
    prepare()
    random_models = importlib.import_module("random_models")

    if arguments.only:
        results = [run(name) for name in arguments.only]
        for name, text, found in results:
            print(f"\n{name}: {text}")
            print(
                "\n".join(
                    f"  {method:22s} {outcome:12s} {detail}" for method, outcome, detail in found
                )
            )
        print_table(results)
        sys.exit(any(v[1] in FAILURES for _, _, found in results for v in found))
    window = slice(arguments.start, arguments.start + arguments.models)
    names = [str(seed) for seed in range(window.stop)]
    if arguments.alone:
        names = [":".join(entry) for entry in random_models.everything()]
    names = names[window]
    results = run_all(names, arguments.jobs)
    failed = print_failures(results)
    print(f"\nnot met: {random_models.not_met([text for _, text, _ in results])}")
    print_table(results)
    sys.exit(failed)


if __name__ == "__main__":
    main()
