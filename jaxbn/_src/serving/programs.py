"""A network as a program: traced and lowered with `jax.export`, it answers where the code of the model is not.

One sealed file holds the program, a StableHLO module of a batch of any size, and behind it the arrays that it takes. As
constants of the module they would be there too, but every reader of the module would have to carry them along, and what
`jax.export` serializes ends at 2 GB.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, unfreeze
from jax import export as jax_export

from jaxbn._src import internals as _internals
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.inference.frozen import Frozen, Info, make_info, versions
from jaxbn._src.linen.capture import FROZEN, is_call_of_layer, statistics_of
from jaxbn._src.linen.freeze import apply_frozen
from jaxbn._src.linen.modules import STATISTICS
from jaxbn._src.linen.registry import evaluates
from jaxbn._src.linen.variables import find_states
from jaxbn._src.methods.protocol import State
from jaxbn._src.nnx.capture import find_states as find_states_nnx
from jaxbn._src.nnx.framework import SAVED
from jaxbn._src.serving import sealed
from jaxbn._src.serving.arrays import describe, describe_tree, info_of, pack, shapes_of, to_device, to_host, unpack
from jaxbn._src.serving.batches import check_batch, lacks_examples, leave_open, shape_of, text, without_examples
from jaxbn._src.serving.custom_calls import check_module

KIND = sealed.Kind("jaxbn-program", 1, "a program")
PLATFORMS = ("cpu", "cuda", "tpu")

_Run = Callable[[Any, Any], Any]  # (arrays, batch) -> outputs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A network that answers without the code of its model; `load_program` makes it, and its example shows it.

    It is called with a batch, of any number of examples; of none, the outputs are empty. It compiles once for each
    number, so that a server does well to fill its batches up to a few sizes. It may be called inside `jax.jit`, and
    holds its arrays on the default device.
    """

    inputs: Any  # jax.ShapeDtypeStruct of each array of a batch; `b`, or another name, is the number of examples
    outputs: Any  # the same of what comes back
    info: Info  # which layers normalize how, where that was known, and the versions of the packages that wrote it
    _run: Callable[[Any], Any]

    def __call__(self, batch: Any) -> Any:
        """The outputs for a batch; a ValueError says which array is not as `inputs` says."""
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
                f"The program was exported for other sizes of its open axes: it takes {text(self.inputs)} under the "
                f"constraints of its example, and not {text(batch)}. {error}"
            ) from error

    def __repr__(self) -> str:
        """As `Program(float32[b, 8, 8, 1] -> float32[b, 10])`."""
        return f"Program({text(self.inputs)} -> {text(self.outputs)})"


