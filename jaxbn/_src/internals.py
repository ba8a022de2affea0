"""All uses of JAX and Flax internals, which may change without notice.

These are names outside the documented API, and parameters of the primitives in a traced program. They were checked with
JAX 0.10.0, 0.10.2, 0.11.2 and 0.12.0.1 and Flax 0.12.7, 0.12.8 and 0.12.12; comments name the differences between
versions. `tests/test_internals.py` traces each primitive and checks the parameters that this file reads. If a parameter
is missing, the error names the primitive and the JAX version.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import distributed
from jax.extend import core, source_info_util
from jax.extend.core import primitives
from jax.interpreters import ad, batching, mlir

# A traced program: `core.Jaxpr` or `core.ClosedJaxpr`, the same class since JAX 0.11. Both have `constvars`, `invars`,
# `eqns` and `outvars`.
Program = Any
Equation = Any

Literal = core.Literal
# Raised if a decision depends on a dimension that is symbolic in an exported program.
UnknownDimension = core.InconclusiveDimensionOperation

# Primitives that only call a program -> the parameter that holds the program.
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
    """Whether x is being traced, so that its value is unknown."""
    return isinstance(x, jax.core.Tracer)


def is_array_of_jax(x: Any) -> bool:
    """Whether JAX accepts x as an array without conversion; not so for text and for foreign byte orders."""
    return hasattr(x, "dtype") and core.valid_jaxtype(x)


def varying(x: Any) -> frozenset[str]:
    """The axes of a surrounding shard_map over which the array x may differ."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def coordination_client() -> Any:
    """The client of the service that `jax.distributed.initialize` starts; None before that.

    It has `key_value_set_bytes(key, value)`, `key_value_dir_get_bytes(folder)`, `key_value_delete(folder)` and
    `wait_at_barrier(name, milliseconds)`.
    """
    return distributed.global_state.client


def parts_of_module(module: Any) -> Iterable[Any]:
    """The children of a bound `flax.linen.Module` so far: modules, variables and others."""
    return module._state.children.values()


def is_given_an_example(module: Any) -> bool:
    """Whether `nnx.tabulate` or `nnx.bridge.lazy_init` is calling a `flax.nnx.Module` with an example input.

    `nnx.tabulate` runs a copy and leaves an id in each of its modules; `nnx.bridge.lazy_init` sets a flag.
    """
    return hasattr(module, "_nnx_tabulate_id") or module._pytree__state.initializing


# Reading a program


def constants(program: Program) -> Sequence[Any]:
    """The values of the program's `constvars`. Before JAX 0.11 a `Jaxpr` does not hold them."""
    return getattr(program, "consts", ())


def inner_programs(equation: Equation) -> Iterator[Program]:
    """The programs among the parameters of an equation."""
    return core.jaxprs_in_params(equation.params)


def called_program(equation: Equation) -> Program | None:
    """The program that an equation calls once, on its inputs; None if the equation is not a call."""
    name = _CALLS.get(equation.primitive.name)
    return None if name is None else parameters(equation, name)[0]


def name_of_function(equation: Equation) -> str:
    """The name of the jitted function; 'None' for other equations."""
    return str(equation.params.get("name"))


def has_own_derivative(equation: Equation) -> bool:
    """Whether the equation calls a `jax.custom_jvp` or `jax.custom_vjp`."""
    return equation.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p)


def is_recomputation(equation: Equation) -> bool:
    """Whether the call recomputes values for a gradient, as `jax.checkpoint` does."""
    return equation.primitive is primitives.remat_p and parameters(equation, "differentiated")[0]


class Scan(NamedTuple):
    """Body: (constants, carry, one slice of each input) -> (carry, one slice of each output)."""

    body: Program
    constants: int  # number of inputs that are the same in every iteration
    carry: int  # number of carried inputs and outputs
    options: dict[str, Any]  # keyword arguments of lax.scan


