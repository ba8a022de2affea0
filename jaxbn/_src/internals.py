"""Everything the library relies on that JAX and Flax do not promise to keep: all of it is in this file.

It holds the names outside the documented API, and the parameters of the primitives in a traced program. All of it was
seen in JAX 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1 with Flax 0.12.7, 0.12.8 and 0.12.12; where the versions differ, the
place says how. `tests/test_internals.py` traces each primitive and checks what is read here. A parameter that is
missing is an error that names the primitive and the JAX version.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core, source_info_util
from jax.extend.core import primitives
from jax.interpreters import ad, batching, mlir

# A traced program: `core.Jaxpr` or `core.ClosedJaxpr`, which are one class since JAX 0.11. Both have `constvars`,
# `invars`, `eqns` and `outvars`.
Program = Any
Equation = Any

Literal = core.Literal
# Raised where a decision depends on a dimension that an exported program leaves open.
UnknownDimension = core.InconclusiveDimensionOperation

# Primitives that only call a program, and the parameter that holds it.
_CALLS = {
    primitives.jit_p.name: "jaxpr",  # pmap is a jit of a shard_map
    primitives.remat_p.name: "jaxpr",
    primitives.call_p.name: "call_jaxpr",  # since JAX 0.11.1 one primitive with the next, named "eval_jaxpr"
    primitives.closed_call_p.name: "call_jaxpr",
    primitives.custom_jvp_call_p.name: "call_jaxpr",
    primitives.custom_vjp_call_p.name: "call_jaxpr",
    "custom_vmap_call": "call",  # the one primitive that jax.extend does not export
}
SCAN, COND, WHILE = primitives.scan_p.name, primitives.cond_p.name, primitives.while_p.name
SHARD_MAP = "shard_map"  # jax.extend does not export it either

# Primitives whose output is their input: `jax.ad_checkpoint.checkpoint_name` and `with_sharding_constraint`.
IDENTITIES = frozenset({"name", "sharding_constraint"})


def is_tracer(x: Any) -> bool:
    """Whether x has no value yet, because it is being traced."""
    return isinstance(x, jax.core.Tracer)


def is_array_of_jax(x: Any) -> bool:
    """Whether JAX takes x as an array as it is: not text, and not numbers in another machine's byte order."""
    return hasattr(x, "dtype") and core.valid_jaxtype(x)


