"""Decides which normalizations are folded into a linear layer, by the dataflow of the traced model.

A framework tags the inputs and outputs of its normalizations and linear layers. A normalization is folded into the
layer before it if it is the only user of the output of that layer. Otherwise it is folded into the layer after it if
that layer is the only user of its output. It is left unfolded, with the reason, if folding might change the result.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.framework.selection import named
from jaxbn._src.inference import fold_arithmetic as _fold_arithmetic
from jaxbn._src.inference.fold_report import LayerFold
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.tracing import dataflow as _dataflow

TRAINS = "it normalizes with the statistics of its batch; `call` must run the model in evaluation"
DOMAINS = "its statistics depend on the domain of each example"


class Tag(NamedTuple):
    """The tag of a value."""

    path: str
    role: str  # "input", "output" or "variable"
    own: bool = True  # False: the layer has this path, but does not use the variables that were given


class Norm(NamedTuple):
    """A call of a normalization."""

    transform: NormTransform[Any, Any]  # without activation and dtype
    params: Any  # parameters of the method
    state: State
    axis: Any
    ndim: int  # rank of its input
    dtypes: tuple[np.dtype, np.dtype]  # of its input and its output
    bare: bool  # without activation and residual
    refusal: str | None = None  # reason why this call cannot be folded into any layer


class Layer(NamedTuple):
    """A call of a linear layer."""

    linear: _fold_arithmetic.Linear | None
    weights: _fold_arithmetic.Weights
    refusal: str | None = None  # reason why no normalization can be folded into it
    map_kernel: Callable[[jax.Array], jax.Array] | None = None  # maps the parameter to the kernel that the layer uses


class Traced(NamedTuple):
    """The traced program of a call, and its layers by path."""

    flow: _dataflow.Flow
    norms: Mapping[str, Norm]
    layers: Mapping[str, Layer]
    # The inputs of the program that are the variables of a layer; None: shared with other layers.
    values: Mapping[str, Sequence[_dataflow.Value | None]]


class Fold(NamedTuple):
    """The decision to fold a normalization into a layer."""

    norm: str
    layer: str
    behind: bool  # whether the normalization comes after the layer
    affine: _fold_arithmetic.Affine


@dataclasses.dataclass(frozen=True)
class Plan:
    """The normalizations to fold, in the order of the program, and the result for each normalization."""

    folds: tuple[Fold, ...]
    layers: dict[str, LayerFold]


def make_plan(traced: Traced, paths: list[str]) -> Plan:
    """Decides for each normalization of the model, given by its path.

    The layers of the plan are in the order of the program, and those that it does not reach are last.
    """
    planner = _Planner(traced)
    tags = [node.tag for node in traced.flow.nodes if isinstance(node.tag, Tag)]
    order = {tag.path: None for tag in tags if tag.path in traced.norms}
    said = {path: planner.decide(path) for path in dict.fromkeys([*order, *paths])}
    return Plan(tuple(planner.folds), {path: said[path] for path in said if path in paths})


def fold_weights(plan: Plan, layers: Mapping[str, Layer]) -> dict[str, _fold_arithmetic.Weights]:
    """Returns the new kernel and bias of each layer into which a normalization is folded."""

    def compute(
        weights: dict[str, _fold_arithmetic.Weights], maps: list[tuple[jax.Array, jax.Array]]
    ) -> dict[str, _fold_arithmetic.Weights]:
        for path, held in weights.items():
            # The folded layer uses its kernel as it is, so apply maps such as centering once, here.
            if function := layers[path].map_kernel:
                weights[path] = held._replace(kernel=function(held.kernel))
        # Keep this order: a layer may absorb several normalizations, each relative to the ones before it.
        for one, (scale, shift) in zip(plan.folds, maps, strict=True):
            linear, fold = (
                layers[one.layer].linear,
                _fold_arithmetic.fold_behind if one.behind else _fold_arithmetic.fold_before,
            )
            assert linear is not None
            weights[one.layer] = fold(weights[one.layer], one.affine._replace(scale=scale, shift=shift), linear)
        return weights

    given = {one.layer: layers[one.layer].weights for one in plan.folds}
    return jax.jit(compute)(given, [one.affine[:2] for one in plan.folds])


class _No(Exception):
    """Raised with the reason not to fold."""


class _Planner:
    """Decides normalization by normalization; later decisions depend on earlier ones."""

    def __init__(self, traced: Traced) -> None:
        self.flow, self.norms, self.layers, self.values = traced
        self.folds: list[Fold] = []
        self._hidden = {one.tag.path: one.inside for one in self.flow.unreadable if isinstance(one.tag, Tag)}

    def decide(self, path: str) -> LayerFold:
        """Plans to fold a normalization if this does not change the result."""
        reasons = []
        for find, behind in ((self._layer_before, True), (self._layer_behind, False)):
            try:
                affine = self._affine(path)
                layer = find(path, affine)
            except _No as reason:
                reasons.append(str(reason))
            else:
                self.folds.append(Fold(path, layer, behind, affine))
                return LayerFold(True, layer, f"into {named(layer)} {'before' if behind else 'after'} it")
        return LayerFold(False, None, "; ".join(dict.fromkeys(reasons)))

    def _check_alone(self, path: str) -> None:
        """Checks that a layer runs once, outside of opaque calls, and that nothing else uses its variables."""
        name = "it" if path in self.norms or path not in self.layers else named(path)
        if hidden := self._hidden.get(path):
            raise _No(f"{name} runs inside `{hidden}`, which fold cannot trace")
        calls = len(self.flow.tagged(Tag(path, "output")))
        if self.flow.tagged(Tag(path, "output", own=False)):
            raise _No(f"another network, with other variables, has a layer with the path of {name}")
        if calls == 0:
            raise _No("the call does not reach it, its output is not used, or fold does not support its class")
        if calls > 1:
            raise _No(f"{name} is called {calls} times")
        values = self.values.get(path, ())
        # A call may compute with values derived from its variables, such as averages of weights. Writing new variables
        # would then change something else.
        if not self.flow.given.get(Tag(path, "variable"), {None}) <= set(values):
            raise _No(f"{name} computes with other values than its variables")
        # New weights must not have effects elsewhere, as in tied layers or a penalty on the weights.
        if not all(value is not None and self.flow.leaves_by(value, Tag(path, "output")) for value in values):
            raise _No(f"the variables of {name} are also used elsewhere")

    def _affine(self, path: str) -> _fold_arithmetic.Affine:
        """The affine map of a normalization that may be folded."""
        self._check_alone(path)
        if refusal := self.norms[path].refusal:
            raise _No(refusal)
        affine, is_one = self._affines[path]
        if not is_one:
            raise _No("its evaluation is not an affine map of its input")
        return affine

    @functools.cached_property
    def _affines(self) -> dict[str, tuple[_fold_arithmetic.Affine, bool]]:
        """The affine maps of all normalizations that can be traced, computed in one program."""
        norms, axes = {}, {}
        for path, norm in self.norms.items():
            if norm.refusal is None and path not in self._hidden:
                norms[path], axes[path] = norm, _axes.split(norm.ndim, norm.axis).features

        def compute(held: Mapping[str, Any]) -> Any:
            found = {}
            for path, (params, state) in held.items():
                norm = norms[path]
                evaluate = functools.partial(norm.transform.eval, params, state)
                like = jnp.zeros(state.mean.shape, _dtypes.promote(norm.dtypes[0], state.mean.dtype))
                affine, same = _fold_arithmetic.affine_of(evaluate, norm.ndim, axes[path], like)
                found[path] = affine.scale, affine.shift, same
            return found

        found = jax.jit(compute)({path: (norm.params, norm.state) for path, norm in norms.items()})
        return {
            path: (_fold_arithmetic.Affine(scale, shift, axes[path]), bool(same))
            for path, (scale, shift, same) in found.items()
        }

    def _layer_before(self, path: str, affine: _fold_arithmetic.Affine) -> str:
        """Returns the layer whose output is used by the normalization only."""
        value = self._given(path)
        while True:
            maker, uses = self.flow.makers.get(value), self.flow.uses(value)
            if maker is None:
                raise _No("its input is the input of the model, or a constant")
            if not isinstance(maker.tag, Tag):
                raise _No(f"its input is made by {_what(maker)}")
            before = maker.tag.path
            if len(uses) > 1:
                others = [node for node in uses if node.tag != Tag(path, "input")]
                raise _No(f"the output of {named(before)} also goes into {_what(others[0])}")
            if before in self.layers:
                self._check_layer(before, affine, behind=True)
                return before
            # A bare normalization that was folded into the layer before it leaves nothing, so continue to its input.
            if not (self.norms[before].bare and any(one.norm == before and one.behind for one in self.folds)):
                raise _No(f"its input is made by the normalization {named(before)}")
            path, value = before, self._given(before)  # this one is already folded

    def _layer_behind(self, path: str, affine: _fold_arithmetic.Affine) -> str:
        """Returns the layer that is the only user of the output of the normalization."""
        if not self.norms[path].bare:
            raise _No("its own activation or residual comes before the next layer")
        (output,) = self.flow.tagged(Tag(path, "output"))
        uses = self.flow.uses(output.outputs[0])
        if len(uses) > 1:
            raise _No(f"its output is used {len(uses)} times")
        behind = uses[0].tag
        # Only the node that stands for the outputs of the model has no inputs.
        if not uses[0].inputs:
            raise _No("its output is the output of the model")
        if not isinstance(behind, Tag):
            raise _No(f"its output goes into {_what(uses[0])}, not directly into a layer")
        if behind.path not in self.layers:
            raise _No(f"its output goes into {named(behind.path)}")
        self._check_layer(behind.path, affine, behind=False)
        return behind.path

    def _given(self, path: str) -> _dataflow.Value:
        (node,) = self.flow.tagged(Tag(path, "input"))
        return node.inputs[0]

    def _check_layer(self, path: str, affine: _fold_arithmetic.Affine, *, behind: bool) -> None:
        layer = self.layers[path]
        self._check_alone(path)
        if layer.refusal or layer.linear is None:
            raise _No(f"{named(path)} {layer.refusal}")
        linear = layer.linear
        features = linear.outputs if behind else linear.inputs
        if not set(affine.axes) <= set(features):
            raise _No(f"its features are along axes {affine.axes}, those of {named(path)} along {tuple(features)}")
        # If the shift is 0, there is no constant that padding could interrupt.
        if not behind and linear.uneven and np.any(np.asarray(affine.shift)):
            raise _No(f"{named(path)} {linear.uneven}")


def _what(node: _dataflow.Node) -> str:
    """Describes an equation."""
    if isinstance(node.tag, Tag):
        return repr(node.tag.path)
    if node.label in _ACTIVATIONS:
        return f"an activation ({node.label})"
    return f"`{node.label}`" if " " not in node.label else node.label


# Names of jax.nn, and the primitives of the others.
_ACTIVATIONS = set(
    "relu relu6 sigmoid softplus sparse_plus soft_sign silu swish log_sigmoid leaky_relu hard_sigmoid hard_silu "
    "hard_swish hard_tanh tanh elu celu selu gelu glu squareplus mish logistic max".split()
)
