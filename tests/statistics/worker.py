"""One of the two processes of test_processes.py: runs every scenario, and writes what came of it."""

import itertools
import json
import sys
import warnings

import flax.linen as nn
import global_worker
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROWS = 12


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(self.width)(x)))
        return jaxbn.linen.BatchNorm(use_running_average=True)(nn.Dense(self.width)(x))


def batches_of(process, count):
    """`count` batches, other ones for each process."""
    return list(np.random.default_rng(process).normal(process, 1, (count, ROWS, 3)).astype(np.float32))


def pass_over(batches, width=4, **options):
    net = Net(width)
    variables = net.init(jax.random.key(0), np.zeros((2, 3), np.float32))
    return jaxbn.linen.postproc(net.apply, variables, batches, **options)


def statistics(batches, **options):
    variables, report = pass_over(batches, **options)
    jaxbn.check_replicas(variables)
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(variables["batch_stats"])]
    kinds = {path: change.kind for path, change in report.layers.items()}
    return {
        "leaves": leaves,
        "batches": report.batches,
        "skipped": report.skipped,
        "kinds": kinds,
        "stopped": report.stopped,
    }


def endless(process):
    return itertools.chain(batches_of(process, 30), itertools.repeat(None))  # which nobody can measure


def mesh():
    return jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.local_devices())


def breaks_at(position, batches):
    yield from batches[:position]
    raise OSError(f"batch {position} cannot be read")


def with_nan(batches):
    return [*batches[:1], np.full_like(batches[0], np.nan), *batches[1:]]


def nnx_statistics(batches):
    model, _ = jaxbn.nnx.postproc(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), batches)
    jaxbn.check_replicas(nnx.state(model))
    return [np.asarray(model.mean[...]).tolist(), np.asarray(model.var[...]).tolist()]


def sharded(batches, nnx_too=False):
    """With kernels spread over the devices of both processes, and all else whole on each of them."""
    everywhere = jax.make_mesh((4,), ("data",), (AxisType.Auto,))

    def place(leaf):
        leaf = np.asarray(leaf)
        spec = P(None, "data") if leaf.ndim > 1 else P()
        return jax.make_array_from_callback(leaf.shape, NamedSharding(everywhere, spec), lambda index: leaf[index])

    if nnx_too:
        model = linear_and_norm()
        before = jax.tree.map(place, nnx.state(model))
        model, _ = jaxbn.nnx.postproc(nnx.merge(nnx.graphdef(model), before), batches)
        after, statistics = nnx.state(model), nnx.state(model, nnx.BatchStat)
    else:
        net = Net()
        before = jax.tree.map(place, net.init(jax.random.key(0), np.zeros((2, 3), np.float32)))
        after, _ = jaxbn.linen.postproc(net.apply, before, batches)
        statistics = after["batch_stats"]
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == [leaf.sharding for leaf in jax.tree.leaves(before)]
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(after))
    jaxbn.check_replicas(after)
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(statistics)]


def linear_and_norm():
    return nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)))


def diagnosed(batches):
    variables = Net().init(jax.random.key(0), np.zeros((2, 3), np.float32))
    return jaxbn.linen.diagnose(Net().apply, variables, batches).to_dict()


def of_other_depth(process):
    """The batches of process 1 go through one layer more, so that it has one stage more."""
    layers = nn.Sequential([nn.BatchNorm(True), nn.Dense(3), nn.BatchNorm(True)])
    variables = layers.init(jax.random.key(0), np.zeros((2, 3), np.float32))

    def call(variables, batch):
        return layers.apply(variables, batch, method=lambda net, x: net(x) if process else net.layers[0](x))

    return jaxbn.linen.postproc(call, variables, batches_of(process, 2), consistent=True)[1].batches


SCENARIOS = {
    "five and none": lambda p: statistics(batches_of(p, 0 if p else 5)),
    "none and five": lambda p: statistics(batches_of(p, 5 if p else 0)),
    "three and two": lambda p: statistics(batches_of(p, 2 if p else 3)),
    "on two devices each": lambda p: statistics(batches_of(p, 2 if p else 3), mesh=mesh()),
    "consistent": lambda p: statistics(batches_of(p, 2 if p else 3), consistent=True),
    "moving average": lambda p: statistics(batches_of(p, 2 if p else 3), estimator=jaxbn.moving_average()),
    "mean of batches": lambda p: statistics(batches_of(p, 2 if p else 3), estimator=jaxbn.mean_of_batches()),
    "nnx": lambda p: nnx_statistics(batches_of(p, 2 if p else 3)),
    "sharded over both": lambda p: sharded(batches_of(p, 2 if p else 3)),
    "sharded over both, nnx": lambda p: sharded(batches_of(p, 2 if p else 3), True),
    "diagnose": lambda p: diagnosed(batches_of(p, 2 if p else 3)),
    "diagnose, all on one": lambda p: diagnosed(batches_of(0, 3) + batches_of(1, 2) if p else []),
    "one breaks": lambda p: statistics(breaks_at(3, batches_of(p, 5)) if p else batches_of(p, 5)),
    "one breaks at once": lambda p: statistics(breaks_at(0, []) if p else batches_of(p, 5)),
    "none": lambda p: statistics([]),
    "nan": lambda p: statistics(with_nan(batches_of(p, 2)) if p else batches_of(p, 2)),
    "nan left out": lambda p: statistics(with_nan(batches_of(p, 2)) if p else batches_of(p, 3), skip_nonfinite=True),
    "other models": lambda p: pass_over(batches_of(p, 2), width=4 + p)[1].batches,
    "one has a stage more": of_other_depth,
    "one has params alone": lambda p: (
        jaxbn.linen.postproc(
            nn.BatchNorm(True).apply,
            {"params": {}} if p else nn.BatchNorm(True).init(jax.random.key(0), jnp.ones((2, 3))),
            batches_of(p, 2),
        )[1].batches
    ),
    "diagnose, one breaks": lambda p: diagnosed(breaks_at(1, batches_of(p, 2)) if p else batches_of(p, 2)),
    "other variables": lambda p: jaxbn.check_replicas({"a": jnp.ones(3), "b": {"c": jnp.full(2, p)}}),
    "stopped": lambda p: statistics(endless(p), stop_when=0.12),
    "stopped, one runs out": lambda p: statistics(batches_of(p, 10) if p else endless(p), stop_when=0.12),
    "stopped, consistent": lambda p: statistics(
        (lambda: endless(p)) if p else batches_of(p, 9), stop_when=0.12, consistent=True
    ),
    "one breaks after a decision": lambda p: statistics(
        breaks_at(10, batches_of(p, 10)) if p else endless(p), stop_when=1e-9
    ),
    "the same again": lambda p: statistics(batches_of(p, 2 if p else 3)),  # after all those errors
}


SCENARIOS |= {f"global: {name}": lambda _, agree=agree: agree() for name, agree in global_worker.AGREE.items()}
SCENARIOS |= {f"global: {name}": fails for name, (fails, _) in global_worker.FAIL.items()}
SCENARIOS |= {"global: again": SCENARIOS["global: pooled"]}  # after all those errors


def main(address, process, path, *names):
    warnings.simplefilter("error")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process)
    results = {}
    for name in names or SCENARIOS:
        try:
            results[name] = {"result": SCENARIOS[name](process)}
        except Exception as error:
            results[name] = {"error": type(error).__name__, "message": str(error)}
    with open(path, "w") as file:
        json.dump(results, file)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
