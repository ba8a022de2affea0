"""Moments and statistics of NNX models, stock and ours, against float64 over what the layers were really given."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, mesh

import jaxbn
import jaxbn.nnx
from jaxbn._src.framework.layers import Layer, Slot
from jaxbn._src.nnx import capture

NORMS = [nnx.BatchNorm, jaxbn.nnx.BatchNorm]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=["stock", "jaxbn"])
every_mode = pytest.mark.parametrize("mode", ["batch", "eval"])
EPSILON = 1e-5


class Block(nnx.Module):
    """Two linear maps and two normalizations around a residual connection."""

    def __init__(self, norm, *, rngs):
        self.linears = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([norm(4, rngs=rngs) for _ in range(2)])

    def __call__(self, x, **flags):
        y = nnx.relu(self.norms[0](self.linears[0](x), **flags))
        return x + self.norms[1](self.linears[1](y), **flags)


def started(model):
    """With statistics and parameters that are not the initial ones."""
    rng = np.random.default_rng(1)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, tuple(NORMS)):
            for variable, base in ((layer.mean, 0.3), (layer.var, 1.5), (layer.scale, 1.0), (layer.bias, 0.0)):
                variable[...] = jnp.asarray(base + 0.2 * rng.random(variable.shape), jnp.float32)
    return model


def block(norm):
    return started(Block(norm, rngs=nnx.Rngs(0)))


def normalize(layer, x, mode, given):
    """A normalization in float64, which notes what it was given."""
    given.append(x)
    mean, var, scale, bias = (np.float64(p[...]) for p in (layer.mean, layer.var, layer.scale, layer.bias))
    if mode == "batch":
        mean, var = x.mean(0), x.var(0)
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias


def oracle(model, x, mode):
    """The block in float64: its output, and what its two layers were given."""
    given, linear = [], lambda layer, x: x @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])
    y = np.maximum(normalize(model.norms[0], linear(model.linears[0], np.float64(x)), mode, given), 0)
    y = x + normalize(model.norms[1], linear(model.linears[1], y), mode, given)
    return y, {f"norms/{number}": values for number, values in enumerate(given)}


def snapshot(model):
    return nnx.graphdef(model), jax.tree.map(np.copy, nnx.to_pure_dict(nnx.state(model)))


def captured(model, x, call=None, *, mode="batch", jit=False):
    """(outputs, moments), after checking that the model is what it was."""
    before = snapshot(model)
    run = jaxbn.nnx.capture_moments(call, mode=mode)
    outputs, moments = (nnx.jit(run) if jit else run)(model, x)
    assert nnx.graphdef(model) == before[0]
    chex.assert_trees_all_equal(snapshot(model)[1], before[1], strict=True)
    return outputs, moments


def assert_moments_of(moments, given):
    assert moments.keys() == given.keys()
    for path, values in given.items():
        np.testing.assert_array_equal(moments[path].count, len(values))
        np.testing.assert_allclose(moments[path].mean, values.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments[path].var, values.var(0), rtol=1e-5)


@pytest.fixture
def x(rng):
    return (3 + 2 * rng.standard_normal((24, 4))).astype(np.float32)


# --- A model called in many ways: the same moments and outputs --------------------------------------------------------


def in_train(model, x):
    model.train()
    return model(x)


def in_eval(model, x):
    model.eval()
    return model(x)


def through_a_view(model, x):
    return nnx.view(model, use_running_average=True)(x)


def through_split_and_merge(model, x):
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return jax.jit(lambda params, statistics, x: nnx.merge(graphdef, params, statistics)(x))(params, statistics, x)


def through_checkpoint(model, x):
    graphdef, state = nnx.split(model)
    return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


def through_cond(model, x):
    return nnx.cond(x.sum() < 1e9, lambda model, x: model(x), lambda model, x: x, model, x)


WAYS = {
    "as it is": None,
    "flags of the call, train": lambda model, x: model(x, use_running_average=False),
    "flags of the call, eval": lambda model, x: model(x, use_running_average=True),
    "train()": in_train,
    "eval()": in_eval,
    "nnx.view": through_a_view,
    "nnx.jit": nnx.jit(lambda model, x: model(x)),
    "nnx.remat": nnx.remat(lambda model, x: model(x)),
    "jax.jit of split and merge": through_split_and_merge,
    "jax.checkpoint of split and merge": through_checkpoint,
    "nnx.cond": through_cond,
}


@every_norm
@every_mode
@pytest.mark.parametrize("call", WAYS.values(), ids=WAYS.keys())
def test_moments_and_outputs_however_it_is_called(call, mode, norm, x):
    model = block(norm)
    outputs, moments = captured(model, x, call, mode=mode)
    expected, given = oracle(model, x, mode)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, given)


@every_norm
@every_mode
def test_capture_may_be_jitted_and_is_then_traced_once(mode, norm, x):
    model, traces = block(norm), []

    def call(model, x):
        traces.append(None)
        return model(x)

    run = nnx.jit(jaxbn.nnx.capture_moments(call, mode=mode))
    for _ in range(2):
        outputs, moments = run(model, x)
    assert len(traces) == 1
    expected, given = oracle(model, x, mode)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, given)


@every_norm
@every_mode
def test_outputs_are_what_the_stock_model_gives(mode, norm, x):
    model, stock = block(norm), block(nnx.BatchNorm)
    expected = stock(x, use_running_average=mode == "eval")
    np.testing.assert_allclose(captured(model, x, mode=mode)[0], expected, rtol=1e-5, atol=1e-5)


@every_norm
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_as_called_follows_the_model(train, norm, x):
    model = block(norm)
    call = lambda model, x: model(x, use_running_average=not train)
    outputs, moments = captured(model, x, call, mode="as_called")
    expected, given = oracle(model, x, "batch" if train else "eval")
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, given)
    np.testing.assert_allclose(outputs, call(model, x), rtol=1e-5, atol=1e-5)


@every_norm
def test_capture_does_not_poison_what_is_compiled(norm, x):
    """The same jitted function, with and without capture, in any order."""
    model = block(norm)
    run = nnx.jit(lambda model, x: model(x, use_running_average=True))
    plain, given = oracle(model, x, "eval")
    np.testing.assert_allclose(run(model, x), plain, rtol=1e-5, atol=1e-5)  # compiled before
    for mode in ("batch", "eval", "batch"):
        outputs, moments = captured(model, x, run, mode=mode)
        np.testing.assert_allclose(outputs, oracle(model, x, mode)[0], rtol=1e-5, atol=1e-5)
        assert_moments_of(moments, oracle(model, x, mode)[1])
        np.testing.assert_allclose(run(model, x), plain, rtol=1e-5, atol=1e-5)


@every_norm
def test_an_output_through_which_nothing_flows_back(norm, x):
    model = block(norm)
    outputs, moments = captured(model, x, lambda model, x: model(x).argmax(-1))
    expected, given = oracle(model, x, "batch")
    np.testing.assert_array_equal(outputs, expected.argmax(-1))
    assert_moments_of(moments, given)


@every_norm
def test_a_state_that_the_call_returns_has_no_slots(norm, x):
    model = block(norm)
    (_, state), _ = captured(model, x, lambda model, x: (model(x), nnx.state(model)))
    chex.assert_trees_all_equal_structs(nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.state(model)))


@every_norm
def test_a_model_that_the_call_returns_is_as_given(norm, x):
    model = block(norm)
    (_, returned), _ = captured(model, x, lambda model, x: (model(x), model))
    assert type(returned.norms[0]) is norm
    assert vars(returned.norms[0]).keys() == vars(model.norms[0]).keys()


# --- Stacks, shared layers, subclasses --------------------------------------------------------------------------------


def stack(norm):
    return started(nnx.vmap(lambda rngs: norm(4, rngs=rngs))(nnx.Rngs(0).split(3)))


def each(stacked):
    """The members of a stack, as `normalize` takes them."""
    for member in range(3):
        yield types.SimpleNamespace(
            **{name: getattr(stacked, name)[...][member] for name in ("mean", "var", "scale", "bias")}
        )


BY_KIND = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
ENSEMBLES = {
    "in_axes 0": nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)),
    "StateAxes": nnx.vmap(lambda layer, x: layer(x), in_axes=(BY_KIND, None)),
    "jit of vmap": nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))),
    "vmap of remat": nnx.vmap(nnx.remat(lambda layer, x: layer(x)), in_axes=(0, None)),
}


@every_norm
@every_mode
@pytest.mark.parametrize("run", ENSEMBLES.values(), ids=ENSEMBLES.keys())
def test_ensembles_keep_their_axis(run, mode, norm, x):
    model = stack(norm)
    outputs, moments = captured(model, x, run, mode=mode)
    expected = [normalize(member, np.float64(x), mode, []) for member in each(model)]
    np.testing.assert_allclose(outputs, np.stack(expected), rtol=1e-5, atol=1e-5)
    assert moments[""].mean.shape == (3, 4)
    np.testing.assert_allclose(moments[""].mean, np.stack([np.float64(x).mean(0)] * 3), rtol=1e-5)
    np.testing.assert_allclose(moments[""].var, np.stack([np.float64(x).var(0)] * 3), rtol=1e-5)


def over_layers(layer, x):
    return 2 * layer(x) + 1


def scanned(body):
    return nnx.scan(lambda x, layer: body(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)


LAYERS = {"scan": scanned(over_layers), "scan of remat": scanned(nnx.remat(over_layers))}


@every_norm
@every_mode
@pytest.mark.parametrize("run", LAYERS.values(), ids=LAYERS.keys())
def test_scanned_layers_keep_their_axis(run, mode, norm, x):
    model, given, expected = stack(norm), [], np.float64(x)
    outputs, moments = captured(model, x, lambda model, x: run(x, model), mode=mode, jit=True)
    for member in each(model):
        expected = 2 * normalize(member, expected, mode, given) + 1
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(moments[""].count, np.full((3, 4), len(x)))
    np.testing.assert_allclose(moments[""].mean, np.stack(given).mean(1), rtol=1e-5)
    np.testing.assert_allclose(moments[""].var, np.stack(given).var(1), rtol=1e-5)


@every_norm
def test_scan_over_time_pools_what_one_layer_sees(norm, x):
    model = started(norm(4, rngs=nnx.Rngs(0)))

    def call(model, x):
        model.eval()
        return nnx.scan(lambda model, x: model(x), in_axes=(nnx.StateAxes({...: None}), 0), out_axes=0)(model, x)

    outputs, moments = captured(model, x.reshape(4, 6, 4), call, mode="eval")
    expected = normalize(model, np.float64(x), "eval", [])
    np.testing.assert_allclose(outputs.reshape(24, 4), expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


@every_norm
def test_lanes_that_share_statistics_are_pooled(norm, x):
    model = started(norm(4, rngs=nnx.Rngs(0)))
    call = nnx.vmap(lambda model, x: model(x, use_running_average=True), in_axes=(nnx.StateAxes({...: None}), 0))
    outputs, moments = captured(model, x.reshape(4, 6, 4), call, mode="eval")
    np.testing.assert_allclose(
        outputs.reshape(24, 4), normalize(model, np.float64(x), "eval", []), rtol=1e-5, atol=1e-5
    )
    assert_moments_of(moments, {"": np.float64(x)})


class Shared(nnx.Module):
    def __init__(self, norm):
        self.first = self.again = norm(4, rngs=nnx.Rngs(0))
        self.unused = norm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.again(3 * self.first(x) + 1)


@every_norm
@every_mode
def test_shared_layers_are_pooled_and_those_not_reached_count_nothing(mode, norm, x):
    model, given = started(Shared(norm)), []
    outputs, moments = captured(model, x, mode=mode)
    layer = model.first
    expected = normalize(layer, 3 * normalize(layer, np.float64(x), mode, given) + 1, mode, given)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    (path,) = set(moments) - {"unused"}
    for part in moments.pop("unused"):
        np.testing.assert_array_equal(part, np.zeros(4))
    assert_moments_of(moments, {path: np.concatenate(given)})


@every_norm
def test_sequential_lists_layers_in_their_natural_order(norm, x):
    model = started(nnx.Sequential(*[norm(4, rngs=nnx.Rngs(0)) for _ in range(12)]))
    outputs, moments = captured(model, x)
    expected, given = np.float64(x), []
    for layer in model.layers:
        expected = normalize(layer, expected, "batch", given)
    assert list(moments) == [f"layers/{number}" for number in range(12)]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    assert_moments_of(moments, {f"layers/{number}": values for number, values in enumerate(given)})


@every_norm
@pytest.mark.parametrize("generations", [1, 2])
def test_subclasses_that_call_super(generations, norm, x):
    class Doubled(norm):
        def __call__(self, x, **arguments):
            return super().__call__(2 * x, **arguments) + 5

    class Again(Doubled):
        def __call__(self, x):
            return super().__call__(x, use_running_average=True)

    model = started((Doubled if generations == 1 else Again)(4, rngs=nnx.Rngs(0)))
    outputs, moments = captured(model, x)
    np.testing.assert_allclose(outputs, normalize(model, 2 * np.float64(x), "batch", []) + 5, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": 2 * np.float64(x)})


@every_norm
def test_layers_of_another_model_pass_through(norm, x):
    """A frozen teacher in the call keeps its own statistics, and is no layer of the student."""
    student, teacher = (started(norm(4, rngs=nnx.Rngs(0))) for _ in range(2))
    teacher.mean[...] += 7
    outputs, moments = captured(student, x, lambda model, x: teacher(x, use_running_average=True) + 0 * model(x))
    np.testing.assert_allclose(outputs, teacher(x, use_running_average=True), rtol=1e-5, atol=1e-5)
    assert list(moments) == [""]


@every_norm
@pytest.mark.parametrize(
    "make", [lambda m: {"net": m}, lambda m: (m,), lambda m: nnx.List([m])], ids="dict tuple List".split()
)
def test_models_in_containers(make, norm, x):
    inside = block(norm)
    expected, given = oracle(inside, x, "batch")
    outputs, moments = captured(make(inside), x, lambda model, x: model["net" if "net" in model else 0](x))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    prefix = "net" if isinstance(make(inside), dict) else "0"
    assert_moments_of(moments, {f"{prefix}/{path}": values for path, values in given.items()})


# --- Models that run on devices of their own


SPECS = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS)}


def by_split_and_merge(layers, x, *, check_vma=True, **flags):
    graphdef, state = nnx.split(layers)
    run = lambda state, x: in_turn(nnx.merge(graphdef, state), x, **flags)
    return jax.shard_map(run, mesh=mesh(), check_vma=check_vma, **SPECS)(state, x)


def by_nnx(layers, x):
    return nnx.shard_map(in_turn, mesh=mesh(), **SPECS)(layers, x)


def in_turn(layers, x, **flags):
    for layer in layers:
        x = nnx.relu(layer(x, **flags))
    return x


class OnDevices(nnx.Module):
    """A layer, and two more under shard_map."""

    def __init__(self, norm, synchronized, run):
        self.outside = norm(4, rngs=nnx.Rngs(0))
        axis_name = AXIS if synchronized else None
        self.inside = nnx.List([norm(4, axis_name=axis_name, rngs=nnx.Rngs(0)) for _ in range(2)])
        self.run = run

    def __call__(self, x, **flags):
        return self.run(self.inside, self.outside(x, **flags), **flags)


def oracle_of_devices(model, x, mode, synchronized):
    given = {path: [] for path in ("outside", "inside/0", "inside/1")}
    x = normalize(model.outside, np.float64(x), mode, given["outside"])
    for number, layer in enumerate(model.inside):
        parts = [x] if synchronized else np.split(x, DEVICES)
        normalized = [normalize(layer, part, mode, given[f"inside/{number}"]) for part in parts]
        x = np.maximum(np.concatenate(normalized), 0)
    return x, {path: np.concatenate(parts) for path, parts in given.items()}


@pytest.mark.sample(every=3)
@every_norm
@pytest.mark.parametrize(("mode", "synchronized"), [("batch", True), ("batch", False), ("eval", False)])
@pytest.mark.parametrize(
    "run",
    [by_split_and_merge, functools.partial(by_split_and_merge, check_vma=False), by_nnx],
    ids=["checked", "unchecked", "nnx.shard_map"],
)
def test_models_that_run_on_devices_of_their_own(run, synchronized, mode, norm, rng):
    x = (3 + 2 * rng.standard_normal((64, 4))).astype(np.float32)
    model = started(OnDevices(norm, synchronized, run))
    outputs, moments = captured(model, x, mode=mode, jit=True)
    expected, given = oracle_of_devices(model, x, mode, synchronized)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_moments_of(moments, given)


@pytest.mark.sample(every=3)
@every_norm
@pytest.mark.parametrize(("train", "synchronized"), [(True, True), (True, False), (False, False)])
def test_models_on_devices_of_their_own_as_called(train, synchronized, norm, rng):
    x = (3 + 2 * rng.standard_normal((64, 4))).astype(np.float32)
    model = started(OnDevices(norm, synchronized, by_split_and_merge))
    call = lambda model, x: model(x, use_running_average=not train)
    outputs, moments = captured(model, x, call, mode="as_called", jit=True)
    expected, given = oracle_of_devices(model, x, "batch" if train else "eval", synchronized)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert_moments_of(moments, given)


@pytest.mark.sample(every=5)
@every_norm
@pytest.mark.parametrize(("synchronized", "consistent"), [(True, False), (False, False), (False, True)])
def test_statistics_of_models_on_devices_of_their_own(consistent, synchronized, norm, rng):
    """Where devices do not synchronize, one pass is the exact merge of what each has seen."""
    x = (3 + 2 * rng.standard_normal((64, 4))).astype(np.float32)
    model = started(OnDevices(norm, synchronized, by_split_and_merge))
    new, _ = jaxbn.nnx.postproc(model, [x], consistent=consistent)
    _, given = oracle_of_devices(model, x, "batch", synchronized or consistent)
    layers = {"outside": new.outside, "inside/0": new.inside[0], "inside/1": new.inside[1]}
    for path, values in given.items():
        np.testing.assert_allclose(layers[path].mean[...], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layers[path].var[...], values.var(0), rtol=1e-4)


# --- Arguments of the layers ------------------------------------------------------------------------------------------


@every_norm
@every_mode
def test_other_feature_axes(mode, norm, rng):
    x = rng.standard_normal((20, 4, 3)).astype(np.float32)
    model = started(norm(4, axis=1, rngs=nnx.Rngs(0)))
    outputs, moments = captured(model, x, mode=mode)
    rows = np.float64(x).transpose(0, 2, 1).reshape(-1, 4)
    expected = normalize(model, rows, mode, []).reshape(20, 3, 4).transpose(0, 2, 1)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": rows})


def test_several_feature_axes(rng):
    x = rng.standard_normal((20, 4, 3)).astype(np.float32)
    model = jaxbn.nnx.BatchNorm((4, 3), axis=(1, 2), rngs=nnx.Rngs(0))
    assert_moments_of(captured(model, x)[1], {"": np.float64(x)})


@every_norm
def test_masks_of_the_model_count(norm, x):
    valid = np.arange(24)[:, None] % 3 > 0
    model = started(norm(4, rngs=nnx.Rngs(0)))
    call = lambda model, x: model(x, mask=valid)
    outputs, moments = captured(model, x, call)
    rows = np.float64(x[valid[:, 0]])
    assert_moments_of(moments, {"": rows})
    np.testing.assert_allclose(outputs[valid[:, 0]], normalize(model, rows, "batch", []), rtol=1e-5, atol=1e-5)


def test_masks_of_ours_weigh(x):
    weights = np.arange(24)[:, None] % 3
    moments = captured(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), x, lambda m, x: m(x, mask=weights))[1]
    assert_moments_of(moments, {"": np.repeat(np.float64(x), weights[:, 0], 0)})


@every_mode
def test_residual_and_activation_stay_in_the_layer(mode, x, rng):
    residual = rng.standard_normal(x.shape).astype(np.float32)
    model = started(jaxbn.nnx.BatchNorm(4, activation=nnx.relu, rngs=nnx.Rngs(0)))
    outputs, moments = captured(model, x, lambda model, x: model(x, residual=residual), mode=mode)
    expected = np.maximum(normalize(model, np.float64(x), mode, []) + residual, 0)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


@every_norm
@pytest.mark.parametrize("fields", [{"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False}])
def test_layers_without_parameters(fields, norm, x):
    model = norm(4, rngs=nnx.Rngs(0), **fields)
    outputs, moments = captured(model, x)
    np.testing.assert_allclose(outputs, nnx.clone(model)(x), rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


@pytest.mark.parametrize("average", [None, jaxbn.cumulative(), jaxbn.horizon(10)], ids=str)
def test_layers_with_other_averages(average, x):
    model = jaxbn.nnx.BatchNorm(4, momentum=average, rngs=nnx.Rngs(0))
    outputs, moments = captured(model, x)
    np.testing.assert_allclose(outputs.mean(0), np.zeros(4), atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


@every_norm
@pytest.mark.parametrize("mode", ["batch", "eval", "as_called"])
def test_half_precision_layers_give_what_the_model_gives(mode, norm):
    """Flax's layer rounds its input and the stored statistics to `dtype`, but not the statistics of the batch."""
    x = 100 + np.random.default_rng(0).standard_normal((64, 4))
    x = np.float32(jnp.asarray(x, jnp.bfloat16))  # so that rounding the input changes nothing
    model = norm(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.mean[...] = jnp.full(4, 100.3)
    with jax.numpy_dtype_promotion("standard"):
        outputs, moments = captured(model, x, mode=mode)
        expected = nnx.clone(model)(x, use_running_average=mode == "eval")
    assert outputs.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(outputs), np.float32(expected), rtol=2**-7, atol=1e-4)
    assert_moments_of(moments, {"": np.float64(x)})


