"""Scaling of products, a CG solve and a training step of a decoder-only transformer over devices.

python benchmarks/scaling.py --preset laptop          # 1, 2, 4, 8 forced CPU devices
python benchmarks/scaling.py --preset 124m            # whatever devices JAX finds
python benchmarks/scaling.py --preset 7b --analyse    # compiled, never run: flops, bytes, memory

Weak scaling keeps the batch per device, strong scaling the whole batch. Forced CPU devices share
the cores of one machine, so there seconds only show the overhead; flops, bytes of collectives and
memory are read from the compiled program and mean the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import median_seconds, timed
from costs import collective_bytes, matmul_flops
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import fvp


class Preset(NamedTuple):
    """Sizes of the transformer and of the batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int  # per sequence
    sequences: int  # per device (weak) and per eight devices (strong)
    dtype: str


PRESETS = {
    "laptop": Preset(2, 64, 4, 256, 32, 4, "float32"),
    "124m": Preset(12, 768, 12, 50304, 1024, 4, "bfloat16"),
    "1b": Preset(24, 2048, 16, 50304, 2048, 2, "bfloat16"),
    "7b": Preset(32, 4096, 32, 50304, 2048, 1, "bfloat16"),
}
MODES = ("weak", "strong")
CG_ITERATIONS = 10
PRODUCTS = {"product": 1, "products": CG_ITERATIONS, "cg": CG_ITERATIONS, "step": CG_ITERATIONS}
# Dense bfloat16 peak in flop/s by the manufacturers' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def init(preset: Preset, key: jax.Array) -> Any:
    """Parameters with the layers stacked on a leading axis, in float32."""
    d, layers = preset.width, preset.layers
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])

    return {
        "embedding": normal(preset.vocabulary, d) * math.sqrt(preset.vocabulary / d),
        "position": normal(preset.tokens, d) * 0.1,
        "layers": {
            "norm1": jnp.ones((layers, d)),
            "qkv": normal(layers, d, 3 * d),
            "out": normal(layers, d, d),
            "norm2": jnp.ones((layers, d)),
            "up": normal(layers, d, 4 * d),
            "down": normal(layers, 4 * d, d),
        },
        "norm": jnp.ones(d),
    }


def model_fn_of(preset: Preset) -> Callable[[Any, jax.Array], jax.Array]:
    """Pre-norm transformer with causal attention and tied output weights: tokens -> logits."""
    dtype = jnp.dtype(preset.dtype)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale).astype(dtype)

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        b, t, d = x.shape
        qkv = norm(x, p["norm1"]) @ p["qkv"].astype(dtype)
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, preset.heads, -1), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(b, t, d) @ p["out"].astype(dtype)
        hidden = jax.nn.gelu(norm(x, p["norm2"]) @ p["up"].astype(dtype))
        return x + hidden @ p["down"].astype(dtype), None

    def model_fn(params: Any, tokens: jax.Array) -> jax.Array:
        embedding = params["embedding"].astype(dtype)
        x = embedding[tokens] + params["position"].astype(dtype)
        x, _ = jax.lax.scan(layer, x, params["layers"])
        return norm(x, params["norm"]) @ embedding.T

    return model_fn


def programs(preset: Preset) -> dict[str, Callable[..., Any]]:
    """What is measured: each a function of (params, tokens, targets)."""
    head, model_fn = fvp.Softmax(), model_fn_of(preset)
    tx = fvp.natural_gradient(0.1, model_fn, head, damping=0.1, maxiter=CG_ITERATIONS, tol=0.0)

    def gradient(params: Any, tokens: Any, targets: Any) -> Any:
        return jax.grad(lambda p: head.nll(model_fn(p, tokens), targets).mean())(params)

    def product(params: Any, tokens: Any, targets: Any) -> Any:
        del targets
        return fvp.fisher_vector_product(model_fn, head, params, tokens, params)

    def products(params: Any, tokens: Any, targets: Any) -> Any:
        del targets
        operator = fvp.fisher(model_fn, head, params, tokens)
        add = lambda _, v: jax.tree.map(jnp.add, v, operator @ v)
        return jax.lax.fori_loop(0, CG_ITERATIONS, add, params)

    def solve(params: Any, tokens: Any, targets: Any) -> Any:
        del targets
        operator = fvp.fisher(model_fn, head, params, tokens)
        return fvp.cg(operator, params, damping=0.1, maxiter=CG_ITERATIONS, tol=0.0)[0]

    def step(params: Any, tokens: Any, targets: Any) -> Any:
        operator = fvp.fisher(model_fn, head, params, tokens)
        _, grads = operator.value_and_grad(targets)
        updates, _ = tx.update(grads, tx.init(params), params, operator=operator)
        return optax.apply_updates(params, updates)

    return {
        "gradient": gradient,
        "product": product,
        "products": products,
        "cg": solve,
        "step": step,
    }


