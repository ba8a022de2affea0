"""The devices that `compiled_cost.py` compiles for; only their compilers have to be installed.

Import this module before JAX: it silences the messages of plugins that find no device, which start with the import.
"""

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides output that native code, such as a plugin that finds no device, writes to stderr."""
    screen = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)


with quiet():
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


# The properties of an H100 with 80 GB that XLA needs if the device is not present.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""


class Device(NamedTuple):
    """One chip, or several that share a batch."""

    title: str
    package: str  # PyPI package with the compiler
    module: str  # module of this package
    topology: dict[str, str]
    chips: int
    batch: int  # default number of examples per chip in training
    options: dict[str, Any] = {}  # compiler options


_V5E = {"platform": "tpu", "topology_name": "v5e:2x4"}
DEVICES = {
    "h100": Device(
        "H100",
        package="jax-cuda12-plugin",
        module="jax_plugins.xla_cuda12",
        topology={"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H100},
        chips=1,
        batch=256,
        options={"xla_gpu_autotune_level": 0},  # autotuning needs the device
    ),
    "v5e": Device("TPU v5e", "libtpu", "libtpu", _V5E, chips=1, batch=64),
    "v5e-2x4": Device("TPU v5e 2x4", "libtpu", "libtpu", _V5E, chips=8, batch=64),
}


class Program(NamedTuple):
    """A program `run(variables, *data)` to compile."""

    run: Callable[..., Any]
    variables: Any  # shapes; replicated on all chips
    data: tuple[jax.ShapeDtypeStruct, ...]  # sharded over the chips
    donates: bool = False  # whether the variables are donated


def is_installed(device: str) -> bool:
    """Whether the compiler for the device is installed."""
    try:
        return importlib.util.find_spec(DEVICES[device].module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def compile_for(device: str, program: Program) -> jax.stages.Compiled | None:
    """Compiles a program; None if it does not fit into the memory of the device."""
    donated = (0,) if program.donates else ()
    everywhere, divided = _shardings(device)
    arguments = _place(program.variables, everywhere), *_place(program.data, divided)
    lowered = jax.jit(program.run, donate_argnums=donated).lower(*arguments)
    try:
        with uncached():
            return lowered.compile(compiler_options=DEVICES[device].options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keeps JAX from writing to its persistent cache, since it cannot load programs for absent devices from it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@functools.cache
def _shardings(device: str) -> tuple[Sharding, Sharding]:
    """The shardings of replicated and of sharded arrays."""
    chips = chips_of(DEVICES[device].topology)[: DEVICES[device].chips]
    if chips.size == 1:
        return (SingleDeviceSharding(chips[0]),) * 2
    # Data parallelism: batches are split over one axis, variables are replicated.
    mesh = Mesh(chips, ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def chips_of(topology: dict[str, str]) -> np.ndarray:
    """The chips of a topology, in one dimension; they need not be present."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # keep libtpu from querying the metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # safe, because no process uses a chip
    return np.array(topologies.get_topology_desc(**topology).devices)


def _place(shapes: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
