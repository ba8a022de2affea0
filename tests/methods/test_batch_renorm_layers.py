"""Batch Renormalization as a layer of linen and NNX: fields, statistics pass, freezing, and other checkpoints."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import LINEN, NNX, every_framework, make_batches, statistics_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

EPSILON = 1e-3
LAYERS = {LINEN: jaxbn.linen.BatchRenorm, NNX: jaxbn.nnx.BatchRenorm}
OPEN = {"r_max": 2.0, "d_max": 1.0}  # bounds that hold from the first step


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- Fields -----------------------------------------------------------------------------------------------------------


def test_factory_and_layers_have_the_same_arguments_and_defaults():
    defaults = {name: p.default for name, p in inspect.signature(jaxbn.batch_renorm).parameters.items()}
    linen = inspect.signature(jaxbn.linen.BatchRenorm).parameters
    own = inspect.signature(jaxbn.nnx.BatchRenorm.__init__).parameters
    shared = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
    assert {name: linen[name].default for name in defaults} == defaults
    assert {name: (own if name in own else shared)[name].default for name in defaults} == defaults
    stock = list(inspect.signature(nn.BatchNorm).parameters)[:-2]  # but for parent and name
    assert list(linen)[: len(stock)] == stock


@pytest.mark.parametrize("arguments", [{}, OPEN, jaxbn.renorm_switch(7), {"momentum": jaxbn.cumulative()}], ids=str)
def test_equal_arguments_make_equal_layers(arguments):
    linen = [jaxbn.linen.BatchRenorm(**arguments) for _ in range(2)]
    assert linen[0] == linen[1] and hash(linen[0]) == hash(linen[1])
    graphs = [nnx.graphdef(jaxbn.nnx.BatchRenorm(3, **arguments, rngs=nnx.Rngs(0))) for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_ramps_made_twice_make_equal_layers():
    assert jaxbn.linen.BatchRenorm(**jaxbn.renorm_ramp(9)) == jaxbn.linen.BatchRenorm(**jaxbn.renorm_ramp(9))
    assert jaxbn.linen.BatchRenorm(**jaxbn.renorm_ramp(9)) != jaxbn.linen.BatchRenorm(**jaxbn.renorm_ramp(8))


def test_all_fields_of_batch_norm_are_used():
    with pytest.raises(TypeError, match="r_min"):
        jaxbn.nnx.BatchRenorm(3, r_min=0.5, rngs=nnx.Rngs(0))


# --- Statistics pass and freezing -------------------------------------------------------------------------------------


@pytest.mark.sample(every=2)
@every_framework
def test_the_statistics_pass_uses_batch_statistics_only(framework):
    """It equals batch norm with this epsilon: r = 1 and d = 0 for any averages."""
    x = make_batches(1)[0]["x"]

    def captured(norm, **fields):
        net = framework.net(norm, epsilon=EPSILON, **fields)
        if framework is NNX:
            return plain(jaxbn.nnx.capture_moments(mode="batch")(net, x))
        variables = net.init(jax.random.key(0), x, train=True)
        call = lambda variables, x: net.apply(variables, x, train=True, mutable=["batch_stats"])[0]
        return plain(jaxbn.linen.capture_moments(call, mode="batch")(variables, x))

    def plain(found):  # keys of moments know the method, in which these two differ
        return found[0], {str(path): moments for path, moments in found[1].items()}

    chex.assert_trees_all_equal(captured(LAYERS[framework], **OPEN), captured(framework.ours))


@every_framework
def test_train_postproc_freeze_save_and_load(framework, tmp_path):
    """Training uses r and d; the frozen network is (x - mean) / sqrt(var + epsilon) in float64."""
    batches = [4 + 3 * normal(8, 5, seed=seed) for seed in range(6)]
    if framework is NNX:
        model = jaxbn.nnx.BatchRenorm(5, **jaxbn.renorm_ramp(warmup=1), rngs=nnx.Rngs(0))
        for x in batches:
            model(x)
        assert model.step[...] == 6
        model, report = jaxbn.nnx.postproc(model, batches)
        frozen = jaxbn.nnx.freeze(model, report)
        jaxbn.serving.save(tmp_path / "net", frozen)
        fresh = jaxbn.nnx.BatchRenorm(5, **jaxbn.renorm_ramp(warmup=1), rngs=nnx.Rngs(1))
        evaluate = jaxbn.nnx.install_frozen(fresh, jaxbn.serving.load(tmp_path / "net", like=fresh))
    else:
        net = jaxbn.linen.BatchRenorm(**jaxbn.renorm_ramp(warmup=1))
        variables = net.init(jax.random.key(0), batches[0], use_running_average=False)
        for x in batches:
            variables |= net.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[1]
        assert variables["batch_stats"]["step"] == 6
        call = lambda variables, x: net.apply(variables, x, use_running_average=True)
        variables, report = jaxbn.linen.postproc(call, variables, batches)
        frozen = jaxbn.linen.freeze(variables, report)
        jaxbn.serving.save(tmp_path / "net", frozen)
        served = jaxbn.serving.load(tmp_path / "net", like=variables)
        evaluate = lambda x: call(served.variables, x)

    assert frozen.info.layer("") == jaxbn.LayerInfo("batch_renorm", EPSILON, "pooled", 48.0)
    line = framework.package.summary(frozen).splitlines()[-1]
    assert "batch_renorm" in line and "0.001" in line and "pooled" in line
    population, x = np.float64(np.concatenate(batches)), normal(3, 5, seed=9)
    expected = (x - population.mean(0)) / np.sqrt(population.var(0) + EPSILON)
    np.testing.assert_allclose(evaluate(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.sample(every=2)
@every_framework
def test_make_steps(framework):
    batches = make_batches(4)
    steps = framework.steps(framework.net(LAYERS[framework], **OPEN | jaxbn.renorm_ramp(warmup=1)))
    state = steps.init(jax.random.key(0), batches[0])
    train_step, postproc_step = jax.jit(steps.train_step), jax.jit(steps.postproc_step)
    for batch in batches:
        state, _ = train_step(state, batch)
    acc = steps.start(state, batches[0])
    for batch in batches:
        acc = postproc_step(state, acc, batch)
    frozen, report = steps.finalize(state, acc)
    assert set(report.layers) == {"norm_0", "norm_1"}
    assert frozen.info.layer("norm_1") == jaxbn.LayerInfo("batch_renorm", EPSILON, "pooled", 64.0)
    counters = [leaf for path, leaf in jax.tree.leaves_with_path(frozen.variables) if path[-1].key == "step"]
    assert counters == [len(batches)] * 2
    alone = np.concatenate([steps.eval_step(frozen, {"x": x[None]}) for x in batches[0]["x"]])
    np.testing.assert_allclose(alone, steps.eval_step(frozen, batches[0]), rtol=1e-5, atol=1e-5)


@every_framework
def test_frozen_layers(framework):
    batch = make_batches(1)[0]["x"]
    net = framework.net(LAYERS[framework], **OPEN)
    if framework is NNX:
        frozen = jaxbn.nnx.freeze_layers(net, "norm_0")
        frozen(batch)
        after = statistics_of(frozen)
    else:
        variables = net.init(jax.random.key(0), batch, train=True)
        apply = jaxbn.linen.freeze_layers(net.apply, "norm_0")
        after = apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    np.testing.assert_array_equal(after["norm_0"]["mean"], np.zeros(4))
    assert (after["norm_1"]["mean"] != 0).all()


@every_framework
def test_averages_are_updated_once_for_several_micro_batches(framework):
    """The rule of the method averages sigma; the result is that of one batch of all rows."""
    parts = [2 + 3 * normal(4, 5, seed=seed) for seed in range(3)]
    moments = {"": jaxbn.pool(jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jaxbn.batch_moments, parts)))}
    fields = {"momentum": 0.75, **jaxbn.renorm_ramp(warmup=1)}
    if framework is NNX:
        moved = jaxbn.nnx.move_averages(jaxbn.nnx.BatchRenorm(5, **fields, rngs=nnx.Rngs(0)), moments)
        found = nnx.to_pure_dict(nnx.state(moved, nnx.BatchStat))
    else:
        variables = jaxbn.linen.BatchRenorm(use_running_average=False, **fields).init(jax.random.key(0), parts[0])
        found = jaxbn.linen.move_averages(variables, moments, jaxbn.batch_renorm(**fields))["batch_stats"]
    rows = np.float64(np.concatenate(parts))
    sigma = 0.75 * np.sqrt(1 + EPSILON) + 0.25 * np.sqrt(rows.var(0) + EPSILON)
    np.testing.assert_allclose(found["mean"], 0.25 * rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["var"], sigma**2 - EPSILON, rtol=1e-6)
    assert found["step"] == 1


# --- Other checkpoints ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        for width in (4, 3):
            x = self.norm(use_running_average=True, epsilon=EPSILON)(nn.Dense(width)(x))
        return x


def filled(tree):
    """Fills the variables with random numbers; variances are positive."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [1.5 + 0.1 * jnp.abs(normal(*leaf.shape, seed=i)) for i, leaf in enumerate(leaves)]
    )


