"""Derivatives of all that runs a model for its user: in float64 against central differences, and against stock Flax.

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

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx.freeze import to_variables

SHAPE = (4, 3, 2)  # examples, space, channels
WIDTHS = (2, 3)
STEP = 1e-5
# To compile for speed would take longer than all that is computed here.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

BY_NAME = {"stock": None} | {case.name: case for case in CASES}
# One of each method; what the others differ in, such as how averages move, mostly does nothing here.
FAST = [("linen", name) for name in ("stock", "batch_norm", "moving_average_batch_norm", "domain_batch_norm")]
FAST += [("nnx", name) for name in ("batch_renorm", "ghost_batch_norm")]
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
    """A net in one of the frameworks, taken apart: what is learned and its statistics, in float64."""

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
            variables = self.net.init(jax.random.key(0), np.float32(self.x), self.where, True)
            parts = variables["params"], variables["batch_stats"]
        else:
            self.net = NNXNet(norm)
            self.graph, *parts = nnx.split(self.net, nnx.Param, ...)
        self.learned, self.statistics = jax.tree.map(lambda a: np.float64(a) + rng.uniform(0.1, 0.4, a.shape), parts)

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
        """The call of the folded net, whose variables stay."""
        call, moving, _ = self.package.fold(self.call, self.together(self.learned, self.statistics), self.x)
        return lambda _, x: call(moving, x)


def assert_derivatives(model, losses):
    """In one direction of what is learned and the input; of layers of jaxbn there is none in that of the statistics."""

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


@every_layer(FAST)
def test_gradients_flow_through_the_statistics_of_the_input(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        adapt = functools.partial(model.package.adapt, model.call)
        runs = adapt(prior_count=3, weights=lambda x: np.linspace(0.5, 2, len(x))), adapt(example_weight=0.3)
        assert_zero(assert_derivatives(model, [model.of_capture("batch"), *map(model.of_outputs, runs)]))


OURS = [pair for pair in ALL if pair[1] != "stock"]


@every_layer([("linen", "batch_norm"), ("nnx", "domain_batch_norm")], OURS)
def test_no_gradient_flows_into_stored_statistics(framework, name):
    with in_float64(name):
        model = Model(framework, name)
        runs = map(model.of_outputs, (model.frozen(), model.eval_step()))
        assert_zero(assert_derivatives(model, [model.of_capture("eval"), model.of_capture("as_called"), *runs]))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_stock_layers_have_the_gradients_of_flax(framework):
    """Of their statistics too."""
    with in_float64("stock"):
        model = Model(framework, "stock")
        eval_, as_called = (model.package.capture_moments(model.call, mode=mode) for mode in ("eval", "as_called"))
        runs = model.call, lambda *g: eval_(*g)[0], lambda *g: as_called(*g)[0], model.frozen(), model.eval_step()
        gradients = jax.jit(lambda *z: [jax.grad(model.of_outputs(run), (0, 1, 2))(*z) for run in runs])
        expected, *found = gradients(model.learned, model.statistics, model.x)
        for one in found:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, expected)


@every_layer([("linen", "moving_average_batch_norm"), ("nnx", "batch_renorm")])
def test_a_training_call_that_is_captured_has_its_own_gradients(framework, name):
    """Those of a method that takes something for a constant, or learns from other batches, are no derivative."""
    with in_float64(name):
        model = Model(framework, name)
        training = functools.partial(model.call, train=True)
        captured = model.package.capture_moments(training, mode="as_called")
        runs = training, lambda *given: captured(*given)[0]
        gradients = jax.jit(lambda *z: [jax.grad(model.of_outputs(run), (0, 2))(*z) for run in runs])
        expected, found = gradients(model.learned, model.statistics, model.x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)