def scan_of(equation: Equation) -> Scan:
    """Reads a scan, which is also `lax.map` and a `fori_loop` with static bounds.

    An input is sliced if it has one axis more outside the body than inside. The shapes are used because the parameters
    changed: `num_consts` and `num_carry` until JAX 0.10, `ft_in` and `ft_out` since.
    """
    body, length, reverse, unroll = parameters(equation, "jaxpr", "length", "reverse", "unroll")
    carry = _count_equal_ranks(equation.outvars, body.outvars)
    constants_and_carry = _count_equal_ranks(equation.invars, body.invars)
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    return Scan(body, constants_and_carry - carry, carry, options)


def _count_equal_ranks(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def branches_of(equation: Equation) -> Sequence[Program]:
    """The branches of a cond or switch; its first input is the index of the branch."""
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
    manual: frozenset[str]  # the mesh axes that it maps over


def shard_map_of(equation: Equation) -> ShardMap:
    """Reads a shard_map, which is also a pmap."""
    # JAX 0.10.0 has the name manual_axes; its value includes the axes of a surrounding shard_map.
    name = "manual_axes" if "manual_axes" in equation.params else "newly_manual_axes"
    body, mesh, in_specs, out_specs, check_vma, manual = parameters(
        equation, "jaxpr", "mesh", "in_specs", "out_specs", "check_vma", name
    )
    return ShardMap(body, mesh, in_specs, out_specs, check_vma, manual - frozenset(mesh.manual_axes))


def parameters(equation: Equation, *names: str) -> list[Any]:
    """The parameters of an equation by name.

    Raises:
        NotImplementedError: If one is missing, as in a version of JAX that jaxbn does not support.
    """
    missing = [name for name in names if name not in equation.params]
    if missing:
        raise NotImplementedError(
            f"`{equation.primitive.name}` has no parameter {missing[0]!r} in JAX {jax.__version__}; it has "
            f"{sorted(equation.params)}. This version of jaxbn does not support this version of JAX: change one of "
            f"the two."
        )
    return [equation.params[name] for name in names]


def place_of(equation: Equation) -> str:
    """The line of the user's program that created an equation."""
    return source_info_util.summarize(equation.source_info) or "place unknown"


# Running a program


@contextlib.contextmanager
def as_traced(equation: Equation) -> Iterator[None]:
    """Sets the scope names and the configuration to those that the equation was traced with."""
    names = source_info_util.current_name_stack() + equation.source_info.name_stack
    with source_info_util.user_context(equation.source_info.traceback, name_stack=names), equation.ctx.manager:
        yield


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation."""
    primitive = equation.primitive
    # For calls and custom derivatives, bind takes functions where an equation holds programs.
    outputs = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(outputs) if primitive.multiple_results else [outputs]


# Primitives of the library


def identity_primitive(name: str, passes: Callable[..., Any], batch: Callable[..., Any], *, multiple: bool) -> Any:
    """Creates a primitive that returns some of its operands, with the derivative of the identity and no run-time cost.

    Args:
        name: The name shown in programs.
        passes: `(*operands, **parameters) -> outputs`: the operands that it returns; a list if `multiple`.
        batch: The rule for vmap, `(operands, axes, **parameters) -> (outputs, axes)`.
        multiple: Whether there may be several outputs.

    Returns:
        The primitive.
    """
    primitive: Any = core.Primitive(name)
    primitive.multiple_results = multiple
    primitive.def_impl(passes)
    primitive.def_abstract_eval(passes)
    mlir.register_lowering(
        primitive, lambda ctx, *ops, **params: passes(*ops, **params) if multiple else [passes(*ops, **params)]
    )
    # The tangents do not pass through the primitive, so it needs no transpose rule.
    ad.primitive_jvps[primitive] = lambda primals, tangents, **params: (
        primitive.bind(*primals, **params),
        passes(*tangents, **params),
    )
    batching.primitive_batchers[primitive] = batch
    return primitive


def lower_on(platform: str, primitive: Any, function: Callable[..., Sequence[Any]]) -> None:
    """Makes the primitive compile to this function on a platform."""
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform=platform)
