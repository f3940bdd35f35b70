"""The same numbers for every library: parameters, data and a vector, as NumPy arrays.

Parameters are flat dicts; convolutions are HWIO, dense weights (inputs, outputs), and the layers of
the transformer are stacked on the first axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

Arrays = dict[str, np.ndarray]
Sizes = dict[str, int | tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's numbers. ``kind`` names the architecture, ``head`` the distribution."""

    name: str
    kind: str
    head: str
    params: Arrays
    x: np.ndarray
    y: np.ndarray
    vector: Arrays
    description: str

    @property
    def rows(self) -> int:
        """Examples, or tokens."""
        return math.prod(self.y.shape) if self.head == "softmax" else self.y.shape[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.size for p in self.params.values())


def dense(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal with variance 1 / inputs; all axes but the last are inputs."""
    return rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]))


def mlp(rng: np.random.Generator, sizes: tuple[int, ...]) -> Arrays:
    """Dense layers with biases."""
    params: Arrays = {}
    for i, (m, n) in enumerate(itertools.pairwise(sizes)):
        params |= {f"b{i}": 0.1 * rng.normal(size=n), f"w{i}": dense(rng, m, n)}
    return params


def conv(rng: np.random.Generator, channels: tuple[int, ...], classes: int) -> Arrays:
    """3 x 3 convolutions with biases, and a dense layer."""
    params: Arrays = {}
    for i, (m, n) in enumerate(itertools.pairwise(channels)):
        params |= {f"b{i}": 0.1 * rng.normal(size=n), f"w{i}": 1.4 * dense(rng, 3, 3, m, n)}
    return params | {"b": 0.1 * rng.normal(size=classes), "w": dense(rng, channels[-1], classes)}


def resnet(rng: np.random.Generator, channels: tuple[int, ...], classes: int) -> Arrays:
    """A stem and a block of two convolutions for each further width, with scales and shifts."""
    scaled = lambda name, n: {
        f"{name}_scale": 1 + 0.1 * rng.normal(size=n),
        f"{name}_shift": 0.1 * rng.normal(size=n),
    }
    params: Arrays = {"stem": 1.4 * dense(rng, 3, 3, *channels[:2]), **scaled("stem", channels[1])}
    for i, (m, n) in enumerate(itertools.pairwise(channels[1:])):
        params |= {f"block{i}_in": 1.4 * dense(rng, 3, 3, m, n), **scaled(f"block{i}_in", n)}
        params |= {f"block{i}_out": dense(rng, 3, 3, n, n), **scaled(f"block{i}_out", n)}
        params |= {f"block{i}_skip": dense(rng, m, n)}
    return params | {"b": 0.1 * rng.normal(size=classes), "w": dense(rng, channels[-1], classes)}


def transformer(
    rng: np.random.Generator, layers: int, width: int, context: int, tokens: int
) -> Arrays:
    """Embeddings, and stacked layers with normalisation before attention and dense layers."""
    stacked = lambda m, n: np.stack([dense(rng, m, n) for _ in range(layers)])
    params = {
        "embedding": rng.normal(size=(tokens, width)),
        "positions": 0.5 * rng.normal(size=(context, width)),
        "layers_attend": stacked(width, 3 * width),
        "layers_project": stacked(width, width),
        "layers_up": stacked(width, 4 * width),
        "layers_up_bias": 0.1 * rng.normal(size=(layers, 4 * width)),
        "layers_down": stacked(4 * width, width),
        "layers_down_bias": 0.1 * rng.normal(size=(layers, width)),
        "out": dense(rng, width, tokens),
    }
    for name in ("layers_first", "layers_second"):
        params |= {f"{name}_scale": 1 + 0.1 * rng.normal(size=(layers, width))}
        params |= {f"{name}_shift": 0.1 * rng.normal(size=(layers, width))}
    return params


def build(name: str, kind: str, sizes: Sizes, seed: int = 0) -> Workload:
    """A workload of the given sizes."""
    rng = np.random.default_rng(seed)
    s = {"batch": 0, "classes": 10, **sizes}
    batch, head = s["batch"], "gaussian" if kind == "regression" else "softmax"
    if kind in ("mlp", "regression"):
        params = mlp(rng, s["widths"])
        x = rng.normal(size=(batch, s["widths"][0]))
        text = "-".join(map(str, s["widths"])) + f", batch {batch}"
    elif kind in ("conv", "resnet"):
        params = {"conv": conv, "resnet": resnet}[kind](rng, s["channels"], s["classes"])
        x = rng.normal(size=(batch, s["side"], s["side"], s["channels"][0]))
        shape = "x".join(map(str, x.shape[1:]))
        text = f"{shape}, channels {'/'.join(map(str, s['channels'][1:]))}, batch {batch}"
    else:
        shape = (s["layers"], s["width"], s["context"], s["tokens"])
        params = transformer(rng, *shape)
        x = rng.integers(0, s["tokens"], (batch, s["context"]))
        text = "{} layers of width {} in a scan, {} tokens of {}, batch {}".format(*shape, batch)
    if kind == "regression":
        y = rng.normal(size=(batch, 1))
    elif kind == "transformer":
        y = rng.integers(0, s["tokens"], x.shape)
    else:
        y = rng.integers(0, s["classes"], batch)
    floats = lambda a: a.astype(np.int32 if a.dtype.kind == "i" else np.float32)
    params = {key: floats(params[key]) for key in sorted(params)}
    vector = {key: floats(rng.normal(size=p.shape)) for key, p in params.items()}
    size = sum(p.size for p in params.values())
    text = f"{text}; {size:,} parameters"
    return Workload(name, kind, head, params, floats(x), floats(y), vector, text)


PRESETS: dict[str, dict[str, Sizes]] = {
    "small": {
        "mlp": {"widths": (784, 512, 512, 10), "batch": 256},
        "conv": {"channels": (1, 16, 32, 64), "side": 28, "batch": 128},
        "transformer": {"layers": 3, "width": 64, "context": 64, "tokens": 32, "batch": 8},
        "resnet": {"channels": (3, 16, 16, 32, 64), "side": 16, "batch": 64},
        "regression": {"widths": (32, 128, 128, 1), "batch": 512},
    },
    "large": {
        "mlp": {"widths": (784, 2048, 2048, 2048, 10), "batch": 1024},
        "conv": {"channels": (1, 64, 128, 256), "side": 28, "batch": 512},
        "transformer": {"layers": 12, "width": 768, "context": 512, "tokens": 8192, "batch": 8},
        "resnet": {"channels": (3, 64, 64, 128, 256, 512), "side": 32, "batch": 256},
        "regression": {"widths": (32, 512, 512, 1), "batch": 4096},
    },
    "tiny": {
        "mlp": {"widths": (8, 16, 10), "batch": 8},
        "conv": {"channels": (1, 4, 4, 8), "side": 8, "batch": 4},
        "transformer": {"layers": 2, "width": 16, "context": 8, "tokens": 8, "batch": 2},
        "resnet": {"channels": (3, 4, 4, 8), "side": 8, "batch": 4},
        "regression": {"widths": (4, 16, 1), "batch": 16},
    },
}


def workload(name: str, preset: str) -> Workload:
    """A workload of a preset."""
    return build(name, name, PRESETS[preset][name])
