"""Shared test setup: float64 references, eight CPU devices, and warnings that fail."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    # A warning of the library is a message to its user, so no test may cause one unnoticed.
    config.addinivalue_line("filterwarnings", "error")


def pytest_runtest_setup(item):
    # Tests of values spend their time in compilation: a module that sets COMPILE_QUICKLY leaves out
    # most optimizations. Whatever reads flops, memory or bits of a program does not.
    quickly = getattr(getattr(item, "module", None), "COMPILE_QUICKLY", False)
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """A process that keeps the compiled programs of all files runs out of memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def build():
    """Build the operator of one curvature by name, with the one signature all five share."""
    import fvp

    def build_operator(curvature, model, head, params, batch, targets, key, **options):
        arguments = {
            "fisher": (),
            "ggn": (targets,),
            "empirical_fisher": (targets,),
            "mc_fisher": (key,),
            "hessian": (targets,),
        }[curvature]
        return getattr(fvp, curvature)(model, head, params, batch, *arguments, **options)

    return build_operator
