"""Each rule of harvest has a program here that pins the JAX internals it leans on; the oracle is float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec as P
from sown import (
    CHANNELS,
    DEPTH,
    ENSEMBLE,
    FLAT,
    FLAT_INDEX,
    FLAT_PROGRAMS,
    FULL,
    ROWS,
    STACK,
    STACK_INDEX,
    Layer,
    assert_moments,
    chain,
    gradient_of,
    inputs,
    instructions,
    moments_of,
    normed,
    oracle,
    primitive_names,
    remat,
    stacked,
)

from jaxbn._src.numerics.moments import Moments, merge, pool
from jaxbn._src.tracing import harvest as _harvest
from jaxbn._src.tracing.harvest import harvest
from jaxbn._src.tracing.records import Record, collect
from jaxbn._src.tracing.sow import sow


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FLAT_PROGRAMS)
def test_rule(name, jitted):
    program, primitive, length = FLAT_PROGRAMS[name]
    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    assert primitive in primitive_names(jax.make_jaxpr(program)(x, index))
    harvested = jax.jit(harvest(program)) if jitted else harvest(program)
    y, records = harvested(x, index)
    np.testing.assert_allclose(y, program(x, index), rtol=1e-6, atol=1e-6)
    expected = oracle([(FLAT_INDEX, layer_input) for layer_input in chain(x, length)[:length]], FLAT.size)
    assert_moments(collect(records, {FLAT: index})[FLAT], expected)


def test_every_rule_has_a_program():
    reached = {primitive for _, primitive, _ in FLAT_PROGRAMS.values()}
    assert reached - _harvest._RULES.keys() <= {
        "jit",
        "remat2",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vmap_call",
    }
    assert reached >= _harvest._RULES.keys()


# Stacked layers: the index is sliced together with the statistics


STACK_PROGRAMS = {
    "scan": stacked,
    "unrolled": partial(stacked, unroll=DEPTH),
    "remat": partial(stacked, layer=jax.checkpoint(normed, static_argnums=2)),
    "jit": partial(stacked, layer=jax.jit(normed, static_argnums=2)),
    "grad": lambda x, index: jax.grad(lambda x: jnp.square(stacked(x, index)).sum())(x),
    "python_loop": lambda x, index: [x := normed(x, index[i], STACK) for i in range(DEPTH)][-1],
}


@pytest.mark.parametrize("name", STACK_PROGRAMS)
def test_stacked_layers(name):
    x, index = inputs(), jnp.asarray(STACK_INDEX)
    y, records = harvest(STACK_PROGRAMS[name])(x, index)
    np.testing.assert_allclose(y, STACK_PROGRAMS[name](x, index), rtol=1e-6, atol=1e-6)
    expected = oracle(list(zip(STACK_INDEX, chain(x, DEPTH), strict=True)), STACK.size)
    assert_moments(collect(records, {STACK: index})[STACK], expected)


def test_stacked_layers_backwards():
    x = inputs()
    _, records = harvest(partial(stacked, reverse=True))(x, jnp.asarray(STACK_INDEX))
    expected = oracle(list(zip(STACK_INDEX[::-1], chain(x, DEPTH), strict=True)), STACK.size)
    assert_moments(collect(records)[STACK], expected)


def test_stack_reached_in_part():
    x = inputs()
    _, records = harvest(stacked)(x, jnp.asarray(STACK_INDEX[1:3]))
    expected = oracle(list(zip(STACK_INDEX[1:3], chain(x, 2), strict=True)), STACK.size)
    assert_moments(collect(records)[STACK], expected)


@pytest.mark.parametrize("which", range(3))
def test_switch_over_different_layers(which):
    names = [Layer(n, CHANNELS) for n in ("a", 1)]  # not sortable among each other
    branches = [partial(normed, layer=names[0]), lambda x, i: x, lambda x, i: normed(x, i, names[1]) + 1]

    def program(which, x, index):
        return lax.switch(which, branches, x, index)

    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    y, records = harvest(program)(jnp.asarray(which), x, index)
    np.testing.assert_array_equal(y, branches[which](x, index))
    moments = collect(records)
    assert set(moments) == set(names)
    for position, name in ((0, names[0]), (2, names[1])):
        calls = [(FLAT_INDEX, x)] if which == position else []
        assert_moments(moments[name], oracle(calls, CHANNELS))


def test_while_over_several_layers():
    names = [Layer(n, CHANNELS) for n in ("a", 1)]

    def program(x, index, turns):
        def body(state):
            return state[0] + 1, normed(normed(state[1], index, names[0]), index, names[1])

        return lax.while_loop(lambda state: state[0] < turns, body, (0, x))[1]

    x = inputs()
    _, records = jax.jit(harvest(program))(x, jnp.asarray(FLAT_INDEX), 3)
    for offset, name in enumerate(names):
        calls = [(FLAT_INDEX, layer_input) for layer_input in chain(x, 6)[offset::2]]
        assert_moments(collect(records)[name], oracle(calls, CHANNELS))


def test_condition_of_while_is_refused():
    def program(x, index):
        return lax.while_loop(lambda x: normed(x, index).sum() > 1e3, lambda x: x, x)

    with pytest.raises(NotImplementedError, match="condition of `while`"):
        harvest(program)(inputs(), jnp.asarray(FLAT_INDEX))


# vmap inside and outside

VMAP_LAYERS = {
    "plain": normed,
    "jit": jax.jit(normed, static_argnums=2),
    "remat": lambda x, index, layer: jax.checkpoint(partial(normed, layer=layer))(x, index),
    "custom_vmap": lambda x, index, layer: jax.custom_batching.sequential_vmap(partial(normed, layer=layer))(x, index),
    "cond": lambda x, index, layer: lax.cond(True, partial(normed, layer=layer), lambda x, index: x, x, index),
}


@pytest.mark.parametrize("name", VMAP_LAYERS)
@pytest.mark.parametrize("own_input", [True, False])
def test_vmap_inside_over_members(name, own_input):
    """Statistics [members, C]: each lane brings its index; the input is its own or shared."""
    x, axis = (inputs((DEPTH, *FULL)), 0) if own_input else (inputs(), None)
    program = jax.vmap(partial(VMAP_LAYERS[name], layer=ENSEMBLE), (axis, 0))
    y, records = harvest(program)(x, jnp.asarray(STACK_INDEX))
    np.testing.assert_allclose(y, np.broadcast_to(np.tanh(x), y.shape), rtol=1e-5)
    calls = list(zip(STACK_INDEX, np.broadcast_to(x, (DEPTH, *FULL)), strict=True))
    assert_moments(collect(records)[ENSEMBLE], oracle(calls, ENSEMBLE.size))


@pytest.mark.parametrize("in_axes", [0, 1])
def test_vmap_inside_over_rows(in_axes):
    """Statistics shared by the lanes: their moments are pooled."""
    x = inputs((DEPTH, DEPTH, CHANNELS))
    _, records = harvest(jax.vmap(normed, (in_axes, None)))(x, jnp.asarray(FLAT_INDEX))
    assert_moments(collect(records)[FLAT], oracle([(FLAT_INDEX, x)], FLAT.size))


def test_vmap_of_scan_inside():
    members = Layer("members", 2 * STACK.size)
    index = np.arange(members.size, dtype=np.int32).reshape(DEPTH, 2, CHANNELS)  # depth first, then members
    x = inputs((2, *FULL))

    def one(x, index):
        return lax.scan(lambda x, index: (normed(x, index, members), None), x, index)[0]

    _, records = harvest(jax.vmap(one, (0, 1)))(x, jnp.asarray(index))
    calls = [(index[d, m], layer_input) for m in range(2) for d, layer_input in enumerate(chain(x[m], DEPTH))]
    assert_moments(collect(records)[members], oracle(calls, members.size))


@pytest.mark.parametrize("name", ["plain", "remat", "scan", "cond_taken", "while", "grad_of_remat"])
def test_vmap_outside(name):
    program, _, length = FLAT_PROGRAMS[name]
    x = inputs((2, *FULL))
    _, records = jax.vmap(harvest(program), (0, None))(x, jnp.asarray(FLAT_INDEX))
    for lane in range(2):
        got = collect(jax.tree.map(lambda a, lane=lane: a[lane], records))[FLAT]
        assert_moments(got, oracle([(FLAT_INDEX, v) for v in chain(x[lane], length)], FLAT.size))


def test_vmap_outside_of_a_predicate_that_differs():
    """The zeros of a branch not taken are selected per lane."""
    x = jnp.stack([inputs() + 5, inputs() - 5])

    def program(x, index):
        return lax.cond(x.sum() > 0, normed, lambda x, index: x, x, index)

    _, records = jax.vmap(harvest(program), (0, None))(x, jnp.asarray(FLAT_INDEX))
    assert_moments(collect(records)[FLAT], oracle([(FLAT_INDEX, x[0])], FLAT.size))


# Devices: harvest is called within the user's shard_map or pmap, who merges the records


def merged_over_devices(program, axis, x, index):
    y, records = harvest(program)(x, index)
    gathered = jax.tree.map(lambda part: lax.all_gather(part, axis), collect(records, {FLAT: index})[FLAT])
    return y, pool(gathered)


QUICK_PROGRAMS = ["plain", "scan_of_remat", "while", "grad"]
DEVICE_PROGRAMS = ["plain", "jit", "remat", "scan", "scan_of_remat", "cond_taken", "while", "scan_of_while", "grad"]


@pytest.mark.parametrize(
    ("name", "jitted"),
    [
        *((name, True) for name in QUICK_PROGRAMS),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in DEVICE_PROGRAMS if n not in QUICK_PROGRAMS),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("plain", "scan_of_while")),
    ],
)
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_shard_map(name, jitted, check_vma):
    program, _, length = FLAT_PROGRAMS[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x, index = inputs((8 * ROWS, CHANNELS)), jnp.asarray(FLAT_INDEX)
    sharded = jax.shard_map(
        lambda x, index: jax.tree.map(lambda a: a[None], merged_over_devices(program, "d", x, index)),
        mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"), check_vma=check_vma,
    )  # fmt: skip
    y, moments = (jax.jit(sharded) if jitted else sharded)(x, index)
    np.testing.assert_allclose(y.reshape(x.shape), program(x, index), rtol=1e-5, atol=1e-5)
    expected = oracle([(FLAT_INDEX, layer_input) for layer_input in chain(x, length)], FLAT.size)
    for device in range(8):
        assert_moments(jax.tree.map(lambda part, device=device: part[device], moments), expected)


@pytest.mark.parametrize("name", DEVICE_PROGRAMS)
def test_in_pmap(name):
    program, _, length = FLAT_PROGRAMS[name]
    x, index = inputs((8, *FULL)), jnp.asarray(FLAT_INDEX)
    _, moments = jax.pmap(partial(merged_over_devices, program, "d"), "d", in_axes=(0, None))(x, index)
    expected = oracle([(FLAT_INDEX, layer_input) for layer_input in chain(x, length)], FLAT.size)
    assert_moments(jax.tree.map(lambda part: part[3], moments), expected)


def test_branch_that_differs_between_devices():
    """A cond with records in one branch only, on a predicate that varies over devices."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = inputs((8, CHANNELS)) + jnp.where(jnp.arange(8) < 3, 9, -9)[:, None]

    def program(x, index):
        return lax.cond(x.sum() > 0, normed, lambda x, index: x, x, index)

    _, moments = jax.jit(
        jax.shard_map(
            lambda x, index: jax.tree.map(lambda a: a[None], merged_over_devices(program, "d", x, index)),
            mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"),
        )
    )(x, jnp.asarray(FLAT_INDEX))  # fmt: skip
    assert_moments(jax.tree.map(lambda part: part[0], moments), oracle([(FLAT_INDEX, x[:3])], FLAT.size))


