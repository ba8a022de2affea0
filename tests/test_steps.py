"""`make_steps` in linen and NNX: train, postproc and eval as pure functions, on one device and on eight.

The oracles are the formulas in float64, and loops that were written by hand with Flax alone.
"""

import copy
import functools
import inspect

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, NAMED, gathered, mesh, run, shards, spread
from nets import (
    LAYERS,
    LINEN,
    MOMENTUM,
    NNX,
    OPTIMIZER,
    assert_same_statistics,
    every_framework,
    forward,
    in_float64,
    make_batches,
    params_of,
    pooled_in_float64,
    squared_error,
    statistics_of,
    trained_in_float64,
)

import jaxbn
import jaxbn.linen
import jaxbn.nnx

KEY = jax.random.key(0)
every_norm = pytest.mark.parametrize("kind", ["ours", "stock"])


def train(steps, state, batches, **arguments):
    step = jax.jit(steps.train_step)
    for batch in batches:
        state, _ = step(state, batch, **arguments)
    return state


def estimate(steps, state, batches):
    step, acc = jax.jit(steps.postproc_step), steps.start(state, batches[0])
    for batch in batches:
        acc = step(state, acc, batch)
    return acc


def trained(framework, kind="ours", *, convs=0, momentum=MOMENTUM):
    """(steps, batches, state, accumulator) after some steps and a pass on one device."""
    return _trained(framework, kind, convs, momentum)


@functools.cache
def _trained(framework, kind, convs, momentum):
    steps = framework.steps(framework.net(getattr(framework, kind), convs=convs, momentum=momentum))
    batches = make_batches(4, image=(4, 4) if convs else ())
    state = train(steps, steps.init(KEY, batches[0]), batches)
    return steps, batches, state, estimate(steps, state, batches)


# --- Right ----------------------------------------------------------------------------------------------------------


@every_framework
def test_the_cycle_follows_the_formula(framework):
    steps, batches, state, acc = trained(framework)
    start = params_of(steps.init(KEY, batches[0]))
    params, averages = trained_in_float64(start, batches)
    chex.assert_trees_all_close(params_of(state), params, rtol=0, atol=1e-6)
    population = pooled_in_float64(params, [batch["x"] for batch in batches])
    for (frozen, _), expected in [(steps.finalize(state), averages), (steps.finalize(state, acc), population)]:
        assert_same_statistics(statistics_of(frozen), expected, 2e-6)
        outputs, _ = in_float64(forward)(params, batches[0]["x"], expected)
        np.testing.assert_allclose(steps.eval_step(frozen, batches[0]), outputs, rtol=0, atol=5e-6)


