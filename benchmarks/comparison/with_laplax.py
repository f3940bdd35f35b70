"""The measures with laplax: its GGN product, and the diagonal from that."""

from __future__ import annotations

import importlib
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

from comparison.models import MODELS, data_of, mean_loss
from comparison.program import MARGINAL, Program, Programs
from comparison.with_jax import conjugate_gradients, loop
from comparison.with_kfac_jax import NO_CG
from comparison.workloads import Workload


def programs(work: Workload) -> Programs:
    """Products of a sum over examples, as means; it takes the tokens of an example for classes."""
    ggn = importlib.import_module("laplax.curv.ggn")
    diagonal_of = importlib.import_module("laplax.util.mv").diagonal
    model = MODELS[work.kind]
    params, x, y, v = data_of(work)
    scale = 1.0 / work.x.shape[0] / (1.0 if work.head == "softmax" else 2.0)

    def multiply(p: Any, x: Any, y: Any) -> Any:
        product = ggn.create_ggn_mv(
            lambda input, params: model(params, input[None])[0],
            p,
            {"input": x, "target": y},
            loss_fn="cross_entropy" if work.head == "softmax" else "mse",
        )
        return lambda u: jax.tree.map(lambda g: scale * g, product(u))

    def diagonal(p: Any, x: Any, y: Any) -> Any:
        return ravel_pytree(p)[1](diagonal_of(multiply(p, x, y), layout=p))

    data = lambda: (params, x, y, v)
    measures: dict[str, Program | str] = {
        "gradient": Program(jax.grad(mean_loss(work)), lambda: (params, x, y)),
        "product": Program(lambda p, x, y, v: multiply(p, x, y)(v), data),
        MARGINAL: Program(lambda p, x, y, v, count: loop(multiply(p, x, y), v, count), data),
        "ten CG iterations": Program(
            lambda p, x, y, v: conjugate_gradients(multiply(p, x, y), v), data, note=NO_CG
        ),
        "diagonal": Program(diagonal, lambda: (params, x, y), note="a product per parameter"),
    }
    if work.kind != "regression":
        measures["diagonal"] = f"it takes a product for each of {work.size:,} parameters"
    return measures