def varying(x: Any) -> frozenset[str]:
    """The axes of a surrounding shard_map over which x may differ; x is an array."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def parts_of_module(module: Any) -> Iterable[Any]:
    """What a bound `flax.linen.Module` has made or was given so far: modules, among others."""
    return module._state.children.values()


def is_given_an_example(module: Any) -> bool:
    """Whether a `flax.nnx.Module` is called with an example of an input, to show it or to make variables of it.

    `nnx.tabulate` leaves a number in every module of the copy that it runs, and `nnx.bridge.lazy_init` sets a flag.
    """
    return hasattr(module, "_nnx_tabulate_id") or module._pytree__state.initializing


# Reading a program


def constants(program: Program) -> Sequence[Any]:
    """The values of its `constvars`. A `Jaxpr` before JAX 0.11 has none attached."""
    return getattr(program, "consts", ())


def inner_programs(equation: Equation) -> Iterator[Program]:
    """The programs that an equation holds."""
    return core.jaxprs_in_params(equation.params)


def called_program(equation: Equation) -> Program | None:
    """The program that an equation calls once, on its inputs; None if it is no such call."""
    name = _CALLS.get(equation.primitive.name)
    return None if name is None else parameters(equation, name)[0]


def name_of_function(equation: Equation) -> str:
    """The name of the function that was jitted; 'None' for other equations."""
    return str(equation.params.get("name"))


def has_own_derivative(equation: Equation) -> bool:
    """Whether it is the call of a `jax.custom_jvp` or `jax.custom_vjp`."""
    return equation.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


def is_recomputation(equation: Equation) -> bool:
    """Whether the call computes again, for a gradient, what the program has computed before."""
    return equation.primitive is primitives.remat_p and parameters(equation, "differentiated")[0]


class Scan(NamedTuple):
    """Body: (constants, carry, one slice of each input) -> (carry, one slice of each output)."""

    body: Program
    constants: int  # how many inputs are the same in every turn
    carry: int  # how many inputs and outputs go from turn to turn
    options: dict[str, Any]  # of lax.scan


def scan_of(equation: Equation) -> Scan:
    """Reads a scan, which is also `lax.map` and a `fori_loop` with static bounds.

    The shapes say which inputs are sliced: they have one axis more outside the body than inside. The parameters that
    say so were `num_consts` and `num_carry` until JAX 0.10, and are `ft_in` and `ft_out` since.
    """
    body, length, reverse, unroll = parameters(equation, "jaxpr", "length", "reverse", "unroll")
    carry = _count_equal_ranks(equation.outvars, body.outvars)
    constants_and_carry = _count_equal_ranks(equation.invars, body.invars)
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    return Scan(body, constants_and_carry - carry, carry, options)


def _count_equal_ranks(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def branches_of(equation: Equation) -> Sequence[Program]:
    """The branches of a cond or switch, whose first input is the number of the branch."""
    return parameters(equation, "branches")[0]


class While(NamedTuple):
    """Inputs: the constants of the condition, those of the body, and the carry."""

    condition: Program
    condition_constants: int
    body: Program
    body_constants: int


def while_of(equation: Equation) -> While:
    """Reads a while loop."""
    return While(*parameters(equation, "cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts"))


class ShardMap(NamedTuple):
    """The arguments of `jax.shard_map`, and its function as a program."""

    body: Program
    mesh: Any
    in_specs: Any
    out_specs: Any
    check_vma: bool
    manual: frozenset[str]  # the axes of the mesh that it maps over


def shard_map_of(equation: Equation) -> ShardMap:
    """Reads a shard_map, which is also a pmap."""
    # In JAX 0.10.0 it has the other name, and holds the axes of a surrounding shard_map as well.
    name = "manual_axes" if "manual_axes" in equation.params else "newly_manual_axes"
    body, mesh, in_specs, out_specs, check_vma, manual = parameters(
        equation, "jaxpr", "mesh", "in_specs", "out_specs", "check_vma", name
    )
    return ShardMap(body, mesh, in_specs, out_specs, check_vma, manual - frozenset(mesh.manual_axes))


def parameters(equation: Equation, *names: str) -> list[Any]:
    """The parameters of an equation by name.

    Raises:
        NotImplementedError: If one is missing, as it may be in a version of JAX that jaxbn does not know.
    """
    missing = [name for name in names if name not in equation.params]
    if missing:
        raise NotImplementedError(
            f"`{equation.primitive.name}` has no parameter {missing[0]!r} in JAX {jax.__version__}; it has "
            f"{sorted(equation.params)}. This version of jaxbn does not know this version of JAX: use another of one "
            f"of the two."
        )
    return [equation.params[name] for name in names]


def place_of(equation: Equation) -> str:
    """The line of the user's program that an equation comes from."""
    return source_info_util.summarize(equation.source_info) or "place unknown"


# Running a program


@contextlib.contextmanager
def as_traced(equation: Equation) -> Iterator[None]:
    """Within it, operations have the scope names and the configuration that the equation was traced with."""
    names = source_info_util.current_name_stack() + equation.source_info.name_stack
    with source_info_util.user_context(equation.source_info.traceback, name_stack=names), equation.ctx.manager:
        yield


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for these inputs."""
    primitive = equation.primitive
    # Undoes what tracing did to the parameters of custom derivatives and calls; the identity for all others.
    outputs = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(outputs) if primitive.multiple_results else [outputs]


# Primitives of the library


def identity_primitive(name: str, passes: Callable[..., Any], batch: Callable[..., Any], *, multiple: bool) -> Any:
    """A primitive that gives back some of its operands and compiles to nothing; its derivative is that of an identity.

    Args:
        name: Shown in programs.
        passes: `(*operands, **parameters) -> the operands that come out`: one, or a list with `multiple`.
        batch: The rule for vmap, `(operands, axes, **parameters) -> (outputs, axes)`.
        multiple: Whether there may be several outputs.
    """
    primitive: Any = core.Primitive(name)
    primitive.multiple_results = multiple
    primitive.def_impl(passes)
    primitive.def_abstract_eval(passes)
    mlir.register_lowering(
        primitive, lambda ctx, *ops, **params: passes(*ops, **params) if multiple else [passes(*ops, **params)]
    )
    # The tangents go round it, so no transpose is needed.
    ad.primitive_jvps[primitive] = lambda primals, tangents, **params: (
        primitive.bind(*primals, **params),
        passes(*tangents, **params),
    )
    batching.primitive_batchers[primitive] = batch
    return primitive


def lower_on(platform: str, primitive: Any, function: Callable[..., Sequence[Any]]) -> None:
    """Compiles the primitive to this function on `platform`."""
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform=platform)