def test_sharded_arrays_under_jit():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = inputs((8 * ROWS, CHANNELS))
    placed = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
    y, records = jax.jit(harvest(normed))(placed, jnp.asarray(FLAT_INDEX))
    assert y.sharding.is_equivalent_to(placed.sharding, y.ndim)
    assert_moments(collect(records)[FLAT], oracle([(FLAT_INDEX, x)], FLAT.size))


# Known limits, as the module says them


def test_limit_vmap_inside_of_a_predicate_that_differs():
    """JAX runs both branches on all lanes; `test_vmap_outside_of_a_predicate_that_differs` is the way to do it."""
    x = jnp.stack([inputs() + 5, inputs() - 5])
    program = jax.vmap(lambda x, i: lax.cond(x.sum() > 0, normed, lambda x, i: x, x, i), (0, None))
    _, records = harvest(program)(x, jnp.asarray(FLAT_INDEX))
    assert_moments(collect(records)[FLAT], oracle([(FLAT_INDEX, x)], FLAT.size))


@pytest.mark.parametrize(
    ("program", "times"),
    [
        (lambda x, i: jax.grad(lambda x: gradient_of(remat, x, i).sum())(x), 2),
        (
            lambda x, i: jax.grad(lambda w: lax.scan(lambda c, _: (c * normed(w, i), None), w, length=4)[0].sum())(x),
            0.25,
        ),
    ],
    ids=["second_derivative_of_remat", "derivative_of_a_scan_over_a_constant"],
)
def test_limit_derivatives_inside(program, times):
    calls = 1 if times > 1 else 4
    expected = oracle([(FLAT_INDEX, inputs())] * calls, FLAT.size)
    _, records = harvest(program)(inputs(), jnp.asarray(FLAT_INDEX))
    got = collect(records)[FLAT]
    assert_moments(got, Moments(times * expected.count, expected.mean, times * expected.m2))


