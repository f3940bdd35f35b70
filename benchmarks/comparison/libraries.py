"""Who is compared: the module with a library's programs, and the environment that runs them."""

from __future__ import annotations

import dataclasses
import importlib.metadata


@dataclasses.dataclass(frozen=True)
class Library:
    """A row of the tables.

    Attributes:
      module: of this folder, with a function ``function`` from a workload to programs.
      environment: name of its virtual environment; None is the one that runs compare.py.
      requirements: what is installed there.
      packages: whose versions are reported.
    """

    module: str
    environment: str | None = None
    requirements: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    function: str = "programs"


def _own_jax() -> tuple[str, ...]:
    return tuple(f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))


TORCH = ("torch==2.14.1", "curvlinops-for-pytorch==3.0.1", "backpack-for-pytorch==1.7.1")


def libraries() -> dict[str, Library]:
    """All of them; the peers with the same jax as fvp where they run on it."""
    jax = _own_jax()

    def peer(module: str, package: str, *pins: str, function: str = "programs") -> Library:
        name = package.split("==")[0]
        return Library(module, name, (package, *(pins or jax)), (name, "jax"), function)

    torch = lambda name: Library(f"with_{name}", "torch", TORCH, (f"{name}-for-pytorch", "torch"))
    return {
        "fvp": Library("with_fvp", packages=("fvp", "jax")),
        "JAX by hand": Library("with_jax", packages=("jax",)),
        "JAX textbook": Library("with_jax", packages=("jax",), function="textbook"),
        # Its last release fails on newer ones.
        "kfac-jax": peer("with_kfac_jax", "kfac-jax==0.0.8", "jax==0.9.1", "jaxlib==0.9.1"),
        "somax": peer("with_somax", "python-somax==1.0.1"),
        "laplax": peer("with_laplax", "laplax==0.0.2"),
        "netket": peer("with_netket", "netket==3.23.0"),
        "netket dense": peer("with_netket", "netket==3.23.0", function="dense"),
        "nlls-gram": peer("with_nlls_gram", "nlls-gram==2.13.0"),
        "randngd": peer("with_randngd", "randngd==0.1.1"),
        "curvlinops": torch("curvlinops"),
        "BackPACK": torch("backpack"),
    }
