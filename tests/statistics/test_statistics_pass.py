"""The statistics pass in both frameworks, against float64: consistent sweeps, weights, skipped batches, devices."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh
from nets import LAYERS, LINEN, NNX, assert_same_statistics, every_framework, pooled_in_float64, statistics_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROWS = 420


@pytest.fixture(scope="module")
def data():
    """Rows of three features, far from mean 0 and variance 1, drifting from the first to the last."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((ROWS, 3)) * 2 + np.linspace(-3, 3, ROWS)[:, None]).astype(np.float32)


class Model:
    """A network in one framework with its values, and the pass over it."""

    def __init__(self, framework, layer="ours"):
        self.framework, net = framework, framework.net(getattr(framework, layer))
        if framework is LINEN:
            self.values = net.init(jax.random.key(0), np.zeros((2, 3), np.float32), False)
            self.call = lambda variables, x: net.apply(variables, x, False)
            self.params = self.values["params"]
        else:
            self.values, self.call = net, None
            self.params = nnx.to_pure_dict(nnx.state(net, nnx.Param))

    def postproc(self, batches, **options):
        """Statistics, and the report."""
        if self.framework is LINEN:
            values, report = jaxbn.linen.postproc(self.call, self.values, batches, **options)
        else:
            values, report = jaxbn.nnx.postproc(self.values, batches, **options)
        return statistics_of(values), report


def in_batches(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


@pytest.mark.sample(every=2)
@every_framework
@pytest.mark.parametrize("layer", ["stock", pytest.param("ours", marks=pytest.mark.slow)])
def test_consistent_statistics_are_those_of_all_data_whatever_the_batches(framework, layer, data, rng):
    model = Model(framework, layer)
    exact = pooled_in_float64(model.params, [data])
    shuffled = data[rng.permutation(ROWS)]
    arrangements = [in_batches(data, 7), in_batches(shuffled, 200), [data]]
    found = [model.postproc(batches, consistent=True) for batches in arrangements]
    for statistics, report in found:
        assert_same_statistics(statistics, exact, 1e-5)
        assert_same_statistics(statistics, found[0][0], 1e-5)
        assert (report.stages, report.sweeps, report.change) == (len(LAYERS), 1, None)
    once, _ = model.postproc(in_batches(data, 7))  # deep layers are off, which is what the stages are for
    with pytest.raises(AssertionError):
        assert_same_statistics(once, exact, 0.01)


@pytest.mark.slow
@every_framework
def test_one_pass_with_everything_as_the_batch_is_the_same_at_once(framework, data):
    model = Model(framework)
    swept, _ = model.postproc(in_batches(data, 200), consistent=True)
    assert_same_statistics(model.postproc([data])[0], swept, 1e-5)
    assert_same_statistics(model.postproc([data], mesh=mesh())[0], swept, 1e-5)


@pytest.mark.slow
@every_framework
def test_other_estimators_in_stages(framework, data):
    model = Model(framework)
    statistics, report = model.postproc(in_batches(data, 200), consistent=True, estimator=jaxbn.mean_of_batches())
    assert report.stages == len(LAYERS)
    x = data.astype(np.float64) @ np.float64(model.params["map_0"]["kernel"]) + np.float64(
        model.params["map_0"]["bias"]
    )
    variances = [part.var(0, ddof=1) for part in in_batches(x, 200)]
    np.testing.assert_allclose(statistics["norm_0"]["var"], np.mean(variances, 0), rtol=1e-5)


@pytest.mark.slow
def test_a_layer_downstream_of_itself_is_swept_until_it_settles(data):
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm, dense = nn.BatchNorm(use_running_average=True), nn.Dense(3)
            for _ in range(3):
                x = norm(x) + 0.3 * jnp.tanh(dense(x))
            return x

    net = Loop()
    variables = net.init(jax.random.key(0), data[:2])
    found = [
        jaxbn.linen.postproc(net.apply, variables, in_batches(data, size), consistent=True, max_sweeps=60)
        for size in (7, 200)
    ]
    assert all(report.change <= 1e-5 and 2 < report.sweeps < 60 for _, report in found)
    first, second = (new["batch_stats"]["BatchNorm_0"] for new, _ in found)
    np.testing.assert_allclose(first["var"], second["var"], rtol=1e-4)


@every_framework
def test_each_batch_is_read_once(framework, data):
    model, read = Model(framework), []

    def batches():
        for batch in in_batches(data, 200):
            read.append(len(batch))
            yield batch

    found, report = model.postproc(batches(), consistent=True)
    assert read == [200, 200, 20] and report.batches == 3
    assert_same_statistics(found, model.postproc(batches, consistent=True)[0], 1e-7)
    assert_same_statistics(model.postproc(batches)[0], model.postproc(batches())[0], 1e-7)


@pytest.mark.parametrize("options", [{"max_sweeps": 3}, {"memory": 0}])
def test_options_of_consistent_statistics_are_not_ignored(options, data):
    with pytest.raises(ValueError, match="memory= and max_sweeps= are options of consistent statistics"):
        Model(LINEN).postproc([data], **options)


@every_framework
@pytest.mark.parametrize(
    "options", [{"max_sweeps": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}, {"memory": -1}]
)
def test_sweeps_that_make_no_sense_are_refused(framework, options, data):
    with pytest.raises(ValueError, match="must be positive, and tolerance=|memory=-1 is a number of bytes"):
        Model(framework).postproc([data], consistent=True, **options)


# Weights of examples.


def weight_of(batch):
    """0 for what fills the batch up, which is NaN."""
    return ~jnp.isnan(batch).any(1)


def filled(batches, size):
    return [np.concatenate([b, np.full((size - len(b), b.shape[1]), np.nan, np.float32)]) for b in batches]


@pytest.mark.sample(every=4)
@every_framework
@pytest.mark.parametrize("consistent, devices", [(False, None), (True, mesh())], ids=["once", "consistent, 8 devices"])
def test_examples_of_weight_0_are_as_if_they_were_not_there(framework, consistent, devices, data):
    """One batch is full, one is half padding, one is all padding."""
    model, parts = Model(framework, "stock"), [data[:16], data[400:408], data[:0]]
    found, report = model.postproc(filled(parts, 16), weights=weight_of, consistent=consistent, mesh=devices)
    exact = pooled_in_float64(model.params, [np.concatenate(parts)] if consistent else parts[:2])
    assert_same_statistics(found, exact, 1e-5)
    assert {change.count for change in report.layers.values()} == {24.0}
    assert (report.batches, report.skipped) == (3, 0)


@pytest.mark.sample(every=2)
@every_framework
def test_real_weights_repeat_examples(framework, data):
    model, counts = Model(framework), np.arange(20) % 4
    repeated = model.postproc([np.repeat(data[:20], counts, axis=0)])[0]
    weighted = model.postproc([data[:20]], weights=lambda x: jnp.asarray(counts, jnp.float32))[0]
    assert_same_statistics(weighted, repeated, 1e-5)


@every_framework
def test_weights_that_do_not_fit_are_refused(framework, data):
    model = Model(framework)
    with pytest.raises(ValueError, match=r"weights for 8 examples, but the input of 'norm_0' is \(16, 4\)"):
        model.postproc([data[:16]], weights=lambda x: jnp.ones(8))
    with pytest.raises(ValueError, match=r"one real number for each example, \[N\]"):
        model.postproc([data[:16]], weights=lambda x: jnp.ones((16, 1)))


def test_weights_do_not_count_features(data):
    net = nn.BatchNorm(use_running_average=True, axis=0)
    variables = net.init(jax.random.key(0), data[:4])
    with pytest.raises(ValueError, match="its leading axis does not hold them"):
        jaxbn.linen.postproc(net.apply, variables, [data[:4]], weights=lambda x: jnp.ones(4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))) + x, None


