"""Keys of moments that hold the method of a layer, through jit and other calls; names and defaults of fields."""

import copy
import pickle
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from own_method import MixedNorm, NNXMixedNorm, mixed_norm

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.framework.layer_paths import LayerPath, by_name, contents_of, method_with

CHANNELS, ROWS = 3, 8
X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (ROWS, CHANNELS)), jnp.float32)


def floor_norm(*, floor=100.0, momentum=0.99):
    """A method with the statistics of batch norm, so that their names do not identify it; variance at least `floor`."""
    base = jaxbn.batch_norm(momentum=momentum)

    def postproc(state, moments):
        new = base.postproc(state, moments)
        return new._replace(var=jnp.maximum(new.var, floor))

    return base._replace(postproc=postproc)


class FloorNorm(jaxbn.linen.Norm):
    factory = staticmethod(floor_norm)


class Net(nn.Module):
    """A layer that is always called, and one that may be called in initialization alone."""

    calls_both: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        y = FloorNorm(use_running_average=not train, name="floor")(x)
        unused = MixedNorm(use_running_average=not train, name="unused")
        return unused(y) if self.is_initializing() or self.calls_both else y


def initial(layer, x=X):
    return layer.init(jax.random.key(0), x)


def captured(layer, variables, x=X):
    return jaxbn.linen.capture_moments(layer.apply)(variables, x)[1]


def test_programs_of_one_method_are_not_used_for_another():
    """The trees of the arguments are equal but for the methods."""
    move, install = jax.jit(jaxbn.linen.move_averages), jax.jit(jaxbn.linen.install_moments)
    for momentum in (0.9, 0.5):
        layer = jaxbn.linen.BatchNorm(use_running_average=True, momentum=momentum)
        variables = initial(layer)
        moved = move(variables, captured(layer, variables))["batch_stats"]["mean"]
        np.testing.assert_allclose(moved, (1 - momentum) * np.float64(X).mean(0), rtol=1e-5)
    for floor in (50.0, 100.0):
        layer = FloorNorm(use_running_average=True, floor=floor)
        variables = initial(layer)
        installed = install(variables, captured(layer, variables))
        np.testing.assert_array_equal(installed["batch_stats"]["var"], floor)


def test_keys_of_layers_made_anew_are_equal():
    def layer(value):
        activation = lambda x: x * value
        return jaxbn.linen.BatchNorm(
            use_running_average=True,
            momentum=jaxbn.scheduled(lambda step: 1 - value / (step + 2)),
            activation=activation,
            epsilon=np.float32(value),
        )

    variables = initial(layer(0.5))
    one, same, other = (captured(layer(value), variables) for value in (0.5, 0.5, 0.25))
    (key,), (like,), (unlike,) = one, same, other
    assert key == like == "" and not key != like and hash(key) == hash(like) == hash("")
    assert key != unlike and unlike == "" and not unlike != ""
    merged = {path: jaxbn.merge(one[path], same[path]) for path in one}
    np.testing.assert_array_equal(merged[""].count, 2 * ROWS)


def test_contents_of_functions_that_refer_to_themselves():
    def again(n):
        return again(n - 1) if n else 0

    assert contents_of(again) == contents_of(again)
    assert contents_of(jnp.ones(2)) != contents_of(jnp.zeros(2))
    assert contents_of({"a": [1, (2,)]}) == contents_of({"a": [1, (2,)]}) != contents_of({"a": [1, (3,)]})


def test_layers_that_were_not_reached_stay():
    net = Net()
    variables = initial(net)
    moments = captured(net, variables)
    assert {path: float(found.count.max()) for path, found in moments.items()} == {"floor": ROWS, "unused": 0}
    before = variables["batch_stats"]["unused"]
    for change in (jaxbn.linen.install_moments, jaxbn.linen.move_averages):
        changed = jax.jit(change)(variables, moments)["batch_stats"]
        jax.tree.map(np.testing.assert_array_equal, changed["unused"], before)
    estimated, report = jaxbn.linen.postproc(net.apply, variables, [X])
    jax.tree.map(np.testing.assert_array_equal, estimated["batch_stats"]["unused"], before)
    assert report.not_reached == ("unused",) and (estimated["batch_stats"]["floor"]["var"] == 100).all()


def test_a_saved_accumulator_is_installed_by_the_methods():
    """Pickled, its keys are plain strings; the state knows the layers."""
    loss_fn = lambda outputs, batch: (jnp.mean(outputs**2), {})
    steps = jaxbn.linen.make_steps(Net(calls_both=True), loss_fn, optax.sgd(0.1), inputs=lambda batch: batch)
    state = steps.init(jax.random.key(0), X)
    acc = steps.postproc_step(state, steps.start(state, X), X)
    restored = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, acc)))
    for one in (acc, restored):
        frozen, _ = steps.finalize(state, one)
        np.testing.assert_array_equal(frozen.variables["batch_stats"]["floor"]["var"], 100)


