"""Correct uses of the public functions, which a type checker must accept; see `tests/test_typing.py`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

x = jnp.ones((4, 2))

# Plain functions: the types of params and state are known, and come out as they go in.
bn = jaxbn.batch_norm(momentum=0.9, axis_name=("data", "model"), activation=jax.nn.relu)
params, state = bn.init((2,), dtype=jnp.bfloat16)
y, state = bn.train(params, state, x, mask=x > 0, residual=x)
y = bn.eval(params, state, x)
moments: jaxbn.Moments = bn.measure(x, mask=x)
state = bn.postproc(state, moments)
assert bn.update is not None
state = bn.update(state, moments, 4)
mean: jax.Array = state.mean
scale: jax.Array | None = params.scale
count: jax.Array | None = state.count


@jax.jit
def step(params: jaxbn.NormParams, state: jaxbn.BatchNormState, x: jax.Array) -> jaxbn.BatchNormState:
    return bn.train(params, state, x)[1]


def any_method(transform: jaxbn.NormTransform[Any, Any], x: jax.Array) -> jax.Array:
    return transform.eval(*transform.init(x.shape[-1]), x)


# A model of functions, with the statistics pass and what follows it.
def predict(model: tuple[jaxbn.NormParams, jaxbn.BatchNormState], x: jax.Array) -> jax.Array:
    return bn.eval(*model, x)


model, plain_report = jaxbn.postproc(predict, (params, state), [x], weights=lambda x: jnp.ones(len(x)))
plain_frozen: jaxbn.Frozen = jaxbn.freeze(model, plain_report)
plain_table: str = jaxbn.summary(plain_frozen)
outputs, plain_moments = jaxbn.capture_moments(predict, mode="eval")(model, x)
model = jaxbn.install_moments(model, plain_moments)
plain_diagnosis: jaxbn.Diagnosis = jaxbn.diagnose(predict, model, [x, x])

for transform in (bn, jaxbn.batch_renorm(**jaxbn.renorm_ramp(100)), jaxbn.ghost_batch_norm(ghost_size=32)):
    any_method(transform, x)

mabn = jaxbn.moving_average_batch_norm(window=8)
mabn_params, mabn_state = mabn.init(2)
y, mabn_state = mabn.train(mabn_params, mabn_state, x)
mabn_state = mabn.backward(mabn_params, mabn_state, mabn_params, loss_scale=2.0)
window: jax.Array = mabn_state.gradient_window
any_method(mabn, x)

by_domain = jaxbn.domain_batch_norm(num_domains=2)
domain_params, domain_state = by_domain.init(2)
ids = jnp.array([0, 1, 0, 1])
y, domain_state = by_domain.train(domain_params, domain_state, x, domain=ids)
y = by_domain.eval(domain_params, domain_state, x, domain=ids)
domain_state = by_domain.postproc(domain_state, by_domain.measure(x, domain=ids))
any_method(by_domain, x)


# A method with params and a state of its own, from the functions of another one.
class MixedParams(NamedTuple):
    mix: jax.Array


class MixedState(NamedTuple):
    mean: jax.Array
    var: jax.Array
    batches: jax.Array


def mixed_norm(*, share: float = 0.5) -> jaxbn.NormTransform[MixedParams, MixedState]:
    base = jaxbn.batch_norm(momentum=None, use_scale=False, use_bias=False)
    plain, _ = base.init(1)

    def init(
        feature_shape: int | Sequence[int], *, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> tuple[MixedParams, MixedState]:
        _, state = base.init(feature_shape, dtype=dtype)
        return MixedParams(jnp.full_like(state.mean, share)), MixedState(state.mean, state.var, jnp.zeros(()))

    def train(
        params: MixedParams,
        state: MixedState,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> tuple[jax.Array, MixedState]:
        y, _ = base.train(plain, jaxbn.BatchNormState(*state[:2]), x, mask=mask, residual=residual)
        return params.mix * y, state._replace(batches=state.batches + 1)

    def evaluate(
        params: MixedParams,
        state: MixedState,
        x: jax.typing.ArrayLike,
        *,
        mask: jax.typing.ArrayLike | None = None,
        residual: jax.typing.ArrayLike | None = None,
    ) -> jax.Array:
        return params.mix * base.eval(plain, jaxbn.BatchNormState(*state[:2]), x, residual=residual)

    def postproc(state: MixedState, moments: jaxbn.Moments) -> MixedState:
        return state._replace(mean=moments.mean, var=moments.var)

    return jaxbn.NormTransform(init, train, evaluate, base.measure, postproc)


class MixedNorm(jaxbn.linen.Norm):
    factory = staticmethod(mixed_norm)


# linen: any function of (variables, batch) may be the call.
class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


def call_of_dict(variables: dict[str, Any], batch: jax.Array) -> jax.Array:
    return jnp.asarray(Net().apply(variables, batch))


def call_of_mapping(variables: Mapping[str, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"logits": jnp.asarray(Net().apply(variables, batch["image"]))}


net = Net()
variables = net.init(jax.random.key(0), x)
for call in (net.apply, partial(net.apply, train=False), jax.jit(call_of_dict)):
    jaxbn.linen.postproc(call, variables, [x])
jaxbn.linen.postproc(lambda v, batch: net.apply(v, batch["image"]), {"params": {}, "batch_stats": {}}, lambda: iter([]))
jaxbn.linen.capture_moments(call_of_mapping, mode="eval")
found, report = jaxbn.linen.postproc(call_of_dict, variables, [x], estimator=jaxbn.pooled(unbiased=True))
frozen = jaxbn.linen.freeze(found, report)
folded, folded_variables, fold_report = jaxbn.linen.fold(call_of_dict, frozen, x)
folded(folded_variables, x)
jaxbn.linen.summary(frozen)
jaxbn.linen.move_averages(found, {"BatchNorm_0": moments}, bn, samples=4)

# NNX
model = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
model, report = jaxbn.nnx.postproc(model, [x])
model, report = jaxbn.nnx.postproc(model, [{"image": x}], call=lambda model, batch: model(batch["image"]))
outputs, measured = jaxbn.nnx.capture_moments()(model, x)
frozen = jaxbn.nnx.freeze(model, report)
