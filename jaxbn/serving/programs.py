"""A network as a program: traced and lowered with `jax.export`, it answers where the code of the model is not.

One sealed file holds the program, a StableHLO module of a batch of any size, and behind it the arrays that it takes, in
Flax's msgpack format. As constants of the module they would be there too, but every reader of the module would have to
carry them along, and what `jax.export` serializes ends at 2 GB.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, serialization
from jax import export as jax_export

from jaxbn.core import calls as _calls
from jaxbn.linen.capture import FROZEN, is_call_of_layer
from jaxbn.linen.freeze import apply_frozen
from jaxbn.linen.modules import STATISTICS
from jaxbn.nnx.freeze import SAVED
from jaxbn.population.frozen import Frozen, Info, versions
from jaxbn.serving import sealed
from jaxbn.serving.arrays import describe, info_of, name_of, to_device, to_host

KIND = sealed.Kind("jaxbn-program", 1, "a program")
PLATFORMS = ("cpu", "cuda", "tpu")

_Run = Callable[[Any, Any], Any]  # (arrays, batch) -> outputs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A network that answers without the code of its model; `load_program` makes it, and its example shows it.

    It is called with a batch, of any number of examples from one on. It compiles once for each number, so that a server
    does well to fill its batches up to a few sizes. It may be called inside `jax.jit`, and holds its arrays on the
    default device.
    """

    inputs: Any  # jax.ShapeDtypeStruct of each array of a batch; `b` is the number of examples
    outputs: Any  # the same of what comes back
    info: Info  # which layers normalize how, where that was known, and the versions of the packages that wrote it
    _run: Callable[[Any], Any]

    def __call__(self, batch: Any) -> Any:
        """The outputs for a batch; a ValueError says which array is not as `inputs` says."""
        batch = jax.tree.map(jnp.asarray, batch)
        _check_batch(batch, self.inputs)
        return self._run(batch)

    def __repr__(self) -> str:
        """As `Program(float32[b, 8, 8, 1] -> float32[b, 10])`."""
        return f"Program({_text(self.inputs)} -> {_text(self.outputs)})"


def export(path: str | os.PathLike[str], call: Callable[..., Any], network: Any, example: Any) -> None:
    """Writes a network as a program for CPU, CUDA and TPU that needs none of its code; to one file, at once or not.

    The number of examples stays open. Programs are read for at least six months by newer versions of JAX, which is what
    `jax.export` promises, and not by older ones; where it matters `save` the network too.

    Args:
        path: The file; its folder must exist. What stood there is replaced.
        call: `call(variables, batch)` runs a linen model, as `lambda v, x: net.apply(v, x, train=False)`; `call(model,
            batch)` an NNX one, as `lambda model, x: model(x)`. Or what `fold` returned.
        network: A `Frozen` of linen, all variables of a linen model, what `fold` returned, or an NNX model, of
            `jaxbn.nnx.install_frozen`, say. It must evaluate, not train.
        example: A batch, or its shapes: an array, or dicts, lists and tuples of arrays, the first axis of each of which
            is that of the examples. The values do not matter.

    Returns:
        None.

    Raises:
        ValueError: If a layer normalizes with the statistics of the batch; if the model needs the number of examples to
            be a number; if the example has no axis of examples, or more than one number of them; if an array is not
            whole on this process; or if the outputs are no dicts, lists and tuples of arrays.
        TypeError: If the network holds something that is no array.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.program")
        >>> jaxbn.serving.export(path, net.apply, jaxbn.linen.freeze(variables, report), data)
    """
    run, variables = _as_function(call, network)
    given, structure = jax.tree.flatten(jax.tree.map_with_path(to_host, variables))
    arrays = [array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) for array in given]
    specs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    function = jax.jit(lambda leaves, batch: run(jax.tree.unflatten(structure, leaves), batch))
    try:
        exported = jax_export.export(function, platforms=PLATFORMS)(specs, _open(example))
    except (_calls.UnknownDimension, TypeError) as error:
        if isinstance(error, TypeError) and "_DimExpr" not in str(error):  # which is what len(x) raises
            raise
        raise ValueError(
            f"The model needs the number of examples to be a number, and a program leaves it open: take it from "
            f"x.shape[0], as in x.reshape(x.shape[0], -1), and decide nothing by it; and evaluate, by train=False or "
            f"model.eval(), as layers of jaxbn that train need it too. {error}"
        ) from error
    program = bytes(exported.serialize())
    info = Info(network.info.layers if isinstance(network, Frozen) else (), versions())
    header = describe(info) | {"platforms": PLATFORMS, "program": len(program)}
    packed = serialization.msgpack_serialize({str(i): array for i, array in enumerate(arrays)})
    sealed.write(path, KIND, header, program, packed)