# Unsupported programs


def test_unknown_primitive_is_named():
    def program(x, index):
        return lax.custom_linear_solve(lambda v: normed(v, index), x, solve=lambda _, b: b)

    with pytest.raises(NotImplementedError, match=r"inside `custom_linear_solve` \(.*test_harvest.py.*Capture inside"):
        harvest(program)(inputs(), jnp.asarray(FLAT_INDEX))


def test_unknown_primitive_without_a_mark_is_no_error():
    def program(x, index):
        return lax.custom_linear_solve(lambda v: 2 * v, normed(x, index), solve=lambda _, b: b / 2)

    y, records = harvest(program)(inputs(), jnp.asarray(FLAT_INDEX))
    np.testing.assert_allclose(y, np.tanh(inputs()) / 2, rtol=1e-5)
    assert len(records) == 1


def test_cast_index_is_refused():
    with pytest.raises(TypeError, match="bfloat16.*casts every leaf"):
        harvest(normed)(inputs(), jnp.asarray(FLAT_INDEX).astype(jnp.bfloat16))


# Programs without layers are not changed


def without_layers(x):
    x = jax.jit(lambda x: x * 2)(x)
    x = jax.checkpoint(jnp.sin)(x)
    x, ys = lax.scan(lambda x, y: (jnp.cos(x + y), x), x, x[None])
    x = lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
    x = lax.while_loop(lambda x: x.sum() < 3, lambda x: x + 1, x)
    with jax.named_scope("scope"):
        x = jax.nn.relu(jnp.tanh(x))  # a custom_jvp
    double = jax.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (3 * cotangent,))
    x = double(x)
    tripled = jax.custom_batching.custom_vmap(lambda x: 3 * x)
    tripled.def_vmap(lambda size, batched, x: (3 * x, True))
    return {"x": tripled(x), "ys": (ys, None, lax.stop_gradient(ys))}


