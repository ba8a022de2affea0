"""Optimization barriers and explicit rounding: present on the platforms they are for, absent elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn._src.numerics import barriers

BARRIER, ROUNDING = "optimization_barrier", "reduce_precision"


def program(platform, dtype=jnp.float32, activation=jax.nn.relu, residual=False):
    """The gradient of a training step, lowered for a platform."""
    bn = jaxbn.batch_norm(activation=activation)
    params, state = bn.init(4)

    def loss(params, x, r):
        return bn.train(params, state, x, residual=r if residual else None)[0].astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((8, 8, 4), dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    return jax.jit(jax.grad(loss, (0, 1))).trace(params, x, x).lower(lowering_platforms=(platform,)).as_text()


def count_barriers(text):
    return text.count(f"stablehlo.{BARRIER}")


def test_each_use_of_the_sign_of_the_activation_has_a_barrier():
    assert count_barriers(program("cuda")) == 3


def test_a_saved_output_has_one_barrier():
    assert count_barriers(program("cuda", residual=True)) == 1


def test_without_an_activation_there_is_no_barrier():
    assert count_barriers(program("cuda", activation=None)) == 0


def test_barriers_on_a_cpu():
    """The barriers of CUDA, one for the second sum of the statistics, and one for the sum of dz (x - mean)."""
    assert count_barriers(program("cpu")) == 3 + 1
    assert count_barriers(program("cpu", activation=None)) == count_barriers(program("cpu", residual=True)) == 1 + 1


def test_other_platforms_have_no_barrier():
    assert BARRIER not in program("tpu", jnp.bfloat16) and BARRIER not in program("tpu")


def count_roundings(platform, dtype, residual=False):
    return program(platform, dtype, residual=residual).count(ROUNDING)


def test_outputs_in_half_precision_are_rounded_explicitly():
    assert count_roundings("cuda", jnp.bfloat16, True) == count_roundings("cuda", jnp.float32, True) + 1


def test_bfloat16_is_summed_exactly_on_a_tpu_alone():
    """The shift of the statistics is rounded everywhere; exact sums split the squares, the mean, the sum and n."""
    assert count_roundings("tpu", jnp.float32) == count_roundings("cpu", jnp.bfloat16) == 1
    assert count_roundings("tpu", jnp.bfloat16) == 1 + 4


def test_a_barrier_returns_its_arguments():
    tree = {"a": jnp.arange(3.0), "b": None, "c": jnp.ones(())}
    np.testing.assert_equal(jax.tree.map(np.asarray, barriers.barrier(tree, "cpu")), jax.tree.map(np.asarray, tree))
    assert barriers.barrier(None, "cpu") is None


def test_a_barrier_is_differentiable_and_batchable():
    double = lambda x: 2 * barriers.barrier((x, x), "cpu")[1]
    np.testing.assert_array_equal(jax.vmap(jax.grad(double))(jnp.arange(3.0)), [2, 2, 2])
    value, tangent = jax.jvp(jax.grad(lambda x: double(x) ** 2), (1.0,), (1.0,))
    assert (float(value), float(tangent)) == (8, 8)
