"""Consistent statistics in stages, of many architectures, against float64 and against their definition."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import mesh

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.statistics import kept_values, stages

ROWS, WIDTH = 96, 6
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.0, use_fast_variance=False)  # stock Flax, of the last batch


@pytest.fixture(scope="module")
def data():
    """Rows that drift from the first to the last."""
    rng = np.random.default_rng(0)
    return (2 * rng.standard_normal((ROWS, WIDTH)) + np.linspace(-3, 3, ROWS)[:, None]).astype(np.float32)


def in_batches(x, size):
    return (x[start : start + size] for start in range(0, len(x), size))


class Chain(nn.Module):
    """Layers in sequence."""

    depth: int = 3
    train: bool = False

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.relu(BatchNorm(not self.train)(nn.Dense(WIDTH)(x)))
        return x


class Residual(nn.Module):
    """Two convolutional blocks, the second with a projection."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 2, 3, 1)
        for width in (2, 3):
            y = nn.relu(BatchNorm(not self.train)(nn.Conv(width, (2, 2))(x)))
            y = BatchNorm(not self.train)(nn.Conv(width, (2, 2))(y))
            x = x if x.shape == y.shape else BatchNorm(not self.train)(nn.Conv(width, (1, 1))(x))
            x = nn.relu(x + y)
        return x.mean((1, 2))


class Dense(nn.Module):
    """Each layer sees the outputs of all layers before."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        features = [x]
        for _ in range(3):
            features.append(nn.Dense(4)(nn.relu(BatchNorm(not self.train)(jnp.concatenate(features, -1)))))
        return features[-1]


class Body(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(BatchNorm(not self.train)(nn.Dense(WIDTH)(x))), None


class Scanned(nn.Module):
    """A loop over layers, with rematerialization, between two layers; the stack has the given axis."""

    axis: int = 0
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = BatchNorm(not self.train)(x)
        axes = {"params": 0, "batch_stats": self.axis}
        layers = nn.scan(nn.remat(Body), variable_axes=axes, split_rngs={"params": True}, length=3)(self.train)
        return BatchNorm(not self.train)(layers(x, None)[0])


class Ensemble(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        members = nn.vmap(Chain, variable_axes=axes, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=2)
        return members(2, self.train)(x)


NETS = {
    "chain": (Chain(), 3),
    "residual": (Residual(), 4),
    "dense": (Dense(), 3),
    "scanned": (Scanned(), 5),
    "scanned, last axis": (Scanned(1), 5),
    "ensemble": (Ensemble(), 2),
}


def all_as_one_batch(net, variables, x):
    """The statistics of stock Flax in float64, with all rows as one batch."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.float64(leaf)), variables)
        _, new = net.clone(train=True).apply(wide, jnp.asarray(np.float64(x)), mutable=["batch_stats"])
    return new["batch_stats"]


def largest_difference(found, exact):
    """The largest difference of a mean in standard deviations, and of a variance relative."""
    exact = dict(jax.tree.leaves_with_path(exact))
    differences = []
    for path, leaf in jax.tree.leaves_with_path(found):
        var = np.asarray(exact[*path[:-1], jax.tree_util.DictKey("var")])
        scale = np.sqrt(var) if path[-1].key == "mean" else var
        differences.append(np.max(np.abs(np.asarray(leaf) - np.asarray(exact[path])) / scale))
    return max(differences)


def distance_from_fixed_point(call, variables, x):
    """How far the statistics are from those of the inputs that the layers see in evaluation, the definition."""
    _, moments = jaxbn.linen.capture_moments(call, mode="eval")(variables, x)
    installed = jaxbn.linen.install_moments(variables, moments)
    return largest_difference(variables["batch_stats"], installed["batch_stats"])


def of_module(net, x):
    return lambda variables, batch: net.apply(variables, batch), net.init(jax.random.key(0), x[:2])


