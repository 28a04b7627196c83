"""Strict JAX for every test: no silent promotion, two CPU devices, nothing compiled twice.

More than half of the time of the fast tests would be that of the compiler: they are compiled with
little effort, which leaves the arithmetic as it is written. The slow ones are compiled as users
have it, and so are all with any XLA_FLAGS of your own, such as an empty one.
"""

import os
import tempfile

import jax
import pytest


LITTLE_EFFORT = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# The first process makes the folder; the workers and the kernels of notebooks inherit its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="smpr3d_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)


def pytest_configure(config):
    """Little effort for the fast tests; what another process is just writing is compiled again."""
    if config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", LITTLE_EFFORT)
    unread = "ignore:Error (reading|writing) persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", unread)


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


# The package is imported inside the fixtures: here it would come before the type-checking hook.


@pytest.fixture(scope="session")
def series():
    """A focal series of a small specimen, simulated once: 3 scans of 3 x 6 positions."""
    from . import tiny

    return tiny.simulated()


@pytest.fixture(scope="session")
def experiment_file(series, tmp_path_factory):
    """The same series as files, with the experiment file that `run` takes."""
    from smpr3d_jax.app.simulate import write_series

    return write_series(tmp_path_factory.mktemp("series"), series, "two layers")


@pytest.fixture(scope="session")
def finished(experiment_file, tmp_path_factory):
    """What `smpr3d run` answers and the folder that it leaves: run once for many tests."""
    from . import tiny

    folder = tmp_path_factory.mktemp("results") / "new" / "folder"
    return tiny.smpr3d("run", experiment_file, "-o", folder, *tiny.FEW, "--json"), folder
