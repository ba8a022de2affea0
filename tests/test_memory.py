"""Values that a user's functions close over are freed after the call."""

import functools
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.framework.program_cache import Recipe, compiled

X = np.arange(24, dtype=np.float32).reshape(4, 6) % 5
NET = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
VARIABLES = NET.init(jax.random.key(0), X)


class Model(nnx.Module):
    def __init__(self):
        self.map, self.norm = nnx.Linear(6, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.norm.set_attributes(use_running_average=True)

    def __call__(self, x):
        return self.norm(self.map(x))


# Compiled functions that outlive all, and are called inside the call.
run_linen, run_nnx = jax.jit(NET.apply), nnx.jit(lambda model, x: model(x))


def given(package, call, variables):
    """The arguments in the order of the framework."""
    return ((call, variables), {}) if package is jaxbn.linen else ((variables,), {"call": call})


def postproc(package, call, variables, weights, **options):
    args, keywords = given(package, call, variables)
    package.postproc(*args, [X, X + 1], **keywords, weights=weights, **options)


def diagnose(package, call, variables, weights):
    args, keywords = given(package, call, variables)
    package.diagnose(*args, [X, X + 1], **keywords, weights=weights)


def capture(package, call, variables, weights):
    compile_ = jax.jit if package is jaxbn.linen else nnx.jit
    compile_(package.capture_moments(call, weights=weights))(variables, X)


def adapt(package, call, variables, weights):
    compile_ = jax.jit if package is jaxbn.linen else nnx.jit
    compile_(package.adapt(call, prior_count=8, weights=weights))(variables, X)


def fold(package, call, variables, weights):
    args, keywords = given(package, call, variables)
    package.fold(*args, X, **keywords)


USES = [postproc, functools.partial(postproc, consistent=True), diagnose, capture, adapt, fold]


@pytest.mark.sample(every=11)
@pytest.mark.parametrize("package", [jaxbn.linen, jaxbn.nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("use", USES, ids=["postproc", "consistent", "diagnose", "capture", "adapt", "fold"])
def test_what_a_call_closes_over_is_freed_and_so_is_the_model(package, use):
    alive = []

    def once():
        model = jax.tree.map(jnp.array, VARIABLES) if package is jaxbn.linen else Model()
        on_device, of_numpy = jnp.ones((6, 6)), np.ones(6, np.float32)
        alive.extend(map(weakref.ref, (on_device, of_numpy, *jax.tree.leaves(model))))

        def call(model, x):
            run = run_linen if package is jaxbn.linen else run_nnx
            return run(model, x @ on_device + of_numpy[None])

        use(package, call, model, lambda batch: on_device[0, :1].repeat(len(batch)))

    once()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_programs_are_found_again_for_the_same_functions_and_for_no_others():
    traces = []

    class Callable_:
        __slots__ = ()  # it cannot be held weakly

        def __call__(self, x):
            traces.append(None)
            return x

        method = __call__

    class Model(Callable_):  # it can
        __hash__ = None

    def program(function, *static):
        return compiled(Recipe(_plus, (function, None), static))

    models = [Model(), Model()]
    for _ in range(2):
        assert [int(program(model.method, 1)(2)) for model in models] == [3, 3]
        assert [int(program(models[0].method, n)(2)) for n in (1, 2)] == [3, 4]
    assert len(traces) == 3
    for _ in range(2):
        assert int(program(Callable_(), 1)(2)) == 3  # nothing is cached
        assert int(program(models[0], [1])(2)) == 3
    assert len(traces) == 7


def _plus(function, none, number):
    assert none is None
    return lambda x: function(x) + (number[0] if isinstance(number, list) else number)


def test_functions_that_live_for_ever_do_not_collect_programs():
    programs = [weakref.ref(compiled(Recipe(_plus, (_plus, None), (n,)))) for n in range(100)]
    gc.collect()
    assert sum(reference() is not None for reference in programs) < 50
