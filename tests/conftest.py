"""Strict settings for every test: eight CPU devices, no silent rank promotion, no leaked state."""

import contextlib
import ctypes
import gc
import os
import pathlib
import time

# Tests mostly compile programs that run once. For these, LLVM's optimizations and the emitters that
# rely on them cost several times what they save. XLA's own passes, which decide fusions and
# collectives, run as usual.
# Each flag once: workers inherit them, and the compilation cache's keys depend on them.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are shared by workers, by the processes that tests start, and by later runs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many long-lived objects; collecting garbage 100 times less often saves a tenth.
gc.set_threshold(100_000, 20, 50)


def pytest_configure(config):
    """Bounds the cache: drops programs that no run has read for a week."""
    if hasattr(config, "workerinput"):
        return
    for program in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # Another run may have removed it.
            if program.stat().st_atime < time.time() - 7 * 24 * 3600:
                program.unlink()


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Frees a module's compiled programs when it ends: they are most of a worker's memory."""
    yield
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Some C libraries lack malloc_trim.
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def traced_anew():
    """Clears traces before and after a test that patches functions which ops call."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Runs one test in float64, for oracles."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def mesh8():
    """Eight simulated devices along one axis named "data"."""
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
