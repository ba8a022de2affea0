"""Every entry point of all frameworks against the functions of the method itself, for all methods and a custom one."""

import copy
import dataclasses
import pickle
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from own_method import MixedNorm, NNXMixedNorm, mixed_norm

import jaxbn
import jaxbn.linen
import jaxbn.nnx

CHANNELS, ROWS = 3, 8
FLOOR = {"floor": 100.0, "share": 0.5}  # the variance of the data is far below


class Row(NamedTuple):
    """A method, the same with compiled functions, its layers, and what else a call takes."""

    method: str
    transform: jaxbn.NormTransform
    core: jaxbn.NormTransform
    linen: nn.Module
    nnx: nnx.Module
    where: Any = lambda x: {}

    @property
    def frameworks(self):
        return [Linen(self), NNX(self), Plain(self)]


def compiled(transform):
    """One program for each function where there would be many small ones."""
    functions = {name: getattr(transform, name) for name in ("train", "eval", "measure", "postproc")}
    return transform._replace(**{name: jax.jit(function) for name, function in functions.items()})


def row_of(case):
    transform = case.factory(**case.arguments)
    return Row(
        case.factory.__name__,
        transform,
        compiled(transform),
        case.linen_module(),
        case.nnx_module(CHANNELS),
        case.where,
    )


ROWS_OF = {case.name: partial(row_of, case) for case in CASES}
ROWS_OF["own"] = lambda: Row(
    "mixed_norm",
    mixed_norm(**FLOOR),
    compiled(mixed_norm(**FLOOR)),
    MixedNorm(**FLOOR),
    NNXMixedNorm(CHANNELS, **FLOOR, rngs=nnx.Rngs(0)),
)


class Linen:
    package = jaxbn.linen
    path = ""  # of the layer

    def __init__(self, row):
        self.row, self.layer = row, row.linen
        make = partial(self.layer.init, use_running_average=True)
        self.model = jax.jit(make)(jax.random.key(0), data()[0], **row.where(data()[0]))
        self.call = partial(self._run, True)
        self.training_call = partial(self._run, False)

    def _run(self, evaluates, variables, x):
        options = {} if evaluates else {"mutable": ["batch_stats"]}
        out = self.layer.apply(variables, x, use_running_average=evaluates, **options, **self.row.where(x))
        return out if evaluates else out[0]

    def trained(self, model, x):
        train = partial(self.layer.apply, use_running_average=False, mutable=["batch_stats"])
        return {**model, **jax.jit(train)(model, x, **self.row.where(x))[1]}

    def variables(self, model):
        return {**model.get("params", {}), **model["batch_stats"]}

    def postproc(self, model, batches):
        return jaxbn.linen.postproc(self.call, model, batches)

    def capture(self, mode):
        return jaxbn.linen.capture_moments(self.training_call if mode == "as_called" else self.call, mode=mode)

    def outputs(self, model, x):
        return self.call(model, x)

    def adapted(self, model, x):
        return jax.jit(jaxbn.linen.adapt(self.call, prior_count=4))(model, x)

    def diagnosed(self, model, batches):
        return jaxbn.linen.diagnose(self.call, model, batches)

    def summary(self, model):
        return jaxbn.linen.summary(model, self.call, data()[0])

    def folded(self, model, x):
        call, folded, report = jaxbn.linen.fold(self.call, model, x)
        return call(folded, x), report

    def frozen_training(self, model, x):
        return jax.jit(jaxbn.linen.freeze_layers(self.training_call, ""))(model, x)


class NNX(Linen):
    package = jaxbn.nnx

    def __init__(self, row):
        self.row, self.model = row, row.nnx
        self.call = lambda model, x: model(x, use_running_average=True, **row.where(x))
        self.training_call = lambda model, x: model(x, use_running_average=False, **row.where(x))

    def trained(self, model, x):
        model = nnx.clone(model)
        self.training_call(model, x)
        return model

    def variables(self, model):
        return nnx.to_pure_dict(nnx.state(model))

    def postproc(self, model, batches):
        return jaxbn.nnx.postproc(model, batches, call=self.call)

    def capture(self, mode):
        return jaxbn.nnx.capture_moments(self.training_call if mode == "as_called" else self.call, mode=mode)

    def adapted(self, model, x):
        return jaxbn.nnx.adapt(self.call, prior_count=4)(model, x)

    def diagnosed(self, model, batches):
        return jaxbn.nnx.diagnose(model, batches, call=self.call)

    def summary(self, model):
        return jaxbn.nnx.summary(model)

    def folded(self, model, x):
        folded, report = jaxbn.nnx.fold(model, x, call=self.call)
        return self.call(folded, x), report

    def frozen_training(self, model, x):
        return self.training_call(jaxbn.nnx.freeze_layers(model, ""), x)