def test_a_method_of_which_only_the_name_is_known():
    """Ours install alike whatever their arguments; one's own is an error, not batch norm."""
    variables = initial(FloorNorm(use_running_average=True))

    def traced(floor):
        layer = FloorNorm(use_running_average=True, floor=floor)
        return jaxbn.linen.install_moments(variables, captured(layer, variables))

    with pytest.raises(ValueError, match="Only the name of the method of a layer is known, floor_norm"):
        jax.jit(traced)(7.0)
    assert type(by_name("a", "batch_renorm")) is str
    moments = {by_name("", "floor_norm"): jaxbn.batch_moments(X)}
    with pytest.raises(ValueError, match="use the keys that capture_moments returns"):
        jaxbn.linen.install_moments(variables, moments)


def test_keys_through_copies_and_files():
    """A copy knows the method; of a file no more than the name is left, which is an error where it matters."""
    layer = FloorNorm(use_running_average=True)
    variables = initial(layer)
    moments = captured(layer, variables)
    installed = jaxbn.linen.install_moments(variables, copy.deepcopy(moments))
    np.testing.assert_array_equal(installed["batch_stats"]["var"], 100)
    restored = pickle.loads(pickle.dumps(moments))
    assert restored.keys() == {""}
    with pytest.raises(ValueError, match="floor_norm.*read from a file"):
        jaxbn.linen.install_moments(variables, restored)
    assert type(pickle.loads(pickle.dumps(LayerPath("a", partial(jaxbn.batch_renorm))))) is str


def test_a_momentum_does_not_take_the_place_of_a_method_of_ones_own():
    layer = FloorNorm(use_running_average=True)
    variables = initial(layer)
    with pytest.raises(ValueError, match="of another method, floor_norm. Leave momentum out"):
        jaxbn.linen.move_averages(variables, captured(layer, variables), 0.9)


def learning_norm(*, share=0.5):
    """Keeps a share of the gradient of its scale in its mean."""

    def backward(params, state, grads):
        return state._replace(mean=share * state.mean + grads.scale)

    return jaxbn.batch_norm(momentum=None)._replace(backward=backward)


class LearningNorm(jaxbn.linen.Norm):
    factory = staticmethod(learning_norm)


class NNXLearningNorm(jaxbn.nnx.Norm):
    factory = staticmethod(learning_norm)


def test_a_method_that_learns_from_the_gradient():
    """In the steps of both frameworks, and in update_backward of NNX, where layers hold their method."""
    loss_fn = lambda outputs, batch: (jnp.mean(outputs**3), {})

    class Learning(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return LearningNorm(use_running_average=not train, share=0.25, name="norm")(x)

    def loss_of(params):
        return loss_fn(jaxbn.batch_norm(momentum=None).train(params, transform.init(CHANNELS)[1], X)[0], X)[0]

    transform = learning_norm(share=0.25)
    params, state = transform.init(CHANNELS)
    expected = transform.backward(params, state, jax.grad(loss_of)(params)).mean
    make = partial(jaxbn.linen.make_steps, loss_fn=loss_fn, optimizer=optax.sgd(0.1), inputs=lambda batch: batch)
    steps = make(Learning())
    stepped, _ = jax.jit(steps.train_step)(steps.init(jax.random.key(0), X), X)
    np.testing.assert_allclose(stepped.batch_stats["norm"]["mean"], expected, rtol=1e-5)
    model = nnx.Sequential(NNXLearningNorm(CHANNELS, share=0.25, rngs=nnx.Rngs(0)))
    grads = nnx.grad(lambda model: loss_fn(model(X), X)[0])(model)
    jaxbn.nnx.update_backward(model, grads)
    np.testing.assert_allclose(model.layers[0].mean[...], expected, rtol=1e-5)


class _Params(NamedTuple):
    mix: Any


def clashing_norm(*, mix=0.5):
    base = jaxbn.batch_norm()

    def init(feature_shape, *, dtype=jnp.float32):
        params, state = base.init(feature_shape, dtype=dtype)
        return _Params(jnp.full_like(params.scale, mix)), state

    def evaluate(params, state, x):
        return jnp.broadcast_to(params.mix, x.shape) * x

    return base._replace(init=init, eval=evaluate)


class ClashingNorm(jaxbn.linen.Norm):
    factory = staticmethod(clashing_norm)


class NNXClashingNorm(jaxbn.nnx.Norm):
    factory = staticmethod(clashing_norm)


def mix_norm(*, share=0.5):
    return clashing_norm(mix=share)


class MixNorm(jaxbn.linen.Norm):
    factory = staticmethod(partial(mix_norm))


class NNXMixNorm(jaxbn.nnx.Norm):
    factory = staticmethod(partial(mix_norm))


def test_reserved_names_and_initializers_without_a_variable():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="clashing_norm has a parameter or a statistic 'mix'"):
        initial(ClashingNorm(use_running_average=True))
    with pytest.raises(ValueError, match="clashing_norm has a parameter or a statistic 'mix'"):
        NNXClashingNorm(CHANNELS, rngs=rngs)
    assert set(initial(MixNorm(use_running_average=True))["params"]) == {"mix"}
    NNXMixNorm(CHANNELS, rngs=rngs)
    for field in ("scale_init", "bias_init"):
        given = {field: nn.initializers.constant(2.0)}
        with pytest.raises(ValueError, match=f"{field}=.*mix_norm learns mix"):
            initial(MixNorm(use_running_average=True, **given))
        with pytest.raises(ValueError, match=f"{field}=.*mix_norm learns mix"):
            NNXMixNorm(CHANNELS, **given, rngs=rngs)
    with pytest.raises(ValueError, match="scale_metadata=.*mix_norm learns mix"):
        NNXMixNorm(CHANNELS, scale_metadata={"sharding": ("model",)}, rngs=rngs)


