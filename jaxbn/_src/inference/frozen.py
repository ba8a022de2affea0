"""The frozen network: parameters and fixed statistics, with information on the origin of the statistics.

It is the result of training and of a statistics pass, and you evaluate, save and serve it.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._src.display.tables import in_order
from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.framework.processes import check_unstacked, here
from jaxbn._src.framework.selection import named
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.averages import INITIAL_MEAN, INITIAL_VAR
from jaxbn._src.statistics.pass_report import Report

RUNNING = "running averages"
AS_GIVEN = "as given"

# Packages whose versions are recorded.
_VERSIONS = ("jaxbn", "jax", "flax")
_HINT = "build the model with the arguments with which it was frozen."


class LayerInfo(NamedTuple):
    """The method of one layer, and the origin of its statistics."""

    method: str | None  # such as "batch_norm"; None: unknown
    epsilon: float | None
    estimator: str  # the name of the estimator of a pass; "running averages"; or "as given" if unknown
    rows: float | None  # values per channel in the pass; None: unknown


class Info(NamedTuple):
    """Information on a frozen network; static and hashable."""

    layers: tuple[tuple[str, LayerInfo], ...]  # by path
    versions: tuple[tuple[str, str], ...]  # of the packages that made the network

    def layer(self, path: str) -> LayerInfo:
        """Returns the information on the layer at this path."""
        return dict(self.layers)[path]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # comparing arrays gives no truth value
class Frozen:
    """A network to evaluate: its variables, and information on its statistics. A pytree; `info` is static.

    Make one with `jaxbn.linen.freeze`, `jaxbn.nnx.freeze`, `jaxbn.freeze` or the `finalize` of `make_steps`. Training
    steps do not accept it. Gradients flow to inputs and parameters; with jaxbn's layers, the statistics have none.
    """

    # Nested dicts of arrays: Flax's collections (linen), or the variables by path (NNX). Of plain functions, their tree
    variables: Any
    info: Info = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        """Copies NumPy arrays, because their owner may write to them."""
        if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(self.variables)):
            copies = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, self.variables)
            object.__setattr__(self, "variables", copies)

    def __repr__(self) -> str:
        """A few lines: how many arrays there are, and how the layers normalize."""
        return "\n  ".join([f"<Frozen: {_sizes(self.variables)}", *_kinds_of_layers(self.info), _versions(self.info)])


def freeze(
    framework: Framework,
    model: Any,
    report: Report | None = None,
    *,
    kinds: Mapping[str, LayerKind] | None = None,
    otherwise: str = AS_GIVEN,
) -> Frozen:
    """The frozen network of a model of any framework; see `jaxbn.linen.freeze`, and `make_info` for the arguments."""
    states = framework.states(model)
    check_unstacked(framework.split(model)[1])
    kinds = framework.kinds(model) if kinds is None else kinds
    return Frozen(
        copied(framework.variables(model)), make_info(states, report=report, kinds=kinds, otherwise=otherwise)
    )


def make_info(
    states: Mapping[str, State],
    *,
    report: Report | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
    otherwise: str = AS_GIVEN,
) -> Info:
    """Checks that the statistics may be frozen, and returns the information on them.

    Args:
        states: The statistics of each layer, by path.
        report: The report of the pass that estimated them.
        kinds: The method and epsilon of layers that are not in the report.
        otherwise: The estimator of layers that are not in the report.

    Returns:
        The information on all layers.

    Raises:
        ValueError: If the statistics of a layer were never estimated or are not finite, or if the report is about other
            statistics.
    """
    kinds, states = kinds or {}, here(states)  # arrays may be spread over processes
    if report is not None and set(report.layers) != set(states):
        raise ValueError(
            f"The report is about the layers {sorted(report.layers)}, but the variables hold {sorted(states)}."
        )
    paths = in_order(states, report.layers if report else kinds)
    layers = ((path, _layer_info(path, states[path], report, kinds.get(path), otherwise)) for path in paths)
    return Info(tuple(layers), versions())


def versions() -> tuple[tuple[str, str], ...]:
    """Returns the recorded packages and their versions."""
    return tuple((name, _version(name)) for name in _VERSIONS)


def is_initial(state: State) -> np.ndarray:
    """Returns which channels still have the initial statistics."""
    return (np.asarray(state.mean) == INITIAL_MEAN) & (np.asarray(state.var) == INITIAL_VAR)


def copied(tree: Any) -> Any:
    """Copies the arrays of a tree: a step may donate those of its state, and NumPy arrays may be written to."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf, tree)