class Plain(Linen):
    """A model of two functions; its tree is (params, state) of the layer."""

    package = jaxbn
    path = "1"

    def __init__(self, row):
        self.row, transform = row, row.transform
        self.model = transform.init(CHANNELS)
        self.call = lambda model, x: transform.eval(*model, x, **row.where(x))
        self.training_call = lambda model, x: transform.train(*model, x, **row.where(x))[0]

    def trained(self, model, x):
        return model[0], self.row.transform.train(*model, x, **self.row.where(x))[1]

    def variables(self, model):
        return {**model[0]._asdict(), **model[1]._asdict()}

    def postproc(self, model, batches):
        return jaxbn.postproc(self.call, model, batches)

    def capture(self, mode):
        return jaxbn.capture_moments(self.training_call if mode == "as_called" else self.call, mode=mode)

    def diagnosed(self, model, batches):
        return jaxbn.diagnose(self.call, model, batches)

    def summary(self, model):
        return jaxbn.summary(model, self.call, data()[0])


def data():
    x = np.random.default_rng(0).normal(3, 2, (3, ROWS, CHANNELS))
    return [jnp.asarray(rows, jnp.float32) for rows in x]


def assert_state(found, state, expected_params=None):
    """The variables of a layer are the leaves of the state, and no more than those and the params."""
    held = {name: leaf for name, leaf in state._asdict().items() if leaf is not None}
    for name, leaf in held.items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-6, atol=2e-6, err_msg=name)
    if expected_params is not None:
        names = {name for name, leaf in expected_params._asdict().items() if leaf is not None}
        assert {name for name, leaf in found.items() if leaf is not None} == {*held, *names}


def measured_by_core(row, batches):
    moments = [row.core.measure(x, **row.where(x)) for x in batches]
    return jaxbn.pool(jax.tree.map(lambda *parts: jnp.stack(parts), *moments))


@pytest.fixture(params=ROWS_OF)
def row(request):
    return ROWS_OF[request.param]()


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["linen", "nnx", "plain"])
def test_statistics(row, which):
    """Variables, training, capture, the pass, install_moments, move_averages, and the way back."""
    framework, batches = row.frameworks[which], data()
    params, initial = row.core.init(CHANNELS)
    model = framework.model
    assert_state(framework.variables(model), initial, params)

    y, trained = row.core.train(params, initial, batches[0], **row.where(batches[0]))
    moved = framework.trained(model, batches[0])
    assert_state(framework.variables(moved), trained)

    moments = measured_by_core(row, batches)
    estimated, report = framework.postproc(moved, batches)
    expected = row.core.postproc(trained, moments)
    assert_state(framework.variables(estimated), expected)
    found = framework.outputs(estimated, batches[1])
    wanted = row.core.eval(params, expected, batches[1], **row.where(batches[1]))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert_state(framework.variables(framework.package.install_moments(estimated, report.old)), trained)

    _, captured = (
        jax.jit(framework.capture("batch"))(moved, batches[1])
        if which != 1
        else framework.capture("batch")(moved, batches[1])
    )
    one = row.core.measure(batches[1], **row.where(batches[1]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), captured[framework.path], one)
    merged = {path: jaxbn.merge(part, part) for path, part in captured.items()}
    twice = jaxbn.merge(one, one)
    installed = framework.package.install_moments(moved, merged)
    assert_state(framework.variables(installed), row.core.postproc(trained, twice))

    averaged = framework.package.move_averages(moved, merged, samples=2 * ROWS)
    update = row.core.update
    assert_state(framework.variables(averaged), trained if update is None else update(trained, twice, 2 * ROWS))


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["linen", "nnx", "plain"])
def test_evaluation(row, which):
    """freeze, summary, diagnose; in Flax, fold or its refusal, freeze_layers and adapt too."""
    framework, batches = row.frameworks[which], data()
    params, initial = row.core.init(CHANNELS)
    model, report = framework.postproc(framework.model, batches)
    state = row.core.postproc(initial, measured_by_core(row, batches))
    x = batches[0]
    wanted = row.core.eval(params, state, x, **row.where(x))

    frozen = framework.package.freeze(model, report)
    method = frozen.info.layer(framework.path).method
    assert f" {method} " in framework.summary(model) and f" {method} " in framework.package.summary(frozen)
    assert method == row.method

    found = framework.diagnosed(model, batches)
    assert list(found.layers) == [framework.path] and found.layers[framework.path].channels == state.mean.size
    counts = [row.core.measure(x, **row.where(x)).count for x in batches]
    np.testing.assert_allclose(found.layers[framework.path].values, np.mean(counts))
    if which == 2:
        np.testing.assert_allclose(framework.call(frozen.variables, x), wanted, rtol=2e-5, atol=2e-6)
        return

    np.testing.assert_allclose(framework.frozen_training(model, x), wanted, rtol=2e-5, atol=2e-6)
    outputs, folding = framework.folded(model, x)
    np.testing.assert_allclose(outputs, wanted, rtol=2e-5, atol=2e-6)
    assert not folding.layers[""].folded and folding.layers[""].reason  # there is no layer to fold it into

    adapted = framework.adapted(model, x)
    own = row.core.measure(x, **row.where(x))
    mixed = row.core.postproc(state, jaxbn.mix(state, own, own.count / (own.count + 4)))
    wanted = row.core.eval(params, mixed, x, **row.where(x))
    np.testing.assert_allclose(adapted, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["linen", "nnx"])
def test_replacement(row, which):
    """A stock layer in a model becomes a layer of the method, which starts from the parameters and statistics."""
    params, initial = row.core.init(CHANNELS)
    x, learned = data()[0], {f"use_{name}": getattr(params, name) is not None for name in ("scale", "bias")}
    if which == 0:
        stock = nn.BatchNorm(use_running_average=True, **learned)
        trained = stock.init(jax.random.key(0), x)
        trained["batch_stats"]["mean"] += 1
        net = jaxbn.linen.replace(stock, partial(type(row.linen), **_given(row.linen)))
        like = net.init(jax.random.key(0), x, **row.where(x))
        found = Linen(row).variables(jaxbn.linen.convert_norms(trained, like=like))
    else:
        stock = nnx.BatchNorm(CHANNELS, **learned, rngs=nnx.Rngs(0))
        stock.mean[...] += 1
        found = NNX(row).variables(jaxbn.nnx.replace(stock, partial(type(row.nnx), **_given(row.linen))))
    assert_state(found, initial._replace(mean=initial.mean + 1), params)


def _given(layer):
    """The arguments that a layer of linen was given, but for those of where it runs."""
    fields = [f for f in dataclasses.fields(layer) if f.name not in ("parent", "name", "use_running_average")]
    return {f.name: getattr(layer, f.name) for f in fields if getattr(layer, f.name) is not f.default}


class LinenNet(nn.Module):
    norm: nn.Module
    where: Any

    def __call__(self, x, train):
        return self.norm(x, use_running_average=not train, **self.where(x))


class NNXNet(nnx.Module):
    def __init__(self, norm, where):
        self.norm, self.where = norm, where

    def __call__(self, x):
        return self.norm(x, **self.where(x))


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("which", [0, 1], ids=["linen", "nnx"])
def test_finalize(row, which):
    """The steps train by the method of the layer, and install by it."""
    package = row.frameworks[which].package
    net = LinenNet(row.linen, row.where) if which == 0 else NNXNet(row.nnx, row.where)
    loss_fn = lambda outputs, batch: (jnp.mean(outputs**3), {})
    steps = package.make_steps(net, loss_fn, optax.sgd(0.0), inputs=lambda batch: batch)
    batches = data()
    state = steps.init(jax.random.key(0), batches[0])
    state, _ = jax.jit(steps.train_step)(state, batches[0])
    acc, postproc_step = steps.start(state, batches[0]), jax.jit(steps.postproc_step)
    for batch in batches:
        acc = postproc_step(state, acc, batch)
    frozen, _ = steps.finalize(state, acc)

    x, where = batches[0], row.where(batches[0])
    params, initial = row.core.init(CHANNELS)
    loss_of = lambda params: loss_fn(row.core.train(params, initial, x, **where)[0], x)[0]
    _, trained = row.core.train(params, initial, x, **where)
    if row.core.backward is not None:
        trained = row.core.backward(params, trained, jax.grad(loss_of)(params))
    expected = row.core.postproc(trained, measured_by_core(row, batches))
    found = frozen.variables["batch_stats"]["norm"] if which == 0 else frozen.variables["norm"]
    assert_state(found, expected)
    wanted = row.core.eval(params, expected, x, **where)
    np.testing.assert_allclose(steps.eval_step(frozen, x), wanted, rtol=2e-5, atol=2e-6)


# What has no effect is an error


FIELDS = {
    "use_bias": False,
    "use_scale": False,
    "activation": jax.nn.relu,
    "dtype": jnp.bfloat16,
    "axis": 0,
    "axis_name": "devices",
    "use_fast_variance": False,
    "autodiff": True,
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_the_method_does_not_take(field):
    given = {field: FIELDS[field]}
    message = f"{field}=.*mixed_norm does not take {field}.*epsilon, floor, momentum, share"
    with pytest.raises(ValueError, match=message):
        MixedNorm(use_running_average=False, **given).init(jax.random.key(0), data()[0])
    with pytest.raises(ValueError, match=message):
        NNXMixedNorm(CHANNELS, **given, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="groups"):
        NNXMixedNorm(CHANNELS, groups=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="groups"):
        MixedNorm(groups=2)


@pytest.mark.parametrize("operand", ["residual", "domain"])
@pytest.mark.parametrize("evaluates", [False, True])
def test_operands_that_the_method_does_not_take(operand, evaluates):
    x = data()[0]
    layer = MixedNorm(use_running_average=evaluates)
    variables = layer.init(jax.random.key(0), x)
    given = {operand: x if operand == "residual" else jnp.zeros(ROWS, jnp.int32)}
    with pytest.raises(ValueError, match=f"{operand}=, and the method of this layer does not take it"):
        layer.apply(variables, x, **given, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=f"{operand}=, and the method of this layer does not take it"):
        NNXMixedNorm(CHANNELS, rngs=nnx.Rngs(0))(x, evaluates, **given)
    with pytest.raises(ValueError, match="does not take it"):
        jaxbn.linen.capture_moments(lambda v, x: layer.apply(v, x, **given, mutable=["batch_stats"])[0])(variables, x)


def test_masks_reach_the_method():
    x, mask = data()[0], jnp.arange(ROWS)[:, None] < 5
    layer = MixedNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], np.float64(x)[:5].mean(0), rtol=1e-6)
    evaluated = layer.apply(variables, x, use_running_average=None, mask=mask, mutable=["batch_stats"])[0]
    assert evaluated.shape == x.shape
    jaxbn.linen.MovingAverageBatchNorm(use_running_average=True)
    frozen = MixedNorm(use_running_average=True)
    np.testing.assert_array_equal(frozen.apply(variables, x, mask=mask), frozen.apply(variables, x))


def test_moments_under_plain_strings():
    """The statistics tell the method where possible; otherwise there is an error, and the state stays."""
    x = jnp.array([[1.0], [3.0]])
    moments = {"": jaxbn.batch_moments(x)}
    layer = jaxbn.linen.MovingAverageBatchNorm(use_running_average=True)
    variables = jaxbn.linen.install_moments(layer.init(jax.random.key(0), x), moments)
    np.testing.assert_allclose(layer.apply(variables, x).ravel(), [0.447, 1.342], atol=1e-3)

    own = MixedNorm(use_running_average=True).init(jax.random.key(0), x)
    for change in (jaxbn.linen.install_moments, jaxbn.linen.move_averages):
        with pytest.raises(ValueError, match="batches, mean, var.*keys of the moments that capture_moments gives"):
            change(own, moments)
    plain = jaxbn.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="not known how '' averages.*Pass momentum="):
        jaxbn.linen.move_averages(plain, moments)
    moved = jaxbn.linen.move_averages(plain, moments, 0.5)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], [1.0])


def test_a_momentum_for_another_method_is_an_error():
    x = data()[0]
    layer = jaxbn.linen.BatchRenorm(use_running_average=False, **jaxbn.renorm_ramp(warmup=5))
    variables = layer.init(jax.random.key(0), x)
    _, moments = jaxbn.linen.capture_moments(partial(layer.apply, mutable=["batch_stats"]))(variables, x)
    with pytest.raises(ValueError, match="BatchRenormState. Leave momentum out"):
        jaxbn.linen.move_averages(variables, moments, 0.9)
    moved = jaxbn.linen.move_averages(variables, moments)["batch_stats"]
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), moved, updates["batch_stats"])
    assert moved["step"] == 1


def test_keys_of_moments_are_plain_strings_to_others():
    x = data()[0]
    layer = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    _, moments = jax.jit(jaxbn.linen.capture_moments(layer.apply))(variables, x)
    assert (
        set(moments) == {""}
        and moments[""] is not None
        and jax.tree.structure(moments) == jax.tree.structure({"": moments[""]})
    )
    assert type(next(iter(pickle.loads(pickle.dumps(moments))))) is str
    assert copy.deepcopy(moments).keys() == moments.keys()
