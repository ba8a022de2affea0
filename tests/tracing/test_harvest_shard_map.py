"""A shard_map or pmap inside the harvested program: the moments of all its devices. The oracle is float64 NumPy."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, mesh
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
    branch,
    chain,
    gradient_of,
    inputs,
    instructions,
    normed,
    oracle,
    over_time,
    primitive_names,
    stacked,
    until,
)

from jaxbn._src import internals as _internals
from jaxbn._src.numerics.moments import Moments, batch_moments, merge_over
from jaxbn._src.tracing.harvest import harvest
from jaxbn._src.tracing.records import collect
from jaxbn._src.tracing.sow import sow

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
DIVIDED, WHOLE = P(AXIS), P()
INDEX = jnp.asarray(FLAT_INDEX)
ALL = (DEVICES * ROWS, CHANNELS)
pytestmark = pytest.mark.slow  # each compiles for several devices

every_check = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
eager_and_jit = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


def grid(*kinds):
    """Two devices along a, four along b."""
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds or (AUTO, AUTO))


def sharded(layer, check_vma=True, *, on=None, rows=DIVIDED, index=WHOLE, out=None, **options):
    """`layer(x, index)` under shard_map on a mesh, by default on eight devices among which the rows are divided."""
    specs = {"in_specs": (rows, index), "out_specs": rows if out is None else out}
    return jax.shard_map(layer, mesh=on or mesh(), check_vma=check_vma, **specs, **options)


def assert_seen(harvested, x, calls, *, index=INDEX, layer=FLAT, times=1):
    """The moments are those of the calls (index, x), but for a count that is so many times theirs."""
    _, records = harvested(x, index)
    count, mean, m2 = oracle(calls, layer.size)
    assert_moments(collect(records)[layer], Moments(times * count, mean, times * m2), 2e-5)


def in_a_row(x, length):
    return [(FLAT_INDEX, layer_input) for layer_input in chain(x, length)[:length]]


# `sow` under other transformations inside

INSIDE = [
    "plain", "twice", "nested_jit", "remat", "custom_jvp", "custom_vjp", "custom_vmap", "scan",
    "scan_with_outputs", "scan_of_remat", "scan_of_cond", "scan_of_while", "cond_taken", "cond_not_taken",
    "cond_on_both", "while", "while_no_turn", "grad", "grad_of_remat_dots", "grad_of_scan_of_remat", "grad_of_cond",
]  # fmt: skip


INSIDE_UNCHECKED = ["plain", "scan_of_remat", "scan_of_while", "cond_not_taken", "cond_on_both", "grad", "grad_of_cond"]


@pytest.mark.parametrize(
    ("name", "check_vma"), [*((name, True) for name in INSIDE), *((name, False) for name in INSIDE_UNCHECKED)]
)
def test_each_rule_inside(name, check_vma):
    program, _, length = FLAT_PROGRAMS[name]
    x, devices = inputs(ALL), sharded(program, check_vma)
    harvested = jax.jit(harvest(devices))
    np.testing.assert_allclose(harvested(x, INDEX)[0], jax.jit(devices)(x, INDEX), rtol=1e-5, atol=1e-6)
    assert_seen(harvested, x, in_a_row(x, length))


@pytest.mark.parametrize("name", ["plain", "scan_of_while", "grad_of_remat", "grad_of_scan_of_remat"])
def test_inside_without_jit(name):
    program, _, length = FLAT_PROGRAMS[name]
    assert_seen(harvest(sharded(program)), inputs(ALL), in_a_row(inputs(ALL), length))


def test_marks_on_some_devices_only():
    """A cond with a predicate that differs between devices."""
    x = inputs(ALL) + 9 * jnp.where(jnp.arange(len(inputs(ALL))) < 3 * ROWS, 1, -1)[:, None]
    program = sharded(lambda x, i: lax.cond(x.sum() > 0, normed, lambda x, i: x, x, i))
    assert_seen(jax.jit(harvest(program)), x, [(FLAT_INDEX, x[: 3 * ROWS])])


@every_check
def test_devices_with_no_values_and_devices_with_few(check_vma):
    """A mask that leaves some devices without a row."""
    x, valid = inputs(ALL), np.random.default_rng(0).random(ALL) > 0.6
    valid[: 3 * ROWS] = False

    def layer(x, index):
        return sow(x, index, batch_moments(x[..., 0], mask=x[..., 1]), layer=FLAT)

    _, records = jax.jit(harvest(sharded(layer, check_vma)))(jnp.stack([x, valid.astype(np.float32)], -1), INDEX)
    calls = [(FLAT_INDEX[c : c + 1], np.asarray(x)[valid[:, c], c : c + 1]) for c in range(CHANNELS)]
    assert_moments(collect(records)[FLAT], oracle(calls, FLAT.size))


# The shard_map under other transformations: program, and how many layers in a row


def with_a_scalar(x, index):
    """Its derivative wants a scalar of each device, to which JAX gives an axis on the way."""
    return normed(x, index) * jnp.sin(jnp.exp(x.mean()))


def saving(layer):
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable)


AROUND = {
    "plain": (lambda layer, x, i: layer(x, i), 1),
    "twice": (lambda layer, x, i: layer(layer(x, i), i), 2),
    "beside": (lambda layer, x, i: normed(layer(x, i), i), 2),
    "jit": (lambda layer, x, i: jax.jit(layer)(x, i), 1),
    "scan": (lambda layer, x, i: over_time(x, i, layer=layer), DEPTH),
    "scan_of_remat": (lambda layer, x, i: over_time(x, i, layer=jax.checkpoint(layer)), DEPTH),
    "cond": (lambda layer, x, i: branch(True, x, i, layer=layer), 1),
    "cond_not_taken": (lambda layer, x, i: branch(False, x, i, layer=layer), 0),
    "while": (lambda layer, x, i: until(3, x, i, layer=layer), 3),
    "grad": (gradient_of, 1),
    "grad_of_jit": (lambda layer, x, i: gradient_of(jax.jit(layer), x, i), 1),
    "grad_of_remat": (lambda layer, x, i: gradient_of(jax.checkpoint(layer), x, i), 1),
    "grad_of_remat_saving": (lambda layer, x, i: gradient_of(saving(layer), x, i), 1),
    "grad_of_scan": (lambda layer, x, i: gradient_of(partial(over_time, layer=layer), x, i), DEPTH),
    "forward_mode": (lambda layer, x, i: jax.jvp(lambda x: layer(x, i), (x,), (x,))[1], 1),
}


@every_check
@pytest.mark.parametrize("name", AROUND)
def test_each_transformation_around(name, check_vma):
    around, length = AROUND[name]
    x, program = inputs(ALL), partial(around, sharded(with_a_scalar if "grad_of_remat" in name else normed, check_vma))
    harvested = jax.jit(harvest(program))
    np.testing.assert_allclose(harvested(x, INDEX)[0], jax.jit(program)(x, INDEX), rtol=1e-5, atol=1e-6)
    assert_seen(harvested, x, in_a_row(x, length))


@every_check
@pytest.mark.parametrize("inside", [True, False], ids=["scan inside", "scan around"])
def test_stacked_layers(inside, check_vma):
    """The index is sliced by the scan, on whichever side of the shard_map that is."""

    def layer(x, index, layer):
        return sharded(partial(normed, layer=layer), check_vma)(x, index)

    x = inputs(ALL)
    harvested = harvest(sharded(stacked, check_vma) if inside else partial(stacked, layer=layer))
    calls = list(zip(STACK_INDEX, chain(x, DEPTH), strict=True))
    assert_seen(jax.jit(harvested), x, calls, index=jnp.asarray(STACK_INDEX), layer=STACK)


MEMBER = partial(normed, layer=ENSEMBLE)
ENSEMBLES = {
    "around": lambda check: jax.vmap(sharded(MEMBER, check)),
    "inside": lambda check: sharded(jax.vmap(MEMBER), check, rows=P(None, AXIS)),
    "over devices": lambda check: jax.vmap(sharded(MEMBER, check, on=grid(), rows=P("a")), spmd_axis_name="b"),
}


@every_check
@pytest.mark.parametrize("name", ENSEMBLES)
def test_vmap_over_members(name, check_vma):
    """Each lane has its own index."""
    x, index = inputs((DEPTH, *ALL)), jnp.asarray(STACK_INDEX)
    calls = list(zip(STACK_INDEX, x, strict=True))
    assert_seen(jax.jit(harvest(ENSEMBLES[name](check_vma))), x, calls, index=index, layer=ENSEMBLE)


@every_check
def test_vmap_over_rows(check_vma):
    x = inputs((*ALL[:1], DEPTH, CHANNELS))
    program = jax.vmap(sharded(normed, check_vma), (1, None))
    assert_seen(jax.jit(harvest(program)), x, [(FLAT_INDEX, x)])


@every_check
def test_vmap_of_harvest(check_vma):
    x = inputs((2, *ALL))
    _, records = jax.jit(jax.vmap(harvest(sharded(normed, check_vma)), (0, None)))(x, INDEX)
    for lane in range(2):
        got = collect(jax.tree.map(lambda a, lane=lane: a[lane], records))[FLAT]
        assert_moments(got, oracle([(FLAT_INDEX, x[lane])], FLAT.size))


@every_check
def test_gradient_of_harvest(check_vma):
    """That of the output is as without harvest, and that of the moments is theirs."""
    x, program = inputs(ALL), sharded(normed, check_vma)

    def loss(x):
        y, records = harvest(program)(x, INDEX)
        return jnp.square(y).sum() + collect(records)[FLAT].mean.sum()

    expected = jax.grad(lambda x: jnp.square(program(x, INDEX)).sum() + x.mean(0).sum())(x)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-5, atol=1e-6)


# Shard_map in shard_map


def nested(inner, outer, check_vma, layer=normed):
    """Rows over a in the outer one and over b in the inner one, where those are given."""
    inside = partial(jax.shard_map, in_specs=(inner, P()), out_specs=inner, axis_names={"b"}, check_vma=check_vma)
    return sharded(lambda x, i: inside(layer)(x, i), check_vma, on=grid(), rows=outer, axis_names={"a"})


@every_check
@pytest.mark.parametrize(("inner", "outer"), [(P("b"), P("a")), (P("b"), P()), (P(), P("a")), (P(), P())])
def test_nested(inner, outer, check_vma):
    x = inputs(ALL)
    assert_seen(jax.jit(harvest(nested(inner, outer, check_vma))), x, [(FLAT_INDEX, x)])


@every_check
def test_nested_without_axes_left_to_map(check_vma):
    inside = partial(jax.shard_map, in_specs=(P(), P()), out_specs=P(), axis_names={"a", "b"}, check_vma=check_vma)
    program = sharded(lambda x, i: inside(normed)(x, i), check_vma, on=grid(), rows=P("a"))
    assert_seen(jax.jit(harvest(program)), inputs(ALL), [(FLAT_INDEX, inputs(ALL))])


@every_check
@pytest.mark.parametrize("axis_names", ["b", "ab"])
def test_harvest_within_the_users_shard_map(axis_names, check_vma):
    """An inner shard_map is pooled; the records are still those of one device of the outer one."""
    specs = {"in_specs": (P("b"), P()), "out_specs": P("b"), "axis_names": set(axis_names)}

    def program(x, index):
        y, records = harvest(jax.shard_map(normed, check_vma=check_vma, **specs))(x, index)
        return jax.tree.map(lambda part: part[None], collect(records)[FLAT])

    x = inputs(ALL)
    moments = jax.jit(sharded(program, check_vma, on=grid(), rows=P("a"), axis_names={"a"}))(x, INDEX)
    for device, rows in enumerate(np.split(x, 2)):
        got = jax.tree.map(lambda part, device=device: part[device], moments)
        assert_moments(got, oracle([(FLAT_INDEX, rows)], FLAT.size))


def manual_axes(program):
    """Those inside every shard_map, from the outside to the inside."""
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name == _internals.SHARD_MAP:
            mapped = _internals.shard_map_of(eqn)
            found.append(mapped.manual.union(mapped.mesh.manual_axes))
        found += [axes for inner in _internals.inner_programs(eqn) for axes in manual_axes(inner)]
    return found


@pytest.mark.parametrize("outer", ["a", "ab"])
@pytest.mark.parametrize("inner", ["a", "b", "ab"])
def test_axes_that_are_left_to_the_compiler_stay_so(inner, outer):
    inside = partial(jax.shard_map, in_specs=(P(), P()), out_specs=P(), axis_names=set(inner))
    program = sharded(lambda x, i: inside(normed)(x, i), on=grid(), rows=P("a"), axis_names=set(outer))
    before, after = (jax.make_jaxpr(fun)(inputs(ALL), INDEX) for fun in (program, harvest(program)))
    assert manual_axes(before) == manual_axes(after) and len(manual_axes(before)) == 2


# Meshes of two axes: values that are equal along one of them count once


KINDS = [(AUTO, AUTO), (EXPLICIT, EXPLICIT), (EXPLICIT, AUTO), (AUTO, EXPLICIT)]
every_kind = pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: " ".join(kind.name for kind in kinds))


def placed(x, rows, on):
    return jax.device_put(x, NamedSharding(on, rows)), jax.device_put(INDEX, NamedSharding(on, WHOLE))


@every_check
@every_kind
@pytest.mark.parametrize(
    ("rows", "axis_names"),
    [(P(("b", "a")), "ab"), (P("a"), "ab"), (P("b"), "ab"), (P(), "ab"), (P("a"), "a"), (P(), "b")],
    ids=["both", "over a", "over b", "none", "over a, manual a", "none, manual b"],
)
def test_axes_over_which_no_array_is_sharded(rows, axis_names, kinds, check_vma):
    on, x = grid(*kinds), inputs(ALL)
    program = sharded(normed, check_vma, on=on, rows=rows, axis_names=set(axis_names))
    given, index = placed(x, rows, on)
    assert_seen(jax.jit(harvest(program)), given, [(FLAT_INDEX, x)], index=index)


@every_kind
def test_meshes_without_jit(kinds):
    on, x = grid(*kinds), inputs(ALL)
    given, index = placed(x, P("a"), on)
    assert_seen(harvest(sharded(normed, on=on, rows=P("a"))), given, [(FLAT_INDEX, x)], index=index)


@every_check
def test_mesh_that_is_set(check_vma):
    """Specs inferred from the arrays, and a `sow` of the same layer outside."""
    on = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(EXPLICIT,))
    devices = jax.shard_map(normed, out_specs=P(AXIS), check_vma=check_vma)
    x, index = placed(inputs(ALL), DIVIDED, on)
    with jax.set_mesh(on):
        assert_seen(jax.jit(harvest(lambda x, i: normed(devices(x, i), i))), x, in_a_row(x, 2), index=index)


@eager_and_jit
def test_mesh_without_devices(transform):
    """Those of the arrays are taken."""
    program = sharded(normed, on=AbstractMesh((DEVICES,), (AXIS,), axis_types=(AUTO,)))
    x, index = placed(inputs(ALL), DIVIDED, mesh())
    assert_seen(transform(harvest(program)), x, [(FLAT_INDEX, x)], index=index)


def test_smap():
    with jax.set_mesh(mesh()):
        program = jax.smap(normed, in_axes=(0, None), out_axes=0, axis_name=AXIS)
        assert_seen(jax.jit(harvest(program)), inputs(ALL), [(FLAT_INDEX, inputs(ALL))])


@every_check
def test_features_on_different_devices(check_vma):
    """The index is divided as the statistics are, and each device holds other positions."""
    layer = Layer("wide", 12)
    x, index = inputs((*ALL[:1], layer.size)), jnp.arange(layer.size, dtype=jnp.int32)
    program = sharded(partial(normed, layer=layer), check_vma, on=grid(), rows=P("a", "b"), index=P("b"))
    assert_seen(jax.jit(harvest(program)), x, [(index, x)], index=index, layer=layer)


@every_check
def test_differences_that_no_spec_tells_of(check_vma):
    """No array is sharded over b, but an operation inside varies over it."""
    programs = {
        "axis_index": lambda x, i: normed(x + lax.axis_index("b").astype(jnp.float32), i),
        "psum_scatter": lambda x, i: normed(lax.psum_scatter(x, "b", tiled=True) / 4, i),
        "in a scan": lambda x, i: lax.scan(
            lambda x, _: (normed(x, i), None), x + lax.axis_index(("b",)).astype(jnp.float32), length=1
        )[0],
    }
    x = inputs(ALL)
    shifted = [(FLAT_INDEX, x + b) for b in range(4)]
    for name, calls in (("axis_index", shifted), ("psum_scatter", [(FLAT_INDEX, x)]), ("in a scan", shifted)):
        program = sharded(programs[name], check_vma, on=grid(), rows=P("a"), out=P(("a", "b")))
        assert_seen(jax.jit(harvest(program)), x, calls)


# Known limits, as the module says them


@pytest.mark.parametrize(("check_vma", "times"), [(True, 1), (False, 4)], ids=["checked", "unchecked"])
def test_limit_operations_that_name_an_axis(check_vma, times):
    """The mean over b does not vary along b, which only the types show."""

    def layer(x, index):
        x = lax.pcast(x, "b", to="varying") if check_vma else x
        return normed(lax.pmean(x, "b"), index)

    x = inputs(ALL)
    program = sharded(layer, check_vma, on=grid(), rows=P("a"))
    assert_seen(jax.jit(harvest(program)), x, [(FLAT_INDEX, x)], times=times)


@every_check
def test_limit_all_gather(check_vma):
    """Its result is the same on all devices, but typed as varying."""
    x = inputs(ALL)
    program = sharded(lambda x, i: normed(lax.all_gather(x, AXIS, tiled=True), i), check_vma)
    assert_seen(jax.jit(harvest(program)), x, [(FLAT_INDEX, x)], times=DEVICES)


def test_limit_what_is_the_same_in_pmap():
    x = inputs()
    program = lambda x, i: jax.pmap(lambda k: normed(x, i) + k)(jnp.zeros(DEVICES))
    assert_seen(jax.jit(harvest(program)), x, [(FLAT_INDEX, x)], times=DEVICES)


# Pmap


PMAPS = {
    "plain": lambda layer: jax.pmap(layer, in_axes=(0, None)),
    "axis 1": lambda layer: lambda x, i: jax.pmap(layer, in_axes=(1, None), out_axes=1)(jnp.swapaxes(x, 0, 1), i),
    "named": lambda layer: jax.pmap(lambda x, i: layer(x, i) - lax.pmean(x, "d"), "d", in_axes=(0, None)),
    "replicas": lambda layer: lambda x, i: jax.pmap(layer)(x, jnp.stack([i] * len(x))),
    "static": lambda layer: (
        lambda x, i: jax.pmap(layer, in_axes=(0, None, None), static_broadcasted_argnums=2)(x, i, FLAT)
    ),
}


@eager_and_jit
@pytest.mark.parametrize("devices", [DEVICES, 2])
@pytest.mark.parametrize("name", PMAPS)
def test_pmap(name, devices, transform):
    x, program = inputs((devices, *FULL)), PMAPS[name](normed)
    harvested = transform(harvest(program))
    np.testing.assert_allclose(harvested(x, INDEX)[0], program(x, INDEX), rtol=1e-5, atol=1e-6)
    assert_seen(harvested, x, [(FLAT_INDEX, x)])


# The records


@every_check
@eager_and_jit
def test_records_are_whole_on_every_device(transform, check_vma):
    layers = [Layer(name, CHANNELS) for name in ("first", "second")]

    def program(x, index):
        for layer in (*layers, layers[0]):
            x = normed(x, index, layer)
        return x

    x = inputs(ALL)
    _, records = transform(harvest(sharded(program, check_vma)))(x, INDEX)
    first, second, third = in_a_row(x, 3)
    assert [record.layer for record in records] == layers
    for record, calls in zip(records, ([first, third], [second]), strict=True):
        assert record.index.shape == (CHANNELS,) and record.moments.mean.sharding.is_fully_replicated
        assert_moments(collect([record])[record.layer], oracle(calls, CHANNELS))


def synchronized(x, index, layer):
    moments = batch_moments(x)
    return sow(jnp.tanh(x - merge_over(moments, AXIS).mean[None]), index, moments, layer=layer)


@pytest.mark.parametrize("layer", [normed, synchronized])
@pytest.mark.parametrize("times", [1, 3])
def test_one_collective_for_each_layer(times, layer):
    """A layer that synchronizes gathers the same moments, and the compiler sees that."""

    def program(x, index):
        for name in range(times):
            x = layer(x, index, Layer(name, CHANNELS))
        return x

    compiled = jax.jit(harvest(sharded(program))).lower(inputs(ALL), INDEX).compile().as_text()
    assert len(re.findall(r" all-[a-z]+\(", compiled)) == times


@every_check
def test_an_index_that_goes_in_whole_comes_out_with_the_record(check_vma):
    """So the moments are in place, and need no scatter."""
    program = sharded(lambda x, i: normed(jax.jit(normed)(x, i), i), check_vma)

    def moments(x, index):
        _, records = harvest(program)(x, index)
        assert [record.index is index for record in records] == [True]
        return collect(records, {FLAT: index})[FLAT]

    jaxpr = jax.make_jaxpr(moments)(inputs(ALL), INDEX)
    assert not {name for name in primitive_names(jaxpr) if "scatter" in name}
    assert_moments(moments(inputs(ALL), INDEX), oracle(in_a_row(inputs(ALL), 2), FLAT.size))


def test_an_index_that_was_changed_inside_is_not_mistaken_for_it():
    """One index unchanged, one reversed, and one that is another argument of the same shape."""
    backwards = INDEX[::-1]

    def program(x, index, other):
        y = normed(normed(x, index), index[::-1])
        return normed(y, other, Layer("other", CHANNELS))

    x = inputs(ALL)
    mapped = jax.shard_map(program, mesh=mesh(), in_specs=(DIVIDED, WHOLE, WHOLE), out_specs=DIVIDED)
    moments = collect(harvest(mapped)(x, INDEX, backwards)[1], {FLAT: INDEX})
    first, second, third = (layer_input for _, layer_input in in_a_row(x, 3))
    assert_moments(moments[FLAT], oracle([(FLAT_INDEX, first), (backwards, second)], CHANNELS))
    assert_moments(moments[Layer("other", CHANNELS)], oracle([(backwards, third)], CHANNELS))


def test_far_from_zero():
    """Means in float32: the variance stays within (5e-4 / 1e-2)^2."""
    x = jnp.asarray(np.random.default_rng(2).normal(1e4, 1e-2, (512, CHANNELS)), jnp.float32)
    program = sharded(lambda x, i: sow(x, i, batch_moments(x), layer=FLAT))
    got = collect(jax.jit(harvest(program))(x, INDEX)[1])[FLAT]
    expected = oracle([(FLAT_INDEX, np.asarray(x))], FLAT.size)
    np.testing.assert_allclose(got.mean, expected.mean, rtol=1e-7)
    np.testing.assert_allclose(got.m2, expected.m2, rtol=1e-2)


def test_what_has_no_mark_is_not_touched():
    program = sharded(lambda x, index: jnp.tanh(x - lax.pmean(x.mean(0, keepdims=True), AXIS)) + index)
    x = inputs(ALL)
    harvested = lambda *args: harvest(program)(*args)[0]
    before, after = (jax.make_jaxpr(fun)(x, x[:1]) for fun in (program, harvested))
    assert [eqn.primitive.name for eqn in before.eqns] == [eqn.primitive.name for eqn in after.eqns] == ["shard_map"]
    lowered = [jax.jit(fun).lower(x, x[:1]) for fun in (program, harvested)]
    assert instructions(lowered[0]) == instructions(lowered[1])


def test_what_is_refused_inside_is_named():
    solve = lambda x, i: lax.custom_linear_solve(lambda v: normed(v, i), x, solve=lambda _, b: b)
    with pytest.raises(NotImplementedError, match="inside `custom_linear_solve`"):
        harvest(sharded(solve))(inputs(ALL), INDEX)
