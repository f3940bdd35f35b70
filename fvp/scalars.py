"""Records of scalars that are one array."""

from __future__ import annotations

import typing
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np


@typing.dataclass_transform(kw_only_default=True)
class Scalars:
    """Base of records whose fields are all float32 scalars, kept in one array ``values``.

    Each array of an optimizer's state costs some microseconds in every call of a compiled step, as
    much as a small network's gradient when there are forty of them, and a copy in every branch.
    Fields are read by their names, and `_replace` gives the record with others, as for a named
    tuple. Stacked by ``vmap`` they keep their fields along the last axis.
    """

    _fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        for i, name in enumerate(cls._fields):
            setattr(cls, name, property(lambda self, i=i: self.values[..., i]))
        key = jax.tree_util.GetAttrKey("values")
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda self: (((key, self.values),), None),
            lambda _, values: cls._of(*values),
            lambda self: ((self.values,), None),
        )

    def __init__(self, **fields: Any) -> None:
        named = [fields.pop(name) for name in self._fields]
        if fields:
            raise TypeError(f"{type(self).__name__}: unexpected {', '.join(fields)}")
        self.values = jnp.stack([jnp.asarray(x, jnp.float32) for x in named], axis=-1)

    @classmethod
    def _of(cls, values: Any) -> Self:
        self = object.__new__(cls)
        self.values = values
        return self

    @classmethod
    def zeros(cls) -> Self:
        """Every field zero."""
        return cls._of(jnp.zeros(len(cls._fields), jnp.float32))

    def _replace(self, **fields: Any) -> Self:
        return type(self)(**{name: getattr(self, name) for name in self._fields} | fields)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and bool(np.all(self.values == vars(other)["values"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._fields)}: {self.values!r})"
