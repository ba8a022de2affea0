"""Calls that a type checker must reject: one error at least on each line marked `# wrong`, and none on the others.

`tests/test_typing.py` runs mypy on this file; the file itself never runs.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
import jaxbn.linen
import jaxbn.nnx


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


net, x = Net(), jnp.ones((4, 2))
variables = net.init(jax.random.key(0), x)

# A transform: other arguments, in another order, or of another method.
bn = jaxbn.batch_norm(momentum=0.9)
params, state = bn.init(2)
bn.init("three")  # wrong
bn.init(2, jnp.float32)  # wrong
bn.train(state, x)  # wrong
bn.train(state, params, x)  # wrong
bn.train(params, state, x, masks=x)  # wrong
bn.train(params, state, x, domain=x)  # wrong
bn.eval(nonsense=1)  # wrong
bn.eval(params, x, state)  # wrong
bn.measure(x, residual=x)  # wrong
bn.postproc(state, x)  # wrong
bn.postproc(params, bn.measure(x))  # wrong
bn.update(state, bn.measure(x))  # wrong: it is None for momentum=None
bn.backward(params, state, params)  # wrong: it is None
bn.move(state, bn.measure(x))  # wrong
output: jax.Array = bn.train(params, state, x)  # wrong
renormed: jaxbn.BatchRenormState = state  # wrong
jaxbn.batch_renorm().train(params, state, x)  # wrong
jaxbn.moving_average_batch_norm().backward(params, state, params)  # wrong
jaxbn.domain_batch_norm(num_domains=2).train(params, state, x, domain=x)  # wrong
jaxbn.batch_norm(0.9)  # wrong
jaxbn.batch_norm(decay=0.9)  # wrong
jaxbn.batch_norm(epsilon="small")  # wrong
jaxbn.batch_norm(activation="relu")  # wrong
jaxbn.ghost_batch_norm(ghost_size=2, grouping="random")  # wrong
jaxbn.domain_batch_norm()  # wrong


# A method whose functions do not fit together.
def init(feature_shape: int | Sequence[int], *, dtype: Any = jnp.float32) -> tuple[int, jaxbn.BatchRenormState]:
    raise NotImplementedError


def postproc(state: jaxbn.BatchRenormState) -> jaxbn.BatchRenormState:
    return state


bn._replace(postproc=postproc)  # wrong
bn._replace(init=init)  # wrong
jaxbn.NormTransform(init, bn.train, bn.eval, bn.measure, bn.postproc)  # wrong

# linen
jaxbn.linen.postproc(net, variables, [x])  # wrong
jaxbn.linen.postproc(net.apply, net, [x])  # wrong
jaxbn.linen.postproc(net.apply, variables, x, estimator="pooled")  # wrong
jaxbn.linen.capture_moments(net)  # wrong
jaxbn.linen.diagnose(net, variables, [x])  # wrong
jaxbn.linen.fold(net, variables, x)  # wrong
found, report = jaxbn.linen.postproc(net.apply, variables, [x])
jaxbn.linen.freeze(report)  # wrong
jaxbn.linen.freeze(report, found)  # wrong
jaxbn.linen.freeze((found, report))  # wrong
jaxbn.linen.install_moments(found, report)  # wrong
report.statistics  # wrong  # noqa: B018
