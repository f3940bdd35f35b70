"""Records: frozen dataclasses that are pytrees without being registered one by one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax


class Record:
    """Base of the library's abstract classes: a subclass that is a frozen dataclass is a pytree.

    Its fields are children, but for those marked ``dataclasses.field(metadata={"static": True})``,
    which must hash. Flattening and unflattening go round the constructor, so that ``__post_init__``
    may validate what a person passes: JAX rebuilds records with tracers and placeholders in them.
    """

    #: Names of fields that are static wherever a subclass declares them.
    STATIC: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The fields are not known before the dataclass decorator has run: they are read when used.
        jax.tree_util.register_pytree_with_keys(
            cls, _flatten, lambda static, children: _unflatten(cls, static, children)
        )


@functools.cache
def _names(cls: type[Record]) -> tuple[list[str], list[str]]:
    """The names of the fields that are children, and of those that are static."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    static = [f.name for f in fields if f.metadata.get("static") or f.name in cls.STATIC]
    return [field.name for field in fields if field.name not in static], static


def _flatten(record: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children, static = _names(type(record))
    if getattr(record, "__dict__", {}).keys() - {*children, *static}:
        raise TypeError(
            f"{type(record).__name__}: expected a frozen dataclass; decorate the class."
        )
    keyed = [(jax.tree_util.GetAttrKey(name), getattr(record, name)) for name in children]
    return keyed, tuple(getattr(record, name) for name in static)


def _unflatten(cls: type[Record], static: tuple[Any, ...], children: Any) -> Any:
    record, names = object.__new__(cls), _names(cls)
    for name, value in zip([*names[0], *names[1]], [*children, *static], strict=True):
        object.__setattr__(record, name, value)
    return record
