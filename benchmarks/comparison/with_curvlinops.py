"""The measures with curvlinops: linear operators on lists of PyTorch tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from comparison.program import DAMPING, ITERATIONS, MARGINAL, Program, Programs
from comparison.torch_models import TorchWorkload, torch
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Everything but diagonals, which it estimates from products alone."""
    library = importlib.import_module("curvlinops")
    this = TorchWorkload(work)
    v = this.vector
    options: Any = {"check_deterministic": False, "num_data": len(work.x)}
    data = (this.module, this.loss, this.params, [(this.x, this.y)])
    ggn = lambda: library.GGNLinearOperator(*data, **options)
    sampled = lambda: library.FisherMCLinearOperator(*data, **options, mc_samples=1)
    damping = DAMPING / this.scale

    def loop(v: Any, count: int) -> Any:
        G = ggn()
        for _ in range(count):
            v = [a + this.scale * b for a, b in zip(v, G @ v, strict=True)]
        return [a / this.scale for a in v]

    def cg(v: Any) -> Any:
        identity = importlib.import_module("curvlinops.examples").IdentityLinearOperator
        shapes = [tuple(p.shape) for p in this.params]
        one = identity(shapes, torch.device("cpu"), torch.float32)
        limits: Any = {"max_iter": ITERATIONS, "tolerance": 0.0, "max_tridiag_iter": 0}
        inverse = library.CGInverseLinearOperator(ggn() + damping * one, **limits)
        return [x / this.scale**2 for x in inverse @ v]

    def kfac(exact: bool, corrected: bool = False) -> Any:
        kinds = library.FisherType
        chosen: Any = {"fisher_type": kinds.TYPE2 if exact else kinds.MC}
        make = library.EKFACLinearOperator if corrected else library.KFACLinearOperator
        return make(*data, **options, **chosen, separate_weight_and_bias=False)

    def factors(exact: bool) -> Callable[[], Any]:
        def program() -> Any:
            K = kfac(exact)
            K.compute_kronecker_factors()
            return K

        return program

    def solve(K: Any, v: Any) -> Any:
        exact: Any = {"damping": damping, "use_exact_damping": True}
        inverse = library.KFACInverseLinearOperator(K, **exact)
        return [x / this.scale**2 for x in inverse @ v]

    vector = lambda: (v,)
    factored = lambda: (factors(True)(), v)
    program = lambda function, args=vector, note="": Program(function, args, this.to_jax, note)
    measures: dict[str, Program | str] = {
        "gradient": program(this.gradient, tuple),
        "product": program(lambda v: ggn() @ v),
        MARGINAL: program(loop),
        "Monte Carlo product": program(lambda v: sampled() @ v),
        "quadratic form": Program(
            lambda v: sum(this.scale * (a * b).sum() for a, b in zip(v, ggn() @ v, strict=True)),
            vector,
        ),
        "ten CG iterations": program(cg),
        "diagonal": "it estimates diagonals from products",
        "K-FAC factors": program(factors(True), tuple),
        "K-FAC factors, Monte Carlo": program(factors(False), tuple),
        "K-FAC product": program(lambda K, v: K @ v, factored),
        "K-FAC solve": program(solve, factored),
        "EK-FAC product": program(lambda v: kfac(True, corrected=True) @ v),
    }
    for name in ("K-FAC factors", "K-FAC factors, Monte Carlo"):
        measures[name] = Program(factors("Monte" not in name), tuple)
    return measures