@pytest.mark.parametrize("stock", [nn.BatchNorm, jaxbn.linen.BatchNorm], ids=["flax", "jaxbn"])
def test_checkpoints_from_and_to_batch_norm(stock):
    x, key = normal(8, 3), jax.random.key(0)
    old, new = Net(stock), Net(jaxbn.linen.BatchRenorm)
    given = filled(old.init(key, x))
    converted = jaxbn.linen.convert_norms(given, like=new.init(key, x))
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, new.init(key, x))
    assert converted["batch_stats"]["BatchRenorm_1"]["step"] == 0
    np.testing.assert_allclose(new.apply(converted, x), old.apply(given, x), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(jaxbn.linen.convert_norms(converted, like=old.init(key, x)), given)


def test_checkpoints_of_sbx():
    x, key = normal(8, 3), jax.random.key(0)
    net = Net(jaxbn.linen.BatchRenorm)
    like = net.init(key, x)
    given = filled(like)
    for statistics in given["batch_stats"].values():
        del statistics["step"]
        statistics |= {"steps": jnp.int32(120_000), "r_max": 3, "d_max": 5}
    converted = jaxbn.linen.convert_norms(given, like=like)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, like)
    assert converted["batch_stats"]["BatchRenorm_0"]["step"] == 120_000
    for name in ("mean", "var"):
        found, expected = (tree["batch_stats"]["BatchRenorm_1"][name] for tree in (converted, given))
        np.testing.assert_array_equal(found, expected)
    assert "step" in like["batch_stats"]["BatchRenorm_0"] and "steps" in given["batch_stats"]["BatchRenorm_0"]


