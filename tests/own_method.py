"""A custom method, as a user would write it: with a hyper-parameter, a third learned parameter, and more state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxbn
import jaxbn.linen
import jaxbn.nnx


class MixedParams(NamedTuple):
    scale: jax.Array
    bias: jax.Array
    mix: jax.Array  # f32[C]: weight of the normalized input in the output


class MixedState(NamedTuple):
    mean: jax.Array
    var: jax.Array
    batches: jax.Array  # f32[]: the number of batches so far


def mixed_norm(*, share=0.75, floor=0.01, momentum=0.9, epsilon=1e-5):
    """A learned mixture of the input and its normalization, whose population variance is at least `floor`."""
    base = jaxbn.batch_norm(momentum=momentum, epsilon=epsilon)

    def init(feature_shape, *, dtype=jnp.float32):
        params, state = base.init(feature_shape, dtype=dtype)
        mix = jnp.full_like(params.scale, share)
        return MixedParams(*params, mix), MixedState(state.mean, state.var, jnp.zeros(()))

    def affine(params):
        return jaxbn.NormParams(params.scale, params.bias)

    def plain(state):
        return jaxbn.BatchNormState(state.mean, state.var)

    def mixed(params, normalized, x):
        mix = jnp.broadcast_to(params.mix, x.shape)
        return mix * normalized + (1 - mix) * x

    def train(params, state, x, *, mask=None):
        y, new = base.train(affine(params), plain(state), x, mask=mask)
        return mixed(params, y, x), MixedState(new.mean, new.var, state.batches + 1)

    def evaluate(params, state, x):
        return mixed(params, base.eval(affine(params), plain(state), x), x)

    def postproc(state, moments):
        new = base.postproc(plain(state), moments)
        return MixedState(new.mean, jnp.maximum(new.var, floor), state.batches)

    def update(state, moments, samples=None):
        new = base.update(plain(state), moments, samples)
        return MixedState(new.mean, new.var, state.batches + 1)

    return base._replace(init=init, train=train, eval=evaluate, postproc=postproc, update=update)


class MixedNorm(jaxbn.linen.Norm):
    factory = staticmethod(mixed_norm)


class NNXMixedNorm(jaxbn.nnx.Norm):
    factory = staticmethod(mixed_norm)