@pytest.mark.parametrize(
    "name", [name if name in ("residual", "scanned") else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
)
def test_statistics_are_those_of_all_rows_as_one_batch(name, data):
    net, depth = NETS[name]
    call, variables = of_module(net, data)
    new, report = jaxbn.linen.postproc(call, variables, in_batches(data, 36), consistent=True)
    assert (report.stages, report.sweeps, report.batches) == (depth, 1, 3)
    exact = all_as_one_batch(net, variables, data)
    assert largest_difference(new["batch_stats"], exact) < 2e-6
    once, _ = jaxbn.linen.postproc(call, variables, in_batches(data, 36))
    assert largest_difference(once["batch_stats"], exact) > 0.05


@pytest.mark.slow
def test_thirty_layers_in_small_batches(data):
    """Sweeps overflowed here: each layer saw inputs that were normalized with statistics of others."""
    net = Chain(30)
    call, variables = of_module(net, data)
    exact = all_as_one_batch(net, variables, data)
    for size in (8, 64):
        new, report = jaxbn.linen.postproc(call, variables, in_batches(data, size), consistent=True)
        assert report.stages == 30
        assert largest_difference(new["batch_stats"], exact) < 1e-4


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm, dense = BatchNorm(True), nn.Dense(WIDTH)
        for _ in range(3):
            x = norm(x) + 0.3 * jnp.tanh(dense(x))
        return BatchNorm(True)(nn.Dense(WIDTH)(x))


class Siamese(nn.Module):
    @nn.compact
    def __call__(self, x):
        branch = Chain(2)
        return BatchNorm(True)(nn.Dense(WIDTH)(branch(x) - branch(x[:, ::-1])))


@pytest.mark.parametrize(
    "net, stages, sweeps",
    [
        pytest.param(Siamese(), 3, 1, id="siamese"),
        pytest.param(Recurrent(), 2, 20, id="recurrent", marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_called_several_times(net, stages, sweeps, data):
    """Calls that do not depend on each other are one stage; a layer that sees its own output is swept."""
    call, variables = of_module(net, data)
    new, report = jaxbn.linen.postproc(call, variables, in_batches(data, 36), consistent=True)
    assert report.stages == stages
    assert report.sweeps == 1 if sweeps == 1 else 2 < report.sweeps < sweeps
    assert distance_from_fixed_point(call, new, data) < 2e-5


CHAIN = Chain()
OVER = mesh()


def indexed(variables, x):
    for i in range(2):
        x = CHAIN.apply(jax.tree.map(operator.itemgetter(i), variables), x)
    return x


CALLS = {
    "jit": (jax.jit(CHAIN.apply), 3),
    "checkpoint": (jax.checkpoint(CHAIN.apply), 3),
    "slices": (indexed, 6),
    "cond": (lambda v, x: lax.cond(x[0, 0] < 1e9, lambda x: CHAIN.apply(v, x), lambda x: x, x), 1),
    "map": (lambda v, x: lax.map(functools.partial(CHAIN.apply, v), x.reshape(2, -1, WIDTH)), 1),
    "shard_map": (
        lambda v, x: jax.shard_map(CHAIN.apply, mesh=OVER, in_specs=(P(), P("devices")), out_specs=P("devices"))(v, x),
        1,
    ),
    "while": (
        lambda v, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, CHAIN.apply(v, c[1])), (0, x))[1],
        1,
    ),
}


@pytest.mark.parametrize("name", [n if n == "while" else pytest.param(n, marks=pytest.mark.slow) for n in CALLS])
def test_layers_inside_transformations(name, data):
    """Calls are inlined, and so are slices of stacked statistics; inside loops and branches layers are swept."""
    call, expected = CALLS[name]
    variables = CHAIN.init(jax.random.key(0), data[:2])
    if name == "slices":
        variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), variables, CHAIN.init(jax.random.key(1), data[:2]))
    new, report = jaxbn.linen.postproc(call, variables, in_batches(data, 48), consistent=True)
    assert report.stages == expected
    assert report.sweeps == (1 if expected > 1 else 4)  # as many as layers, and one that changes nothing
    assert distance_from_fixed_point(call, new, data) < 2e-6
    if expected == 1:
        assert report.change == 0
        assert {change.way[:2] for change in report.layers.values()} == {(1, 4)}
        assert "'BatchNorm_0', 'BatchNorm_1', 'BatchNorm_2' in 4 sweeps, the last" in str(report).replace("\n", " ")