def hand_written_linen(net, batches):
    variables = net.init(KEY, batches[0]["x"], train=True)
    state = train_state.TrainState.create(apply_fn=net.apply, params=variables["params"], tx=OPTIMIZER)

    @jax.jit
    def step(state, batch_stats, batch):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            outputs, updates = net.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
            return squared_error(outputs, batch)[0], updates["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), batch_stats, loss

    batch_stats = variables["batch_stats"]
    for batch in batches:
        state, batch_stats, _ = step(state, batch_stats, batch)
    return state.params, batch_stats


def hand_written_nnx(net, batches):
    optimizer = nnx.Optimizer(net, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, batch):
        loss, grads = nnx.value_and_grad(lambda net: squared_error(net(batch["x"]), batch)[0])(net)
        optimizer.update(net, grads)
        return loss

    for batch in batches:
        step(net, optimizer, batch)
    return nnx.to_pure_dict(nnx.state(net, nnx.Param)), statistics_of(net)


@pytest.mark.sample(every=3)
@every_framework
@every_norm
def test_a_loop_written_by_hand_gives_the_same(framework, kind):
    """The same operations, though another program may round them otherwise."""
    _, batches, state, _ = trained(framework, kind, convs=1)
    by_hand = hand_written_linen if framework is LINEN else hand_written_nnx
    expected = by_hand(framework.net(getattr(framework, kind), convs=1), batches)
    chex.assert_trees_all_close((params_of(state), statistics_of(state)), expected, rtol=1e-5, atol=1e-5)


def rows_first(batches):
    """Batches as one array; rows are sharded along its first axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays, 1), *batches)


@pytest.mark.sample(every=3)
@every_framework
@pytest.mark.parametrize(
    "kind, way",
    [("ours", "jit"), ("ours", "shard_map")]
    + [pytest.param("ours", way, marks=pytest.mark.slow) for way in ("jit explicit", "shard_map unchecked", "pmap")]
    + [pytest.param("stock", way, marks=pytest.mark.slow) for way in ("jit", "shard_map", "pmap")],
)
def test_eight_devices_give_what_one_gives(framework, kind, way):
    """Sums in another order differ in the last digits, and a few steps of training make 1e-6 of that."""
    steps, batches, state, acc = trained(framework, kind, convs=1)
    axis_name = AXIS if way in NAMED else None
    spread_steps = framework.steps(
        framework.net(getattr(framework, kind), convs=1, axis_name=axis_name), axis_name=axis_name
    )

    def cycle(state, batches):
        batches = jax.tree.map(lambda a: a.swapaxes(0, 1), batches)
        state, metrics = jax.lax.scan(spread_steps.train_step, state, batches)
        acc = spread_steps.start(state, jax.tree.map(lambda a: a[0], batches))
        acc, _ = jax.lax.scan(lambda acc, batch: (spread_steps.postproc_step(state, acc, batch), None), acc, batches)
        return (state, acc, metrics), ()

    start = spread_steps.init(KEY, batches[0])
    (found, found_acc, metrics), _ = run(way, cycle, start, rows_first(batches))
    assert found.step == 4
    chex.assert_trees_all_close(params_of(found), params_of(state), rtol=0, atol=1e-5)
    assert_same_statistics(statistics_of(found), statistics_of(state))
    _, expected = jax.jit(steps.train_step)(steps.init(KEY, batches[0]), batches[0])
    chex.assert_trees_all_close(jax.tree.map(lambda m: m[0], metrics), expected, rtol=1e-5)

    for mine, theirs in [((), ()), ((acc,), (found_acc,))]:  # Method ONE, Method TWO
        frozen, _ = steps.finalize(state, *mine)
        found_frozen, _ = spread_steps.finalize(found, *theirs)
        assert found_frozen.info == frozen.info
        assert_same_statistics(statistics_of(found_frozen), statistics_of(frozen))
    evaluate = lambda frozen, batch: ((), spread_steps.eval_step(frozen, batch))
    _, outputs = run(way, evaluate, found_frozen, batches[0])
    np.testing.assert_allclose(outputs, steps.eval_step(frozen, batches[0]), rtol=0, atol=2e-5)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("framework, way", [(LINEN, "pmap"), (NNX, "shard_map")], ids=["linen pmap", "nnx shard_map"])
def test_state_and_accumulator_stay_on_the_devices_from_call_to_call(framework, way):
    """The steps mapped one by one, as in a loop, with the state and the accumulator donated."""
    one_device, batches, state, acc = trained(framework)
    steps = framework.steps(framework.net(axis_name=AXIS), axis_name=AXIS)

    def mapped(function, **options):
        """The last argument is spread."""
        if way == "pmap":
            return jax.pmap(function, axis_name=AXIS, **options)
        specs = (P(),) * (len(inspect.signature(function).parameters) - 1) + (P(AXIS),)
        return jax.jit(jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=P()), **options)

    found, spread_out = steps.init(KEY, batches[0]), batches
    if way == "pmap":
        found = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), found)
        spread_out = jax.tree.map(shards, batches)
    train_step = mapped(lambda state, batch: steps.train_step(state, batch), donate_argnums=0)
    postproc_step = mapped(steps.postproc_step, donate_argnums=1)
    found_acc = mapped(steps.start)(found, spread_out[0])
    for batch in spread_out:
        given, (found, _) = found, train_step(found, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for batch in spread_out:
        given, found_acc = found_acc, postproc_step(found, found_acc, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    if way == "pmap":
        found, found_acc = jax.tree.map(lambda leaf: leaf[0], (found, found_acc))
    assert_same_statistics(statistics_of(found), statistics_of(state))
    expected, _ = one_device.finalize(state, acc)
    assert_same_statistics(statistics_of(steps.finalize(found, found_acc)[0]), statistics_of(expected))


# --- Pure -----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=2)
@every_framework
def test_donated_state_is_deleted_and_frozen_networks_stay_valid(framework):
    steps, batches, *_ = trained(framework)
    train_step = jax.jit(steps.train_step, donate_argnums=0)
    postproc_step = jax.jit(steps.postproc_step, donate_argnums=1)
    state, _ = train_step(steps.init(KEY, batches[0]), batches[0])
    empty = steps.start(state, batches[0])
    acc = postproc_step(state, empty, batches[0])
    frozen, (pooled, report) = steps.finalize(state)[0], steps.finalize(state, acc)
    before = jax.tree.map(np.array, (frozen, pooled))
    changes = copy.deepcopy(report)
    _ = train_step(state, batches[1])
    _ = postproc_step(steps.init(KEY, batches[0]), acc, batches[1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state, empty, acc)))
    chex.assert_trees_all_equal((frozen, pooled), before)
    chex.assert_trees_all_equal(vars(report.layers["norm_0"]), vars(changes.layers["norm_0"]))
    assert np.isfinite(steps.eval_step(frozen, batches[0])).all()


def test_the_nnx_model_is_left_untouched():
    net = NNX.net(rate=0.5)
    net.seen = nnx.Intermediate(jnp.ones(2))  # of a call before, which the steps do without
    values = lambda: jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngKey))))
    graph, before, key = nnx.graphdef(net), values(), jax.random.key_data(net.dropout.rngs.key[...])
    steps, batches = NNX.steps(net), make_batches(1)
    train_step = jax.jit(steps.train_step, donate_argnums=0)
    for rng in (KEY, None):
        state, _ = train_step(steps.init(rng, batches[0]), batches[0])
        steps.start(state, batches[0])
        steps.eval_step(steps.finalize(state)[0], batches[0])
    assert nnx.graphdef(net) == graph
    chex.assert_trees_all_equal(values(), before, strict=True)
    np.testing.assert_array_equal(jax.random.key_data(net.dropout.rngs.key[...]), key)


@every_framework
def test_one_trace_serves_many_steps(framework):
    """Of states made one after the other, too, and of networks that were frozen one after the other."""
    steps, batches, *_ = trained(framework)
    chex.clear_trace_counter()  # it counts by the place in the source, which both frameworks share
    train_step, postproc_step, eval_step = (
        jax.jit(chex.assert_max_traces(function, n=1))
        for function in (steps.train_step, steps.postproc_step, steps.eval_step)
    )
    for _ in range(2):
        state = steps.init(KEY, batches[0])
        for batch in batches:
            state, _ = train_step(state, batch)
        acc = steps.start(state, batches[0])
        for batch in batches:
            acc = postproc_step(state, acc, batch)
        eval_step(steps.finalize(state, acc)[0], batches[0])


@every_framework
def test_state_and_accumulator_keep_their_types_and_scan(framework):
    steps, batches, expected, expected_acc = trained(framework)
    state = steps.init(KEY, batches[0])
    acc = steps.start(state, batches[0])
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
    assert types(expected) == types(state) and types(expected_acc) == types(acc)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((state, acc)))  # a number would be compiled in
    assert (state.step.dtype, state.step, expected.step) == (jnp.int32, 0, 4)

    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    state, metrics = jax.jit(lambda state: jax.lax.scan(steps.train_step, state, stacked))(state)
    chex.assert_trees_all_close(state, expected, rtol=0, atol=1e-6)
    assert metrics["loss"].shape == (4,)


@every_framework
def test_metrics_are_the_loss_and_those_of_the_user(framework):
    steps, batches, *_ = trained(framework)
    state = steps.init(KEY, batches[0])
    _, metrics = jax.jit(steps.train_step)(state, batches[0])
    outputs, _ = in_float64(forward)(params_of(state), batches[0]["x"])
    error = outputs[:, 0] - batches[0]["y"]
    expected = {"loss": (error**2).mean(), "mean error": np.abs(error).mean()}
    chex.assert_trees_all_close(metrics, expected, rtol=1e-6)


@every_framework
def test_state_is_a_train_state_of_flax_and_is_saved_as_a_whole(framework, tmp_path):
    steps, batches, state, _ = trained(framework)
    assert isinstance(state, train_state.TrainState) and isinstance(state, framework.package.TrainState)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", steps.init(KEY, batches[0]))
    chex.assert_trees_all_equal(restored, state)


# --- Random ---------------------------------------------------------------------------------------------------------


@functools.cache
def dropping(framework):
    """(steps, batches, state) with dropout."""
    steps, batches = framework.steps(framework.net(rate=0.5)), make_batches(3)
    return steps, batches, steps.init(KEY, batches[0])


@every_framework
def test_dropout_follows_its_key(framework):
    steps, (batch, *_), state = dropping(framework)
    step = jax.jit(steps.train_step)
    (one, _), (same, _), (other, _) = (step(state, batch, rng=jax.random.key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    assert not np.allclose(params_of(one)["head"]["kernel"], params_of(other)["head"]["kernel"])


def test_linen_dropout_is_that_of_a_key_for_all_streams():
    steps, (batch, *_), state = dropping(LINEN)
    _, metrics = jax.jit(steps.train_step)(state, batch, rng=jax.random.key(1))
    outputs, _ = state.apply_fn(
        state.variables, batch["x"], train=True, rngs=jax.random.key(1), mutable=["batch_stats"]
    )
    np.testing.assert_allclose(metrics["loss"], squared_error(outputs, batch)[0], rtol=1e-6)
    with pytest.raises(flax.errors.InvalidRngError):
        steps.train_step(state, batch)


@pytest.mark.slow
def test_nnx_dropout_without_a_key_goes_on_as_in_flax():
    steps, batches, _ = dropping(NNX)
    state = train(steps, steps.init(None, batches[0]), batches)
    expected = hand_written_nnx(NNX.net(rate=0.5), batches)
    chex.assert_trees_all_close((params_of(state), statistics_of(state)), expected, rtol=1e-5, atol=1e-5)


def test_nnx_key_of_a_step_leaves_the_streams_of_the_state():
    steps, (batch, *_), state = dropping(NNX)
    streams = lambda state: nnx.filter_state(state.others, nnx.RngState)
    keyed, _ = jax.jit(steps.train_step)(state, batch, rng=KEY)
    chex.assert_trees_all_equal(streams(keyed), streams(state))
    going_on, _ = jax.jit(steps.train_step)(state, batch)
    assert going_on.others["dropout"]["rngs"]["count"][...] == len(LAYERS)  # each of which is followed by dropout


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework, way",
    [(LINEN, "pmap"), (NNX, "pmap"), (NNX, "shard_map")],
    ids=["linen pmap", "nnx pmap", "nnx shard_map"],
)
def test_each_device_may_have_its_own_key(framework, way):
    """And the state is the same on all devices, which shard_map and `run` check."""
    steps, (batch,) = framework.steps(framework.net(rate=0.5, axis_name=AXIS), axis_name=AXIS), make_batches(1)

    def step(replicated, batch):
        state, keys = replicated
        new, metrics = steps.train_step(state, batch, keys[jax.lax.axis_index(AXIS)])
        # NumPy, in which results are compared, has no keys.
        return (jax.tree.map(without_keys, new), metrics), ()

    state, all_keys = steps.init(KEY, batch), (jax.random.split(KEY, DEVICES), jnp.stack([KEY] * DEVICES))
    mapped, _ = spread(way, step, (state, KEY), batch)
    own, same = (gathered(way, mapped(*spread(way, step, (state, keys), batch)[1])) for keys in all_keys)
    (_, own_metrics), _ = own
    (_, same_metrics), _ = same
    assert abs(own_metrics["loss"] - same_metrics["loss"]) > 1e-3


def without_keys(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@every_framework
def test_dropout_is_off_in_postproc_and_in_eval(framework):
    steps, batches, state = dropping(framework)
    state = train(steps, state, batches, rng=KEY)
    frozen, _ = steps.finalize(state, estimate(steps, state, batches))
    population = pooled_in_float64(params_of(state), [batch["x"] for batch in batches])
    assert_same_statistics(statistics_of(frozen), population, 2e-6)
    outputs, _ = in_float64(forward)(params_of(state), batches[0]["x"], population)
    np.testing.assert_allclose(steps.eval_step(frozen, batches[0]), outputs, rtol=0, atol=5e-6)


# --- finalize -------------------------------------------------------------------------------------------------------


@every_framework
def test_method_one_is_the_running_averages(framework):
    steps, _, state, _ = trained(framework)
    frozen, report = steps.finalize(state)
    assert report is None
    chex.assert_trees_all_equal(statistics_of(frozen), statistics_of(state))
    for layer in LAYERS:
        assert frozen.info.layer(layer) == jaxbn.LayerInfo("batch_norm", 1e-5, "running averages", None)


@every_framework
@pytest.mark.parametrize(
    "kind, estimator",
    [
        pytest.param("stock", jaxbn.pooled(), id="pooled"),
        pytest.param("ours", jaxbn.mean_of_batches(), id="mean of batches", marks=pytest.mark.slow),
        pytest.param("ours", jaxbn.moving_average(), id="moving average", marks=pytest.mark.slow),
    ],
)
def test_method_two_is_the_pass_of_postproc(framework, kind, estimator):
    _, batches, state, _ = trained(framework, kind)
    steps = framework.steps(framework.net(getattr(framework, kind)), estimator=estimator)
    frozen, report = steps.finalize(state, estimate(steps, state, batches))
    if framework is LINEN:
        call = lambda variables, batch: state.apply_fn(variables, batch["x"], train=False)
        variables, expected = jaxbn.linen.postproc(call, state.variables, batches, estimator=estimator)
    else:
        net = framework.net(getattr(framework, kind))
        nnx.update(net, state.params, state.others)
        variables, expected = jaxbn.nnx.postproc(net, batches, call=lambda n, b: n(b["x"]), estimator=estimator)
    chex.assert_trees_all_close(statistics_of(frozen), statistics_of(variables), rtol=1e-5, atol=1e-6)
    assert vars(report).keys() == vars(expected).keys() and report.batches == expected.batches
    for layer, change in expected.layers.items():
        assert report.layers[layer].summary == pytest.approx(change.summary, rel=1e-4, nan_ok=True)
    for layer in LAYERS:
        assert frozen.info.layer(layer) == jaxbn.LayerInfo("batch_norm", 1e-5, estimator.name, 64.0)


@every_framework
def test_without_running_averages_the_statistics_come_from_a_pass(framework):
    steps, batches, state, acc = trained(framework, momentum=None)
    assert (statistics_of(state)["norm_0"]["mean"] == 0).all()
    with pytest.raises(ValueError, match="The statistics of 'norm_0' were never estimated"):
        steps.finalize(state)
    population = pooled_in_float64(params_of(state), [batch["x"] for batch in batches])
    assert_same_statistics(statistics_of(steps.finalize(state, acc)[0]), population, 2e-6)


@every_framework
def test_finalize_refuses_other_objects_than_statistics(framework):
    steps, batches, state, acc = trained(framework)
    with pytest.raises(ValueError, match="The statistics of 'norm_0' were never estimated.*[Tt]rain"):
        steps.finalize(steps.init(KEY, batches[0]))
    with pytest.raises(ValueError, match="has seen no batch: call postproc_step"):
        steps.finalize(state, steps.start(state, batches[0]))
    replicated, replicated_acc = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), (state, acc))
    with pytest.raises(ValueError, match=r"is replicated. .* jax.tree.map\(lambda leaf: leaf\[0\], state\)"):
        steps.finalize(replicated)
    with pytest.raises(ValueError, match=r"is replicated. .* jax.tree.map\(lambda leaf: leaf\[0\], acc\)"):
        steps.finalize(state, replicated_acc)
    bad = [dict(batch) for batch in batches]
    bad[2]["x"] = np.where(np.arange(3) == 1, np.nan, bad[2]["x"])
    bad_acc, before = estimate(steps, state, bad), jax.tree.map(np.array, state)
    with pytest.raises(ValueError, match=r"Batch 2 \(counted from 0\) gave statistics .* not finite, .*in 'norm_0'"):
        steps.finalize(state, bad_acc)
    chex.assert_trees_all_equal(state, before)


class LinenWithAHead(nn.Module):
    """With a head that runs in training alone."""

    @nn.compact
    def __call__(self, x, train):
        x = jaxbn.linen.BatchNorm(use_running_average=not train, name="norm")(x)
        if train:
            jaxbn.linen.BatchNorm(use_running_average=False, name="head")(x)
        return x


class NNXWithAHead(nnx.Module):
    def __init__(self):
        self.norm, self.head = (jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        x = self.norm(x)
        if not self.head.use_running_average:
            self.head(x)
        return x


@every_framework
def test_a_layer_that_the_pass_does_not_reach_keeps_its_running_averages(framework):
    batches = make_batches(2)
    steps = framework.steps(LinenWithAHead() if framework is LINEN else NNXWithAHead())
    state = train(steps, steps.init(KEY, batches[0]), batches)
    frozen, report = steps.finalize(state, estimate(steps, state, batches))
    assert report.not_reached == ("head",)
    assert [frozen.info.layer(layer).estimator for layer in ("norm", "head")] == ["pooled", "running averages"]
    leaf = frozen.variables["batch_stats"] if framework is LINEN else frozen.variables
    moving = state.batch_stats if framework is LINEN else nnx.to_pure_dict(state.others)
    chex.assert_trees_all_equal(leaf["head"]["var"], moving["head"]["var"])
    assert (leaf["norm"]["var"] != moving["norm"]["var"]).all()


# --- eval_step ------------------------------------------------------------------------------------------------------


@every_framework
@every_norm
def test_eval_step_is_the_model_in_evaluation_to_the_last_bit(framework, kind):
    steps, batches, state, acc = trained(framework, kind)
    frozen, _ = steps.finalize(state, acc)
    net = framework.net(getattr(framework, kind))
    if framework is NNX:
        net.eval()
        nnx.update(net, state.params, state.others)
        for layer, statistics in statistics_of(frozen).items():
            nnx.update(getattr(net, layer), statistics)
    for batch in (batches[0], jax.tree.map(lambda a: a[:1], batches[0])):
        if framework is LINEN:
            expected = jax.jit(lambda variables, x: net.apply(variables, x, train=False))(frozen.variables, batch["x"])
        else:
            expected = nnx.jit(lambda net, x: net(x))(net, batch["x"])
        np.testing.assert_array_equal(jax.jit(steps.eval_step)(frozen, batch), expected)


@every_framework
def test_eval_step_takes_a_frozen_network_alone(framework):
    steps, batches, state, _ = trained(framework)
    frozen, _ = steps.finalize(state)
    for other in (state, frozen.variables, None):
        with pytest.raises(TypeError, match="Expected a jaxbn.Frozen, made by"):
            steps.eval_step(other, batches[0])
    elsewhere = framework.steps(framework.net(epsilon=1e-3))
    with pytest.raises(ValueError, match="'norm_.' was frozen with epsilon=1e-05, but the model has epsilon=0.001"):
        elsewhere.eval_step(frozen, batches[0])


# --- Wrong models ---------------------------------------------------------------------------------------------------


class NoFlag(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


class MoreCollections(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        self.variable("cache", "calls", jnp.zeros, ())
        return nn.BatchNorm(use_running_average=not train)(x)


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(x)


def test_linen_models_that_the_steps_cannot_carry():
    (batch,) = make_batches(1)
    with pytest.raises(TypeError, match=r"The call of NoFlag does not take train; it takes \['x'\]. Wrap it"):
        LINEN.steps(NoFlag())
    with pytest.raises(ValueError, match=r"the model also has \['cache'\]"):
        LINEN.steps(MoreCollections()).init(KEY, batch)
    with pytest.raises(ValueError, match="no statistics of a normalization layer"):
        LINEN.steps(NoNorm()).init(KEY, batch)


def test_nnx_model_without_normalization():
    with pytest.raises(ValueError, match="no normalization layer"):
        NNX.steps(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))


@every_framework
@every_norm
@pytest.mark.parametrize("axis_name", [None, "others"])
def test_layers_that_do_not_synchronize_are_an_error(framework, kind, axis_name):
    """Their averages would differ from device to device; linen's layers are met when they run."""
    (batch,) = make_batches(1)

    def train():
        steps = framework.steps(framework.net(getattr(framework, kind), axis_name=axis_name), axis_name=AXIS)
        return run("pmap", lambda state, batch: (steps.train_step(state, batch), ()), steps.init(KEY, batch), batch)

    with pytest.raises(ValueError, match=f"'norm_0' would keep .* it has axis_name={axis_name!r}. Give the layer"):
        train()


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("framework, way", [(LINEN, "pmap"), (NNX, "shard_map")], ids=["linen pmap", "nnx shard_map"])
def test_a_pass_merges_the_moments_of_unsynchronized_layers(framework, way):
    """Layers that keep no averages may normalize with the rows of their own device."""
    steps, (batch,) = framework.steps(framework.net(momentum=None), axis_name=AXIS), make_batches(1, rows=32)

    def cycle(state, batch):
        state, _ = steps.train_step(state, batch)
        return (state, steps.postproc_step(state, steps.start(state, batch), batch)), ()

    (state, acc), _ = run(way, cycle, steps.init(KEY, batch), batch)
    frozen, _ = steps.finalize(state, acc)
    population = pooled_in_float64(params_of(state), np.split(batch["x"], DEVICES))
    assert_same_statistics(statistics_of(frozen), population, 2e-6)
    together = pooled_in_float64(params_of(state), [batch["x"]])
    assert abs(together["norm_1"]["var"] / statistics_of(frozen)["norm_1"]["var"] - 1).max() > 1e-2
    assert frozen.info.layer("norm_1").rows == 32