def test_a_program_without_layers_stays_the_same():
    x = inputs()
    y, records = harvest(without_layers)(x)
    assert records == []
    jax.tree.map(np.testing.assert_array_equal, y, without_layers(x))
    before, after = (jax.make_jaxpr(fun)(x) for fun in (without_layers, lambda x: harvest(without_layers)(x)[0]))
    for name in ("jit", "remat2", "scan", "cond", "while", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call"):
        assert name in primitive_names(before)
    assert [eqn.primitive.name for eqn in before.eqns] == [eqn.primitive.name for eqn in after.eqns]
    lowered = [jax.jit(fun).lower(x) for fun in (without_layers, lambda x: harvest(without_layers)(x)[0])]
    assert all("scope/tanh" in low.as_text(debug_info=True) for low in lowered)
    assert instructions(lowered[0]) == instructions(lowered[1])


def test_custom_gradient_of_what_has_no_mark_is_kept():
    double = jax.custom_vjp(lambda x: 2 * x)
    double.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (7 * cotangent,))
    gradient = jax.grad(lambda x, index: harvest(lambda x, i: double(normed(x, i)))(x, index)[0].sum())
    x = inputs()
    np.testing.assert_allclose(gradient(x, jnp.asarray(FLAT_INDEX)), 7 * (1 - np.tanh(x) ** 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("custom", [jax.custom_jvp, jax.custom_vjp])
def test_custom_gradient_around_a_mark_is_kept(custom, jitted):
    def program(x, index):
        layer = custom(lambda x, index: jnp.tanh(normed(2 * x, index)))
        if custom is jax.custom_jvp:
            layer.defjvp(lambda primals, tangents: (layer(*primals), 7 * tangents[0]))
        else:
            layer.defvjp(lambda x, index: (layer(x, index), None), lambda _, cotangent: (7 * cotangent, None))
        return lax.scan(lambda x, _: (layer(x, index), None), 3 * x, length=2)[0]

    def loss(x):
        y, records = harvest(program)(x, jnp.asarray(FLAT_INDEX))
        return y.sum(), collect(records)[FLAT]

    gradient = jax.grad(loss, has_aux=True)
    found, moments = (jax.jit(gradient) if jitted else gradient)(inputs())
    np.testing.assert_array_equal(found, np.full(FULL, 3 * 7 * 7))
    first = 6 * np.float64(inputs())
    second = 2 * np.tanh(np.tanh(first))
    assert_moments(moments, oracle([(FLAT_INDEX, first), (FLAT_INDEX, second)], FLAT.size))


def test_configuration_of_an_equation_is_kept():
    """What jax keeps in an equation's context holds when it is bound again, or when a rule runs it."""

    def program(x, index):
        with set_xla_metadata(colour="blue"):
            y = lax.scan(lambda x, _: (jnp.sin(normed(x, index)), None), jnp.sin(x), length=2)[0]
        return jnp.cos(y)

    lowered = jax.jit(harvest(program)).lower(inputs(), jnp.asarray(FLAT_INDEX)).as_text()
    for operation, expected in (("sine", True), ("cosine", False)):
        lines = [line for line in lowered.splitlines() if f"stablehlo.{operation}" in line]
        assert lines and all(("blue" in line) is expected for line in lines)


def test_debug_callback_runs_once():
    seen = []

    def program(x, index):
        jax.debug.callback(lambda total: seen.append(float(total)), x.sum())
        return lax.cond(x.sum() > -1e3, lambda x: normed(x, index), lambda x: x, x)

    jax.block_until_ready(harvest(program)(inputs(), jnp.asarray(FLAT_INDEX)))
    jax.effects_barrier()
    assert len(seen) == 1


def test_jit_cache_is_not_poisoned():
    traces = []

    @jax.jit
    def apply(x, index):
        traces.append(1)
        return normed(x, index)

    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    plain = apply(x, index)
    for _ in range(2):
        y, records = harvest(apply)(x, index)
        np.testing.assert_array_equal(y, plain)
        assert len(records) == 1  # although its trace was there already
        np.testing.assert_array_equal(apply(x, index), plain)
    assert len(traces) == 1


# Trees, types


def test_leaves_that_are_no_arrays_pass_through():
    def program(batch, index, flag):
        assert batch["name"] == "digits" and flag is True and batch["epoch"] == 3
        y = normed(batch["x"], index)
        return {"y": y, "name": batch["name"], "n": batch["epoch"], "none": None, "rows": y.shape[0], "f": jnp.tanh}

    x = np.asarray(inputs(), np.float64)  # as a data loader gives it
    out, records = harvest(program)({"x": x, "name": "digits", "epoch": 3}, FLAT_INDEX, True)
    assert {k: v for k, v in out.items() if k != "y"} == {
        "name": "digits", "n": 3, "none": None, "rows": ROWS, "f": jnp.tanh
    }  # fmt: skip
    assert out["y"].dtype == jnp.float32
    assert_moments(collect(records)[FLAT], oracle([(FLAT_INDEX, np.float32(x))], FLAT.size))


def test_outputs_keep_their_types():
    def program(x, weak, key):
        return [x, weak, weak * 2, jnp.float32(1), jnp.asarray(2.0), key, x.astype(jnp.bfloat16), x.sum() > 0, ()]

    args = inputs(), jnp.asarray(2.0), jax.random.key(0)
    got, expected = harvest(program)(*args)[0], program(*args)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) and jax.typeof(a) == jax.typeof(b)  # shape, dtype and weak type


def test_weak_carries_and_literals():
    def program(x, index):
        def body(carry, x):
            return (carry[0] + 1.0, carry[1] + 1), normed(x, index)

        carry, y = lax.scan(body, (0.0, 0), x[None])
        return lax.cond(carry[1] > 0, lambda n: (n, normed(x, index), 1.0), lambda n: (n + 1, x, 2.0), 5), carry, y

    args = inputs(), jnp.asarray(FLAT_INDEX)
    got, expected = harvest(program)(*args)[0], program(*args)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    kinds = [jax.tree.map(lambda a: (a.dtype, a.weak_type), tree) for tree in (got, expected)]
    assert kinds[0] == kinds[1]


def test_jit_of_harvest_traces_once():
    traces = []

    def program(x, index):
        traces.append(1)
        return normed(x, index)

    harvested = jax.jit(harvest(program))
    for seed in range(3):
        _, records = harvested(inputs(seed=seed), jnp.asarray(FLAT_INDEX))
    assert len(traces) == 1
    assert records[0].layer == FLAT and isinstance(records[0], Record)


# The `sow` primitive


def test_mark_is_the_identity():
    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    tagged = partial(sow, index=index, moments=moments_of(x), layer=FLAT)
    np.testing.assert_array_equal(tagged(x), x)
    np.testing.assert_array_equal(jax.jit(tagged)(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (tagged(x) * x).sum())(x), 2 * x)
    np.testing.assert_array_equal(jax.jvp(tagged, (x,), (2 * x,))[1], 2 * x)
    np.testing.assert_array_equal(jax.vmap(tagged)(x), x)
    assert jax.linear_transpose(lambda t: jax.jvp(tagged, (x,), (t,))[1], x)(x)[0] is not None


def test_the_derivative_of_a_mark_does_not_know_of_its_moments():
    def loss(x, index):
        return sow(jnp.ones(()), index, moments_of(x), layer=FLAT) * 3

    np.testing.assert_array_equal(jax.grad(loss)(inputs(), jnp.asarray(FLAT_INDEX)), np.zeros(FULL))


@pytest.mark.parametrize("name", ["twice", "jit", "remat", "custom_jvp", "scan", "cond_taken", "while", "shard_map"])
def test_moments_come_out_with_their_derivative(name):
    program, _, length = FLAT_PROGRAMS[name]
    x, index = inputs(), jnp.asarray(FLAT_INDEX)

    def by_hand(x):
        parts = [x := jnp.tanh(x) if turn else x for turn in range(length)]
        pooled = moments_of(jnp.concatenate(parts))
        return jnp.sin(pooled.mean) + pooled.m2

    def harvested(x):
        found = collect(harvest(program)(x, index)[1])[FLAT]
        return jnp.sin(found.mean) + found.m2

    @partial(jax.jit, static_argnums=0)
    def derivative(fun, x, direction):
        return jax.jvp(fun, (x,), (direction,))[1]

    got, expected = (derivative(fun, x, inputs(seed=1)) for fun in (harvested, by_hand))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_sow_compiles_to_no_operation():
    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    with_sow, bare = (instructions(jax.jit(fun).lower(x, index)) for fun in (normed, lambda x, index: jnp.tanh(x)))
    assert {op for op in with_sow if op[1] != "parameter"} == {op for op in bare if op[1] != "parameter"}


def test_scalar_moments_are_broadcast():
    ones = Moments(*(jnp.asarray(v, jnp.float32) for v in (4, 1, 0)))
    _, records = harvest(lambda x, index: sow(x, index, ones, layer=FLAT))(inputs(), jnp.asarray(FLAT_INDEX))
    assert_moments(collect(records)[FLAT], Moments(np.full(3, 4), np.ones(3), np.zeros(3)))


# collect


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1e4, 1e-2), (-1e4, 1e-2), (1e-6, 1e-8)])
def test_collect_is_exact(mean, deviation, in_place):
    """Five calls of unequal size, one of them empty, against float64 from the same float32 moments."""
    rng, index = np.random.default_rng(1), jnp.asarray(FLAT_INDEX)
    parts = []
    for rows in (1, 7, 0, 30, 2):
        part_mean = np.float32(mean + deviation * rng.normal(size=CHANNELS)) * (rows > 0)
        m2 = np.float32(rows * deviation**2 * rng.uniform(0.5, 2, CHANNELS))
        parts.append(Moments(np.full(CHANNELS, rows, np.float32), part_mean, m2))
    records = [Record(FLAT, index, jax.tree.map(jnp.asarray, part)) for part in parts]
    got = collect(records, {FLAT: index} if in_place else None)[FLAT]
    count, means, m2 = (np.float64(part) for part in map(np.stack, zip(*parts, strict=True)))
    expected_mean = (count * means).sum(0) / count.sum(0)
    expected_m2 = (m2 + count * (means - expected_mean) ** 2).sum(0)
    np.testing.assert_array_equal(got.count, count.sum(0))
    np.testing.assert_allclose(got.mean, expected_mean, rtol=2e-7)
    np.testing.assert_allclose(got.m2, expected_m2, rtol=5e-6)