def test_the_number_of_sweeps_can_be_limited(data):
    call, variables = CALLS["while"][0], CHAIN.init(jax.random.key(0), data[:2])
    _, report = jaxbn.linen.postproc(call, variables, in_batches(data, 48), consistent=True, max_sweeps=2)
    assert report.sweeps == 2
    first, second, _ = (report.layers[path].way.last_change for path in report.layers)
    assert first == 0 < second <= report.change
    _, report = jaxbn.linen.postproc(call, variables, in_batches(data, 48), consistent=True, max_sweeps=1)
    assert (report.sweeps, report.change) == (1, None)


def test_values_wait_in_host_memory_beyond_the_budget(data, monkeypatch):
    """Same bits, with at most the budget in use by all batches that wait."""
    net = Residual()
    call, variables = of_module(net, data)
    batches, held = [*in_batches(data, 24)], []
    expected, _ = jaxbn.linen.postproc(call, variables, batches, consistent=True)
    keep = kept_values.KeptValues.keep

    def watched(self, values):
        kept = keep(self, values)
        held.append((sum(item.kept.size for item in alive[0].items), kept.places is not None))
        return kept

    alive, init = [], stages.Stages.__init__
    monkeypatch.setattr(stages.Stages, "__init__", lambda self, *args: (alive.append(self), init(self, *args))[1])
    monkeypatch.setattr(kept_values.KeptValues, "keep", watched)
    budget = 3000
    found, _ = jaxbn.linen.postproc(call, variables, batches, consistent=True, memory=budget)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert max(size for size, _ in held) <= budget
    assert {moved for _, moved in held} == {False, True}


