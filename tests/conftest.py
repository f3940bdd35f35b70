"""Shared test setup: float64 references, eight CPU devices, and warnings that fail."""

import collections
import importlib

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="all combinations, not a sample")


def pytest_configure(config):
    # A warning of the library is a message to its user, so no test may cause one unnoticed.
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("markers", "compile_in_full: whatever flag the module sets")
    config.addinivalue_line("markers", "exhaustive: one of many alike, left to --exhaustive")
    config.addinivalue_line("markers", "each_value: some combinations that have all values")
    keep_programs(config)


def pytest_collection_modifyitems(config, items):
    """Leaves to `--exhaustive` what is marked so.

    Of a test marked `each_value` those combinations of its parameters run that are needed for each
    value of each parameter to be met.
    """
    if config.getoption("exhaustive"):
        return
    left = {item for item in items if item.get_closest_marker("exhaustive")}
    combinations = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("each_value") and item not in left:
            combinations[item.parent, item.originalname].append(item)
    for alike in combinations.values():
        left.update(set(alike) - set(meeting_each_value(alike)))
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def meeting_each_value(items):
    """The next item is the first of those that have the most values which no other had."""
    values = {item: set(item.callspec.indices.items()) for item in items}
    unmet = set().union(*values.values())
    while unmet:
        item = max(items, key=lambda item: len(values[item] & unmet))
        unmet -= values[item]
        yield item


def keep_programs(config):
    """Compiled programs are kept beside pytest's own cache, for the next files and the next run.

    A program is found by its text, the options and the version of its compiler, so that none is out
    of date. `--cache-clear` deletes them; JAX_COMPILATION_CACHE_DIR names another place.
    """
    if getattr(config, "cache", None) is None or jax.config.jax_compilation_cache_dir is not None:
        return
    # Two processes may write one program at a time; who reads half of it compiles it.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent")
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """How the programs of a file are compiled, and for how long they are kept.

    Tests of values spend their time in compilation: a module that sets COMPILE_QUICKLY leaves out
    most optimizations. Its tests that read bits have the mark `compile_in_full`, and those of
    models that take a maximum: without LLVM's optimizations that may equal none of the values it
    was taken of, since each is computed twice and rounded in two ways, and its derivative is then
    0 / 0. The flops and the memory of a program are settled before LLVM sees it. JAX takes the
    options of its compiler with each `jax.jit` alone, and most programs here are the library's own:
    hence the patch of a private function. A version of JAX without it compiles in full, and more
    slowly.
    """
    from dense import QUICKLY

    options = dict(QUICKLY) if getattr(request.module, "COMPILE_QUICKLY", False) else {}
    compiler = importlib.import_module("jax._src.compiler")
    original = getattr(compiler, "get_compile_options", None)

    def get_compile_options(*args, env_options_overrides, **kwargs):
        return original(*args, env_options_overrides={**options, **env_options_overrides}, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if original is not None:
            patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield options
    # A process that keeps the compiled programs of all files runs out of memory maps.
    jax.clear_caches()


@pytest.fixture(autouse=True)
def program(request, programs):
    """Nothing compiled of a test marked `compile_in_full` is shared with others."""
    if request.node.get_closest_marker("compile_in_full") is None:
        yield
        return
    jax.clear_caches()
    flags = dict(programs)
    programs.clear()
    yield
    programs.update(flags)
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
