"""Programs whose layers sow their moments, and these moments in float64: for all tests of harvest."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn._src.internals import inner_programs
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.tracing.sow import sow

ROWS, CHANNELS, DEPTH = 6, 3, 4
FULL = (ROWS, CHANNELS)


class Layer(NamedTuple):
    name: Any
    size: int


FLAT, STACK = Layer(("block", 0), CHANNELS), Layer(("block", "scan"), DEPTH * CHANNELS)
ENSEMBLE = Layer("ensemble", DEPTH * CHANNELS)
FLAT_INDEX = np.arange(CHANNELS, dtype=np.int32)
STACK_INDEX = np.arange(DEPTH * CHANNELS, dtype=np.int32).reshape(DEPTH, CHANNELS)


def moments_of(x: jax.Array) -> Moments:
    rows = tuple(range(x.ndim - 1))
    mean = x.mean(rows)
    m2 = jnp.square(x - jnp.expand_dims(mean, rows)).sum(rows)
    return Moments(jnp.full(mean.shape, x.size // x.shape[-1], jnp.float32), mean, m2)


def normed(x: jax.Array, index: jax.Array, layer: Layer = FLAT) -> jax.Array:
    """A layer, whose output is the tanh of its input."""
    return jnp.tanh(sow(x, index, moments_of(x), layer=layer))


def oracle(calls: list[tuple[np.ndarray, np.ndarray]], size: int) -> Moments:
    """Float64 moments per flat position of calls (index [C], x [rows, C])."""
    seen: list[list[np.ndarray]] = [[] for _ in range(size)]
    for index, x in calls:
        for channel, position in enumerate(index):
            seen[position].append(np.float64(x[..., channel]).ravel())
    values = [np.concatenate([np.zeros(0), *parts]) for parts in seen]
    mean = [v.mean() if v.size else 0.0 for v in values]
    m2 = [np.square(v - m).sum() for v, m in zip(values, mean, strict=True)]
    return Moments(*(np.array(part) for part in ([v.size for v in values], mean, m2)))


def assert_moments(got: Moments, expected: Moments, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(got.count, expected.count)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got.m2, expected.m2, rtol=tolerance, atol=tolerance)


def inputs(shape: tuple[int, ...] = FULL, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1.0, shape), jnp.float32)


def chain(x: Any, length: int) -> list[np.ndarray]:
    """The inputs of `length` layers in a row."""
    inputs_of = [np.float64(x)]
    for _ in range(length - 1):
        inputs_of.append(np.tanh(inputs_of[-1]))
    return inputs_of


def primitive_names(jaxpr: Any) -> set[str]:
    inner = [primitive_names(sub) for eqn in jaxpr.eqns for sub in inner_programs(eqn)]
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*inner)


def instructions(lowered: Any) -> list[str]:
    """The compiled instructions, without names and metadata."""
    return re.findall(r" = (\w+\[[\d,]*\])\S* ([\w-]+)\(", lowered.compile().as_text())


# Programs with one flat layer: (x, index) -> output, the primitive that they must contain, how many layers in a row


def flat(x, index):
    return normed(x, index)  # custom derivatives would take the default layer for an argument


def nested_jit(x, index):
    return jax.jit(lambda x: jax.jit(normed)(jax.jit(normed)(x, index), index))(x)


def custom_jvp(x, index):
    fun = jax.custom_jvp(flat)
    fun.defjvp(lambda primals, tangents: (fun(*primals), tangents[0]))
    return fun(x, index)


def custom_vjp(x, index):
    fun = jax.custom_vjp(flat)
    fun.defvjp(lambda x, index: (fun(x, index), None), lambda _, cotangent: (cotangent, None))
    return fun(x, index)


def custom_vmap(x, index):
    fun = jax.custom_batching.custom_vmap(flat)
    fun.def_vmap(lambda size, batched, x, index: (jax.vmap(normed)(x, index), True))
    return fun(x, index)


def over_time(x, index, *, layer=normed, **options):
    return lax.scan(lambda x, _: (layer(x, index), None), x, length=DEPTH, **options)[0]


def time_as_inputs(x, index):
    stacked = lax.scan(lambda carry, _: (normed(carry, index), carry), x, length=DEPTH)
    return stacked[0] + 0 * stacked[1].sum()


def branch(taken, x, index, *, layer=normed):
    return lax.cond(x.sum() > (-1e3 if taken else 1e3), layer, lambda x, index: x, x, index)


def branch_on_both(x, index):
    return lax.cond(x.sum() > 0, normed, lambda x, index: normed(x, index) + 1, x, index)


def until(turns, x, index, *, layer=normed):
    def body(state):
        return state[0] + 1, layer(state[1], index)

    return lax.while_loop(lambda state: state[0] < turns + 0 * x.sum().astype(jnp.int32), body, (0, x))[1]


def gradient_of(layer, x, index):
    return jax.grad(lambda x: jnp.square(layer(x, index)).sum())(x)


def over_devices(layer, x, index):
    """Under shard_map; all rows must be those of few devices, as there are six."""
    mesh = jax.make_mesh((2,), ("halves",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(layer, mesh=mesh, in_specs=(P("halves"), P()), out_specs=P("halves"))(x, index)


def mapped(x, index):
    return jax.pmap(normed, in_axes=(0, None))(x.reshape(2, -1, CHANNELS), index).reshape(x.shape)


remat = jax.checkpoint(normed)
remat_saving = jax.checkpoint(normed, policy=jax.checkpoint_policies.everything_saveable)
remat_dots = jax.checkpoint(normed, policy=jax.checkpoint_policies.dots_saveable)

FLAT_PROGRAMS: dict[str, tuple[Callable[..., jax.Array], str, int]] = {
    "plain": (normed, "jaxbn_sow", 1),
    "twice": (lambda x, index: normed(normed(x, index), index), "jaxbn_sow", 2),
    "jit": (jax.jit(normed), "jit", 1),
    "nested_jit": (nested_jit, "jit", 2),
    "remat": (remat, "remat2", 1),
    "remat_policy": (remat_saving, "remat2", 1),
    "jit_of_remat": (jax.jit(remat), "remat2", 1),
    "custom_jvp": (custom_jvp, "custom_jvp_call", 1),
    "custom_vjp": (custom_vjp, "custom_vjp_call", 1),
    "custom_vmap": (custom_vmap, "custom_vmap_call", 1),
    "scan": (over_time, "scan", DEPTH),
    "scan_unrolled": (partial(over_time, unroll=2), "scan", DEPTH),
    "scan_of_remat": (partial(over_time, layer=remat), "remat2", DEPTH),
    "scan_of_jit": (partial(over_time, layer=jax.jit(normed)), "scan", DEPTH),
    "scan_with_outputs": (time_as_inputs, "scan", DEPTH),
    "scan_of_cond": (partial(over_time, layer=partial(branch, True)), "cond", DEPTH),
    "scan_of_while": (partial(over_time, layer=partial(until, 2)), "while", 2 * DEPTH),
    "cond_taken": (partial(branch, True), "cond", 1),
    "cond_not_taken": (partial(branch, False), "cond", 0),
    "cond_on_both": (branch_on_both, "cond", 1),
    "cond_of_scan": (lambda x, i: lax.cond(x.sum() > -1e3, over_time, lambda x, i: x, x, i), "scan", DEPTH),
    "while": (partial(until, 5), "while", 5),
    "while_no_turn": (partial(until, 0), "while", 0),
    "fori": (
        lambda x, i: lax.fori_loop(0, (x.sum() * 0).astype(jnp.int32) + 3, lambda _, x: normed(x, i), x),
        "while",
        3,
    ),
    "grad": (partial(gradient_of, normed), "jaxbn_sow", 1),
    "grad_of_jit": (partial(gradient_of, jax.jit(normed)), "jit", 1),
    "jit_of_grad": (jax.jit(partial(gradient_of, normed)), "jit", 1),
    "grad_of_remat": (partial(gradient_of, remat), "remat2", 1),
    "grad_of_remat_saving": (partial(gradient_of, remat_saving), "remat2", 1),
    "grad_of_remat_dots": (partial(gradient_of, remat_dots), "remat2", 1),
    "grad_of_jit_of_remat": (partial(gradient_of, jax.jit(remat)), "remat2", 1),
    "grad_of_remat_of_jit": (partial(gradient_of, jax.checkpoint(jax.jit(normed))), "remat2", 1),
    "grad_of_remat_of_remat": (partial(gradient_of, jax.checkpoint(lambda x, i: remat(x, i))), "remat2", 1),
    "grad_of_scan": (partial(gradient_of, over_time), "scan", DEPTH),
    "grad_of_scan_of_remat": (partial(gradient_of, partial(over_time, layer=remat)), "remat2", DEPTH),
    "grad_of_remat_of_scan": (partial(gradient_of, jax.checkpoint(over_time)), "remat2", DEPTH),
    "grad_of_cond": (partial(gradient_of, partial(branch, True)), "cond", 1),
    "grad_of_custom_jvp": (partial(gradient_of, custom_jvp), "jaxbn_sow", 1),
    "grad_of_custom_vjp": (partial(gradient_of, custom_vjp), "jaxbn_sow", 1),
    "shard_map": (partial(over_devices, normed), "shard_map", 1),
    "pmap": (mapped, "shard_map", 1),
    "scan_of_shard_map": (partial(over_time, layer=partial(over_devices, normed)), "shard_map", DEPTH),
    "cond_of_shard_map": (partial(branch, True, layer=partial(over_devices, normed)), "shard_map", 1),
    "while_of_shard_map": (partial(until, 2, layer=partial(over_devices, normed)), "shard_map", 2),
    "second_derivative": (lambda x, i: jax.grad(lambda x: gradient_of(normed, x, i).sum())(x), "jaxbn_sow", 1),
    "forward_mode": (lambda x, i: jax.jvp(lambda x: remat(x, i), (x,), (x,))[1], "remat2", 1),
}


def stacked(x, index, *, layer=normed, **options):
    def body(x, index):
        y = layer(x, index, STACK)
        return y, y.sum()

    return lax.scan(body, x, index, **options)[0]
