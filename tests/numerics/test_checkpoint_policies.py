"""Checkpoint policies: which values are saved, determined by counting the repeated matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import checkpoint_policies as policies
from jaxbn._src.internals import inner_programs

BN, SUM = jaxbn.batch_norm(activation=jax.nn.relu), jaxbn.batch_norm(activation=jax.nn.relu)
WIDTH = 4


def block(params, x):
    """Two dense layers with norms, a third one in the shortcut, and the sum."""
    first, last, shortcut = params
    norm = lambda bn, x, **kw: bn.train(*bn.init(WIDTH), x, **kw)[0]
    y = norm(BN, x @ first)
    return norm(SUM, y @ last, residual=norm(jaxbn.batch_norm(), x @ shortcut))


def network(params, x, policy):
    """Two rematerialized blocks."""
    kept = block if policy is None else jax.checkpoint(block, policy=policy)
    return kept(params[1], kept(params[0], x)).sum()


@pytest.fixture
def arrays(rng):
    params = jnp.asarray(rng.normal(size=(2, 3, WIDTH, WIDTH)), jnp.float32)
    return params, jnp.asarray(rng.normal(size=(16, WIDTH)), jnp.float32)


def operations(name, policy, arrays):
    """The number of times the gradient computes an operation."""

    def count(program):
        inside = sum(count(sub) for equation in program.eqns for sub in inner_programs(equation))
        return inside + sum(equation.primitive.name == name for equation in program.eqns)

    return count(jax.make_jaxpr(jax.grad(lambda params, x: network(params, x, policy), (0, 1)))(*arrays))


# Products of a block that are computed again: none, the last and the one on the shortcut, or all three.
AGAIN = {
    policies.save_norm_inputs_and_outputs: 0,
    policies.save_norm_inputs: 0,
    policies.save_inner_norm_inputs: 2,
    policies.save_norm_statistics: 3,
}


@pytest.mark.parametrize(("policy", "again"), AGAIN.items())
def test_products_that_are_computed_again(policy, again, arrays):
    assert operations("dot_general", policy, arrays) == operations("dot_general", None, arrays) + 2 * again


@pytest.mark.slow
@pytest.mark.parametrize("policy", AGAIN)
def test_gradients_are_the_same(policy, arrays):
    gradient = lambda policy: jax.jit(jax.grad(lambda params, x: network(params, x, policy), (0, 1)))(*arrays)
    for a, b in zip(gradient(policy), gradient(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_is_measured_again(arrays):
    """The statistics are saved, so the recomputation of the normalization adds no sums."""
    sums = lambda policy: operations("reduce_sum", policy, arrays)
    assert sums(policies.save_norm_inputs) == sums(None) < sums(jax.checkpoint_policies.nothing_saveable)