def shardings(params: Any, mesh: Mesh, layout: str) -> Any:
    """Replicated parameters ("dp"), or each split along its largest divisible axis ("fsdp")."""

    def spec(x: Any) -> NamedSharding:
        axes: list[Any] = [None] * x.ndim
        if layout == "fsdp":
            axis = int(np.argmax(x.shape))
            if x.shape[axis] % mesh.size == 0:
                axes[axis] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(spec, params)


def measure(
    name: str, program: Callable[..., Any], arguments: Any, out: Any, count: int, repeats: int
) -> dict[str, Any]:
    """Compiles ``program``, reads its costs, and runs it ``repeats`` times (0: never)."""
    shape = arguments[1].shape

    def compile_program() -> tuple[Any, Any]:
        traced = jax.jit(program, out_shardings=out).trace(*arguments)
        return traced, traced.lower().compile()

    row: dict[str, Any] = {"program": name, "devices": count, "sequences": shape[0]}
    (traced, compiled), row["compile_seconds"] = timed(compile_program)
    memory = compiled.memory_analysis()
    row["flops_per_device"] = matmul_flops(traced.jaxpr.jaxpr, CG_ITERATIONS) / count
    row["collective_bytes"] = collective_bytes(compiled.as_text() or "", CG_ITERATIONS)
    row["temporary_bytes"] = memory.temp_size_in_bytes if memory else None
    if repeats:
        row["seconds"] = median_seconds({name: compiled}, arguments, repeats)[name]
        row["tokens_per_second"] = math.prod(shape) / row["seconds"]
        if count_of_products := PRODUCTS.get(name):
            row["products_per_second"] = count_of_products / row["seconds"]
        peak = next(
            (v for k, v in PEAK_FLOPS.items() if jax.devices()[0].device_kind.startswith(k)), None
        )
        if peak:
            row["fraction_of_peak"] = row["flops_per_device"] / row["seconds"] / peak
    return row


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All programs over all device counts, weak and strong, as they are measured."""
    preset = PRESETS[arguments.preset]
    devices = jax.devices()
    counts = [n for n in (2**k for k in range(20)) if n <= len(devices)]
    suite = programs(preset)
    cases = [
        (mode, n, name)
        for mode in arguments.modes
        for n in counts
        for name in suite
        if mode == "weak" or 8 * preset.sequences % n == 0
    ]
    done: dict[tuple[int, int, str], dict[str, Any]] = {}
    for mode, n, name in tqdm(cases, desc=arguments.preset, unit="program"):
        mesh = Mesh(np.array(devices[:n]), ("data",))
        shapes = jax.eval_shape(lambda: init(preset, jax.random.key(0)))
        layout = shardings(shapes, mesh, arguments.layout)
        rows_sharding = NamedSharding(mesh, PartitionSpec("data"))
        sequences = preset.sequences * (n if mode == "weak" else 8)
        if (n, sequences, name) in done:  # where weak and strong scaling meet
            yield {"mode": mode, **done[n, sequences, name]}
            continue
        tokens_shape = (sequences, preset.tokens)
        if arguments.analyse:
            place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
            tokens = jax.ShapeDtypeStruct(tokens_shape, jnp.int32, sharding=rows_sharding)
            data = (jax.tree.map(place, shapes, layout), tokens, tokens)
        else:
            params = jax.jit(lambda: init(preset, jax.random.key(0)), out_shardings=layout)()
            numbers = np.random.default_rng(0).integers(0, preset.vocabulary, tokens_shape)
            tokens = jax.device_put(numbers.astype(np.int32), rows_sharding)
            data = (params, tokens, jnp.roll(tokens, -1, axis=1))
        repeats = 0 if arguments.analyse else arguments.repeats
        row = measure(name, suite[name], data, layout, n, repeats)
        row["parameter_bytes"] = sum(4 * math.prod(s.shape) for s in jax.tree.leaves(shapes))
        done[n, sequences, name] = row
        yield {"mode": mode, **row}


def marginal(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What one product more costs, in gradients, and the vectors of CG, of rows of one size."""
    seconds = {row["program"]: row["seconds"] for row in rows}
    flops = {row["program"]: row["flops_per_device"] for row in rows}
    of_one = lambda cost: (cost["products"] - cost["product"]) / (CG_ITERATIONS - 1)
    rate = lambda cost, time: cost / time
    return {
        "marginal product in gradients": of_one(seconds) / seconds["gradient"],
        "its flops in gradients": of_one(flops) / flops["gradient"],
        "its flop/s in those of the gradient": rate(of_one(flops), of_one(seconds))
        / rate(flops["gradient"], seconds["gradient"]),
        "vector work in a CG solve": 1 - seconds["products"] / seconds["cg"],
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(
        f"{'mode':7}{'program':10}{'devices':>8}{'seqs':>6}{'seconds':>10}{'tokens/s':>12}"
        f"{'Gflop/dev':>11}{'coll. MB':>10}{'coll/params':>12}{'temp MB':>10}"
    )
    for r in rows:
        print(
            f"{r['mode']:7}{r['program']:10}{r['devices']:>8}{r['sequences']:>6}"
            f"{r.get('seconds', math.nan):>10.4f}{r.get('tokens_per_second', math.nan):>12.0f}"
            f"{r['flops_per_device'] / 1e9:>11.3f}{r['collective_bytes'] / 1e6:>10.2f}"
            f"{r['collective_bytes'] / r['parameter_bytes']:>12.2f}"
            f"{(r['temporary_bytes'] or math.nan) / 1e6:>10.1f}"
            + (f"{r['fraction_of_peak']:>9.3f} of peak" if "fraction_of_peak" in r else "")
        )
    for mode, count in dict.fromkeys((r["mode"], r["devices"]) for r in rows if "seconds" in r):
        alike = [r for r in rows if (r["mode"], r["devices"]) == (mode, count)]
        print(f"{mode}, {count}:", *(f"{k} {v:.3f}" for k, v in marginal(alike).items()), sep="  ")


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Seconds, flops, bytes sent and temporary memory against devices, weak and strong."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = [
        ("seconds", 1, "seconds per call"),
        ("flops_per_device", 1e9, "Gflop per device"),
        ("collective_bytes", 1e6, "MB sent per device"),
        ("temporary_bytes", 1e6, "temporary MB per device"),
    ]
    devices = sorted({r["devices"] for r in rows})
    panels = [panel for panel in panels if panel[0] in rows[0]]
    modes = [mode for mode in MODES if any(r["mode"] == mode for r in rows)]
    figure, axes = plt.subplots(
        len(modes),
        len(panels),
        figsize=(3.6 * len(panels), 3 * len(modes)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for line, mode in zip(axes, modes, strict=True):
        for axis, (field, unit, label) in zip(line, panels, strict=True):
            for name, style in zip(
                ("gradient", "product", "products", "cg", "step"), "os*v^", strict=True
            ):
                chosen = [r for r in rows if r["mode"] == mode and r["program"] == name]
                values = [r[field] / unit for r in chosen]
                axis.plot([r["devices"] for r in chosen], values, f"{style}-", label=name)
            axis.set(title=f"{mode} scaling", ylabel=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(devices, [str(n) for n in devices])
            if field == "collective_bytes":
                axis.set_ylim(bottom=0)  # one device sends nothing
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument("--layout", choices=("dp", "fsdp"), default="dp")
    parser.add_argument("--cpu-devices", type=int, help="force this many CPU devices (laptop: 8)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--analyse", action="store_true", help="compile only, run nothing")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out"))
    arguments = parser.parse_args()
    forced = arguments.cpu_devices or (8 if arguments.preset == "laptop" else None)
    if forced:
        jax.config.update("jax_num_cpu_devices", forced)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"scaling_{arguments.preset}_{arguments.layout}"
    rows = []
    for row in run(arguments):
        rows.append(row)
        stem.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    report(rows)
    plot(rows, stem.with_suffix(".png"))
    print(f"saved {stem.with_suffix('.json')} and {stem.with_suffix('.png')}")


if __name__ == "__main__":
    main()