@every_norm
def test_rounded_statistics_do_not_round_those_of_the_batch(norm):
    x = (100 + np.random.default_rng(0).standard_normal((20, 4))).astype(np.float32)
    model = norm(4, rngs=nnx.Rngs(0))
    outputs = captured(model, x)[0]
    for variable in (model.mean, model.var):
        variable.set_value(variable[...].astype(jnp.bfloat16))
    np.testing.assert_allclose(captured(model, x)[0], outputs, atol=1e-5)


@every_norm
def test_layer_trained_over_devices_is_measured_on_one(norm, x):
    """Its axis is not there; the batch it is given is the whole batch."""
    model = started(norm(4, axis_name="devices", rngs=nnx.Rngs(0)))
    outputs, moments = captured(model, x)
    np.testing.assert_allclose(outputs, normalize(model, np.float64(x), "batch", []), rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


@every_norm
def test_layer_over_lanes_normalizes_with_all_of_them(norm, x):
    model = started(norm(4, axis_name="lanes", rngs=nnx.Rngs(0)))
    call = nnx.vmap(lambda model, x: model(x), in_axes=(nnx.StateAxes({...: None}), 0), axis_name="lanes")
    outputs, moments = captured(model, x.reshape(4, 6, 4), call)
    expected = normalize(model, np.float64(x), "batch", [])
    np.testing.assert_allclose(outputs.reshape(24, 4), expected, rtol=1e-5, atol=1e-5)
    assert_moments_of(moments, {"": np.float64(x)})


# --- Errors, and what is leant on in Flax -----------------------------------------------------------------------------


def test_errors_of_capture(x):
    with pytest.raises(ValueError, match="'train' is none of 'batch', 'eval', 'as_called'"):
        jaxbn.nnx.capture_moments(mode="train")
    with pytest.raises(ValueError, match="no normalization layer"):
        jaxbn.nnx.capture_moments()(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), x)
    model = block(nnx.BatchNorm)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the loader broke"):
        jaxbn.nnx.capture_moments(fails)(model, x)
    chex.assert_trees_all_equal(snapshot(model)[1], before[1])
    assert nnx.graphdef(model) == before[0]


