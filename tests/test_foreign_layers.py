"""Layers that are batch norm and neither Flax's nor jaxbn's: registered, in a bridge, or an error that names them.

Each serves as the layer of one network; every function of jaxbn must treat it like Flax's own layer.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

EPSILON = 1e-3


class Copied(nn.Module):
    """As people copy Flax's layer: the same variables, a flag of another name, and float32."""

    axis: int = -1
    momentum: float = 0.9
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x, training: bool):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        used = mean.value, var.value
        if training:
            axes = tuple(range(x.ndim - 1))
            used = x.mean(axes), x.var(axes)
            if not self.is_initializing():
                for variable, new in zip((mean, var), used, strict=True):
                    variable.value = self.momentum * variable.value + (1 - self.momentum) * new
        return (x - used[0]) * jax.lax.rsqrt(used[1] + self.epsilon) * scale + bias


class Renamed(nn.Module):
    """A layer with other names for all variables, one more variable, and Flax's flag as a field or an argument."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None):
        evaluates = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "batch_norm_running_mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "batch_norm_running_var", jnp.ones, shape)
        steps = self.variable("batch_stats", "steps", jnp.zeros, ())
        gamma, beta = self.param("gamma", nn.initializers.ones, shape), self.param("beta", nn.initializers.zeros, shape)
        used = mean.value, var.value
        if not evaluates:
            used = x.mean(0), x.var(0)
            if not self.is_initializing():
                mean.value, var.value = (
                    0.9 * old + 0.1 * new for old, new in zip((mean.value, var.value), used, strict=True)
                )
                steps.value = steps.value + 1
        return (x - used[0]) * jax.lax.rsqrt(used[1] + EPSILON) * gamma + beta


class CopiedNNX(nnx.Module):
    """In NNX, with an argument to train."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.axis, self.momentum, self.eps = -1, 0.9, EPSILON
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x, train: bool = False):
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = x.mean(0), x.var(0)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return (x - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]


class RenamedNNX(CopiedNNX):
    """Told to train by an attribute, with other names."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, rngs=rngs)
        self.running_mean, self.running_var, self.gamma, self.beta = self.mean, self.var, self.scale, self.bias
        del self.mean, self.var, self.scale, self.bias
        self.training = False

    def __call__(self, x):
        mean, var = self.running_mean[...], self.running_var[...]
        if self.training:
            mean, var = x.mean(0), x.var(0)
            self.running_mean[...] = 0.9 * self.running_mean[...] + 0.1 * mean
            self.running_var[...] = 0.9 * self.running_var[...] + 0.1 * var
        return (x - mean) * jax.lax.rsqrt(var + EPSILON) * self.gamma[...] + self.beta[...]


class UnknownLinen(nn.Module):
    """Not registered."""

    @nn.compact
    def __call__(self, x, training: bool):
        mean = self.variable("batch_stats", "running_mean", jnp.zeros, x.shape[-1:])
        if training and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - (x.mean(0) if training else mean.value)


class UnknownNNX(nnx.Module):
    """Not registered."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.running_mean = nnx.BatchStat(jnp.zeros(features))

    def __call__(self, x):
        return x - self.running_mean[...]


jaxbn.linen.register_batch_norm(Copied, evaluation={"training": False})
RENAMED = {"mean": "batch_norm_running_mean", "var": "batch_norm_running_var", "scale": "gamma", "bias": "beta"}
jaxbn.linen.register_batch_norm(
    Renamed, evaluation={"use_running_average": True}, **RENAMED, axis=-1, epsilon=EPSILON, momentum=0.9
)
jaxbn.nnx.register_batch_norm(CopiedNNX, evaluation={"train": False}, epsilon="eps")
RENAMED_NNX = {"mean": "running_mean", "var": "running_var", "scale": "gamma", "bias": "beta"}
jaxbn.nnx.register_batch_norm(RenamedNNX, evaluation={"training": False}, **RENAMED_NNX, epsilon="eps")

STOCK = {"momentum": 0.9, "epsilon": EPSILON}


def bridged(layer: Any, x: Any, train: bool) -> Any:
    return nnx.bridge.to_linen(layer, x.shape[-1], **STOCK, name="norm")(x, use_running_average=not train)


