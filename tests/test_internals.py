"""Pins the parts of JAX and Flax beyond their documented API that jaxbn reads, each on a small traced program."""

import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn._src import internals
from jaxbn._src.framework import processes

ROOT = Path(__file__).parents[1]
X = jnp.arange(6.0).reshape(2, 3)


def only_equation(program, *args):
    (eqn,) = jax.make_jaxpr(program)(*args).eqns
    return eqn


def twice(x):
    return jnp.sin(x) * 2


def outputs_of(program, *args):
    """Runs a traced program equation by equation, as the rules do."""
    values = dict(zip((*program.constvars, *program.invars), (*internals.constants(program), *args), strict=True))
    for eqn in program.eqns:
        read = [atom.val if isinstance(atom, internals.Literal) else values[atom] for atom in eqn.invars]
        with internals.as_traced(eqn):
            values.update(zip(eqn.outvars, internals.bind(eqn, read), strict=True))
    return [values[atom] for atom in program.outvars]


def test_internals_are_in_one_file():
    """Only internals.py and this test name modules that JAX does not document, and underscored names of Flax."""
    internal = r"jax\._src|jax\.core\b|jax\.extend|jax\.interpreters|from jax import .*\bcore\b|\bflax\.[\w.]*\b_[a-z]"
    of_modules = r"\b(?:module|model|layer|scope)\._(?!asdict|replace|factory)[a-z]+|\b(?:nn|nnx)\.[\w.]*\b_[a-z]+"
    allowed = {ROOT / "jaxbn" / "_src" / "internals.py", Path(__file__)}
    files = {file for folder in ("jaxbn", "tests", "examples") for file in (ROOT / folder).rglob("*.py")} - allowed
    found = {file.name: re.findall(f"{internal}|{of_modules}", file.read_text()) for file in files}
    assert len(files) > 100 and {name: hits for name, hits in found.items() if hits} == {}


def test_no_client_before_processes_know_each_other(monkeypatch):
    """`statistics/test_multihost.py` exchanges messages through one."""
    assert internals.coordination_client() is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"There are 2 processes.*jax.distributed.initialize\(\)"):
        processes.exchange(b"")


# Calls


def custom_jvp(x):
    function = jax.custom_jvp(twice)
    function.defjvp(lambda primals, tangents: (twice(*primals), tangents[0]))
    return function(x)


def custom_vjp(x):
    function = jax.custom_vjp(twice)
    function.defvjp(lambda x: (twice(x), None), lambda _, cotangent: (cotangent,))
    return function(x)


def custom_vmap(x):
    function = jax.custom_batching.custom_vmap(twice)
    function.def_vmap(lambda size, batched, x: (twice(x), True))
    return function(x)


def called(primitive, x):
    program = jax.make_jaxpr(twice)(x)
    if primitive.name == "call":  # which before JAX 0.11 takes a program without constants
        program = program.jaxpr
    return primitive.bind(x, **primitive.get_bind_params({"call_jaxpr": program}))[0]


CALLS = {
    "jit": jax.jit(twice),
    "remat": jax.checkpoint(twice),
    "call": partial(called, primitives.call_p),
    "closed_call": partial(called, primitives.closed_call_p),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "custom_vmap": custom_vmap,
}


@pytest.mark.parametrize("name", CALLS)
def test_internals_hold_their_program(name):
    eqn = only_equation(CALLS[name], X)
    program = internals.called_program(eqn)
    assert [inner.eqns for inner in internals.inner_programs(eqn)] == [program.eqns]
    np.testing.assert_array_equal(outputs_of(program, X)[0], twice(X))
    np.testing.assert_array_equal(internals.bind(eqn, [X])[0], twice(X))
    assert not internals.is_recomputation(eqn)


def test_every_call_was_traced():
    assert {only_equation(call, X).primitive.name for call in CALLS.values()} == set(internals._CALLS)


def test_recomputation():
    program = jax.make_jaxpr(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)).sum())(x)))(X)
    assert [internals.is_recomputation(eqn) for eqn in program.eqns if internals.called_program(eqn) is not None] == [
        True
    ]


def test_names_of_functions():
    assert internals.name_of_function(only_equation(jax.jit(jax.nn.silu), X)) == "silu"
    assert internals.name_of_function(only_equation(jnp.sin, X)) == "None"


def test_identities():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, P())
    named = only_equation(lambda x: jax.ad_checkpoint.checkpoint_name(x, "x"), X)
    constrained = only_equation(lambda x: lax.with_sharding_constraint(x, everywhere), X)
    assert {named.primitive.name, constrained.primitive.name} == internals.IDENTITIES


# Loops and branches