def test_a_learned_parameter_is_not_dropped_on_the_way_to_another_method():
    plain, own = jaxbn.linen.BatchNorm(use_running_average=True), MixedNorm(use_running_average=True)
    with pytest.raises(ValueError, match="'params/mix' of the variables have no counterpart"):
        jaxbn.linen.convert_norms(initial(own), like=initial(plain))
    with pytest.raises(ValueError, match="'mix' of the model as it was have no counterpart"):
        jaxbn.nnx.replace(NNXMixedNorm(CHANNELS, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm)


def test_summary_names_all_that_a_method_learns():
    own, few = MixedNorm(use_running_average=True), MixNorm(use_running_average=True)
    assert "  scale, bias, mix  " in jaxbn.linen.summary(initial(own))
    assert "  mix  " in jaxbn.linen.summary(initial(few)) and "scale" not in jaxbn.linen.summary(initial(few))
    model = NNXMixNorm(CHANNELS, rngs=nnx.Rngs(0))
    assert "  scale, bias, mix  " in jaxbn.nnx.summary(NNXMixedNorm(CHANNELS, rngs=nnx.Rngs(0)))
    assert "  mix  " in jaxbn.nnx.summary(jaxbn.nnx.replace(model, NNXMixNorm))


def test_defaults_of_classes_that_inherit_from_a_layer():
    class Mixin:
        pass

    class Mixed(Mixin, jaxbn.linen.Norm):
        factory = staticmethod(mixed_norm)

    class Again(MixedNorm):
        factory = staticmethod(jaxbn.batch_norm)

    class NNXAgain(NNXMixedNorm):
        factory = staticmethod(jaxbn.batch_norm)

    class NNXWritten(jaxbn.nnx.Norm):
        factory = staticmethod(mixed_norm)

        def __init__(self, num_features, *, share=0.25, **shared):
            self.share = share
            super().__init__(num_features, **shared)

    rngs = nnx.Rngs(0)
    assert MixedNorm().momentum == NNXMixedNorm(CHANNELS, rngs=rngs).momentum == Mixed().momentum == 0.9
    written = NNXWritten(CHANNELS, floor=2.0, rngs=rngs)
    assert (written.momentum, written.share, written.floor, written.mix[0]) == (0.9, 0.25, 2.0, 0.25)
    assert Again().momentum == NNXAgain(CHANNELS, rngs=rngs).momentum == 0.99
    assert Mixed(True, -1, 0.5).momentum == 0.5
    with pytest.raises(ValueError, match="share=0.5, and its method batch_norm does not take share"):
        initial(Again(use_running_average=True, share=0.5))
    with pytest.raises(TypeError, match="does not take share="):
        NNXAgain(CHANNELS, share=0.5, rngs=rngs)


def test_names_of_statistics_determine_the_class_of_a_state():
    """A state with further leaves is a custom method, even if it contains all leaves of one of ours."""
    names = frozenset(jaxbn.MovingAverageBatchNormState._fields)
    assert method_with(names).backward is not None
    assert method_with(frozenset({"mean", "var"})).backward is None
    assert method_with(names | {"floor"}) is None
