"""Exports a network as a program with `jax.export`, which runs without the code of the model.

One file holds the program, a StableHLO module for a batch of any size, and the arrays that it takes. Arrays that are
constants of the module would be copied at each step of reading it, and `jax.export` serializes 2 GB at most.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import export as jax_export

from jaxbn._src import internals as _internals
from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.inference.frozen import Frozen, Info, make_info, versions
from jaxbn._src.linen.capture import FROZEN, is_call_of_layer, statistics_of
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.freeze import apply_frozen
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.registry import evaluates
from jaxbn._src.methods.protocol import State, holds_states
from jaxbn._src.nnx.framework import NNX, SAVED
from jaxbn._src.pytree.framework import PYTREE
from jaxbn._src.serving import atomic_files, plain_functions
from jaxbn._src.serving.arrays import describe, describe_tree, info_of, pack, shapes_of, to_device, to_host, unpack
from jaxbn._src.serving.batches import check_batch, lacks_examples, leave_open, shape_of, text, without_examples
from jaxbn._src.serving.custom_calls import check_module

KIND = atomic_files.Kind("jaxbn-program", 1, "a program")
PLATFORMS = ("cpu", "cuda", "tpu")

_Run = Callable[[Any, Any], Any]  # (arrays, batch) -> outputs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A network that runs without the code of its model, made by `load_program`.

    Call it with a batch of any number of examples; the outputs for an empty batch are empty. It compiles once for each
    number, so a server should pad its batches to a few sizes. You may call it inside `jax.jit`. Its arrays are on the
    default device.
    """

    inputs: Any  # jax.ShapeDtypeStruct of each array of a batch; `b`, or another name, is the number of examples
    outputs: Any  # jax.ShapeDtypeStruct of each output
    info: Info  # information on the normalization layers, if known, and the versions of the packages that wrote it
    _run: Callable[[Any], Any]

    def __call__(self, batch: Any) -> Any:
        """Returns the outputs for a batch; raises a ValueError if an array does not fit `inputs`."""
        batch = jax.tree.map(jnp.asarray, batch)
        sizes = check_batch(batch, self.inputs)
        examples = str(jax.tree.leaves(self.inputs)[0].shape[0])
        if sizes[examples] == 0:
            return without_examples(self._run, batch, self.outputs, examples)
        try:
            return self._run(batch)
        except ValueError as error:
            if len(sizes) == 1:
                raise
            raise ValueError(
                f"The program was exported for other sizes of its named axes: it takes {text(self.inputs)} under the "
                f"constraints of its example, and not {text(batch)}. {error}"
            ) from error

    def __repr__(self) -> str:
        """Shows the signature, as `Program(float32[b, 8, 8, 1] -> float32[b, 10])`."""
        return f"Program({text(self.inputs)} -> {text(self.outputs)})"


def export(path: str | os.PathLike[str], call: Callable[..., Any], network: Any, example: Any) -> None:
    """Writes a network to one file, as a program for CPU, CUDA and TPU that runs without the code of the model.

    The number of examples is dynamic, and so are the axes that the example names. As `jax.export` promises, newer
    versions of JAX read the program for at least six months; older versions do not. To keep the network for longer,
    `save` it too. The write is atomic.

    Args:
        path: The file, which is replaced if it exists; its folder must exist.
        call: `call(variables, batch)` runs a linen model, as `lambda v, x: net.apply(v, x, train=False)`; `call(model,
            batch)` runs an NNX model, as `lambda model, x: model(x)`. Or the call that `fold` returned, or, for plain
            functions, the one that `jaxbn.postproc` takes.
        network: A `Frozen` of linen or of plain functions, all variables of a linen model, the variables or model that
            `fold` returned, a pytree with states of methods, or an NNX model, such as that of
            `jaxbn.nnx.install_frozen`. The call must evaluate, not train.
        example: A batch, or its shapes: an array, or dicts, lists and tuples of arrays, whose first axis is the axis of
            examples. The values are not used. To make other axes dynamic, such as height, width or time, name them:
            `jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 3"), jnp.float32)`, with the requirements of the
            model as `constraints=["mod(h, 8) == 0"]`.

    Returns:
        None.

    Raises:
        ValueError: If a layer normalizes with the statistics of the batch; if the statistics of a layer were never
            estimated or are not finite; if the model needs a fixed number of examples; if the example has no axis of
            examples, or several numbers of examples; if the model calls functions outside of XLA, such as LAPACK
            (`jnp.linalg.cholesky`), kernels and callbacks; if the `Frozen` is that of an NNX model; if this process
            does not hold all of an array; or if the outputs are not arrays in dicts, lists and tuples.
        TypeError: If the network holds anything but arrays.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.program")
        >>> jaxbn.serving.export(path, net.apply, jaxbn.linen.freeze(variables, report), data)
    """
    run, variables = _as_function(call, network)
    check_unstacked(variables)
    given, structure = jax.tree.flatten(jax.tree.map_with_path(to_host, variables))
    # NumPy arrays may have 64 bits in a JAX that is configured for 32.
    arrays = [array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) for array in given]
    exported = _exported(lambda leaves, batch: run(jax.tree.unflatten(structure, leaves), batch), arrays, example)
    check_module(exported.mlir_module())
    _check_estimated(network)
    program = bytes(exported.serialize())
    info = Info(network.info.layers if isinstance(network, Frozen) else (), versions())
    header = describe(info) | {"platforms": PLATFORMS, "program": len(program), "arrays": describe_tree(arrays)}
    atomic_files.write(path, KIND, header, program, *pack(arrays))


