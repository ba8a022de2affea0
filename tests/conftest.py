"""All tests run on 8 fake CPU devices, with strict dtype promotion, no rank promotion, and warnings as errors."""

import collections
import gc
import importlib.util
import os
from pathlib import Path

# Programs that are equal are compiled once for all processes of a run, and kept for the next one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's passes would take a third of the time of the tests. .ci/run asks for them where numbers are compared.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jaxlib  # noqa: E402  jax reads the variables above when it starts

FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# XLA's older emitters of fused kernels compile in half the time. Newer versions of jaxlib do not have them, and libtpu,
# which reads the flags too, ends the process where it does not know one.
if jaxlib.version.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Sends all tests of a file to one process of `-n`, where they share compiled programs and module fixtures."""
    if config.getoption("dist", None) == "load":
        config.option.dist = "loadfile"
        # Files with many tests first, the order of xdist, would leave a long file with few tests to one process.
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before those that `-m` leaves out are left out
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked `sample(every=n)`, all but each n-th are slow; those that are slow do not count."""
    seen = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is not None and item.get_closest_marker("slow") is None:
            name = item.nodeid.split("[")[0]
            if seen[name] % sample.kwargs["every"]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


def pytest_collection_finish():
    """What is imported stays to the end: the garbage collector, a tenth of the time of tests, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def rng():
    """A new generator for each test."""
    return np.random.default_rng(0)