def load_program(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `export` has written; neither the model nor its code is needed, and nothing is unpickled.

    Args:
        path: The file.

    Returns:
        The `Program`, a function of a batch.

    Raises:
        ValueError: If the file is none of these, is damaged or cut off, or was written by versions of jaxbn or JAX
            whose programs these do not read.
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
    program, packed = body[: header["program"]], body[header["program"] :]
    try:
        exported = jax_export.deserialize(bytearray(program))
    except ImportError:  # of what JAX reads programs with
        raise
    except Exception as error:  # the bytes are those that were written, so that it is the versions
        raise ValueError(
            f"{path} was written with {header['versions']}, whose programs JAX {jax.__version__} does not read: export "
            f"the network anew. {error}"
        ) from error
    restored = serialization.msgpack_restore(packed)
    arrays = [to_device((jax.tree_util.DictKey(str(i)),), restored[str(i)]) for i in range(len(restored))]
    (_, inputs), _ = jax.tree.unflatten(exported.in_tree, map(_shape, exported.in_avals))
    outputs = jax.tree.unflatten(exported.out_tree, map(_shape, exported.out_avals))
    answer = jax.jit(exported.call)
    return Program(inputs, outputs, info_of(header), lambda batch: answer(arrays, batch))


def _as_function(call: Callable[..., Any], network: Any) -> tuple[_Run, Any]:
    """A pure function of arrays and a batch, which refuses to train, and the arrays."""
    if isinstance(network, nnx.Module):
        graph, variables, *others = nnx.split(network, SAVED, ...)
        return lambda arrays, batch: _run_nnx(call, nnx.merge(graph, arrays, *others, copy=True), batch), variables
    if not isinstance(network, Frozen):
        return lambda arrays, batch: _run_linen(call, arrays, batch), network

    def run(arrays: Any, batch: Any) -> Any:
        return _run_linen(apply_frozen, call, dataclasses.replace(network, variables=arrays), batch)

    return run, network.variables


def _run_linen(call: Callable[..., Any], *arguments: Any) -> Any:
    with nn.intercept_methods(_refuse_training):
        return call(*arguments)


def _refuse_training(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if is_call_of_layer(context) and not layer.has_variable(STATISTICS, FROZEN):
        given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
        if (layer.use_running_average if given is None else given) is False:
            raise ValueError(_TRAINS.format("/".join(layer.path)))
    return next_call(*args, **kwargs)


def _run_nnx(call: Callable[..., Any], model: Any, batch: Any) -> Any:
    stored = [(path, leaf, leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))]
    outputs = call(model, batch)
    for path, leaf, before in stored:
        if leaf.get_value() is not before:
            raise ValueError(_TRAINS.format("/".join(map(str, path[:-1]))) + " For NNX that is model.eval().")
    return outputs


_TRAINS = (
    "{!r} normalizes with the statistics of the batch, as in training, and answers would depend on the examples beside "
    "them: make the call one for evaluation."
)


def _open(example: Any) -> Any:
    """The shapes of the example with the number of examples left open."""
    leaves = jax.tree.leaves_with_path(example)
    for path, leaf in leaves:
        if not jnp.shape(leaf):
            raise ValueError(f"{name_of(path) or 'The example'!r} has no axis of examples; give arrays [N, ...].")
    if len({jnp.shape(leaf)[0] for _, leaf in leaves}) != 1:
        raise ValueError(
            f"The arrays of the example hold several numbers of examples, or there are none: {_text(example)}."
        )
    (b,) = jax_export.symbolic_shape("b")

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *jnp.shape(leaf)[1:]), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))

    return jax.tree.map(spec, example)


def _check_batch(batch: Any, wanted: Any) -> None:
    """Raises a ValueError for a batch that the program does not take."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (batch, wanted)]
    if structures[0] != structures[1]:
        raise ValueError(f"The program takes {_text(wanted)}; given: {_text(batch)}.")
    counts = set()
    for (path, given), like in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(wanted), strict=True):
        if given.shape[1:] != like.shape[1:] or given.ndim != len(like.shape) or given.dtype != like.dtype:
            name = f"{name_of(path)!r}" if path else "the batch"
            raise ValueError(f"The program takes {_text(like)} for {name}; given: {_text(given)}.")
        counts.add(given.shape[0])
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"A batch has one number of examples, and at least one of them; given: {_text(batch)}.")


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


class _Bare(str):
    """Text that shows without quotes inside of dicts and tuples."""

    __repr__ = str.__str__


def _text(tree: Any) -> str:
    """Shapes and dtypes, in the structure in which they come."""
    return str(jax.tree.map(lambda a: _Bare(f"{jnp.result_type(a)}[{', '.join(map(str, jnp.shape(a)))}]"), tree))