def load_program(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `export` has written. The code of the model is not needed, and nothing is unpickled.

    A program is code: load programs only from people whom you trust. Programs that call functions outside of XLA are
    rejected before they run. All others are compiled and run as they are, and may compute anything for any time.

    Args:
        path: The file.

    Returns:
        The `Program`, a function of a batch.

    Raises:
        ValueError: If the file is of another kind, is damaged, incomplete or invalid, or was written by versions of
            jaxbn or JAX whose programs cannot be read.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.program")
        >>> jaxbn.serving.export(path, net.apply, jaxbn.linen.freeze(variables, report), data)
        >>> program = jaxbn.serving.load_program(path)
        >>> program
        Program(float32[b, 1] -> float32[b, 1])
        >>> print(f"{program(data[:1])[0, 0]:.2f}")
        -1.57
    """
    header, body = atomic_files.read(path, KIND)
    with atomic_files.parsing(path, KIND):
        start, info = header["program"], info_of(header)
        if type(start) is not int or not 0 <= start <= len(body):
            raise ValueError(f"a program of {start} bytes does not fit into the file.")
        arrays = unpack(shapes_of(header["arrays"]), memoryview(body)[start:])
    try:
        exported = jax_export.deserialize(bytearray(body[:start]))
        module = exported.mlir_module()
    except ImportError:  # a package with which JAX reads programs is missing
        raise
    except Exception as error:  # the checksum is right, so the cause is the version
        raise ValueError(
            f"{path} was written with {header['versions']}, whose programs JAX {jax.__version__} cannot read: export "
            f"the network again. {error}"
        ) from error
    with atomic_files.parsing(path, KIND):
        check_module(module)
        inputs, outputs = _signature(exported, arrays)
    held = jax.tree.map_with_path(to_device, arrays)
    answer = jax.jit(exported.call)
    return Program(inputs, outputs, info, lambda batch: answer(held, batch))


def _exported(function: Callable[..., Any], arrays: list[Any], example: Any) -> jax_export.Exported:
    """Exports the program, with clear errors for a model that does not support a dynamic number of examples."""
    shapes = leave_open(example)
    specs = list(map(shape_of, arrays))
    try:
        return jax_export.export(jax.jit(function), platforms=PLATFORMS)(specs, shapes)
    except Exception as error:
        unknown = isinstance(error, TypeError) and "_DimExpr" in str(error)  # raised by len(x)
        unknown |= isinstance(error, _internals.UnknownDimension)
        # After an error about a symbolic size, a model that also accepts the example itself has its axis of examples.
        if lacks_examples(lambda batch: function(arrays, batch), example, alone=unknown):
            raise ValueError(_NO_EXAMPLES.format(text(example))) from error
        if unknown:
            raise ValueError(f"{_UNKNOWN} {error}") from error
        raise


_NO_EXAMPLES = (
    "The model does not accept the example, {}, but accepts it with an additional first axis, the axis of examples. "
    "Pass a batch, such as example[None]."
)
_UNKNOWN = (
    "The model needs a fixed number of examples, but it is dynamic in a program: take it from x.shape[0], as in "
    "x.reshape(x.shape[0], -1), and do not branch on it. Evaluate, with train=False or model.eval(): layers of jaxbn "
    "that train need a fixed number. The same holds for other axes that the example names."
)


def _signature(exported: jax_export.Exported, arrays: list[Any]) -> tuple[Any, Any]:
    """Returns the shapes of a batch and of the outputs; raises errors of any type for programs not made by `export`."""
    (leaves, inputs), keywords = jax.tree.unflatten(exported.in_tree, map(shape_of, exported.in_avals))
    outputs = jax.tree.unflatten(exported.out_tree, map(shape_of, exported.out_avals))
    if leaves != list(map(shape_of, arrays)) or keywords or exported.nr_devices != 1:
        raise ValueError("its arrays do not fit the program.")
    if exported.ordered_effects or exported.unordered_effects or exported.has_vjp():
        raise ValueError("the program has effects or a derivative.")
    if not str(jax.tree.leaves(inputs)[0].shape[0]).isidentifier():
        raise ValueError("the number of examples is fixed.")
    return inputs, outputs


def _check_estimated(network: Any) -> None:
    """Raises a ValueError for statistics that cannot be frozen; those of a `Frozen` have already been checked."""
    if isinstance(network, nnx.Module):
        make_info(_states_of(NNX, network))
    elif holds_states(network) and not isinstance(network, Frozen):
        make_info(PYTREE.states(network))
    elif isinstance(network, Mapping):
        make_info(_states_of(LINEN, network))


def _states_of(framework: Framework, network: Any) -> Mapping[str, State]:
    try:
        return framework.states(network)
    except ValueError:  # there are no statistics, for example because all layers were folded
        return {}


def _check_linen(frozen: Frozen) -> None:
    """Raises a ValueError for a network of NNX, whose variables are not in collections."""
    layers = {path for path, _ in frozen.info.layers}
    collections = {"params", STATISTICS} & frozen.variables.keys()
    if not layers <= _states_of(LINEN, frozen.variables).keys() or (frozen.variables and not collections):
        raise ValueError(
            "This Frozen is of an NNX model, which a call for linen variables cannot run: export the model, "
            "jaxbn.nnx.install_frozen(model, frozen), with lambda model, x: model(x)."
        )


def _as_function(call: Callable[..., Any], network: Any) -> tuple[_Run, Any]:
    """Returns a pure function of arrays and a batch, which raises an error if a layer trains, and the arrays."""
    tree = network.variables if isinstance(network, Frozen) else network
    if plain_functions.is_model(tree):
        return plain_functions.as_function(call, tree, _TRAINS)
    if isinstance(network, nnx.Module):
        # Random states and intermediate values become constants of the program; a frozen network does not hold them.
        graph, variables, *others = nnx.split(network, SAVED, ...)
        return lambda arrays, batch: _run_nnx(call, nnx.merge(graph, arrays, *others, copy=True), batch), variables
    if not isinstance(network, Frozen):
        return lambda arrays, batch: _run_linen(call, arrays, batch), network
    _check_linen(network)

    def run(arrays: Any, batch: Any) -> Any:
        # apply_frozen also compares the methods and epsilons of the layers with those of the frozen network.
        return _run_linen(apply_frozen, call, dataclasses.replace(network, variables=arrays), batch)

    return run, network.variables


def _run_linen(call: Callable[..., Any], *arguments: Any) -> Any:
    with nn.intercept_methods(_refuse_training):
        return call(*arguments)


def _refuse_training(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if is_call_of_layer(context):
        # Layers in `freeze_layers` evaluate, whatever their flags say.
        trains = not module.has_variable(STATISTICS, FROZEN) and evaluates(module, args, kwargs) is False
        outputs = None if trains else next_call(*args, **kwargs)
    else:  # an unknown layer trains if it replaces its statistics
        before = statistics_of(module)
        outputs = next_call(*args, **kwargs)
        after = statistics_of(module)
        trains = any(after[name] is not leaf for name, leaf in before.items())
    if trains:
        raise ValueError(_TRAINS.format("/".join(module.path)))
    return outputs


def _statistics(model: Any) -> dict[Any, Any]:
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))}


def _run_nnx(call: Callable[..., Any], model: Any, batch: Any) -> Any:
    before = _statistics(model)
    outputs = call(model, batch)
    after = _statistics(model)  # a bridge to linen may replace the variables
    # An update makes a new array, so a layer that trains no longer holds the same object.
    for path, leaf in before.items():
        if after.get(path) is not leaf:
            raise ValueError(_TRAINS.format("/".join(map(str, path[:-1]))) + " For NNX that is model.eval().")
    return outputs


_TRAINS = (
    "{!r} normalizes with the statistics of the batch, as in training, so the output for an example would depend on "
    "the others: pass a call that evaluates."
)
