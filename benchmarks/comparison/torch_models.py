"""The workloads' models in PyTorch, and the way of their parameters to the JAX layout and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from comparison.workloads import Arrays, Workload

# PyTorch is not among the development requirements.
torch: Any = importlib.import_module("torch")
nn: Any = torch.nn
HEADS = 4
Tensors = Sequence[Any]


def mlp(work: Workload) -> Any:
    """Dense layers with tanh between."""
    layers: list[Any] = []
    for i in range(len(work.params) // 2):
        layers += [nn.Tanh()] * (i > 0) + [nn.Linear(*work.params[f"w{i}"].shape)]
    return nn.Sequential(*layers)


def convolution(shape: tuple[int, ...], stride: int, bias: bool) -> Any:
    """A 3 x 3 convolution for HWIO weights of a shape, padded by one."""
    return nn.Conv2d(shape[2], shape[3], 3, stride=stride, padding=1, bias=bias)


def conv(work: Workload) -> Any:
    """Convolutions, from the second one on of stride two; the mean of the last goes to classes."""
    layers: list[Any] = []
    for i in range(len(work.params) // 2 - 1):
        layers += [convolution(work.params[f"w{i}"].shape, 2 if i else 1, True), nn.ReLU()]
    return nn.Sequential(*layers, *classifier(work, len(work.params) // 2 - 2))


def classifier(work: Workload, halvings: int) -> list[Any]:
    """The mean over what is left of the image, and a dense layer; BackPACK has no adaptive mean."""
    side = work.x.shape[1]
    for _ in range(halvings):
        side = (side + 1) // 2
    return [nn.AvgPool2d(side), nn.Flatten(), nn.Linear(*work.params["w"].shape)]


def norm(channels: int) -> Any:
    """Batch normalisation whose fixed statistics do nothing."""
    return nn.BatchNorm2d(channels, eps=0.0).eval()


class Block(nn.Module):
    """Two convolutions beside a 1 x 1 one."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], stride: int) -> None:
        super().__init__()
        inner, outer, skip = shapes
        self.body = nn.Sequential(
            convolution(inner, stride, False),
            norm(inner[3]),
            nn.ReLU(),
            convolution(outer, 1, False),
            norm(outer[3]),
        )
        self.skip = nn.Conv2d(*skip, 1, stride=stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Any) -> Any:
        """Their sum's positive part."""
        return self.relu(self.body(x) + self.skip(x))


def resnet(work: Workload) -> Any:
    """Residual blocks."""
    shape = {name: p.shape for name, p in work.params.items()}
    layers = [convolution(shape["stem"], 1, False), norm(shape["stem"][3]), nn.ReLU()]
    blocks = sum(name.endswith("_skip") for name in shape)
    for i in range(blocks):
        shapes = [shape[f"block{i}_{part}"] for part in ("in", "out", "skip")]
        layers.append(Block(shapes, 2 if i else 1))
    return nn.Sequential(*layers, *classifier(work, blocks - 1))


class Layer(nn.Module):
    """Attention and dense layers, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """Both added to the input."""
        batch, time, width = x.shape
        split = self.attend(self.first(x)).reshape(batch, time, 3, HEADS, width // HEADS)
        query, key, value = (split[:, :, i].transpose(1, 2) for i in range(3))
        scores = query @ key.transpose(2, 3) * (width // HEADS) ** -0.5
        allowed = torch.ones(time, time, dtype=torch.bool).tril()
        mixed = torch.where(allowed, scores, -1e9).softmax(-1) @ value
        x = x + self.project(mixed.transpose(1, 2).reshape(x.shape))
        hidden = nn.functional.gelu(self.up(self.second(x)), approximate="tanh")
        return x + self.down(hidden)


class Transformer(nn.Module):
    """A decoder; classes on the second axis, as PyTorch's losses have them."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*work.params["embedding"].shape)
        self.positions = nn.Parameter(torch.zeros(work.params["positions"].shape))
        layers, width, _ = work.params["layers_project"].shape
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.out = nn.Linear(*work.params["out"].shape, bias=False)

    def forward(self, tokens: Any) -> Any:
        """Logits of every next token."""
        return self.out(self.layers(self.embedding(tokens) + self.positions)).transpose(1, 2)