# How each layer of linen is made and called, in a compact module.
LINEN = {
    "stock": lambda x, train: nn.BatchNorm(**STOCK, use_running_average=not train, name="norm")(x),
    "copied": lambda x, train: Copied(name="norm")(x, training=train),
    "renamed by field": lambda x, train: Renamed(name="norm", use_running_average=not train)(x),
    "renamed by argument": lambda x, train: Renamed(name="norm")(x, not train),
    "bridged stock": functools.partial(bridged, nnx.BatchNorm),
    "bridged jaxbn": functools.partial(bridged, jaxbn.nnx.BatchNorm),
    "unknown": lambda x, train: UnknownLinen(name="norm")(x, train),
}
FOREIGN = [name for name in LINEN if name not in ("stock", "unknown")]


class Net(nn.Module):
    """A layer between two linear ones."""

    kind: str

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(3, name="first")(x)
        return nn.Dense(2, name="last")(nn.relu(LINEN[self.kind](x, train)))


@pytest.fixture(autouse=True)
def as_others_write():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).standard_normal((3, 8, 4)).astype(np.float32)
    return [jnp.asarray(2 + 3 * one) for one in x]


def model(kind, data):
    net = Net(kind)
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), data[0])
    evaluate = functools.partial(net.apply, train=False)
    train = functools.partial(net.apply, train=True, mutable=["batch_stats"])
    return net, variables, evaluate, train


def names(kind, tree):
    """Variables of a layer by the names that they have in Flax's."""
    own = {theirs: name for name, theirs in RENAMED.items()} if kind.startswith("renamed") else {}
    leaves = tree["norm"] if "norm" in tree else tree
    return {own.get(name, name): leaf for name, leaf in leaves.items() if name != "steps"}


def close(got, wanted, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), got, wanted)


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_pass_gives_the_statistics_of_flaxs_layer(kind, data):
    found = {}
    for each in ("stock", kind):
        _, variables, evaluate, _ = model(each, data)
        new, report = jaxbn.linen.postproc(evaluate, variables, data)
        found[each] = names(each, new["batch_stats"])
        assert report.layers["norm"].kind == ("batch_norm", EPSILON)
        assert jax.tree.structure(new) == jax.tree.structure(variables)
    close(found[kind], found["stock"])


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("mode", ["batch", "eval", "as_called"])
def test_capture_runs_the_layer_in_each_mode(kind, mode, data):
    _, variables, evaluate, train = model(kind, data)
    variables, _ = jaxbn.linen.postproc(evaluate, variables, data)
    (y, updates), moments = jax.jit(jaxbn.linen.capture_moments(train, mode=mode))(variables, data[0])
    (trained, moved) = jax.jit(train)(variables, data[0])
    close(y, trained if mode != "eval" else jax.jit(evaluate)(variables, data[0]))
    close(updates, moved if mode == "as_called" else {"batch_stats": variables["batch_stats"]})
    x = data[0] @ variables["params"]["first"]["kernel"] + variables["params"]["first"]["bias"]
    close((moments["norm"].mean, moments["norm"].var), (x.mean(0), x.var(0)))


