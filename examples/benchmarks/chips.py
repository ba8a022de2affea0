"""The machines that `compiled_cost.py` compiles for, of which only the compiler need be installed.

Import it before JAX, whose import is the first time that they say that there is no device.
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
    """Keeps from the screen what is written to it past Python, as plugins do that find no device."""
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


# What XLA must know of an H100 with 80 GB, where there is none to ask.
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
    package: str  # that has the compiler
    module: str  # of the package
    topology: dict[str, str]
    chips: int
    batch: int  # examples for each chip in training, if the user does not say
    options: dict[str, Any] = {}  # of the compiler


_V5E = {"platform": "tpu", "topology_name": "v5e:2x4"}
DEVICES = {
    "h100": Device(
        "H100",
        package="jax-cuda12-plugin",
        module="jax_plugins.xla_cuda12",
        topology={"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H100},
        chips=1,
        batch=256,
        options={"xla_gpu_autotune_level": 0},  # to choose algorithms by their time would need the device
    ),
    "v5e": Device("TPU v5e", "libtpu", "libtpu", _V5E, chips=1, batch=64),
    "v5e-2x4": Device("TPU v5e 2x4", "libtpu", "libtpu", _V5E, chips=8, batch=64),
}


class Program(NamedTuple):
    """What is compiled: `run(variables, *data)`."""

    run: Callable[..., Any]
    variables: Any  # shapes; the same on all chips
    data: tuple[jax.ShapeDtypeStruct, ...]  # divided among them
    donates: bool = False  # whether what it gives takes the place of the variables


def is_installed(device: str) -> bool:
    """Whether there is a compiler for it."""
    try:
        return importlib.util.find_spec(DEVICES[device].module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def compile_for(device: str, program: Program) -> jax.stages.Compiled | None:
    """Compiles a program; None if it does not fit into the memory of the device."""
    donated = (0,) if program.donates else ()
    everywhere, divided = _shardings(device)
    arguments = _place(program.variables, everywhere), *_place(program.data, divided)
    lowered = jax.jit(program.run, donate_argnums=donated).lower(*arguments)
    try:
        with _uncached():
            return lowered.compile(compiler_options=DEVICES[device].options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps JAX from writing to its persistent cache: it could not read programs for an absent device from there."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@functools.cache
def _shardings(device: str) -> tuple[Sharding, Sharding]:
    """Where what is the same on all chips lies, and where what is divided among them."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the network which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no chip that two processes could fight for
    topology = topologies.get_topology_desc(**DEVICES[device].topology)
    chips = np.array(topology.devices[: DEVICES[device].chips])
    if chips.size == 1:
        return (SingleDeviceSharding(chips[0]),) * 2
    mesh = Mesh(chips, ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def _place(shapes: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
