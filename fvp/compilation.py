"""Running compiled when called eagerly.

What was compiled for a function lives as long as the function: the cache holds functions weakly,
and so does every compiled program, whose static arguments and results name them by reference.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.core import Tracer

from fvp.model import Model, hashable, is_array, unhashed

F = TypeVar("F", bound=Callable[..., Any])


def compiled_when_eager(function: F) -> F:
    """Decorator: jit ``function`` where nothing is being traced, inline it where something is.

    Inside a caller's own ``jit``, ``vmap`` or ``scan`` the function is part of that program; called
    eagerly it would run operation by operation. Arrays and floats anywhere in the arguments are
    data; functions, integers and other objects are part of the program. One compilation for each of
    those, so a Python loop over one model function compiles once; it is dropped with the first
    function among the arguments that dies.
    """
    programs: dict[Any, Any] = {}

    def compile_program() -> Any:
        # A new function each time: JAX keeps what it compiled as long as the function it was given.
        def program(key: Any, data: list[Any]) -> Any:
            args, keywords = _unpack(key, data)
            return _Packed.of(function(*args, **keywords))

        return jax.jit(program, static_argnums=0)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        packed = _Packed.of((args, keywords))
        if any(isinstance(leaf, Tracer) for leaf in packed.data):
            return function(*args, **keywords)
        result = _entry(programs, _references(packed.key), compile_program)(packed.key, packed.data)
        return _unpack(result.key, result.data)

    return call  # pyright: ignore[reportReturnType]


class Reference:
    """Names a callable without keeping it alive; equal and hashed as the callable is."""

    def __init__(self, function: Any) -> None:
        method = isinstance(function, types.MethodType)
        self._hash = hash(hashable(function))
        self._bind = function.__func__ if method else None
        owner = function.__self__ if method else function
        try:
            self._owner = weakref.ref(owner)
        except TypeError:
            self._owner = lambda: owner  # a builtin: it never dies

    def function(self) -> Any:
        """The callable, or None where it is gone."""
        owner = self._owner()
        if owner is None or self._bind is None:
            return owner
        return types.MethodType(self._bind, owner)

    def own(self, entries: dict[Any, Any]) -> None:
        """Takes its entry away when the callable dies."""
        if isinstance(self._owner, weakref.ref):
            owner = self._owner()
            self._owner = weakref.ref(owner, lambda _: entries.pop(self, None))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Reference) or self._hash != other._hash:
            return False
        mine, theirs = self.function(), other.function()
        return mine is not None and hashable(mine) == hashable(theirs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """A tree as its arrays, and a hashable key for all the rest, functions by reference."""

    data: list[Any]
    key: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: Any) -> _Packed:
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_model)
        data, fixed = [], []
        for leaf in leaves:
            if _is_model(leaf):
                data.extend(leaf.arrays)
                names = tuple(_refer(x) for x in leaf.fixed)
                key = _ModelKey(len(leaf.arrays), leaf.structure, names, leaf.batch, leaf.layout)
                fixed.append(key)
            elif is_array(leaf):
                data.append(leaf)
                fixed.append(_DATA)
            else:
                fixed.append(_refer(leaf) if callable(leaf) else hashable(leaf))
        return cls(data, (structure, tuple(fixed)))


@dataclasses.dataclass(frozen=True)
class _ModelKey:
    """A `Model` without its arrays."""

    count: int
    structure: Any
    fixed: tuple[Any, ...]
    batch: Any
    layout: Any


_DATA = object()  # stands where a leaf is data


def _unpack(key: Any, data: Sequence[Any]) -> Any:
    structure, fixed = key
    rest = iter(data)

    def leaf(x: Any) -> Any:
        if x is _DATA:
            return next(rest)
        if isinstance(x, _ModelKey):
            arrays = [next(rest) for _ in range(x.count)]
            fixed = tuple(map(_resolve, x.fixed))
            return Model(arrays, x.structure, fixed, x.batch, x.layout)
        return unhashed(_resolve(x))

    return jax.tree.unflatten(structure, [leaf(x) for x in fixed])


def _refer(x: Any) -> Any:
    return Reference(x) if callable(x) else x


def _resolve(x: Any) -> Any:
    if not isinstance(x, Reference):
        return x
    function = x.function()
    if function is None:
        raise ReferenceError(
            "a function that this operator was built with is gone: keep a reference to it, and let"
            " records that cross jit (curvatures, heads) hold arrays and not functions."
        )
    return function


def _references(key: Any) -> list[Reference]:
    """The functions that a key names, in order."""
    found = []
    for x in key[1]:
        names = x.fixed if isinstance(x, _ModelKey) else (x,)
        found += [name for name in names if isinstance(name, Reference)]
    return found


def _entry(entries: dict[Any, Any], path: Sequence[Reference], make: Callable[[], Any]) -> Any:
    """What is kept under these functions, one level for each, until one of them dies."""
    for reference in path:
        if reference not in entries:
            entries[reference] = {}
            reference.own(entries)
        entries = entries[reference]
    if None not in entries:
        entries[None] = make()
    return entries[None]


def _is_model(x: Any) -> bool:
    return isinstance(x, Model)
