"""The measures with BackPACK: extensions of PyTorch's backward pass."""

from __future__ import annotations

import importlib
from typing import Any

from comparison.program import MARGINAL, Program, Programs
from comparison.torch_models import TorchWorkload
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Products, diagonals and Kronecker factors; it has no product or inverse of the latter."""
    backpack = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    ggnvp = importlib.import_module("backpack.hessianfree.ggnvp").ggn_vector_product
    plain, this = TorchWorkload(work), TorchWorkload(work)
    module = backpack.extend(this.module, use_converter=work.kind == "resnet")
    loss = backpack.extend(this.loss)
    # A converted module keeps the parameters in an order of its own.
    v = this.vector

    def product(v: Any) -> Any:
        z = plain.module(plain.x)
        return ggnvp(plain.loss(z, plain.y), z, plain.module, v)

    def loop(v: Any, count: int) -> Any:
        z = plain.module(plain.x)
        value = plain.loss(z, plain.y)
        for _ in range(count):
            products = ggnvp(value, z, plain.module, v)
            v = [a + this.scale * b for a, b in zip(v, products, strict=True)]
        return [a / this.scale for a in v]

    def extended(extension: Any, field: str) -> Any:
        def program() -> Any:
            with backpack.backpack(extension):
                loss(module(this.x), this.y).backward()
            found = [getattr(p, field) for p in this.params]
            for p in this.params:
                p.grad = None
            return found

        return program

    diagonal = lambda extension, field: Program(extended(extension, field), tuple, this.to_jax)
    factors = lambda extension, field: Program(
        extended(extension, field),
        tuple,
        value=lambda result: None,
        note="weights and biases apart",
    )
    vector = lambda: (v,)
    return {
        "gradient": Program(plain.gradient, tuple, this.to_jax),
        "product": Program(product, vector, this.to_jax),
        MARGINAL: Program(loop, vector, this.to_jax),
        "quadratic form": Program(
            lambda v: sum(this.scale * (a * b).sum() for a, b in zip(v, product(v), strict=True)),
            vector,
        ),
        "diagonal": diagonal(extensions.DiagGGNExact(), "diag_ggn_exact"),
        "Monte Carlo diagonal": diagonal(extensions.DiagGGNMC(1), "diag_ggn_mc"),
        "K-FAC factors": factors(extensions.KFLR(), "kflr"),
        "K-FAC factors, Monte Carlo": factors(extensions.KFAC(1), "kfac"),
    }
