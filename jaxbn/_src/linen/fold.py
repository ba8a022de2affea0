"""Folding for linen: interceptors tag the layers of the model, and later skip the folded ones."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax
import flax.linen as nn
import jax
from flax import nnx
from flax.linen.dtypes import promote_dtype

from jaxbn._src.framework.method import loaded
from jaxbn._src.framework.norm_layer import evaluating_method, operands_of
from jaxbn._src.framework.registry import Registered
from jaxbn._src.framework.unknown_layers import Watch
from jaxbn._src.inference import fold_arithmetic as _fold_arithmetic
from jaxbn._src.inference import fold_plan as _fold_plan
from jaxbn._src.inference.fold_check import checked_report
from jaxbn._src.inference.fold_plan import Layer
from jaxbn._src.inference.fold_report import FoldReport
from jaxbn._src.inference.fold_tags import called_linear, called_norm, tag_call
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.linen.capture import is_call_of_layer, statistics_of, watched
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.registry import REGISTER, as_norm, evaluates, in_flax_names, known, run_bridge
from jaxbn._src.linen.variables import Call, check_variables, find_layers, find_shapes, keys, split_by_class
from jaxbn._src.tracing import dataflow as _dataflow
from jaxbn._src.tracing.harvest import over_arrays

_TAGS, _TAG = "jaxbn_fold", "tag"  # a collection, and the variable in it
_LINEAR: dict[Any, str] = {
    cls: cls.__name__ for cls in (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
}
_LINEAR_CALLS = {inspect.unwrap(cls.__call__) for cls in _LINEAR}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Tagged:
    """Identifies a layer of the given variables, and makes jit caches distinguish folds.

    It has no arrays, so that transformations of variables do not affect it.
    """

    path: str
    fold: object


def fold(
    call: Call, variables: Mapping[str, Any] | Frozen, example: Any, *, tolerance: float | None = None
) -> tuple[Callable[[Any, Any], Any], Any, FoldReport]:
    """Folds BatchNorm layers into adjacent linear layers (conv-BN fusion), which makes them free in evaluation.

    Use it on a trained network before you serve it. The pairs are found by tracing the forward pass. A BatchNorm is
    left unfolded if folding would change the result, and the report gives the reason: its input is used elsewhere too,
    there is an activation in between or padding after it, a layer is called twice, the statistics are those of the
    batch or of a domain, or the layer is inside scan, vmap or similar. Linear layers are `Conv`, `ConvTranspose`,
    `Dense`, `DenseGeneral` and `Einsum`; normalizations are those of jaxbn, of any method, and `flax.linen.BatchNorm`.
    The `activation=` and `residual=` of a layer of jaxbn are kept. Functions of `map_kernel` are folded too.

    Kernels are folded in float32 or better and rounded once, to their own dtype: in bfloat16 to 2^-8 of each weight.

    Args:
        call: Runs the model in evaluation, such as `lambda variables, x: net.apply(variables, x, train=False)`.
        variables: All variables of the model, or a `Frozen`.
        example: A batch for `call`, to trace the model and to compare outputs. Later batches may have other shapes, but
            must reach the same layers.
        tolerance: Maximum difference of the outputs on the example, relative to the largest output; None: 1e-4 where
            all is float32, 1e-9 in float64, 0.02 in float16, 0.1 in bfloat16.

    Returns:
        A call of the folded model; its variables, without the statistics, scales and biases of the folded layers, and
        with biases for linear layers that had none; and a :class:`jaxbn.FoldReport`. Use the new call with the new
        variables only. For a `Frozen` the variables are a `Frozen` of the remaining layers; pass its `variables` to
        the call.

    Raises:
        ValueError: If there is no normalization layer, or outputs on the example differ by more than the tolerance.

    Example:
        >>> conv = flax.linen.Conv(4, (3, 3), use_bias=False)
        >>> net = flax.linen.Sequential([conv, jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> call, variables, report = jaxbn.linen.fold(net.apply, net.init(jax.random.key(0), x), x)
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
        >>> jax.jit(call)(variables, x).shape
        (1, 8, 8, 4)

    References:
        Jacob et al., `Quantization and Training of Neural Networks <https://arxiv.org/abs/1712.05877>`_, 2018,
        section 3.2, equation 14.
    """
    given: Any = variables.variables if isinstance(variables, Frozen) else variables
    check_variables(given)
    given = flax.core.meta.unbox(flax.core.unfreeze(given))
    if not find_shapes(given):
        find_layers(given)  # which raises
    traced = _follow(call, given, example)
    plan = _fold_plan.make_plan(traced, list(find_layers(given)))
    folded, new = _folded_call(call, plan, traced.norms), _write(given, plan, traced.layers)
    report = checked_report(plan, traced, tolerance, (call, given, example), (folded, new, example))
    if not isinstance(variables, Frozen):
        return folded, new, report
    left = tuple((path, layer) for path, layer in variables.info.layers if path not in report.folded)
    return folded, Frozen(new, variables.info._replace(layers=left)), report


def _follow(call: Call, variables: dict[str, Any], example: Any) -> _fold_plan.Traced:
    """Traces the model with tags."""
    recorder, inputs = _Recorder(variables), _with_tags(variables)

    def run(variables: Any, inputs: Any) -> Any:
        with recorder.watch, nn.intercept_methods(recorder.intercept):
            return over_arrays(call(variables, inputs()))

    flow = _dataflow.follow(jax.make_jaxpr(run)(inputs, over_arrays(example)))
    values: dict[str, list[_dataflow.Value]] = {}
    leaves, _ = jax.tree.flatten_with_path(inputs)
    # The inputs of the program are the leaves of the variables, in tree order, and then the example. Tags are static,
    # so they have no leaves.
    for (names, _), value in zip(leaves, flow.inputs, strict=False):
        values.setdefault("/".join(name.key for name in names[1:-1]), []).append(value)
    return _fold_plan.Traced(flow, recorder.norms, recorder.layers, values)


class _Recorder:
    """The layers of a traced call, by path, which its interceptor records."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self.variables, self.shapes, self.watch = variables, find_shapes(variables), Watch(REGISTER)
        self.norms: dict[str, _fold_plan.Norm] = {}
        self.layers: dict[str, Layer] = {}

    def intercept(self, next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        is_norm = is_call_of_layer(context)
        if is_norm and isinstance(module, nnx.bridge.ToLinen) and not _is_tagged_bridge(module):
            # `run_bridge` calls the bridge again, without the tags; the call around it has the tags already.
            return next_call(*args, **kwargs)
        call = functools.partial(_called, next_call, module)
        if not is_norm and not _is_call_of_linear(context):
            return watched(self.watch, module, lambda: call(*args, **kwargs), lambda: self._holds(module))
        # A layer without a tag has other variables than those given, as in a teacher network.
        tagged = module.get_variable(_TAGS, _TAG)
        path = "/".join(module.path) if tagged is None else tagged.path
        return tag_call(
            path,
            call,
            args,
            kwargs,
            input_name="inputs" if (registered := known(module)) is None else registered.input_name,
            variables=jax.tree.leaves([module.variables.get(part, {}) for part in ("params", STATISTICS)]),
            record=functools.partial(self._record, path, module, is_norm),
            own=tagged is not None,
        )

    def _record(self, path: str, module: Any, is_norm: bool, y: jax.Array, *args: Any, **kwargs: Any) -> None:
        if is_norm:
            self.watch.serve(path)
            self.norms[path] = _norm(module, _at(self.variables, path), y, *args, **kwargs)
        else:
            self.layers[path] = _layer(module, _at(self.variables, path), *args, **kwargs)

    def _holds(self, module: Any) -> bool:
        """Whether the module keeps statistics of the given variables."""
        return any("/".join(map(str, (*module.path, *names[:-1]))) in self.shapes for names in statistics_of(module))


def _called(next_call: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    return run_bridge(module, args, kwargs) if _is_tagged_bridge(module) else next_call(*args, **kwargs)


def _is_tagged_bridge(module: Any) -> bool:
    return isinstance(module, nnx.bridge.ToLinen) and _TAGS in module.variables


def _is_call_of_linear(context: nn.module.InterceptorContext) -> bool:
    return getattr(context.orig_method, "func", None) in _LINEAR_CALLS and not context.module.is_initializing()


def _with_tags(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables with a tag for each normalization and each layer with a kernel, in a separate collection."""
    flat, fold = flax.traverse_util.flatten_dict(variables), object()
    kernels = [path for path in flat if path[0] == "params" and path[-1] == "kernel"]
    means = [(STATISTICS, *keys(path), "mean") for path in split_by_class(variables)[0]]
    for path in (*kernels, *means):
        flat[(_TAGS, *path[1:-1], _TAG)] = _Tagged("/".join(path[1:-1]), fold)
    return flax.traverse_util.unflatten_dict(flat)


def _at(variables: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    """The variables of one layer, by collection."""
    found = {}
    for name, collection in variables.items():
        for key in keys(path):
            collection = collection.get(key, {})
        found[name] = collection
    return found


def _norm(
    module: Any, variables: dict[str, dict[str, Any]], y: jax.Array, *args: Any, **kwargs: Any
) -> _fold_plan.Norm:
    layer, found = as_norm(module, args, kwargs), in_flax_names(cast(Registered, known(module)), variables)
    params, state = loaded(evaluating_method(layer)(), found.get("params", {}), found[STATISTICS])
    refusal = None if evaluates(module, args, kwargs) else _fold_plan.TRAINS
    return called_norm(layer, params, state, operands_of(layer, args, kwargs), y, refusal)


def _layer(module: Any, variables: dict[str, dict[str, Any]], *args: Any, **kwargs: Any) -> Layer:
    weights = _fold_arithmetic.Weights(variables["params"]["kernel"], variables["params"].get("bias"))
    return called_linear(module, _LINEAR.get(type(module)), weights, *args, **kwargs)


def _write(variables: dict[str, Any], plan: _fold_plan.Plan, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The variables with the new kernels and biases, without those of the folded normalizations."""
    # A folded layer has no variables any more.
    gone = {keys(one.norm) for one in plan.folds}
    flat = flax.traverse_util.flatten_dict(variables)
    kept = {path: leaf for path, leaf in flat.items() if path[1:-1] not in gone}
    for path, weights in _fold_plan.fold_weights(plan, layers).items():
        for name, value in weights._asdict().items():
            kept[("params", *keys(path), name)] = value
    return flax.traverse_util.unflatten_dict(kept)


def _folded_call(call: Call, plan: _fold_plan.Plan, norms: Mapping[str, _fold_plan.Norm]) -> Callable[[Any, Any], Any]:
    """The call in which folded normalizations return their input, and linear layers have their new biases."""
    gone = {one.norm: norms[one.norm].dtypes[1] for one in plan.folds}
    changed = {one.layer for one in plan.folds}

    def intercept(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        is_norm = is_call_of_layer(context)
        path = "/".join(module.path) if is_norm or _is_call_of_linear(context) else None
        if is_norm and path in gone and not statistics_of(module):  # else it belongs to another network
            layer = as_norm(module, args, kwargs)
            given = operands_of(layer, args, kwargs)
            return _fold_arithmetic.finish(given.x, given.residual, gone[path], getattr(layer, "activation", None))
        if is_norm or path not in changed:
            return next_call(*args, **kwargs)
        # A detached copy: the folded kernel needs a bias, and its map is already applied.
        plain = module.clone(parent=None, use_bias=True, promote_dtype=promote_dtype)
        return plain.apply({"params": module.variables["params"]}, *args, **kwargs)

    def folded(variables: Any, batch: Any) -> Any:
        with nn.intercept_methods(intercept):
            return call(variables, batch)

    return folded