MODULES: dict[str, Callable[[Workload], Any]] = {
    "mlp": mlp,
    "regression": mlp,
    "conv": conv,
    "resnet": resnet,
    "transformer": Transformer,
}


def names_of(work: Workload) -> list[str]:
    """What the module's parameters are called in the workload, in order; with a layer's number."""
    if work.kind in ("mlp", "regression"):
        return [f"{kind}{i}" for i in range(len(work.params) // 2) for kind in "wb"]
    if work.kind == "conv":
        return [f"{k}{i}" for i in range(len(work.params) // 2 - 1) for k in "wb"] + ["w", "b"]
    scaled = lambda name: [name, f"{name}_scale", f"{name}_shift"]
    if work.kind == "resnet":
        names = scaled("stem")
        for i in range(sum(name.endswith("_skip") for name in work.params)):
            names += [*scaled(f"block{i}_in"), *scaled(f"block{i}_out"), f"block{i}_skip"]
        return [*names, "w", "b"]
    parts = ["first_scale", "first_shift", "second_scale", "second_shift", "attend", "project"]
    parts += ["up", "up_bias", "down", "down_bias"]
    layers = range(len(work.params["layers_project"]))
    stacked = [f"layers_{part}:{i}" for i in layers for part in parts]
    return ["positions", "embedding", *stacked, "out"]


def turned(name: str, array: Any) -> Any:
    """A dense or 1 x 1 weight the other way round."""
    if name in ("embedding", "positions") or array.ndim == 1:
        return array
    return array.T if array.ndim == 2 else array


class TorchWorkload:
    """A module with the workload's parameters, its data and the vector."""

    def __init__(self, work: Workload) -> None:
        self.work, self.names = work, names_of(work)
        self.module = MODULES[work.kind](work)
        self.params = list(self.module.parameters())
        with torch.no_grad():
            for p, array in zip(self.params, self.from_jax(work.params), strict=True):
                p.copy_(array)
        x = work.x.transpose(0, 3, 1, 2) if work.x.ndim == 4 else work.x
        self.x = torch.from_numpy(np.ascontiguousarray(x))
        self.y = torch.from_numpy(work.y)
        if self.x.dtype == torch.int32:
            self.x = self.x.long()
        # PyTorch's squared error is without the half, and a mean over outputs: of one here.
        self.loss = nn.CrossEntropyLoss() if work.head == "softmax" else nn.MSELoss()
        self.scale = 1.0 if work.head == "softmax" else 0.5
        if work.head == "softmax":
            self.y = self.y.long()
        self.vector = self.from_jax(work.vector)

    def from_jax(self, arrays: Arrays) -> list[Any]:
        """Tensors like the module's parameters."""
        tensors = []
        for name, p in zip(self.names, self.params, strict=True):
            base, _, layer = name.partition(":")
            array = arrays[base][int(layer)] if layer else arrays[base]
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else turned(name, array)
            tensors.append(torch.from_numpy(np.ascontiguousarray(array)).reshape(p.shape))
        return tensors

    def to_jax(self, tensors: Tensors) -> Arrays:
        """Arrays like the workload's parameters, on fvp's scale."""
        found: dict[str, list[np.ndarray]] = {}
        for name, tensor, p in zip(self.names, tensors, self.params, strict=True):
            array = self.scale * tensor.detach().reshape(p.shape).numpy()
            base = name.partition(":")[0]
            if array.ndim == 4:
                like = self.work.params[base].ndim
                array = array.transpose(2, 3, 1, 0) if like == 4 else array[:, :, 0, 0].T
            else:
                array = turned(name, array)
            found.setdefault(base, []).append(array)
        return {k: np.stack(a) if ":" in self._first(k) else a[0] for k, a in found.items()}

    def _first(self, base: str) -> str:
        return next(name for name in self.names if name.partition(":")[0] == base)

    def gradient(self) -> list[Any]:
        """Of the mean loss."""
        return list(torch.autograd.grad(self.loss(self.module(self.x), self.y), self.params))