@pytest.mark.parametrize("name", ["plain", "jit", "remat"])
def test_far_from_zero(name):
    x = jnp.asarray(np.random.default_rng(2).normal(1e4, 1e-2, (512, CHANNELS)), jnp.float32)
    expected = oracle([(FLAT_INDEX, np.asarray(x))], FLAT.size)

    def program(x, index):  # moments as core/moments.py takes them: deviations about the data
        shift = x[:1]
        near = moments_of(x - shift)
        return sow(x, index, near._replace(mean=near.mean + shift[0]), layer=FLAT)

    wrapped = {"plain": program, "jit": jax.jit(program), "remat": jax.checkpoint(program)}[name]
    for whole in (True, False):
        index = jnp.asarray(FLAT_INDEX)
        _, records = harvest(wrapped)(x, index)
        got = collect(records, {FLAT: index} if whole else None)[FLAT]
        np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-7)
        np.testing.assert_allclose(got.m2, expected.m2, rtol=1e-5)


def test_many_turns_far_from_zero():
    """While pools in float32 from turn to turn: the variance is right to a few (1e-3 / 1e-2)^2, ulps of the mean."""
    x = jnp.asarray(np.random.default_rng(3).normal(1e4, 1e-2, (64, ROWS, CHANNELS)), jnp.float32)

    def program(x, index, turns):
        def body(i, total):
            part, shift = x[i], x[i, :1]
            near = moments_of(part - shift)
            return total + sow(part, index, near._replace(mean=near.mean + shift[0]), layer=FLAT).sum()

        return lax.fori_loop(0, turns, body, jnp.zeros(()))

    _, records = jax.jit(harvest(program))(x, jnp.asarray(FLAT_INDEX), 64)
    expected = oracle([(FLAT_INDEX, np.asarray(x))], FLAT.size)
    got = collect(records)[FLAT]
    np.testing.assert_allclose(got.mean, expected.mean, rtol=2e-7)
    np.testing.assert_allclose(got.m2, expected.m2, rtol=3e-2)