def fails(model, x):
    model(x)
    raise RuntimeError("the loader broke")


@every_norm
def test_a_call_that_casts_all_of_its_variables_is_told(norm, x):
    def call(model, x):
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state))(x)

    with pytest.raises(TypeError, match="Cast only the floating-point leaves"), jax.numpy_dtype_promotion("standard"):
        jaxbn.nnx.capture_moments(call)(block(norm), x)


@every_norm
def test_flax_lets_the_class_of_a_clone_be_replaced(norm):
    """The clone alone changes; its graph says so, and knows the static layer; equal models have equal graphs."""
    model = norm(4, rngs=nnx.Rngs(0))
    before = nnx.graphdef(model)
    graphs = {}
    for attempt in range(2):
        for mode in ("batch", "eval"):
            copy = nnx.clone(model)
            layer = Layer("", (4,), mode)
            capture._hook_layer(copy, Slot(layer.positions(), None, layer))
            graphs[attempt, mode] = nnx.graphdef(copy)
            merged = nnx.merge(*nnx.split(copy))
            assert type(merged) is type(copy) and isinstance(merged, norm)
            assert merged.jaxbn_layer == layer
    assert type(model) is norm and nnx.graphdef(model) == before
    assert graphs[0, "batch"] == graphs[1, "batch"] and hash(graphs[0, "batch"]) == hash(graphs[1, "batch"])
    assert len({before, *graphs.values()}) == 3


@every_norm
def test_flax_carries_the_slot_wherever_it_carries_statistics(norm):
    copy = nnx.clone(norm(4, rngs=nnx.Rngs(0)))
    positions = np.arange(4)
    capture._hook_layer(copy, Slot(positions, None, Layer("", (4,), "batch")))
    _, statistics, rest = nnx.split(copy, nnx.BatchStat, ...)
    assert set(statistics) == {"mean", "var", "jaxbn_slot"}
    assert "jaxbn_slot" not in rest
    np.testing.assert_array_equal(statistics["jaxbn_slot"][...], positions)


def test_flax_reads_no_more_of_a_layer_than_the_stand_in_has(x):
    """`nnx.BatchNorm.__call__` on a namespace gives, to the last bit, what it gives on a layer."""
    layer = started(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    fields = {name: getattr(layer, name) for name in capture._STOCK_FIELDS}
    statistics = {"mean": layer.mean[...], "var": layer.var[...]}  # arrays, where a layer has variables
    stand_in = types.SimpleNamespace(
        **fields, **statistics, scale=layer.scale, bias=layer.bias, use_running_average=True
    )
    np.testing.assert_array_equal(nnx.BatchNorm.__call__(stand_in, x), layer(x, use_running_average=True))
