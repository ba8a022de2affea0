"""Moments and statistics of linen models, stock and ours, against float64 over what the layers were really given."""

from typing import Any, NamedTuple

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, mesh

import jaxbn
import jaxbn.linen

NORMS = [nn.BatchNorm, jaxbn.linen.BatchNorm]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=["stock", "jaxbn"])
every_flag = pytest.mark.parametrize("train", [False, True], ids=["eval flag", "train flag"])
every_mode = pytest.mark.parametrize("mode", ["batch", "eval"])


class Block(nn.Module):
    """A residual block whose layers tell what they were given."""

    features: int
    norm: type

    @nn.compact
    def __call__(self, x, train):
        def normalized(y, name):
            self.sow("inputs", f"{name}_input", y)
            return self.norm(use_running_average=not train, name=name)(y)

        y = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        y = nn.relu(normalized(y, "first"))
        y = normalized(nn.Conv(self.features, (3, 3), use_bias=False)(y), "second")
        if x.shape[-1] != self.features:
            x = normalized(nn.Conv(self.features, (1, 1), use_bias=False)(x), "projection")
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        for features in (4, 4, 6):
            x = Block(features, self.norm)(x, train)
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture
def images(rng):
    """64, 64 and 4 of them, the last ones far away, as the remainder of sorted data is."""
    values = (1 + rng.standard_normal((132, 6, 6, 3))).astype(np.float32)
    values[128:] += 10
    return [values[:64], values[64:128], values[128:]]


def started(norm):
    """A model with statistics that are not the initial ones."""
    net = ResNet(norm)
    make = jax.jit(lambda key: net.init(key, np.zeros((2, 6, 6, 3), np.float32), False))
    variables = dict(make(jax.random.key(0)))
    variables.pop("inputs")
    variables["batch_stats"] = jax.tree.map(lambda leaf: 0.3 + 1.5 * leaf, variables["batch_stats"])
    return net, variables


def plain(net, variables, batch, mode):
    """What the model itself gives with the statistics of the mode, and the input of each layer."""
    train = mode == "batch"
    mutable = ["inputs", "batch_stats"] if train else ["inputs"]
    outputs, updates = jax.jit(lambda v, b: net.apply(v, b, train, mutable=mutable))(variables, batch)
    inputs = flax.traverse_util.flatten_dict(updates["inputs"], sep="/")
    return outputs, {path.removesuffix("_input"): np.float64(values[0]) for path, values in inputs.items()}


def assert_moments_of(moments, inputs, tolerance=1e-5):
    assert moments.keys() == inputs.keys()
    for path, values in inputs.items():
        rows = values.reshape(-1, values.shape[-1])
        np.testing.assert_array_equal(moments[path].count, len(rows))
        np.testing.assert_allclose(moments[path].mean, rows.mean(0), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(moments[path].var, rows.var(0), rtol=tolerance)


@every_norm
@every_mode
@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eval flag", "train flag"])
@pytest.mark.parametrize(
    "transform", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.slow)], ids=["jit", "eager"]
)
def test_moments_and_outputs_whatever_the_flag(norm, mode, train, transform, images):
    net, variables = started(norm)
    before = jax.tree.map(np.copy, variables)
    captured = jaxbn.linen.capture_moments(lambda v, b: net.apply(v, b, train), mode=mode)
    outputs, moments = transform(captured)(variables, images[0])
    expected, inputs = plain(net, variables, images[0], mode)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_moments_of(moments, inputs)
    chex.assert_trees_all_equal(variables, before)


@every_norm
def test_as_called_follows_the_model(norm, images):
    net, variables = started(norm)
    for train in (True, False):
        call = lambda v, b, train=train: net.apply(v, b, train, mutable=["batch_stats"] if train else False)
        outputs, moments = jax.jit(jaxbn.linen.capture_moments(call, mode="as_called"))(variables, images[0])
        expected, inputs = plain(net, variables, images[0], "batch" if train else "eval")
        if train:
            outputs, updates = outputs
            chex.assert_trees_all_equal_structs(updates["batch_stats"], variables["batch_stats"])
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
        assert_moments_of(moments, inputs)


@every_norm
def test_capture_does_not_poison_what_is_compiled(norm, images):
    """The same jitted function, with and without capture, in any order."""
    net, variables = started(norm)
    apply = jax.jit(lambda v, b: net.apply(v, b, False))
    evaluated, inputs = plain(net, variables, images[0], "eval")
    trained, _ = plain(net, variables, images[0], "batch")
    for mode in ("batch", "eval", "batch"):
        outputs, moments = jaxbn.linen.capture_moments(apply, mode=mode)(variables, images[0])
        np.testing.assert_allclose(outputs, trained if mode == "batch" else evaluated, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(apply(variables, images[0]), evaluated, rtol=1e-4, atol=1e-5)
    assert all((m.count > 0).all() for m in moments.values())


class Shared(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        layer = self.norm(use_running_average=True, name="layer")
        self.norm(use_running_average=True, name="only_at_init")(x) if self.is_initializing() else None
        return layer(layer(x) * 3 + 1)


@every_norm
def test_shared_layers_are_pooled_and_those_not_reached_stay(norm, rng):
    x = rng.standard_normal((20, 3)).astype(np.float32)
    net = Shared(norm)
    variables = net.init(jax.random.key(0), x)
    moments = jaxbn.linen.capture_moments(net.apply, mode="eval")(variables, x)[1]
    once = np.float64(x) / np.sqrt(1 + 1e-5)
    both = np.concatenate([np.float64(x), once * 3 + 1])
    np.testing.assert_array_equal(moments["layer"].count, 40)
    np.testing.assert_allclose(moments["layer"].var, both.var(0), rtol=1e-5)
    np.testing.assert_array_equal(moments["only_at_init"].count, 0)
    new, report = jaxbn.linen.postproc(net.apply, variables, [x])
    assert report.not_reached == ("only_at_init",)
    chex.assert_trees_all_equal(new["batch_stats"]["only_at_init"], variables["batch_stats"]["only_at_init"])
    assert "not reached" in str(report)


class Lifted(nn.Module):
    norm: type
    how: str

    @nn.compact
    def __call__(self, x):
        inner = {
            "nn.jit": lambda: nn.jit(self.norm),
            "nn.remat": lambda: nn.remat(self.norm),
            "nn.vmap": lambda: nn.vmap(
                self.norm, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
            ),
            "plain": lambda: self.norm,
        }[self.how]()
        return inner(use_running_average=True, name="layer")(x)


@every_norm
@every_mode
@pytest.mark.parametrize("how", ["plain", "nn.jit", "nn.remat", "nn.vmap"])
def test_lifted_layers(norm, mode, how, rng):
    x = (3 + rng.standard_normal((4, 20, 3))).astype(np.float32)  # an ensemble of 4 for vmap
    net = Lifted(norm, how)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    moments = jax.jit(jaxbn.linen.capture_moments(net.apply, mode=mode))(variables, x)[1]["layer"]
    rows = (1,) if how == "nn.vmap" else (0, 1)
    np.testing.assert_allclose(moments.mean, np.float64(x).mean(rows), rtol=1e-5)
    np.testing.assert_allclose(moments.var, np.float64(x).var(rows), rtol=1e-5)


class Pair(nn.Module):
    norm: type
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        for name in ("first", "second"):
            x = nn.relu(self.norm(use_running_average=not train, axis_name=self.axis_name, name=name)(x))
        return x


def with_devices_inside(norm, synchronized, train):
    """A call of one layer, and then of a pair of them under shard_map; and its variables."""
    pair, layer = Pair(norm, AXIS if synchronized else None), norm(use_running_average=not train)

    def call(variables, x):
        outside, inside = ({kind: leaves[part] for kind, leaves in variables.items()} for part in ("outside", "inside"))
        apply = lambda v, x: pair.apply(v, x, train, mutable=["batch_stats"])[0]
        specs = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS)}
        x = layer.apply(outside, x, mutable=["batch_stats"])[0]
        return jax.shard_map(apply, mesh=mesh(), **specs)(inside, x)

    x = jnp.ones((2, 3))
    parts = {"outside": layer.init(jax.random.key(0), x), "inside": pair.init(jax.random.key(0), x, False)}
    variables = {kind: {name: part[kind] for name, part in parts.items()} for kind in ("params", "batch_stats")}
    variables["batch_stats"] = jax.tree.map(lambda leaf: 0.3 + 1.5 * leaf, variables["batch_stats"])
    return call, variables


