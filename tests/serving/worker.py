"""One of the two processes of test_sharded.py: runs all scenarios and writes their results."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.serving

INFO = jaxbn.Info((("norm", jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 20.0)),), (("jaxbn", "0.1"),))


def everywhere(*axes):
    return NamedSharding(jax.make_mesh((4,), ("x",), (AxisType.Auto,)), P(*axes))


def plain(seed):
    kernel = np.random.default_rng(seed).standard_normal((8, 4)).astype("f4")
    return {"kernel": kernel, "mean": np.arange(4, dtype="f4") + seed, "step": np.int32(seed)}


def network(seed):
    """A kernel spread over both processes, a mean that each has on its own device, and a scalar."""
    whole = plain(seed)
    kernel = jax.make_array_from_callback((8, 4), everywhere("x"), whole["kernel"].__getitem__)
    return jaxbn.Frozen({**whole, "kernel": kernel, "mean": jnp.asarray(whole["mean"])}, INFO)


def check(found, expected, shardings):
    assert found.info == INFO
    for name, value in expected.items():
        array, sharding = found.variables[name], shardings.get(name, SingleDeviceSharding(jax.local_devices()[0]))
        assert array.sharding.is_equivalent_to(sharding, array.ndim), name
        assert array.dtype == value.dtype and array.shape == value.shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])


def load(folder, seed, **shardings):
    expected = plain(seed)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings.get(name))
        for name, leaf in expected.items()
    }
    check(jaxbn.serving.load_sharded(folder, like=like if shardings else None), expected, shardings)


def load_of_one(folder):
    found = jaxbn.serving.load_sharded(folder)
    assert found.variables["params"]["kernel"].shape == (16, 6)


def scenarios(here, p):
    folder, save, read = here / "network", jaxbn.serving.save_sharded, jaxbn.serving.load_sharded
    other = plain(1) | {"kernel": np.ones((8, 5), "f4")}
    return {
        "save": lambda: save(folder, network(1)),
        "load whole": lambda: load(folder, 1),
        "load spread": lambda: load(folder, 1, kernel=everywhere(None, "x"), mean=everywhere("x"), step=everywhere()),
        "load on one device": lambda: load(folder, 1, kernel=SingleDeviceSharding(jax.local_devices()[1])),
        "load of one process": lambda: load_of_one(here / "of one"),
        "one has no network": lambda: save(folder, "network" if p else network(3)),
        "one has another folder": lambda: save(here / f"folder {p}", network(3)),
        "one has another model": lambda: read(folder, like=other if p else plain(1)),
        "nowhere": lambda: read(here / "nowhere"),
        "damaged": lambda: read(here / "damaged"),
        "save again": lambda: save(folder, network(2)),  # after all those errors
    }


def main(address, process, here):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process)
    results = {}
    for name, scenario in scenarios(here, process).items():
        try:
            scenario()
            results[name] = "done"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    (here / f"{process}.json").write_text(json.dumps(results))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
