"""Strict JAX for every test: no silent promotion, two CPU devices."""

import jax
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield
