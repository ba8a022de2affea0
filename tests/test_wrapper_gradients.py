"""Derivatives of all functions that run a user's model: in float64 against central differences, and against stock Flax.

The statistics of a batch depend on the batch, and gradients flow through them; no gradient flows into stored ones.
"""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from meshes import AXIS, DEVICES, NAMED, WAYS, run, sum_gradients

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.nnx.framework import to_variables

SHAPE = (4, 3, 2)  # examples, space, channels
WIDTHS = (2, 3)
STEP = 1e-5
# To compile for speed would take longer than all that is computed here.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

BY_NAME = {"stock": None} | {case.name: case for case in CASES}
# One case of each method; the others mostly differ in their averages, which have no influence here.
FAST = [("linen", name) for name in ("batch_norm", "moving_average_batch_norm", "domain_batch_norm")]
FAST += [("nnx", name) for name in ("stock", "batch_renorm", "ghost_batch_norm")]
ALL = [(framework, name) for framework in ("linen", "nnx") for name in BY_NAME]


def every_layer(fast, among=ALL):
    """Each layer in both frameworks; those that are not `fast` in the slow tests."""
    marks = {pair: [] if pair in fast else [pytest.mark.slow] for pair in among}
    rows = [pytest.param(f, name, marks=marks[f, name], id=f"{f}-{name}") for f, name in among]
    return pytest.mark.parametrize(("framework", "name"), rows)


class LinenNet(nn.Module):
    norm: functools.partial

    @nn.compact
    def __call__(self, x, where, train):
        for i, width in enumerate(WIDTHS):
            x = nn.Dense(width, name=f"map_{i}")(x)
            x = jnp.sin(self.norm(use_running_average=not train, name=f"norm_{i}")(x, **where))
        return x


class NNXNet(nnx.Module):
    def __init__(self, norm):
        for i, (before, width) in enumerate(zip((SHAPE[-1], *WIDTHS), WIDTHS, strict=False)):
            setattr(self, f"map_{i}", nnx.Linear(before, width, rngs=nnx.Rngs(i)))
            setattr(self, f"norm_{i}", norm(width, rngs=nnx.Rngs(i)))

    def __call__(self, x, where):
        for i in range(len(WIDTHS)):
            x = getattr(self, f"map_{i}")(x)
            x = jnp.sin(getattr(self, f"norm_{i}")(x, **where))
        return x


class Model:
    """A net in one of the frameworks, split into parameters and statistics, in float64."""

    def __init__(self, framework, name):
        self.framework, case = framework, BY_NAME[name]
        self.package, stock = getattr(jaxbn, framework), {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}[framework]
        norm = (
            functools.partial(stock) if case is None else functools.partial(getattr(case, framework), **case.arguments)
        )
        rng = np.random.default_rng(0)
        self.x, self.target = rng.normal(1, 2, SHAPE), rng.normal(size=(*SHAPE[:2], WIDTHS[-1]))
        self.where = {} if case is None else case.where(self.x)
        if framework == "linen":
            self.net = LinenNet(norm)
            init = functools.partial(self.net.init, train=True)
            variables = jax.eval_shape(init, jax.random.key(0), np.float32(self.x), self.where)
            parts = variables["params"], variables["batch_stats"]
        else:
            self.net = NNXNet(norm)
            self.graph, *parts = nnx.split(self.net, nnx.Param, ...)

        def drawn(a):  # counters are float32
            return rng.uniform(0.3, 1.3, a.shape) if a.ndim else np.ones((), a.dtype)

        self.learned, self.statistics = jax.tree.map(drawn, parts)

    def together(self, learned, statistics):
        """What the functions of the framework take."""
        if self.framework == "linen":
            return {"params": learned, "batch_stats": statistics}
        return nnx.merge(self.graph, learned, statistics, copy=True)

    def call(self, moving, x, train=False):
        """The outputs of the net."""
        if self.framework == "linen":
            outputs = self.net.apply(moving, x, self.where, train, mutable=["batch_stats"])
            return outputs[0]
        return nnx.view(moving, use_running_average=not train)(x, self.where)

    def of_outputs(self, run):
        """(learned, statistics, x) -> loss, of what runs the model."""
        return lambda learned, statistics, x: (run(self.together(learned, statistics), x) * self.target).sum()

    def of_capture(self, mode):
        """(learned, statistics, x) -> loss, of outputs and moments, as for matching statistics."""
        run = self.package.capture_moments(self.call, mode=mode)

        def loss(learned, statistics, x):
            outputs, moments = run(self.together(learned, statistics), x)
            return (outputs * self.target).sum() + sum((jnp.sin(m.mean) + m.var).sum() for m in moments.values())

        return loss

    def frozen(self):
        """A call with frozen layers, whatever the flag says."""
        if self.framework == "nnx":
            return lambda model, x: self.call(self.package.freeze_layers(model, ""), x, train=True)
        call = self.package.freeze_layers(functools.partial(self.call, train=True), "")
        return lambda variables, x: call(variables, x)

    def eval_step(self):
        """The evaluation of a frozen network in which the variables are put."""
        steps = self.package.make_steps(self.net, None, optax.sgd(0.1), inputs=lambda batch: batch)
        network = self.package.freeze(self.together(self.learned, self.statistics))

        def run(moving, x):
            variables = moving if self.framework == "linen" else to_variables(moving)
            return steps.eval_step(dataclasses.replace(network, variables=variables), (x, self.where))

        return run

    def folded(self):
        """The call of the folded net; its variables are constants."""
        moving = self.together(self.learned, self.statistics)
        if self.framework == "linen":
            call, variables, _ = self.package.fold(self.call, moving, self.x)
            return lambda _, x: call(variables, x)
        moving.eval()
        model, _ = self.package.fold(moving, self.x, call=lambda model, x: model(x, self.where))
        return lambda _, x: model(x, self.where)


def assert_derivatives(model, losses):
    """In one direction of the parameters and the input; returns the derivative with respect to the statistics."""
    losses = list(losses)

    def total(learned, statistics, x):  # sqrt(2), sqrt(3), ...: what one of them lacks, no other makes up for
        return sum(np.sqrt(2.0 + i) * loss(learned, statistics, x) for i, loss in enumerate(losses))

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), (model.learned, model.x))
    evaluate = jax.jit(jax.value_and_grad(total, (0, 1, 2)), compiler_options=COMPILER_OPTIONS)

    def at(step):
        learned, x = jax.tree.map(lambda a, d: a + step * d, (model.learned, model.x), direction)
        return evaluate(learned, model.statistics, x)

    (before, _), (_, (of_learned, of_statistics, of_x)), (behind, _) = map(at, (-STEP, 0, STEP))
    along = jax.tree.map(lambda g, d: (g * d).sum(), (of_learned, of_x), direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(along)), (behind - before) / (2 * STEP), rtol=1e-6)
    return of_statistics


def assert_zero(tree):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def in_float64(name):
    """Of stock Flax promotion is not strict."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.numpy_dtype_promotion("standard" if BY_NAME[name] is None else "strict"))
    return stack


@pytest.mark.sample(every=2)
@every_layer(FAST)
def test_gradients_flow_through_the_statistics_of_the_batch(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        assert_zero(assert_derivatives(model, [model.of_capture("batch")]))


@every_layer([("linen", "batch_norm")])
def test_gradients_flow_through_statistics_that_are_mixed(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        adapt = functools.partial(model.package.adapt, model.call)
        runs = adapt(prior_count=3, weights=lambda x: np.linspace(0.5, 2, len(x))), adapt(example_weight=0.3)
        assert_zero(assert_derivatives(model, map(model.of_outputs, runs)))


OURS = [pair for pair in ALL if pair[1] != "stock"]


@every_layer([("nnx", "batch_norm")], OURS)
def test_no_gradient_flows_into_stored_statistics(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        runs = map(model.of_outputs, (model.frozen(), model.eval_step()))
        assert_zero(assert_derivatives(model, [model.of_capture("eval"), model.of_capture("as_called"), *runs]))


@pytest.mark.parametrize("framework", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_stock_layers_have_the_gradients_of_flax(framework):
    """Of their statistics too."""
    with in_float64("stock"):
        model = Model(framework, "stock")
        eval_, as_called = (model.package.capture_moments(model.call, mode=mode) for mode in ("eval", "as_called"))
        runs = model.call, lambda *g: eval_(*g)[0], lambda *g: as_called(*g)[0], model.frozen(), model.eval_step()
        gradients = jax.jit(
            lambda *z: [jax.grad(model.of_outputs(run), (0, 1, 2))(*z) for run in runs],
            compiler_options=COMPILER_OPTIONS,
        )
        expected, *found = gradients(model.learned, model.statistics, model.x)
        for one in found:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, expected)


@every_layer([("linen", "moving_average_batch_norm")])
def test_a_training_call_that_is_captured_has_its_own_gradients(framework, name):
    """Those of a method that takes something for a constant, or learns from other batches, are no derivative."""
    with in_float64(name):
        model = Model(framework, name)
        training = functools.partial(model.call, train=True)
        captured = model.package.capture_moments(training, mode="as_called")
        runs = training, lambda *given: captured(*given)[0]
        gradients = jax.jit(
            lambda *z: [jax.grad(model.of_outputs(run), (0, 2))(*z) for run in runs], compiler_options=COMPILER_OPTIONS
        )
        expected, found = gradients(model.learned, model.statistics, model.x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


@pytest.mark.parametrize(
    ("framework", "stock"),
    [
        pytest.param("linen", False, id="linen"),
        pytest.param("nnx", True, id="nnx-stock"),
        pytest.param("linen", True, id="linen-stock", marks=pytest.mark.slow),
        pytest.param("nnx", False, id="nnx", marks=pytest.mark.slow),
    ],
)
def test_padding_harms_no_gradient(framework, stock):
    """NaN and infinity in it, in a stock layer too, which knows of no mask."""
    package, weights, target = getattr(jaxbn, framework), np.arange(SHAPE[0]) < 2, jnp.ones(SHAPE).at[2:].set(0)
    if framework == "linen":
        layer = (nn if stock else package).BatchNorm(use_running_average=True)
        model, call = layer.init(jax.random.key(0), jnp.ones(SHAPE)), layer.apply
    else:
        model, call = (nnx if stock else package).BatchNorm(SHAPE[-1], use_running_average=True, rngs=nnx.Rngs(0)), None
    mixed = (
        package.adapt(call, weights=lambda x: weights, **{name: 0.3}) for name in ("prior_count", "example_weight")
    )
    captured = package.capture_moments(call, weights=lambda x: weights)
    runs = lambda *given: captured(*given)[0], *mixed
    graph, state = nnx.split(model) if framework == "nnx" else (None, model)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(state, x):
        moving = state if graph is None else nnx.merge(graph, state, copy=True)
        return sum((jnp.sin(3 * run(moving, x)) * target).sum() for run in runs)

    x = np.float32(np.random.default_rng(0).normal(size=SHAPE))
    expected = gradients(state, x)
    for bad in (np.nan, np.inf):
        x[2:] = bad
        jax.tree.map(np.testing.assert_array_equal, gradients(state, x), expected)


@pytest.mark.parametrize("framework", ["nnx", pytest.param("linen", marks=pytest.mark.slow)])
def test_a_batch_of_padding_alone_has_the_gradients_of_evaluation(framework):
    with in_float64("batch_norm"):
        model = Model(framework, "batch_norm")
        options = {"weights": lambda x: np.zeros(len(x))}
        captured = model.package.capture_moments(model.call, **options)
        runs = lambda *given: captured(*given)[0], model.package.adapt(model.call, prior_count=3, **options)
        gradients = jax.jit(
            lambda *z: [jax.grad(model.of_outputs(run), (0, 1, 2))(*z) for run in (model.call, *runs)],
            compiler_options=COMPILER_OPTIONS,
        )
        expected, *found = gradients(model.learned, model.statistics, model.x)
        for one in found:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, expected)


@every_layer([("linen", "stock"), ("nnx", "batch_norm")], [pair for pair in ALL if "domain" not in pair[1]])
def test_a_folded_call_has_the_gradients_of_evaluation(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        runs = model.folded(), model.call
        gradients = jax.jit(
            lambda *z: [jax.grad(model.of_outputs(run), 2)(*z) for run in runs], compiler_options=COMPILER_OPTIONS
        )
        found, expected = gradients(model.learned, model.statistics, model.x)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.transform().update], ids=lambda case: case.name)
def test_no_gradient_flows_through_averages(case):
    transform = case.transform()
    _, state = transform.init(SHAPE[-1])

    def loss(state, x):
        moved = transform.update(state, transform.measure(x), 3.0)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved))

    x = np.float32(np.random.default_rng(0).normal(size=SHAPE))
    assert_zero(jax.jit(jax.grad(loss, (0, 1)))(state, x))


def test_derivatives_of_moments_that_are_put_together():
    """With weights, and with a part that is empty."""
    rng = np.random.default_rng(0)
    x, direction = rng.normal(3, 2, (2, 3, 5, 2))
    mask = rng.random((3, 5, 1))
    mask[1] = 0

    def by_hand(x):
        rows, weights = x.reshape(15, 2), mask.reshape(15, 1)
        mean = (weights * rows).sum(0) / weights.sum()
        return jnp.sin(mean) + (weights * (rows - mean[None]) ** 2).sum(0) / weights.sum()

    def over_devices(parts):
        merged = jax.vmap(lambda part: jaxbn.merge_over(part, "devices"), axis_name="devices")(parts)
        return jax.tree.map(lambda leaf: leaf[0], merged)

    def in_turn(parts):
        return functools.reduce(jaxbn.merge, (jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in range(len(x))))

    def mixed(parts):
        return jaxbn.mix(jaxbn.BatchNormState(jnp.zeros(2), jnp.ones(2)), jaxbn.pool(parts), 1.0)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
    def derivative(fun, x, direction):
        return jax.jvp(fun, (x,), (direction,))

    def put_together(function, x):
        moments = function(jax.vmap(lambda x, mask: jaxbn.batch_moments(x, mask=mask))(x, mask))
        return jnp.sin(moments.mean) + moments.var

    with jax.enable_x64(True):
        expected = derivative(by_hand, x, direction)
        for function in (jaxbn.pool, over_devices, in_turn, mixed):
            found = derivative(functools.partial(put_together, function), x, direction)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] * (w != "shard_map")) for w in WAYS])
def test_gradients_on_devices_are_those_of_one(way):
    """With a mask that is different on each, of the outputs and of the moments of all rows."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(1, 2, (2 * DEVICES, *SHAPE[1:])))
    batch = {
        "x": x,
        "target": np.float32(rng.normal(size=x.shape)),
        "w": rng.random(len(x)) > 0.4,
    }

    def gradients(way, params, batch):
        axis = AXIS if way in NAMED else None
        call = jaxbn.linen.BatchNorm(True, axis_name=axis).apply
        options = {"call": lambda v, batch: call(v, batch["x"]), "weights": lambda batch: batch["w"]}
        capture, adapt = jaxbn.linen.capture_moments(**options), jaxbn.linen.adapt(**options, prior_count=3)

        def loss(params, x):
            given = {"params": params, "batch_stats": statistics}, batch | {"x": x}
            outputs, moments = capture(*given)
            total = jaxbn.merge_over(moments[""], AXIS) if axis else moments[""]
            # The moments of all rows are the same on each device, and count once.
            shared = (jnp.sin(total.mean) + total.var).sum() / (DEVICES if axis else 1)
            return ((outputs + adapt(*given)) * batch["target"]).sum() + shared

        of_params, of_x = jax.grad(loss, (0, 1))(params, batch["x"])
        return sum_gradients(way, of_params), of_x

    variables = jaxbn.linen.BatchNorm(True).init(jax.random.key(0), x)
    params, statistics = variables["params"], variables["batch_stats"]
    expected = jax.jit(lambda p, b: gradients("one", p, b))(params, batch)
    found = run(way, lambda p, b: gradients(way, p, b), params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, jax.device_get(expected))