def oracle_of_devices(x, mode, synchronized):
    """Outputs, and what each layer is given, in float64."""
    x, given = np.float64(x), {}
    for path in ("outside", "inside/first", "inside/second"):
        given[path] = x
        parts = [x] if synchronized or path == "outside" else np.split(x, DEVICES)
        moments = [(0.3, 1.8) if mode == "eval" else (part.mean(0), part.var(0)) for part in parts]
        x = np.concatenate([(part - m) / np.sqrt(v + 1e-5) for part, (m, v) in zip(parts, moments, strict=True)])
        x = x if path == "outside" else np.maximum(x, 0)
    return x, given


@pytest.mark.sample(every=5)
@every_norm
@pytest.mark.parametrize("synchronized", [True, False], ids=["synchronized", "each device for itself"])
@pytest.mark.parametrize(
    ("mode", "train", "used"),
    [("batch", False, "batch"), ("eval", True, "eval"), ("as_called", True, "batch"), ("as_called", False, "eval")],
)
def test_a_model_that_runs_on_devices_of_its_own(norm, mode, train, used, synchronized, rng):
    x = (1 + rng.standard_normal((64, 3))).astype(np.float32)
    call, variables = with_devices_inside(norm, synchronized, train)
    outputs, moments = jax.jit(jaxbn.linen.capture_moments(call, mode=mode))(variables, x)
    expected, given = oracle_of_devices(x, used, synchronized)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_moments_of(moments, given)