def test_collect_in_place_needs_no_scatter():
    def program(x, index):
        _, records = harvest(lambda x, index: normed(jax.jit(normed)(x, index), index))(x, index)
        return collect(records, {FLAT: index})

    def sliced(x, index):
        return collect(harvest(lambda x, index: normed(x, index[:]))(x, index)[1], {FLAT: index + 0})

    x, index = inputs(), jnp.asarray(FLAT_INDEX)
    assert not {n for n in primitive_names(jax.make_jaxpr(program)(x, index)) if "scatter" in n}
    assert {n for n in primitive_names(jax.make_jaxpr(sliced)(x, index)) if "scatter" in n}


def test_collect_keeps_layers_apart_and_flat():
    other = Layer("other", 6)
    whole = {FLAT: jnp.asarray(FLAT_INDEX), other: jnp.arange(6, dtype=jnp.int32).reshape(2, 3)}
    x = inputs((ROWS, 2, 3))

    def program(x, a, b):
        y = sow(x, b, Moments(jnp.ones(()), x[0], jnp.zeros(())), layer=other)
        return normed(y[:, 0], a)

    _, records = harvest(program)(x, whole[FLAT], whole[other])
    for known in (whole, {}, None):
        moments = collect(records, known)
        assert {layer: m.mean.shape for layer, m in moments.items()} == {other: (6,), FLAT: (3,)}
        np.testing.assert_allclose(moments[other].mean, x[0].ravel(), rtol=1e-6)
        assert_moments(moments[FLAT], oracle([(FLAT_INDEX, x[:, 0])], 3))
    assert collect([]) == {}