@pytest.mark.parametrize("kind", FOREIGN)
def test_gradients_flow_through_the_statistics_of_the_batch(kind, data):
    def gradient(each):
        _, variables, evaluate, _ = model(each, data)
        capture = jaxbn.linen.capture_moments(evaluate, mode="batch")
        loss = lambda x: (capture(variables, x)[0] ** 3).sum()  # noqa: E731  of one line
        return jax.jit(jax.grad(loss))(data[0])

    close(gradient(kind), gradient("stock"), rtol=1e-4)


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_is_adapted_and_frozen_as_flaxs_layer(kind, data):
    def outputs(each):
        _, variables, evaluate, train = model(each, data)
        frozen, updates = jaxbn.linen.freeze_layers(train, "norm")(variables, data[0])
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
        adapted = [
            jaxbn.linen.adapt(evaluate, **how)(variables, data[0])
            for how in ({"prior_count": 8}, {"example_weight": 0.0})
        ]
        return frozen, adapted

    close(outputs(kind), outputs("stock"))


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_is_folded(kind, data):
    _, variables, evaluate, train = model(kind, data)
    variables, _ = jaxbn.linen.postproc(evaluate, variables, data)
    call, folded, report = jaxbn.linen.fold(evaluate, variables, data[0])
    assert report.folded == ("norm",) or list(report.folded) == ["norm"]
    assert set(folded) == {"params"} and set(folded["params"]) == {"first", "last"}
    close(call(folded, data[1]), evaluate(variables, data[1]))
    _, _, report = jaxbn.linen.fold(lambda v, x: train(v, x)[0], variables, data[0], tolerance=np.inf)
    assert "statistics of its batch" in report.layers["norm"].reason


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_layer_takes_its_place(kind, data):
    net, variables, evaluate, _ = model(kind, data)
    variables, _ = jaxbn.linen.postproc(evaluate, variables, data)
    new = jaxbn.linen.replace(net, jaxbn.linen.BatchRenorm)
    start = functools.partial(new.init, train=False)
    converted = jaxbn.linen.convert_norms(variables, like=start(jax.random.key(0), data[0]))
    assert sorted(converted["batch_stats"]["norm"]) == ["mean", "step", "var"]
    close(new.apply(converted, data[1], train=False), evaluate(variables, data[1]))
    _, updates = new.apply(converted, data[0], train=True, mutable=["batch_stats"])
    assert updates["batch_stats"]["norm"]["step"] == 1


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_is_diagnosed_listed_and_served(kind, data, tmp_path):
    _, variables, evaluate, train = model(kind, data)
    found = jaxbn.linen.diagnose(evaluate, variables, data)
    assert "norm" in str(found)
    assert "batch_norm  0.001" in jaxbn.linen.summary(variables, evaluate, data[0])
    with pytest.raises(ValueError, match="'norm' normalizes with the statistics of the batch"):
        jaxbn.serving.export(tmp_path / "net", lambda v, x: train(v, x)[0], variables, data[0])


def test_running_averages_and_steps(data):
    net, variables, _, train = model("copied", data)
    _, moments = jaxbn.linen.capture_moments(train, mode="as_called")(variables, data[0])
    close(jaxbn.linen.move_averages(variables, moments)["batch_stats"], train(variables, data[0])[1]["batch_stats"])
    loss = lambda y, batch: (y.sum(), {})  # noqa: E731  of one line
    steps = jaxbn.linen.make_steps(net, loss, optax.sgd(0.1), inputs=lambda x: x)
    state = steps.init(jax.random.key(0), data[0])
    frozen, _ = steps.finalize(state, steps.postproc_step(state, steps.start(state, data[0]), data[0]))
    assert frozen.info.layer("norm").epsilon == EPSILON


LINEN_CALLS = {
    "postproc": lambda net, v, call, train, data: jaxbn.linen.postproc(call, v, data),
    "capture": lambda net, v, call, train, data: jaxbn.linen.capture_moments(train, mode="eval")(v, data[0]),
    "diagnose": lambda net, v, call, train, data: jaxbn.linen.diagnose(call, v, data),
    "adapt": lambda net, v, call, train, data: jaxbn.linen.adapt(call, prior_count=1)(v, data[0]),
    "freeze": lambda net, v, call, train, data: jaxbn.linen.freeze_layers(train, "")(v, data[0]),
    "fold": lambda net, v, call, train, data: jaxbn.linen.fold(call, v, data[0]),
    "replace": lambda net, v, call, train, data: jaxbn.linen.replace(net, jaxbn.linen.BatchNorm).apply(
        v, data[0], train=False
    ),
    "summary": lambda net, v, call, train, data: jaxbn.linen.summary(v, call, data[0]),
    "steps": lambda net, v, call, train, data: jaxbn.linen.make_steps(
        net, lambda y, b: (y.sum(), {}), optax.sgd(0.1), inputs=lambda x: x
    ).init(jax.random.key(0), data[0]),
}