def test_parts_of_a_scan():
    weights, key = jnp.ones(3), jax.random.key(0)

    def body(carry, x):
        count, y, key = carry
        return (count + 1, y * weights + x, jax.random.fold_in(key, count)), (y + x, count * 2)

    def program(y, xs, key):
        return lax.scan(body, (0, y, key), xs, reverse=True, unroll=2)

    closed = jax.make_jaxpr(program)(X[0], X, key)
    (eqn,) = [eqn for eqn in closed.eqns if eqn.primitive.name == internals.SCAN]
    scan = internals.scan_of(eqn)
    assert (scan.constants, scan.carry, len(eqn.invars), len(eqn.outvars)) == (1, 3, 5, 5)
    assert scan.options == {"length": 2, "reverse": True, "unroll": 2}
    count, y, *_ = outputs_of(scan.body, weights, 5, X[0], key, X[1])
    assert count == 6 and (y == X[0] + X[1]).all()


@pytest.mark.parametrize(
    "program, constants, carry",
    [
        (lambda x: lax.map(lambda row: row * x.sum(), x), 1, 0),
        (lambda x: lax.fori_loop(0, 3, lambda i, y: y * x, x), 1, 2),
        (lambda x: lax.scan(lambda y, _: (y * 2, None), x, length=3)[0], 0, 1),
        (lambda x: lax.scan(lambda _, row: (None, row), None, x)[1], 0, 0),
        (lambda x: lax.scan(lambda y, row: (y + row, y - row), x[0, 0], x[:, 0])[1], 0, 1),  # of scalars
    ],
)
def test_forms_of_a_scan(program, constants, carry):
    (eqn,) = [eqn for eqn in jax.make_jaxpr(program)(X).eqns if eqn.primitive.name == internals.SCAN]
    scan = internals.scan_of(eqn)
    assert (scan.constants, scan.carry) == (constants, carry)
    assert len(scan.body.invars) == len(eqn.invars) and len(scan.body.outvars) == len(eqn.outvars)


def test_gradient_of_a_scan_reads_the_same():
    """JAX sorts the inputs of the transposed scan and adds residuals; the parameters that are read still fit."""

    def loss(x):
        return lax.scan(lambda y, row: (jnp.sin(y) * row, y), x[0], x)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss))(X)
    scans = [internals.scan_of(eqn) for eqn in program.eqns if eqn.primitive.name == internals.SCAN]
    assert len(scans) == 2
    for scan, eqn in zip(scans, (e for e in program.eqns if e.primitive.name == internals.SCAN), strict=True):
        carried = eqn.invars[scan.constants : scan.constants + scan.carry]
        assert [v.aval.shape for v in carried] == [v.aval.shape for v in eqn.outvars[: scan.carry]]


def test_parts_of_a_while():
    limit = jnp.full(3, 9.0)

    def program(x):
        return lax.while_loop(lambda y: (y < limit).all(), lambda y: y + x + limit, x)

    eqn = jax.make_jaxpr(program)(X[1]).eqns[-1]
    loop = internals.while_of(eqn)
    assert eqn.primitive.name == internals.WHILE and (loop.condition_constants, loop.body_constants) == (1, 2)
    assert outputs_of(loop.condition, limit, X[1]) == [True]
    assert len(loop.body.invars) == 3 and len(loop.body.outvars) == 1


def test_branches_of_a_switch():
    eqn = jax.make_jaxpr(lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, twice], x))(1, X).eqns[-1]
    assert eqn.primitive.name == internals.COND and len(eqn.invars) == 2
    for branch, function in zip(internals.branches_of(eqn), [jnp.sin, jnp.cos, twice], strict=True):
        np.testing.assert_array_equal(outputs_of(branch, X)[0], function(X))


# shard_map


def grid():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))


def sharded(function, check_vma=True, axes=("a", "b")):
    specs = {"in_specs": (P("a"),), "out_specs": P("a"), "axis_names": set(axes)}
    return jax.shard_map(function, mesh=grid(), check_vma=check_vma, **specs)


def test_parts_of_a_shard_map():
    eqn = only_equation(sharded(twice), X)
    found = internals.shard_map_of(eqn)
    assert eqn.primitive.name == internals.SHARD_MAP
    assert (found.mesh, found.check_vma, found.manual) == (grid(), True, {"a", "b"})
    assert (list(found.in_specs), list(found.out_specs)) == ([P("a")], [P("a")]) and [*P("b", None)] == ["b", None]
    assert not found.body.constvars and found.body.invars[0].aval.shape == (1, 3)
    assert internals.shard_map_of(only_equation(sharded(twice, False, "a"), X))[4:] == (False, {"a"})


def test_constants_of_a_shard_map_are_inputs():
    eqn = only_equation(sharded(lambda x: x * X.sum()), X)
    assert len(eqn.invars) == len(internals.shard_map_of(eqn).in_specs) == 2