def test_the_error_names_the_variable_that_does_not_fit():
    x, key = normal(8, 3), jax.random.key(0)
    like = Net(jaxbn.linen.BatchRenorm).init(key, x)
    given = Net(nn.BatchNorm).init(key, x)
    for broken, message in [
        (
            {**given, "params": {k: v for k, v in given["params"].items() if k != "Dense_1"}},
            "'params/Dense_1/.*` has no",
        ),
        ({**given, "cache": {"BatchNorm_0": {"mean": 1}}}, "'cache/BatchNorm_0/mean' of the variables"),
        (Net(nn.BatchNorm).init(key, normal(8, 5)), r"Dense_0/kernel' is \(5, 4\) in the variables and \(3, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            jaxbn.linen.convert_norms(broken, like=like)
    both = {**given, "batch_stats": given["batch_stats"] | like["batch_stats"]}
    with pytest.raises(ValueError, match="Two layers of different classes"):
        jaxbn.linen.convert_norms(both, like=like)


def test_nnx_models_load_statistics_by_name():
    """NNX names a layer by its attribute, so one line is enough."""
    bn = jaxbn.nnx.BatchNorm(3, epsilon=EPSILON, rngs=nnx.Rngs(0))
    brn = jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))
    x = 2 + normal(8, 3)
    bn(x)
    nnx.update(brn, nnx.state(bn))
    np.testing.assert_array_equal(brn(x, use_running_average=True), bn(x, use_running_average=True))
    assert brn.step[...] == 0