LIFTS = {
    "scan": nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    ),
    "scan of remat": nn.scan(
        nn.remat(Block), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    ),
    "jit": nn.jit(Block),
    "vmap": nn.vmap(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    ),
}  # fmt: skip


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("lift", LIFTS)
def test_weights_reach_layers_inside_transformations(lift, data):
    net = LIFTS[lift]()
    call = lambda variables, x: net.apply(variables, x, None)[0]
    variables = net.init(jax.random.key(0), data[:4], None)
    whole, _ = jaxbn.linen.postproc(call, variables, [data[:24]])
    padded, report = jaxbn.linen.postproc(call, variables, filled([data[:24]], 32), weights=weight_of)
    for found, expected in zip(*map(jax.tree.leaves, (padded["batch_stats"], whole["batch_stats"])), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert {change.count for change in report.layers.values()} == {24.0}


def test_weights_multiply_a_mask_of_the_model(data):
    net = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = net.init(jax.random.key(0), data[:4])
    call = lambda v, x: net.apply(v, x, mask=jnp.arange(16)[:, None] < 12)
    new, _ = jaxbn.linen.postproc(call, variables, [data[:16]], weights=lambda x: jnp.arange(16) >= 8)
    np.testing.assert_allclose(new["batch_stats"]["mean"], data[8:12].mean(0), rtol=1e-5)


@every_framework
def test_the_weights_do_not_leak_into_the_result_of_the_call(framework, data):
    if framework is LINEN:
        net = nn.BatchNorm(use_running_average=False)
        variables = net.init(jax.random.key(0), data[:4])
        call = lambda v, x: net.apply(v, x, mutable=["batch_stats"])
        capture = jaxbn.linen.capture_moments(call, mode="as_called", weights=lambda x: jnp.ones(4))
        (_, updates), _ = capture(variables, data[:4])
        assert set(updates["batch_stats"]) == {"mean", "var"}
    else:
        model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        capture = jaxbn.nnx.capture_moments(lambda m, x: (m(x), m), weights=lambda x: jnp.ones(4))
        (_, returned), _ = capture(model, data[:4])
        assert nnx.graphdef(returned) == nnx.graphdef(model)


# Batches that are not finite.


@every_framework
def test_batches_that_are_not_finite_are_skipped_and_counted(framework, data):
    model, batches = Model(framework), in_batches(data[:60].copy(), 20)
    clean, _ = model.postproc([batches[0], batches[2]])
    batches[1][7, 1] = np.inf
    with pytest.raises(ValueError, match=r"Batch 1 \(counted from 0\).* first in 'norm_0'.*skip_nonfinite=True"):
        model.postproc(batches)
    found, report = model.postproc(batches, skip_nonfinite=True)
    assert_same_statistics(found, clean, 1e-6)
    assert (report.batches, report.skipped) == (3, 1)
    assert "3 batches, 1 of which were not finite and left out" in str(report)
    with pytest.raises(ValueError, match="Batch 0"):  # no batch would be left
        model.postproc([batches[1]], skip_nonfinite=True)


def test_the_layer_is_named_in_which_it_appeared_first(data):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="z_first")(x)
            x = x / jnp.where(x[:1, :1] > 1e6, 1, 0)
            return nn.BatchNorm(use_running_average=True, name="a_last")(nn.BatchNorm(True, name="m_middle")(x))

    net = Net()
    variables = net.init(jax.random.key(0), data[:4])
    with pytest.raises(ValueError, match="first in 'm_middle'"):
        jaxbn.linen.postproc(net.apply, variables, [data[:4]])