def test_manual_axes_of_nested_shard_maps():
    inner = jax.shard_map(twice, in_specs=P(), out_specs=P(), axis_names={"b"})
    outer = internals.shard_map_of(only_equation(sharded(inner, axes="a"), X))
    (eqn,) = outer.body.eqns
    found = internals.shard_map_of(eqn)
    assert (outer.manual, found.manual) == ({"a"}, {"b"})
    assert found.mesh.manual_axes == ("a",) and found.mesh.axis_names == ("a", "b")


@pytest.mark.parametrize("check_vma, expected", [(True, [{"a"}, set()]), (False, [set()] * 2)])
def test_types_tell_what_varies(check_vma, expected):
    seen = []

    def look(x):
        seen.extend(map(internals.varying, (x, lax.psum(x, "a"))))
        return x

    only_equation(sharded(look, check_vma), X)
    assert seen == expected


OPERATIONS = {
    "axis_index": lambda x: x + lax.axis_index("b").astype(jnp.float32),
    "psum": lambda x: lax.psum(x, "b"),
    "all_gather": lambda x: lax.all_gather(x, "b"),
    "reduce_scatter": lambda x: lax.psum_scatter(x, "b", tiled=True),
    "all_to_all": lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True),
    "ppermute": lambda x: lax.ppermute(x, "b", [(0, 1)]),
    "pmax": lambda x: lax.pmax(x, ("a", "b")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_name_their_axes_in_their_parameters(name):
    program = internals.shard_map_of(only_equation(sharded(OPERATIONS[name], False), jnp.ones((8, 3)))).body
    (eqn,) = (eqn for eqn in program.eqns if eqn.primitive.name == name)
    assert "b" in jax.tree.leaves(eqn.params)


def test_pmap_is_a_shard_map():
    eqn = only_equation(jax.pmap(twice), jnp.ones((8, 3)))
    assert [inner.primitive.name for inner in internals.called_program(eqn).eqns] == [internals.SHARD_MAP]


# The rest


def test_a_parameter_that_is_missing_names_the_version():
    eqn = only_equation(jnp.sin, X)
    with pytest.raises(
        NotImplementedError, match=rf"`sin` has no parameter 'jaxpr' in JAX {re.escape(jax.__version__)}"
    ):
        internals.scan_of(eqn)


def test_equations_run_as_they_were_traced():
    eqn = only_equation(jax.named_scope("outer")(lambda x: jnp.sin(x)), X)
    program = jax.jit(lambda x: _run(eqn, x)).lower(X)
    assert "outer/sin" in program.as_text(debug_info=True)
    assert "test_internals.py" in internals.place_of(eqn)


def _run(eqn, x):
    with internals.as_traced(eqn):
        return internals.bind(eqn, [x])[0]


def test_tracers_and_arrays():
    seen = []
    jax.jit(lambda x: seen.append(internals.is_tracer(x)))(X)
    assert seen == [True] and not internals.is_tracer(X) and not internals.is_tracer(1.0)
    foreign = np.arange(3, dtype=np.dtype(np.int32).newbyteorder())
    given = [X, np.ones(2, jnp.bfloat16), np.float32(1), np.array(["text"]), foreign, 1.0]
    assert [internals.is_array_of_jax(x) for x in given] == [True, True, True, False, False, False]


def test_open_dimensions_cannot_decide():
    (rows,) = jax.export.symbolic_shape("rows")
    with pytest.raises(internals.UnknownDimension):
        bool(rows > 3)


def test_parts_of_a_bound_module():
    class Net(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(2), nn.Dense(3)

        def __call__(self, x):
            x = self.second(self.first(x))
            seen.extend(type(part) for part in internals.parts_of_module(self))
            return x

    seen = []
    jax.eval_shape(Net().init, jax.random.key(0), X)
    assert seen.count(nn.Dense) == 2


def test_primitives_of_the_library_are_identities():
    double = internals.identity_primitive(
        "of_the_test", lambda x, y: x, lambda args, dims: (double.bind(*args), dims[0]), multiple=False
    )
    function = lambda x: double.bind(jnp.sin(x), x)
    np.testing.assert_array_equal(jax.jit(function)(X), jax.jit(jnp.sin)(X))
    np.testing.assert_allclose(jax.grad(lambda x: function(x).sum())(X), np.cos(X), rtol=1e-6)
    np.testing.assert_array_equal(jax.vmap(function)(X), jax.vmap(jnp.sin)(X))
    internals.lower_on("cpu", double, lambda x, y: [x + 1])
    np.testing.assert_array_equal(jax.jit(lambda x: double.bind(x, x))(X), X + 1)