@pytest.mark.slow
def test_a_device_without_pinned_memory(data, monkeypatch):
    monkeypatch.setattr(kept_values, "_PINNED", "none")
    call, variables = of_module(Residual(), data)
    found = [
        jaxbn.linen.postproc(call, variables, in_batches(data, 24), consistent=True, memory=memory)[0]
        for memory in (None, 0)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_batch_that_is_not_finite_leaves_all_later_stages(data):
    call, variables = of_module(CHAIN, data)
    bad = np.full((4, WIDTH), np.nan, np.float32)
    with pytest.raises(
        ValueError, match=r"Batch 1 \(counted from 0\) gave statistics that are not finite, first in 'Batch"
    ):
        jaxbn.linen.postproc(call, variables, [data, bad], consistent=True)
    found, report = jaxbn.linen.postproc(call, variables, [bad, data], consistent=True, skip_nonfinite=True)
    assert (report.skipped, report.batches, report.layers["BatchNorm_2"].batches) == (1, 2, 1)
    assert largest_difference(found["batch_stats"], all_as_one_batch(CHAIN, variables, data)) < 2e-6


def test_frozen_layers_and_layers_that_are_not_reached(data):
    net = Chain(3)
    _, variables = of_module(net, data)
    call = jaxbn.linen.freeze_layers(Chain(2).apply, "BatchNorm_0")
    new, report = jaxbn.linen.postproc(call, variables, in_batches(data, 40), consistent=True)
    assert (report.stages, report.not_reached) == (1, ("BatchNorm_0", "BatchNorm_2"))
    assert report.layers["BatchNorm_0"].way is None
    assert new["batch_stats"]["BatchNorm_0"]["mean"] is variables["batch_stats"]["BatchNorm_0"]["mean"]
    _, moments = jaxbn.linen.capture_moments(call, mode="eval")(variables, data)
    np.testing.assert_allclose(new["batch_stats"]["BatchNorm_1"]["var"], moments["BatchNorm_1"].var, rtol=1e-5)


def test_batches_that_reach_different_layers(data):
    """Later batches may reach further layers, in a stage of their own; but not the same layers in another order."""

    class Heads(nn.Module):
        @nn.compact
        def __call__(self, batch):
            first, second, both = (BatchNorm(True, name=name) for name in ("first", "second", "both"))
            if "swapped" in batch:
                return first(second(batch["x"]))
            if "alone" in batch:
                return BatchNorm(True, name="other")(batch["x"])
            y = first(batch["x"])
            return both(second(y)) if "more" in batch else second(y)

    net = Heads()
    variables, more = (net.init(jax.random.key(0), {"x": data[:2], name: 0}) for name in ("more", "alone"))
    variables = {kind: variables[kind] | more[kind] for kind in variables}
    call = lambda variables, batch: net.apply(variables, batch)
    batches = [{"x": data[:40]}, {"x": data[40:], "more": 0}, {"x": data[:7], "alone": 0}]
    new, report = jaxbn.linen.postproc(call, variables, batches, consistent=True)
    assert report.stages == 3
    counts = {path: change.count for path, change in report.layers.items()}
    assert counts == {"first": 96, "second": 96, "both": 56, "other": 7}
    np.testing.assert_allclose(new["batch_stats"]["other"]["mean"], data[:7].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["first"]["mean"], data.mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Batches of different shapes or structures reach '.*' after other layers"):
        jaxbn.linen.postproc(call, variables, [{"x": data}, {"x": data, "swapped": 0}], consistent=True)


def test_programs_are_compiled_once_for_a_shape(data):
    call, variables = of_module(CHAIN, data)
    traces = []

    def counted(variables, x):
        traces.append(x.shape)
        return call(variables, x)

    for _ in range(2):
        jaxbn.linen.postproc(counted, variables, in_batches(data, 36), consistent=True)
    assert traces == [(36, WIDTH), (24, WIDTH)]


@pytest.mark.slow
def test_arrays_of_the_batch_may_be_deleted_after_they_were_read(data):
    """Values of the batch itself that later stages use are copies."""
    net = Dense()  # its last layer uses the batch
    call, variables = of_module(net, data)

    def batches():
        for rows in in_batches(data, 32):
            batch = jnp.array(rows)
            yield batch
            jax.block_until_ready(batch)
            batch.delete()

    found, _ = jaxbn.linen.postproc(call, variables, batches(), consistent=True)
    assert largest_difference(found["batch_stats"], all_as_one_batch(net, variables, data)) < 2e-6


@pytest.mark.slow
def test_nnx_loops_over_layers(data):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.map, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.norm(self.map(x)))

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Layer(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def loop(layer, x):
        return layer(x)

    model = make(nnx.Rngs(0))
    model.eval()
    new, report = jaxbn.nnx.postproc(model, in_batches(data, 40), call=lambda model, x: loop(model, x), consistent=True)
    assert report.stages == 3
    x = np.float64(data)
    for i in range(3):
        z = x @ np.float64(model.map.kernel[i]) + np.float64(model.map.bias[i])
        np.testing.assert_allclose(new.norm.mean[i], z.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new.norm.var[i], z.var(0), rtol=1e-5)
        x = x + np.tanh((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5))


def test_plain_functions_and_methods_with_further_statistics(data):
    """moving_average_batch_norm evaluates with E[x^2], and renormalization has a counter."""
    methods = [jaxbn.batch_renorm(), jaxbn.moving_average_batch_norm(), jaxbn.batch_norm()]
    started = [method.init(WIDTH) for method in methods]

    def call(states, x):
        for method, (params, _), state in zip(methods, started, states, strict=True):
            x = method.eval(params, state, jnp.tanh(x) * 3 + x)
        return x

    states = [state for _, state in started]
    new, report = jaxbn.postproc(call, states, in_batches(data, 40), consistent=True)
    assert report.stages == 3
    _, moments = jaxbn.capture_moments(call, mode="eval")(new, data)
    for state, expected in zip(new, jaxbn.install_moments(new, moments), strict=True):
        np.testing.assert_allclose(state.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(state.var, expected.var, rtol=1e-5)