def check_frozen(frozen: Any) -> None:
    """Raises a TypeError if the argument is not a frozen network."""
    if not isinstance(frozen, Frozen):
        raise TypeError(f"Expected a jaxbn.Frozen, made by freeze() or by steps.finalize(); got {type(frozen)}.")
    check_unstacked(frozen.variables)


def check_kinds(frozen: Frozen, kinds: Mapping[str, LayerKind]) -> None:
    """Raises a ValueError if a layer of the model has another method or epsilon than the frozen one."""
    known = dict(frozen.info.layers)
    for path in sorted(kinds.keys() & known.keys()):  # the model may hold other layers, such as those of a teacher
        for name in LayerKind._fields:
            old, new = getattr(known[path], name), getattr(kinds[path], name)
            if old is not None and new is not None and old != new:
                raise ValueError(
                    f"{named(path)} was frozen with {name}={old!r}, but the model has {name}={new!r}; {_HINT}"
                )


def check_fits(framework: Framework, frozen: Frozen, model: Any) -> None:
    """Raises a ValueError that names the first variable in which a frozen network differs from a model."""
    check_frozen(frozen)
    given, wanted = (_shapes_by_path(tree) for tree in (frozen.variables, framework.variables(model)))
    for path in sorted(given.keys() | wanted.keys()):
        in_frozen, in_model = given.get(path, "missing"), wanted.get(path, "missing")
        if in_frozen != in_model:
            raise ValueError(f"{path!r} is {in_frozen} in the frozen network and {in_model} in the model; {_HINT}")


def _shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by path; the tree may hold lists and tuples."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _sizes(tree: Any) -> str:
    """The number of arrays, their values, and their bytes; leaves may be shapes, or no arrays at all."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size") and hasattr(leaf, "dtype")]
    size = sum(leaf.size for leaf in leaves)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return f"{len(leaves)} arrays, {size:,} values, {nbytes:,} bytes"


def _kinds_of_layers(info: Info) -> list[str]:
    """A line for each way of normalizing, and how many layers do so."""
    # Layers that differ only in their number of values share a line.
    numbers = Counter(layer._replace(rows=None) for _, layer in info.layers)
    return [
        f"{number} layer{'s'[: number > 1]}: {layer.method or 'unknown method'}, "
        f"epsilon {'unknown' if layer.epsilon is None else f'{layer.epsilon:g}'}, statistics: {layer.estimator}"
        for layer, number in numbers.items()
    ]


def _versions(info: Info) -> str:
    return f"{', '.join(f'{name} {version}' for name, version in info.versions)}>"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from the source tree
        return "unknown"


def _layer_info(path: str, state: State, report: Report | None, kind: LayerKind | None, otherwise: str) -> LayerInfo:
    name = named(path)
    mean, var = np.asarray(state.mean), np.asarray(state.var)
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise ValueError(f"The statistics of {name} are not finite, or a variance is negative.")
    # Initial values are an error unless the pass estimated them: true statistics may be 0 and 1.
    change = None if report is None else report.layers[path]
    reached = False if change is None else change.reached
    if (is_initial(state) & ~np.asarray(reached)).any():
        raise ValueError(
            f"The statistics of {name} were never estimated: they are the initial values. Train with running averages "
            f"(momentum=0.99), or estimate them with postproc on a call that reaches this layer."
        )
    # No pass estimated the statistics of this layer.
    if report is None or change is None or change.count == 0:
        return LayerInfo(kind and kind.method, kind and kind.epsilon, otherwise, None)
    if not (np.array_equal(mean, change.new_mean) and np.array_equal(var, change.new_var)):
        raise ValueError(
            f"The statistics of {name} are not those that the report is about. Freeze the variables or model that the "
            f"pass returned together with the report, not the ones that you passed to it."
        )
    kind = kind or change.kind
    return LayerInfo(kind and kind.method, kind and kind.epsilon, report.estimator, change.count)