class Mixed(nn.Module):
    """A known layer next to an unknown one."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return UnknownLinen(name="other")(x, train)


@pytest.mark.parametrize("name", LINEN_CALLS)
def test_what_is_not_known_is_an_error_or_a_warning_that_names_it(name, data):
    net, variables, evaluate, train = model("unknown", data)
    text = r"'norm' \([\w.]*UnknownLinen\) keeps running statistics.*jaxbn.linen.register_batch_norm\("
    for _ in range(2):  # the second time from what JAX has kept
        with pytest.raises(ValueError, match=text):
            LINEN_CALLS[name](net, variables, evaluate, train, data)
    net = Mixed()
    variables = net.init(jax.random.key(0), data[0], train=False)
    evaluate = functools.partial(net.apply, train=False)
    train = functools.partial(net.apply, train=True, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match=text.replace("norm'", "other'")):
        LINEN_CALLS[name](net, variables, evaluate, train, data)


def test_a_call_that_trains_what_is_not_known_is_not_exported(data, tmp_path):
    _, variables, evaluate, train = model("unknown", data)
    with pytest.raises(ValueError, match="'norm' normalizes with the statistics of the batch"):
        jaxbn.serving.export(tmp_path / "net", lambda v, x: train(v, x)[0], variables, data[0])
    jaxbn.serving.export(tmp_path / "net", evaluate, variables, data[0])


def test_statistics_of_weights_are_no_layer(data):
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.SpectralNorm(nn.Dense(3))(x, update_stats=train))

    net = Spectral()
    variables = net.init(jax.random.key(0), data[0], train=False)
    _, report = jaxbn.linen.postproc(functools.partial(net.apply, train=False), variables, data)
    assert list(report.layers) == ["BatchNorm_0"]


def test_a_whole_network_in_a_bridge_is_the_clear_error(data):
    class Inside(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs)])

        def __call__(self, x):
            return self.norms[0](x, use_running_average=True)

    net = nnx.bridge.ToLinen(Inside)
    with pytest.raises(ValueError, match=r"'norms/0' \(.*ToLinen of .*Inside\) keeps running statistics"):
        jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data[0]), data)


def test_what_is_said_of_a_class_is_checked():
    register = jaxbn.linen.register_batch_norm
    with pytest.raises(TypeError, match="not a class of layers"):
        register(nnx.BatchNorm, evaluation={"use_running_average": True})
    with pytest.raises(ValueError, match="evaluation= names 'train'"):
        register(UnknownLinen, evaluation={"train": False})
    with pytest.raises(ValueError, match="no field 'epsilon'"):
        register(UnknownLinen, evaluation={"training": False}, axis=-1)
    with pytest.raises(ValueError, match="is already registered with other arguments"):
        register(Copied, evaluation={"training": False}, epsilon=1e-5)
    assert register(Copied, evaluation={"training": False}) is Copied


def bridged_to_nnx(layer, features, rngs):
    return nnx.bridge.ToNNX(layer(**STOCK), rngs=rngs).lazy_init(jnp.ones((2, features)), use_running_average=True)


# How each layer of NNX is made, and called to train or to evaluate.
NNX = {
    "stock": (
        lambda rngs: nnx.BatchNorm(3, **STOCK, rngs=rngs),
        lambda m, x, train: m(x, use_running_average=not train),
    ),
    "copied": (lambda rngs: CopiedNNX(3, rngs=rngs), lambda m, x, train: m(x, train=train)),
    "renamed": (lambda rngs: RenamedNNX(3, rngs=rngs), lambda m, x, train: m(x)),
    "bridged stock": (
        lambda rngs: bridged_to_nnx(nn.BatchNorm, 3, rngs),
        lambda m, x, train: m(x, use_running_average=not train, mutable=["batch_stats"]),
    ),
    "bridged jaxbn": (
        lambda rngs: bridged_to_nnx(jaxbn.linen.BatchNorm, 3, rngs),
        lambda m, x, train: m(x, use_running_average=not train, mutable=["batch_stats"]),
    ),
    "unknown": (lambda rngs: UnknownNNX(3, rngs=rngs), lambda m, x, train: m(x)),
}
FOREIGN_NNX = [name for name in NNX if name not in ("stock", "unknown")]


class NetNNX(nnx.Module):
    """A layer between two linear ones."""

    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.kind = kind
        self.first, self.last = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.norm = NNX[kind][0](rngs)

    def __call__(self, x, train=False):
        if self.kind == "renamed" and hasattr(self.norm, "training"):
            self.norm.training = train
        return self.last(nnx.relu(NNX[self.kind][1](self.norm, self.first(x), train)))


def evaluate_nnx(model, x):
    return model(x)


def train_nnx(model, x):
    return model(x, train=True), nnx.state(model, nnx.BatchStat)


def statistics_nnx(model):
    own = {theirs: name for name, theirs in RENAMED_NNX.items()} if model.kind == "renamed" else {}
    state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["norm"]
    return {own.get(name, name): leaf for name, leaf in state.items()}


@pytest.mark.parametrize("kind", FOREIGN_NNX)
def test_nnx_the_pass_and_capture_give_what_flaxs_layer_gives(kind, data):
    found = {}
    for each in ("stock", kind):
        model, report = jaxbn.nnx.postproc(NetNNX(each), data)
        found[each] = [statistics_nnx(model)]
        assert report.layers["norm"].kind == ("batch_norm", EPSILON)
        for mode in ("batch", "eval", "as_called"):
            (y, state), moments = nnx.jit(jaxbn.nnx.capture_moments(train_nnx, mode=mode))(model, data[0])
            found[each] += [y, moments["norm"].mean, moments["norm"].var]
            moved = nnx.clone(model)
            trained = moved(data[0], train=True)
            close(y, trained if mode != "eval" else model(data[0]))
            close(
                nnx.to_pure_dict(state),
                nnx.to_pure_dict(nnx.state(moved if mode == "as_called" else model, nnx.BatchStat)),
            )
        found[each] += [
            jaxbn.nnx.adapt(prior_count=8)(model, data[1]),
            jaxbn.nnx.adapt(example_weight=0.0)(model, data[1]),
        ]
    close(found[kind], found["stock"])


@pytest.mark.parametrize("kind", FOREIGN_NNX)
def test_nnx_it_is_frozen_folded_and_moved(kind, data):
    model, _ = jaxbn.nnx.postproc(NetNNX(kind), data)
    frozen = jaxbn.nnx.freeze_layers(model, "norm")
    close(frozen(data[0], train=True), model(data[0]))
    close(statistics_nnx(frozen), statistics_nnx(model))
    _, moments = jaxbn.nnx.capture_moments(train_nnx, mode="as_called")(model, data[0])
    trained = nnx.clone(model)
    trained(data[0], train=True)
    close(statistics_nnx(jaxbn.nnx.move_averages(model, moments)), statistics_nnx(trained))
    folded, report = jaxbn.nnx.fold(model, data[0])
    close(folded(data[1]), model(data[1]))
    if kind.startswith("bridged"):
        assert "fold does not support its class" in report.layers["norm"].reason
    else:
        assert report.layers["norm"].folded
        assert not nnx.to_pure_dict(nnx.state(folded, nnx.BatchStat))


@pytest.mark.parametrize("kind", FOREIGN_NNX)
def test_nnx_another_layer_takes_its_place(kind, data):
    model, _ = jaxbn.nnx.postproc(NetNNX(kind), data)
    new = jaxbn.nnx.replace(model, jaxbn.nnx.BatchRenorm)
    if kind == "renamed":
        new.norm.use_running_average = True  # the attribute that told the old one is gone
    close(new(data[1]), model(data[1]))
    if kind != "renamed":
        new(data[0], train=True)
        assert new.norm.step[...] == 1
    folded, report = jaxbn.nnx.fold(new, data[0])
    assert report.layers["norm"].folded
    again = jaxbn.nnx.replace(new, nnx.BatchNorm)
    assert isinstance(again.norm, nnx.BatchNorm)


@pytest.mark.parametrize("kind", FOREIGN_NNX)
def test_nnx_it_is_diagnosed_listed_and_served(kind, data, tmp_path):
    model, _ = jaxbn.nnx.postproc(NetNNX(kind), data)
    assert "norm" in str(jaxbn.nnx.diagnose(model, data))
    assert "batch_norm  0.001" in jaxbn.nnx.summary(model)
    with pytest.raises(ValueError, match="'norm' normalizes with the statistics of the batch|Evaluate, with train"):
        jaxbn.serving.export(tmp_path / "net", lambda m, x: m(x, train=True), model, data[0])
    jaxbn.serving.export(tmp_path / "net", evaluate_nnx, model, data[0])
    close(jaxbn.serving.load_program(tmp_path / "net")(data[1]), model(data[1]))


NNX_CALLS = {
    "postproc": lambda model, data: jaxbn.nnx.postproc(model, data),
    "capture": lambda model, data: jaxbn.nnx.capture_moments(mode="eval")(model, data[0]),
    "diagnose": lambda model, data: jaxbn.nnx.diagnose(model, data),
    "adapt": lambda model, data: jaxbn.nnx.adapt(prior_count=1)(model, data[0]),
    "freeze": lambda model, data: jaxbn.nnx.freeze_layers(model, ""),
    "fold": lambda model, data: jaxbn.nnx.fold(model, data[0]),
    "replace": lambda model, data: jaxbn.nnx.replace(model, jaxbn.nnx.BatchNorm),
    "summary": lambda model, data: jaxbn.nnx.summary(model),
    "steps": lambda model, data: jaxbn.nnx.make_steps(
        model, lambda y, b: (y.sum(), {}), optax.sgd(0.1), inputs=lambda x: x
    ),
}


@pytest.mark.parametrize("name", NNX_CALLS)
def test_nnx_what_is_not_known_is_an_error_or_a_warning_that_names_it(name, data):
    text = r"'norm' \([\w.]*UnknownNNX\) keeps running statistics.*jaxbn.nnx.register_batch_norm\("
    with pytest.raises(ValueError, match=text):
        NNX_CALLS[name](NetNNX("unknown"), data)
    mixed = NetNNX("unknown")
    mixed.first = nnx.Sequential(mixed.first, nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0)))
    if name in ("summary", "steps"):  # the summary lists known layers; the statistics pass of the steps warns
        return
    with pytest.warns(UserWarning, match=text):
        NNX_CALLS[name](mixed, data)


def test_nnx_a_whole_network_in_a_bridge_is_the_clear_error(data):
    model = nnx.bridge.ToNNX(Net("stock"), rngs=nnx.Rngs(0)).lazy_init(data[0], train=False)
    with pytest.raises(ValueError, match=r"'' \(.*ToNNX of .*Net\) keeps running statistics"):
        jaxbn.nnx.postproc(model, data, call=lambda m, x: m(x, train=False))


class WithoutCall(nnx.Module):
    """Keeps statistics, and its user calls a method with another name."""

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(3))

    def center(self, x):
        return x - self.mean[...]


@pytest.mark.parametrize("cls", [WithoutCall, lambda: UnknownNNX(3, rngs=nnx.Rngs(0))], ids=["no call", "call"])
def test_nnx_modules_among_the_outputs_keep_their_class(cls, data):
    model = nnx.List([nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)), cls()])
    (_, other), _ = jaxbn.nnx.capture_moments(lambda model, x: (model[0](x), model[1]))(model, data[0])
    assert type(other) is type(model[1])
    assert vars(other).keys() == vars(model[1]).keys()


@pytest.mark.parametrize(
    "layer", ["BatchNorm", "BatchRenorm", "GhostBatchNorm", "MovingAverageBatchNorm", "DomainBatchNorm"]
)
def test_flax_shows_every_layer(layer):
    """`nnx.view_info` reads docstrings, and `nnx.tabulate` runs the model with whatever it is given."""
    options = {"GhostBatchNorm": {"ghost_size": 2}, "DomainBatchNorm": {"num_domains": 2}}.get(layer, {})
    made = getattr(jaxbn.nnx, layer)(4, **options, rngs=nnx.Rngs(0))
    info, stock = (nnx.view_info(one).splitlines() for one in (made, nnx.BatchNorm(4, rngs=nnx.Rngs(0))))
    assert info[:2] == [f"{layer}:", stock[1]] and len(info) > 2
    domain = {"domain": jnp.zeros(1, int)} if layer == "DomainBatchNorm" else {}
    table = nnx.tabulate(made, jnp.ones((1, 4)), **domain, console_kwargs={"force_terminal": False, "width": 200})
    assert f"{layer} Summary" in table and "var: float32" in table
    # Flax has left the call in the class, where it is met all the same.
    _, moments = jaxbn.nnx.capture_moments(lambda m, x: m(x, domain=jnp.zeros(4, int)) if domain else m(x))(
        made, jnp.ones((4, 4))
    )
    assert moments[""].count.max() == 4
    if layer == "BatchNorm":  # in training it stays an error
        with pytest.raises(ValueError, match="one value per channel"):
            made(jnp.ones((1, 4)))


def test_layers_of_nnx_start_in_a_linen_model_from_an_example_of_one_row():
    variables = nnx.bridge.to_linen(jaxbn.nnx.BatchNorm, 4).init(jax.random.key(0), jnp.ones((1, 4)))
    assert not variables["batch_stats"]["mean"].any()
