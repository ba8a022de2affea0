"""Folded kernels and biases, compared weight by weight with the formula in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._src.inference.fold_arithmetic import (
    Affine,
    Linear,
    Weights,
    affine_of,
    finish,
    fold_before,
    fold_behind,
    of_conv,
    of_einsum,
)

GROUPS, IN, OUT = 2, 4, 6  # channels


def drawn(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def affine(*shape, axes):
    return Affine(jnp.asarray(drawn(*shape)), jnp.asarray(drawn(1, *shape)[0]), axes)


def in_float64(one):
    return np.float64(one.scale), np.float64(one.shift)


@pytest.mark.parametrize("bias", [None, drawn(OUT)], ids=["no bias", "bias"])
def test_groups_of_a_convolution(bias):
    """An output channel of group g depends on the input channels of g only."""
    kernel = drawn(3, IN // GROUPS, OUT)
    weights = Weights(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))
    layer = of_conv(3, 3, groups=GROUPS)
    before, behind = affine(IN, axes=(2,)), affine(OUT, axes=(2,))
    old, given = np.float64(kernel), np.zeros(OUT) if bias is None else np.float64(bias)
    scale, shift = in_float64(before)
    expected, total = np.zeros_like(old), given.copy()
    for o in range(OUT):
        for i in range(IN // GROUPS):
            channel = o // (OUT // GROUPS) * (IN // GROUPS) + i
            expected[:, i, o] = old[:, i, o] * scale[channel]
            total[o] += old[:, i, o].sum() * shift[channel]
    folded = fold_before(weights, before, layer)
    np.testing.assert_allclose(folded.kernel, expected, rtol=1e-6)
    np.testing.assert_allclose(folded.bias, total, rtol=1e-5, atol=1e-6)
    scale, shift = in_float64(behind)
    folded = fold_behind(weights, behind, layer)
    np.testing.assert_allclose(folded.kernel, old * scale, rtol=1e-6)
    np.testing.assert_allclose(folded.bias, given * scale + shift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("padding", "pads"),
    [
        ("VALID", ()), ("CIRCULAR", ()), ("REFLECT", ()), ("SAME", (3,)), ("SAME_LOWER", (3,)), ("CAUSAL", (3,)),
        (0, ()), (1, (1, 3)), (((0, 0),), ()), (((0, 1),), (1, 3)),
    ],
)  # fmt: skip
def test_a_shift_does_not_enter_padding_with_zeros(padding, pads, size):
    """Padding by numbers is added for kernels of size 1 too."""
    assert (of_conv(3, size, padding=padding).uneven is not None) == (size in pads)


def test_axes_of_an_einsum_in_any_order():
    """The axes of the kernel, the bias and the output are in different orders."""
    layer = of_einsum(3, "...nc,hcd->...dnh")
    assert layer == Linear({2: 1}, {1: 2, 3: 0})
    kernel, bias = drawn(2, 4, 3), drawn(3, 2)  # hcd, dh
    weights = Weights(jnp.asarray(kernel), jnp.asarray(bias))
    behind, before = affine(3, 2, axes=(1, 3)), affine(4, axes=(2,))
    scale, shift = in_float64(behind)
    folded = fold_behind(weights, behind, layer)
    np.testing.assert_allclose(folded.kernel, np.einsum("hcd,dh->hcd", np.float64(kernel), scale), rtol=1e-6)
    np.testing.assert_allclose(folded.bias, bias * scale + shift, rtol=1e-5, atol=1e-6)
    scale, shift = in_float64(before)
    folded = fold_before(weights, before, layer)
    np.testing.assert_allclose(folded.kernel, np.einsum("hcd,c->hcd", np.float64(kernel), scale), rtol=1e-6)
    answer = np.einsum("hcd,c->dh", np.float64(kernel), shift)
    np.testing.assert_allclose(folded.bias, bias + answer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "padding, uneven",
    [("VALID", False), ("CIRCULAR", False), ("REFLECT", False), (0, False), (((0, 0),), False), ((0,), False)]
    + [("SAME", True), ("CAUSAL", True), (1, True), (((0, 1),), True)],
)
def test_padding_to_which_a_shift_does_not_apply(padding, uneven):
    assert bool(of_conv(3, 3, padding=padding).uneven) == uneven
    assert not of_conv(3, 1, padding="SAME").uneven
    assert of_conv(3, 1, input_dilation=2).uneven and of_conv(3, 3, masked=True).uneven


def test_the_affine_map_of_a_normalization_and_of_other_functions():
    bn = jaxbn.batch_norm(epsilon=0.1, axis=1)
    params, state = jaxbn.NormParams(jnp.array([2.0, 3.0]), None), jaxbn.BatchNormState(*jnp.array([[1e3, 5], [4, 9]]))

    @jax.jit
    def maps():
        normalization = affine_of(lambda x: bn.eval(params, state, x), 3, (1,), jnp.zeros(2))
        return [(found[:2], is_one) for found, is_one in (normalization, affine_of(jax.nn.relu, 2, (1,), jnp.zeros(2)))]

    (found, is_one), (_, is_relu_one) = maps()
    scale = np.array([2, 3]) / np.sqrt(np.array([4, 9]) + 0.1)
    np.testing.assert_allclose(found[0], scale, rtol=1e-6)
    np.testing.assert_allclose(found[1], -np.array([1e3, 5]) * scale, rtol=1e-6)
    assert is_one and not is_relu_one


def test_residual_dtype_and_activation_are_applied_in_this_order():
    y, residual = jnp.array([1.0, -300.0], jnp.bfloat16), jnp.array([0.001, 1.0], jnp.float32)
    np.testing.assert_array_equal(finish(y, residual, jnp.float32, jax.nn.relu), np.float32([1.001, 0]))
    rounded = finish(y, residual, jnp.bfloat16, None)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, jnp.array([1.001, -299.0], jnp.bfloat16))