def test_collect_agrees_with_merge():
    a, b = moments_of(inputs(seed=1)), moments_of(inputs((9, CHANNELS), seed=2))
    index = jnp.asarray(FLAT_INDEX)
    got = collect([Record(FLAT, index, a), Record(FLAT, index, b)])[FLAT]
    assert_moments(got, jax.tree.map(np.float64, merge(a, b)), 1e-6)


def test_complex_mean():
    rng = np.random.default_rng(4)
    means = (rng.normal(size=(2, CHANNELS)) + 1j * rng.normal(size=(2, CHANNELS))).astype(np.complex64)
    count = jnp.full(CHANNELS, 2.0)
    records = [Record(FLAT, jnp.asarray(FLAT_INDEX), Moments(count, jnp.asarray(m), count)) for m in means]
    got = collect(records)[FLAT]
    assert got.m2.dtype == jnp.float32
    np.testing.assert_allclose(got.mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.m2, 4 + 2 * (np.abs(means - means.mean(0)) ** 2).sum(0), rtol=1e-5)


def test_a_bad_value_stays_in_its_layer():
    bad = Layer("bad", CHANNELS)

    def program(x, index):
        return normed(x * jnp.nan, index, bad), normed(x, index)

    moments = collect(harvest(program)(inputs(), jnp.asarray(FLAT_INDEX))[1])
    assert np.isnan(moments[bad].mean).all()
    assert_moments(moments[FLAT], oracle([(FLAT_INDEX, inputs())], 3))