@pytest.mark.slow
@every_norm
@pytest.mark.parametrize(("synchronized", "consistent"), [(True, False), (False, False), (False, True)])
def test_statistics_of_a_model_that_runs_on_devices_of_its_own(norm, synchronized, consistent, rng):
    """Where devices do not synchronize, one pass is the exact merge of what each has seen."""
    x = (1 + rng.standard_normal((64, 3))).astype(np.float32)
    call, variables = with_devices_inside(norm, synchronized, train=False)
    new, report = jaxbn.linen.postproc(call, variables, [x], consistent=consistent)
    _, given = oracle_of_devices(x, "batch", synchronized or consistent)
    found = flax.traverse_util.flatten_dict(new["batch_stats"], sep="/")
    for path, values in given.items():
        np.testing.assert_allclose(found[f"{path}/mean"], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{path}/var"], values.var(0), rtol=1e-4)
    assert report.not_reached == ()


class Layers(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            norm: type

            @nn.compact
            def __call__(self, x, _):
                return 2 * self.norm(use_running_average=True)(x) + 1, None

        stacked = nn.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        return stacked(self.norm)(x, None)[0]


@every_norm
def test_scanned_layers_keep_their_axis(norm, rng):
    x = (3 + 2 * rng.standard_normal((30, 4))).astype(np.float32)
    net = Layers(norm)
    variables = net.init(jax.random.key(0), x)
    (moments,) = jaxbn.linen.capture_moments(net.apply, mode="eval")(variables, x)[1].values()
    assert moments.mean.shape == (3, 4)
    expected = np.float64(x)
    for layer in range(3):
        np.testing.assert_allclose(moments.mean[layer], expected.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moments.var[layer], expected.var(0), rtol=1e-5)
        expected = 2 * expected / np.sqrt(1 + 1e-5) + 1


@every_norm
def test_masks_of_the_model_count(norm, rng):
    x = rng.standard_normal((20, 3)).astype(np.float32)
    valid = rng.random((20, 1)) > 0.4
    net = norm(use_running_average=False)
    variables = net.init(jax.random.key(0), x)
    moments = jaxbn.linen.capture_moments(lambda v, b: net.apply(v, b, mask=valid))(variables, x)[1][""]
    np.testing.assert_array_equal(moments.count, valid.sum())
    np.testing.assert_allclose(moments.var, np.float64(x[valid[:, 0]]).var(0), rtol=1e-5)


@every_norm
@pytest.mark.parametrize("axis", [1, (1, 2)])
def test_other_feature_axes(norm, axis, rng):
    x = rng.standard_normal((20, 3, 4)).astype(np.float32)
    net = norm(use_running_average=True, axis=axis)
    variables = net.init(jax.random.key(0), x)
    moments = jaxbn.linen.capture_moments(net.apply)(variables, x)[1][""]
    rows = (0, 2) if axis == 1 else (0,)
    np.testing.assert_allclose(moments.var, np.float64(x).var(rows), rtol=1e-5)


@every_norm
def test_subclasses_that_call_super(norm, rng):
    class Doubled(norm):
        def __call__(self, x, **arguments):
            return super().__call__(2 * x, **arguments)

    x = rng.standard_normal((20, 3)).astype(np.float32)
    net = Doubled(use_running_average=True)
    variables = net.init(jax.random.key(0), x)
    moments = jaxbn.linen.capture_moments(net.apply)(variables, x)[1][""]
    np.testing.assert_allclose(moments.var, np.float64(2 * x).var(0), rtol=1e-5)


def test_residual_and_activation_stay_in_the_layer(rng):
    x, residual = (rng.standard_normal((20, 3)).astype(np.float32) for _ in range(2))
    net = jaxbn.linen.BatchNorm(use_running_average=False, activation=nn.relu)
    variables = net.init(jax.random.key(0), x)
    expected, _ = net.apply(variables, x, residual=residual, mutable=["batch_stats"])
    outputs, _ = jaxbn.linen.capture_moments(lambda v, b: net.apply(v, b, residual=residual))(variables, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


@every_norm
def test_layer_trained_over_devices_is_measured_on_one(norm, rng):
    """Its axis is not there; the batch it is given is the whole batch."""
    x = (5 + rng.standard_normal((20, 3))).astype(np.float32)
    net = norm(use_running_average=False, axis_name="devices")
    variables = net.init(jax.random.key(0), x)
    outputs, moments = jaxbn.linen.capture_moments(net.apply)(variables, x)
    np.testing.assert_allclose(outputs.mean(0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(moments[""].var, np.float64(x).var(0), rtol=1e-5)


def test_layers_of_other_variables_pass_through(rng):
    """A frozen teacher in the call keeps its own statistics, and is no layer of the student."""
    x = rng.standard_normal((20, 3)).astype(np.float32)
    net = nn.BatchNorm(use_running_average=True)
    student, teacher = net.init(jax.random.key(0), x), net.init(jax.random.key(0), x)
    teacher["batch_stats"]["mean"] += 7
    call = lambda v, b: net.apply(teacher, b) + 0 * net.apply(v, b)
    outputs, moments = jaxbn.linen.capture_moments(call)(student, x)
    np.testing.assert_allclose(outputs, net.apply(teacher, x), rtol=1e-6)
    assert list(moments) == [""]


@every_norm
def test_boxed_variables_keep_their_box(norm, rng):
    """As nn.with_partitioning makes them."""
    x = (3 + rng.standard_normal((20, 4))).astype(np.float32)
    net = norm(use_running_average=True, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    variables = net.init(jax.random.key(0), x)
    box = lambda leaf: nn.Partitioned(leaf, names=("model",))
    variables["batch_stats"] = jax.tree.map(box, variables["batch_stats"])
    new, _ = jaxbn.linen.postproc(net.apply, variables, [x])
    chex.assert_trees_all_equal_structs(new, variables)
    np.testing.assert_allclose(new["batch_stats"]["mean"].value, x.mean(0), rtol=1e-5)


@every_norm
def test_rounded_statistics_do_not_round_those_of_the_batch(norm, rng):
    x = (100 + rng.standard_normal((20, 4))).astype(np.float32)
    net = norm(use_running_average=True)
    variables = net.init(jax.random.key(0), x)
    outputs = jaxbn.linen.capture_moments(net.apply)(variables, x)[0]
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["batch_stats"])
    rounded = jaxbn.linen.capture_moments(net.apply)(variables, x)[0]
    np.testing.assert_allclose(rounded, outputs, atol=1e-5)


def test_layers_are_listed_by_number():
    stats = {f"BatchNorm_{i}": {"mean": jnp.zeros(2), "var": jnp.ones(2)} for i in (10, 2, 0)}
    paths = jaxbn.linen.capture_moments(lambda v, b: b)({"batch_stats": stats}, jnp.ones(2))[1]
    assert list(paths) == ["BatchNorm_0", "BatchNorm_2", "BatchNorm_10"]


def test_what_the_interceptor_leans_on_in_flax(rng):
    """It is given the method as a partial of the function that the class defines, under Flax's wrappers."""
    from jaxbn._src.linen.registry import is_call

    seen = []

    def look(next_call, args, kwargs, context):
        seen.append((type(context.module), context.method_name, is_call(context.module, context.orig_method.func)))
        return next_call(*args, **kwargs)

    for norm in NORMS:
        net = norm(use_running_average=True)
        x = rng.standard_normal((4, 3)).astype(np.float32)
        with nn.intercept_methods(look):
            net.apply(net.init(jax.random.key(0), x), x)
    assert {kind for kind, name, is_met in seen if name == "__call__" and is_met} == {
        nn.BatchNorm,
        jaxbn.linen.BatchNorm,
    }


class Holder(NamedTuple):
    statistics: Any
    other: Any


@every_norm
def test_outputs_that_hold_the_variables_come_back_without_slots(norm, rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    net = norm(use_running_average=True)
    variables = net.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.1)
    holders = [
        lambda v, y: TrainState.create(apply_fn=None, params=v, tx=optimizer),
        lambda v, y: Holder(v["batch_stats"], [y, None]),
        lambda v, y: {"a": ({"b": v},)},
    ]
    for hold in holders:
        outputs, _ = jaxbn.linen.capture_moments(lambda v, b, hold=hold: hold(v, net.apply(v, b)))(variables, x)
        chex.assert_trees_all_equal_structs(outputs, hold(variables, x))


def test_errors_of_capture():
    with pytest.raises(ValueError, match="'train' is none of 'batch', 'eval', 'as_called'"):
        jaxbn.linen.capture_moments(lambda v, b: b, mode="train")
    for variables in ({}, {"params": {"kernel": jnp.ones(3)}}, {"batch_stats": {"sigma": jnp.ones(3)}}):
        with pytest.raises(ValueError, match="no statistics of a normalization layer"):
            jaxbn.linen.capture_moments(lambda v, b: b)(variables, jnp.ones(3))


def test_a_call_that_casts_all_of_its_variables_is_told(rng):
    net = nn.BatchNorm(use_running_average=True)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    cast = lambda v, b: net.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), v), b)
    with pytest.raises(TypeError, match="Cast only the floating-point leaves"), jax.numpy_dtype_promotion("standard"):
        jaxbn.linen.capture_moments(cast)(variables, x)
