"""What a process of test_processes.py does with batches that are arrays over all processes.

It runs in two processes with two devices each, and in the process of the test on four: the results must be the same.
"""

import functools
import gc
import itertools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.framework import processes

DEVICES = 4
ROWS = 16


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), jaxbn.nnx.BatchRenorm(4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)  # its state holds a random key

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norms[0](self.first(x))))
        return self.norms[1](self.second(x))


def mesh(kind=AxisType.Explicit):
    """Over all devices; with Explicit axes, the default of `jax.make_mesh`."""
    return jax.make_mesh((DEVICES,), ("data",), (kind,), devices=jax.devices()[:DEVICES])


def place(leaf, spec, kind=AxisType.Explicit):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh(kind), spec), lambda index: leaf[index])


def own(rows):
    """The part of this process of what all read."""
    share = len(rows) // jax.process_count()
    return rows[jax.process_index() * share :][:share]


def everywhere(rows, kind=AxisType.Explicit):
    """Rows of this process, as part of a global array: the idiom of every pod."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh(kind), P("data")), rows)


def raw(count, seed=0):
    """All rows of each batch, of which the last is smaller."""
    rows = np.random.default_rng(seed).normal(2, 1, (count, ROWS, 3)).astype(np.float32)
    return [*rows[:-1], rows[-1][: ROWS // 2]]


def batches(count, kind=AxisType.Explicit):
    return [everywhere(own(rows), kind) for rows in raw(count)]


def variables_of():
    return Net().init(jax.random.key(0), np.zeros((2, 3), np.float32))


def apply(variables, batch):
    return Net().apply(variables, batch)


def listed(tree):
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(tree)]


def linen(given, variables=None, call=apply, **options):
    """The statistics, and the report; they come back where the variables were."""
    before = variables_of() if variables is None else variables
    after, report = jaxbn.linen.postproc(call, before, given, **options)
    check_places(before, after)
    frozen = jaxbn.linen.freeze(after, report)
    return {"statistics": listed(gather(frozen.variables["batch_stats"])), "report": report.to_dict()}


def in_nnx(given, model=None, **options):
    before = NnxNet(nnx.Rngs(0)) if model is None else model
    after, report = jaxbn.nnx.postproc(before, given, **options)
    check_places(nnx.state(before), nnx.state(after))
    jaxbn.nnx.freeze(after, report)
    return {"statistics": listed(gather(nnx.state(after, nnx.BatchStat))), "report": report.to_dict()}


def check_places(before, after):
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    moved = [(a, b) for a, b in pairs if a.sharding != b.sharding or a.committed != b.committed]
    assert not moved, [(a.sharding, a.committed, b.sharding, b.committed) for a, b in moved]
    jaxbn.check_replicas(after)


def gather(tree):
    return jax.tree.map(lambda leaf: jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
                        if isinstance(leaf.sharding, NamedSharding) else leaf, tree)  # fmt: skip


def sharded(tree):
    """As in FSDP: with the first axis over the devices where they divide it, in statistics too."""

    def spread(leaf):
        divides = leaf.ndim > 0 and leaf.shape[0] % DEVICES == 0
        return place(leaf, P("data") if divides else P(), AxisType.Auto)

    def is_key(leaf):
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    spread_tree = jax.tree.map(lambda leaf: leaf if is_key(leaf) else spread(leaf), tree)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(spread_tree))
    return spread_tree


def watched(given):
    """The batches; fails if this process holds more of a kernel than its shards, except on entry."""

    def replicas():
        kernels = (leaf for leaf in jax.live_arrays() if leaf.shape == (4, 4))
        return sum(leaf.addressable_shards[0].data.shape == leaf.shape for leaf in kernels)

    gc.collect()
    before = replicas()
    for batch in given:
        yield batch
        assert replicas() <= before


def sharded_nnx():
    model = NnxNet(nnx.Rngs(0))
    return nnx.merge(nnx.graphdef(model), sharded(nnx.state(model)))


def weighed(batch):
    return jnp.arange(batch.shape[0]) % 3


def diagnosed(variables=None, kind=AxisType.Explicit):
    return jaxbn.linen.diagnose(apply, variables_of() if variables is None else variables, batches(6, kind)).to_dict()


def diagnosed_nnx():
    return jaxbn.nnx.diagnose(NnxNet(nnx.Rngs(0)), batches(6), weights=weighed).to_dict()


def stepped(spread):
    """A custom loop, which runs the same program on all processes; the state may be sharded over them."""
    steps = jaxbn.linen.make_steps(Net(), lambda y, _: (jnp.mean(y), {}), optax.sgd(0.1), inputs=lambda batch: batch)
    given = batches(3, AxisType.Auto)
    state = spread(steps.init(jax.random.key(0), np.zeros((2, 3), np.float32)))
    acc, step = steps.start(state, given[0]), jax.jit(steps.postproc_step)
    for batch in watched(given):
        acc = step(state, acc, batch)
    frozen, report = steps.finalize(state, acc)
    jaxbn.check_replicas(frozen)
    y = jax.jit(steps.eval_step)(frozen, given[0])
    return {"statistics": listed(gather((frozen.variables["batch_stats"], y))), "report": report.to_dict()}


def in_calls(framework, model, call, statistics_of):
    """One batch at a time, under jit, with parameters that are sharded over the processes."""
    (batch,), jit = batches(2, AxisType.Auto)[:1], nnx.jit if framework is jaxbn.nnx else jax.jit
    y, moments = jit(framework.capture_moments(call))(model, batch)
    installed = framework.install_moments(model, moments)
    adapted = jit(framework.adapt(call, prior_count=8))(installed, batch)
    tables = list(map(framework.summary, (model, installed)))
    return {"arrays": listed(gather((y, statistics_of(installed), adapted))), "tables": tables}


def in_plain_jax():
    """A network of functions, with parameters and states in one pytree."""
    bn = jaxbn.batch_norm()
    keys = jax.random.split(jax.random.key(0))
    kernels = [jax.random.normal(key, shape) for key, shape in zip(keys, ((3, 4), (4, 4)), strict=True)]
    model = sharded([(kernel, *bn.init(4)) for kernel in kernels])

    def call(model, x):
        for kernel, params, state in model:
            x = bn.eval(params, state, x @ kernel)
        return x

    after, report = jaxbn.postproc(call, model, watched(batches(6, AxisType.Auto)))
    check_places(model, after)
    jaxbn.freeze(after, report)
    return {"model": listed(gather(after)), "report": report.to_dict()}


def agrees_without_devices():
    """So that the devices need not wait for the agreement, nor the agreement for the devices."""
    with mock.patch.object(processes, "process_allgather", side_effect=AssertionError("through the devices")):
        return jaxbn.linen.postproc(apply, variables_of(), batches(12), stop_when=0.01)[1].to_dict()


def endless():
    return itertools.chain(batches(30), itertools.repeat(None))  # which nobody can measure


def stops_in_place():
    """After the pass the iterator gives the batch behind the last that was used."""
    numbers, given = itertools.count(), batches(40)
    found = linen((given[next(numbers)] for _ in given), stop_when=0.12)
    assert next(numbers) == found["report"]["batches"] < 40
    return found


def breaks_at(position, given):
    yield from given[:position]
    raise OSError(f"batch {position} cannot be read")


def with_nan():
    rows = raw(4)
    rows[1] = np.full_like(rows[1], np.nan)
    return [everywhere(own(part)) for part in rows]


ESTIMATORS = {
    "pooled": jaxbn.pooled(),
    "pooled, unbiased": jaxbn.pooled(unbiased=True),
    "mean of batches": jaxbn.mean_of_batches(),
    "mean of batches, biased": jaxbn.mean_of_batches(unbiased=False),
    "moving average": jaxbn.moving_average(),
    "moving average, debiased": jaxbn.moving_average(debias=True),
}

# What both must agree in, and with one process that has all devices.
AGREE = {
    **{name: functools.partial(lambda e: linen(batches(6), estimator=e), e) for name, e in ESTIMATORS.items()},
    "weights": lambda: linen(batches(6), weights=weighed),
    "consistent": lambda: linen(batches(6), consistent=True),
    "stopped": lambda: linen(endless(), stop_when=0.12),
    "stopped in place": stops_in_place,
    "stopped, consistent": lambda: linen(endless, stop_when=0.12, consistent=True),
    "nan left out": lambda: linen(with_nan(), skip_nonfinite=True),
    "Auto mesh": lambda: linen(batches(6, AxisType.Auto)),
    "sharded parameters": lambda: linen(watched(batches(6, AxisType.Auto)), sharded(variables_of())),
    "sharded parameters, consistent": lambda: linen(
        batches(6, AxisType.Auto), sharded(variables_of()), consistent=True
    ),
    "sharded parameters in calls": lambda: in_calls(
        jaxbn.linen, sharded(variables_of()), apply, lambda variables: variables["batch_stats"]
    ),
    "without the devices": agrees_without_devices,
    "nnx": lambda: in_nnx(batches(6)),
    "nnx, consistent": lambda: in_nnx(batches(6), consistent=True, estimator=jaxbn.mean_of_batches()),
    "nnx, sharded parameters": lambda: in_nnx(watched(batches(6, AxisType.Auto)), sharded_nnx()),
    "nnx, sharded parameters in calls": lambda: in_calls(
        jaxbn.nnx, sharded_nnx(), None, lambda model: nnx.state(model, nnx.BatchStat)
    ),
    "plain functions, sharded parameters": in_plain_jax,
    "diagnose": diagnosed,
    "diagnose, sharded parameters": lambda: diagnosed(sharded(variables_of()), AxisType.Auto),
    "nnx, diagnose": diagnosed_nnx,
    "steps": lambda: stepped(lambda state: state),
    "steps, sharded parameters": lambda: stepped(sharded),
}

# Errors in both processes, with the messages of process 0 and 1.
FAIL = {
    "none on one": (lambda p: linen([] if p else batches(3)), ["RuntimeError: .*have global batches.*none"] * 2),
    "fewer on one": (
        lambda p: linen(batches(6)[:3] if p else batches(6)),
        ["RuntimeError: Process 1 has 3 global batches and others have more"] * 2,
    ),
    "far fewer on one": (
        lambda p: linen((batches(30) if p else batches(30)[:22]), consistent=True),
        ["RuntimeError: Process 0 has 22 global batches and others have more"] * 2,
    ),
    "other shapes": (
        lambda p: linen(batches(3) if p else batches(3)[::-1]),
        ["RuntimeError: Batch 0 .*8, 3.*on process 0, and differs"] * 2,
    ),
    "global on one": (
        lambda p: linen(raw(3) if p else batches(3)),
        [r"RuntimeError: Processes \[0\] have global batches.*processes \[1\] have local batches"] * 2,
    ),
    "own after global": (
        lambda p: linen([*batches(3), *raw(1)]),
        ["ValueError: A batch of this process alone"] * 2,
    ),
    "own after global on one": (
        lambda p: linen([*batches(3), *(raw(2) if p else batches(2))]),
        ["RuntimeError: Process 1 failed: ValueError: A batch of", "ValueError: A batch of this process alone follows"],
    ),
    "global after own": (lambda p: linen([*raw(3), *batches(1)]), ["ValueError: A global batch, .*follows"] * 2),
    "global after own on one": (
        lambda p: linen([*raw(3), *(batches(1) if p else [])]),
        ["RuntimeError: Process 1 failed: ValueError: A global batch", "ValueError: A global batch, .*follows"],
    ),
    "both in one batch": (
        lambda p: linen([{"x": batch, "y": np.zeros(3)} for batch in batches(3)], call=lambda v, b: apply(v, b["x"])),
        ["ValueError: A batch holds global arrays.*and arrays of this process alone"] * 2,
    ),
    "one cannot read": (
        lambda p: linen(breaks_at(4, batches(6)) if p else batches(6)),
        ["RuntimeError: Process 1 failed: OSError: batch 4 cannot be read", "OSError: batch 4 cannot be read"],
    ),
    "one has params alone": (
        lambda p: jaxbn.linen.postproc(apply, {"params": {}} if p else variables_of(), batches(3)),
        ["RuntimeError: Process 1 failed: ValueError", "ValueError: There are no statistics"],
    ),
    "other models": (
        lambda p: linen(
            batches(3),
            {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}} if p else variables_of(),
            nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False).apply if p else apply,
        ),
        ["RuntimeError: The processes run different models"] * 2,
    ),
    "nan": (lambda p: linen(with_nan()), ["ValueError: Batch 1 .*not finite"] * 2),
    "a mesh": (lambda p: linen(batches(3), mesh=mesh()), ["ValueError: mesh= shards batches of a single process"] * 2),
    "a mesh of all": (lambda p: linen(raw(3), mesh=mesh()), ["ValueError: mesh= holds devices of other processes"] * 2),
    "diagnose, fewer on one": (
        lambda p: jaxbn.linen.diagnose(apply, variables_of(), batches(4)[: 3 + p]),
        ["RuntimeError: Process 0 has 3 global batches"] * 2,
    ),
    "diagnose, global on one": (
        lambda p: jaxbn.nnx.diagnose(NnxNet(nnx.Rngs(0)), raw(3) if p else batches(3)),
        ["RuntimeError: Processes .0. have global batches"] * 2,
    ),
    "diagnose, one has params alone": (
        lambda p: jaxbn.linen.diagnose(apply, {"params": {}} if p else variables_of(), batches(3)),
        ["RuntimeError: Process 1 failed: ValueError", "ValueError: There are no statistics"],
    ),
}