# Devices.


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("framework, consistent", [(NNX, False), (LINEN, True)], ids=["nnx", "linen, consistent"])
def test_on_a_mesh_as_on_one_device(framework, consistent, data):
    """The last batch does not divide, and is whole on each device."""
    model, batches = Model(framework), in_batches(data[:389], 128)
    single, _ = model.postproc(batches, consistent=consistent)
    spread, report = model.postproc(batches, consistent=consistent, mesh=mesh())
    assert_same_statistics(spread, single, 1e-5)
    assert report.layers["norm_0"].count == 389
    assert len(batches[-1]) == 5


@pytest.mark.sample(every=2)
@every_framework
def test_batches_that_are_sharded_already_compile_once(framework, data):
    model, on, traces = Model(framework), mesh(), []
    spread = [jax.device_put(batch, NamedSharding(on, P("devices"))) for batch in in_batches(data[:256], 64)]

    def call(values, x):
        traces.append(x.shape)
        return values(x) if model.call is None else model.call(values, x)

    if framework is LINEN:
        new, _ = jaxbn.linen.postproc(call, jax.device_put(model.values, NamedSharding(on, P())), spread)
    else:
        values = nnx.clone(model.values)
        nnx.update(values, jax.device_put(nnx.state(values), NamedSharding(on, P())))
        new, _ = jaxbn.nnx.postproc(values, spread, call=call)
    assert len(traces) == 2  # for the shapes of the moments, and for the program
    assert_same_statistics(statistics_of(new), model.postproc(in_batches(data[:256], 64))[0], 1e-5)


@pytest.mark.slow
def test_parameters_may_be_sharded(data):
    """As in fully sharded data parallelism: kernels are spread over the same devices as the batch."""
    net = nn.Sequential([nn.Dense(16), nn.BatchNorm(True), nn.relu, nn.Dense(8), jaxbn.linen.BatchNorm(True)])
    variables = net.init(jax.random.key(0), data[:4])
    on = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))

    def shard(leaf):
        return jax.device_put(leaf, NamedSharding(on, P(*[None] * (leaf.ndim - 1), "devices")))

    sharded, batches = jax.tree.map(shard, variables), in_batches(data[:256], 128)
    single, _ = jaxbn.linen.postproc(net.apply, variables, batches, consistent=True)
    new, _ = jaxbn.linen.postproc(net.apply, sharded, batches, consistent=True, mesh=on)
    for found, expected in zip(*map(jax.tree.leaves, (new["batch_stats"], single["batch_stats"])), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert new["params"]["layers_0"]["kernel"].sharding == sharded["params"]["layers_0"]["kernel"].sharding


# Interruption.


@every_framework
def test_an_interrupted_pass_goes_on_with_identical_bits(framework, data, tmp_path):
    steps = framework.steps(framework.net(), estimator=jaxbn.pooled())
    batches = [{"x": x, "y": x[:, 0]} for x in in_batches(data[:128], 32)]
    state = steps.init(jax.random.key(0), batches[0])
    step = jax.jit(steps.postproc_step)

    def run(acc, batches):
        for batch in batches:
            acc = step(state, acc, batch)
        return acc

    expected = run(steps.start(state, batches[0]), batches)
    for cut in (0, 1, 3):
        np.savez(tmp_path / "acc.npz", *jax.tree.leaves(run(steps.start(state, batches[0]), batches[:cut])))
        saved = np.load(tmp_path / "acc.npz")
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
        acc = jax.tree.unflatten(jax.tree.structure(steps.start(state, batches[0])), leaves)
        resumed = run(acc, itertools.islice(batches, int(acc.batches), None))
        jax.tree.map(np.testing.assert_array_equal, resumed, expected)
