"""Helpers for the tests of folding in linen and NNX."""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.internals import inner_programs


def moved(variables):
    """Values for variables of which the shapes are known; those that must be positive are."""
    rng = np.random.default_rng(1)

    def value(path, leaf):
        positive = {"['var']", "['square_window']"} & {str(key) for key in path}
        drawn = rng.uniform(0.5, 2, leaf.shape) if positive else rng.standard_normal(leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree.map_with_path(value, variables)


def assert_same_outputs(call, variables, folded, new, x, tolerance=1e-5):
    """The outputs are those of the model as it was, relative to the largest of each."""
    expected, found = jax.jit(call)(variables, x), jax.jit(folded)(new, x)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert one.dtype == other.dtype
        one, other = np.float64(one), np.float64(other)
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(other / np.abs(one).max(), one / np.abs(one).max(), rtol=0, atol=tolerance)


def primitives_of(function, *args):
    """How often each primitive is in a program, calls inlined."""
    found = collections.Counter()

    def read(jaxpr):
        for eqn in jaxpr.eqns:
            inner = list(inner_programs(eqn))
            found.update([] if inner else [eqn.primitive.name])
            for program in inner:
                read(program)

    read(jax.make_jaxpr(function)(*args))
    return found


def rows_of(report):
    """{layer: where it went, or None}."""
    return {path: layer.into for path, layer in report.layers.items()}