def export(path: str | os.PathLike[str], call: Callable[..., Any], network: Any, example: Any) -> None:
    """Writes a network as a program for CPU, CUDA and TPU that needs none of its code; to one file, at once or not.

    The number of examples stays open, and so do the axes that the example names. Programs are read for at least six
    months by newer versions of JAX, which is what `jax.export` promises, and not by older ones; where it matters `save`
    the network too.

    Args:
        path: The file; its folder must exist. What stood there is replaced.
        call: `call(variables, batch)` runs a linen model, as `lambda v, x: net.apply(v, x, train=False)`; `call(model,
            batch)` an NNX one, as `lambda model, x: model(x)`. Or what `fold` returned.
        network: A `Frozen` of linen, all variables of a linen model, what `fold` returned, or an NNX model, of
            `jaxbn.nnx.install_frozen`, say. It must evaluate, not train.
        example: A batch, or its shapes: an array, or dicts, lists and tuples of arrays, the first axis of each of which
            is that of the examples. The values do not matter. To leave other axes open, such as height, width or time,
            name them: `jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 3"), jnp.float32)`, and what the model
            needs of them, `constraints=["mod(h, 8) == 0"]`.

    Returns:
        None.

    Raises:
        ValueError: If a layer normalizes with the statistics of the batch; if nothing ever estimated the statistics of
            a layer, or they are not finite; if the model needs the number of examples to be a number; if the example
            has no axis of examples, or more than one number of them; if the model calls what is not part of XLA, such
            as LAPACK (`jnp.linalg.cholesky`), kernels and callbacks; if the `Frozen` is of an NNX model; if an array is
            not whole on this process; or if the outputs are no dicts, lists and tuples of arrays.
        TypeError: If the network holds something that is no array.

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
    arrays = [array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) for array in given]
    exported = _exported(lambda leaves, batch: run(jax.tree.unflatten(structure, leaves), batch), arrays, example)
    check_module(exported.mlir_module())
    _check_estimated(network)
    program = bytes(exported.serialize())
    info = Info(network.info.layers if isinstance(network, Frozen) else (), versions())
    header = describe(info) | {"platforms": PLATFORMS, "program": len(program), "arrays": describe_tree(arrays)}
    sealed.write(path, KIND, header, program, *pack(arrays))


def load_program(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `export` has written; neither the model nor its code is needed, and nothing is unpickled.

    A program is code, and calling it runs it: load those of people whom you trust. What calls functions outside of XLA
    is refused before anything runs, but XLA compiles the rest as it is, and it may compute anything for any time.

    Args:
        path: The file.

    Returns:
        The `Program`, a function of a batch.

    Raises:
        ValueError: If the file is none of these, is damaged, cut off or forged, or was written by versions of jaxbn or
            JAX whose programs these do not read.
        FileNotFoundError: If there is no file.

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
    header, body = sealed.read(path, KIND)
    with sealed.understanding(path, KIND):
        start, info = header["program"], info_of(header)
        if type(start) is not int or not 0 <= start <= len(body):
            raise ValueError(f"a program of {start} bytes does not fit into it.")
        arrays = unpack(shapes_of(header["arrays"]), memoryview(body)[start:])
    try:
        exported = jax_export.deserialize(bytearray(body[:start]))
        module = exported.mlir_module()
    except ImportError:  # of what JAX reads programs with
        raise
    except Exception as error:  # if the bytes are those that were written, it is the versions
        raise ValueError(
            f"{path} was written with {header['versions']}, whose programs JAX {jax.__version__} does not read: export "
            f"the network anew. {error}"
        ) from error
    with sealed.understanding(path, KIND):
        check_module(module)
        inputs, outputs = _signature(exported, arrays)
    held = jax.tree.map_with_path(to_device, arrays)
    answer = jax.jit(exported.call)
    return Program(inputs, outputs, info, lambda batch: answer(held, batch))


def _exported(function: Callable[..., Any], arrays: list[Any], example: Any) -> jax_export.Exported:
    """The program; what a model raises for an open number of examples, or without their axis, is said in our words."""
    shapes = leave_open(example)
    specs = list(map(shape_of, arrays))
    try:
        return jax_export.export(jax.jit(function), platforms=PLATFORMS)(specs, shapes)
    except Exception as error:
        unknown = isinstance(error, TypeError) and "_DimExpr" in str(error)  # which is what len(x) raises
        unknown |= isinstance(error, _internals.UnknownDimension)
        if lacks_examples(lambda batch: function(arrays, batch), example, alone=unknown):
            raise ValueError(_NO_EXAMPLES.format(text(example))) from error
        if unknown:
            raise ValueError(f"{_UNKNOWN} {error}") from error
        raise


_NO_EXAMPLES = (
    "The model does not take the example, {}, and takes it with an axis in front: the first axis is that of the "
    "examples. Give a batch, such as example[None]."
)
_UNKNOWN = (
    "The model needs the number of examples to be a number, and a program leaves it open: take it from x.shape[0], as "
    "in x.reshape(x.shape[0], -1), and decide nothing by it; and evaluate, by train=False or model.eval(), as layers "
    "of jaxbn that train need it too. The same holds for other axes that the example names."
)


def _signature(exported: jax_export.Exported, arrays: list[Any]) -> tuple[Any, Any]:
    """The shapes of a batch and of the outputs; an error of any type for a program that `export` does not make."""
    (leaves, inputs), keywords = jax.tree.unflatten(exported.in_tree, map(shape_of, exported.in_avals))
    outputs = jax.tree.unflatten(exported.out_tree, map(shape_of, exported.out_avals))
    if leaves != list(map(shape_of, arrays)) or keywords or exported.nr_devices != 1:
        raise ValueError("its arrays are not those that the program takes.")
    if exported.ordered_effects or exported.unordered_effects or exported.has_vjp():
        raise ValueError("the program does more than to answer.")
    if not str(jax.tree.leaves(inputs)[0].shape[0]).isidentifier():
        raise ValueError("the number of examples is not open.")
    return inputs, outputs


def _check_estimated(network: Any) -> None:
    """Raises a ValueError for statistics that cannot be frozen; those of a `Frozen` were checked when it was made."""
    if isinstance(network, nnx.Module):
        make_info(_states_of(find_states_nnx, network))
    elif isinstance(network, Mapping):
        make_info(_states_of(find_states, meta.unbox(unfreeze(dict(network)))))


def _states_of(find: Callable[[Any], Mapping[str, State]], network: Any) -> Mapping[str, State]:
    try:
        return find(network)
    except ValueError:  # there are none, as when all were folded
        return {}


def _check_linen(frozen: Frozen) -> None:
    """Raises a ValueError for a network of NNX, whose variables are no collections."""
    layers = {path for path, _ in frozen.info.layers}
    collections = {"params", STATISTICS} & frozen.variables.keys()
    if not layers <= _states_of(find_states, frozen.variables).keys() or (frozen.variables and not collections):
        raise ValueError(
            "This Frozen is of an NNX model, and a call for linen variables cannot run it: export the model, "
            "jaxbn.nnx.install_frozen(model, frozen), with lambda model, x: model(x)."
        )


def _as_function(call: Callable[..., Any], network: Any) -> tuple[_Run, Any]:
    """A pure function of arrays and a batch, which refuses to train, and the arrays."""
    if isinstance(network, nnx.Module):
        graph, variables, *others = nnx.split(network, SAVED, ...)
        return lambda arrays, batch: _run_nnx(call, nnx.merge(graph, arrays, *others, copy=True), batch), variables
    if not isinstance(network, Frozen):
        return lambda arrays, batch: _run_linen(call, arrays, batch), network
    _check_linen(network)

    def run(arrays: Any, batch: Any) -> Any:
        return _run_linen(apply_frozen, call, dataclasses.replace(network, variables=arrays), batch)

    return run, network.variables


def _run_linen(call: Callable[..., Any], *arguments: Any) -> Any:
    with nn.intercept_methods(_refuse_training):
        return call(*arguments)


def _refuse_training(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if is_call_of_layer(context):
        trains = not module.has_variable(STATISTICS, FROZEN) and evaluates(module, args, kwargs) is False
        outputs = None if trains else next_call(*args, **kwargs)
    else:  # of layers that are not known, those that train are told by what they do
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
    after = _statistics(model)  # in new variables perhaps, as a bridge to linen has
    for path, leaf in before.items():
        if after.get(path) is not leaf:
            raise ValueError(_TRAINS.format("/".join(map(str, path[:-1]))) + " For NNX that is model.eval().")
    return outputs


_TRAINS = (
    "{!r} normalizes with the statistics of the batch, as in training, and answers would depend on the examples beside "
    "them: make the call one for evaluation."
)
