"""A table of the normalization layers of a model: methods, parameters, and origin of the statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxbn._src.display.tables import Column, in_order, table
from jaxbn._src.framework.framework import Call, Framework, capture_arrays
from jaxbn._src.framework.layers import AFFINE, LayerKind
from jaxbn._src.framework.processes import check_unstacked, held_here
from jaxbn._src.inference.frozen import AS_GIVEN, Frozen, Info, LayerInfo
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.averages import INITIAL_MEAN, INITIAL_VAR

_LEARNS = Column("learns", is_number=False)
_COLUMNS = [
    Column("channels"),
    _LEARNS,
    *(Column(head, is_number=False) for head in ("method", "epsilon", "statistics")),
    Column("rows"),
]


def summary(framework: Framework, model: Any, call: Call | None = None, batch: Any = None) -> str:
    """The table of a model, or of a `Frozen` whose variables are a model; see `jaxbn.linen.summary`."""
    model, info = (model.variables, model.info) if isinstance(model, Frozen) else (model, None)
    framework.check(model)
    structure, arrays = framework.split(model)
    check_unstacked(arrays)
    if call is None:
        kinds = framework.kinds(model)
    else:
        run = capture_arrays(framework, structure, call, "eval", None)
        kinds = dict(jax.eval_shape(run, arrays, batch)[1].kinds)
    return tabulate(framework.states(model), framework.params(model), info=info, kinds=kinds)


def tabulate(
    states: Mapping[str, State],
    params: Iterable[str] | None,
    *,
    info: Info | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
) -> str:
    """Returns the table as text.

    Args:
        states: The statistics of each layer, by path.
        params: The paths of all learned parameters. None: they do not tell the layers; the table does not show them.
        info: The information in a frozen network.
        kinds: The method and epsilon of the layers, if there is no `info`.

    Returns:
        A table with a row for each layer.
    """
    params, kinds = None if params is None else set(params), kinds or {}
    known = dict(info.layers) if info else {}
    rows = {}
    for path in in_order(states, known or kinds):
        learned = [] if params is None else [", ".join(_learned(path, params)) or "-"]
        rows[path] = [str(states[path].mean.size), *learned, *_cells(states[path], path, known, kinds)]
    channels = sum(state.mean.size for state in states.values())
    title = f"{len(states)} normalization layer{'s'[: len(states) > 1]}, {channels} channel{'s'[: channels > 1]}"
    columns = [column for column in _COLUMNS if params is not None or column is not _LEARNS]
    return f"{title}\n{table(columns, rows)}"


def _learned(layer: str, params: Iterable[str]) -> list[str]:
    """The names of the parameters of a layer: scale and bias, then those of its method."""
    split = [param.rpartition("/") for param in params]
    names = sorted(name for path, _, name in split if path == layer)
    return sorted(names, key=lambda name: AFFINE.index(name) if name in AFFINE else len(AFFINE))


def _cells(
    state: State, path: str, known: Mapping[str, LayerInfo], kinds: Mapping[str, LayerKind]
) -> tuple[str, str, str, str]:
    """Method, epsilon, statistics and rows; a dash means unknown."""
    info = known.get(path)
    kind = info or kinds.get(path)
    statistics = info.estimator if info else "initial values" if _is_initial(state) else AS_GIVEN
    return (
        (kind and kind.method) or "-",
        "-" if kind is None or kind.epsilon is None else f"{kind.epsilon:g}",
        statistics,
        "-" if info is None or info.rows is None else f"{info.rows:.0f}",
    )


def _is_initial(state: State) -> bool:
    # Those of this process, so that a program may print the table on process 0 alone.
    return bool((held_here(state.mean) == INITIAL_MEAN).all() and (held_here(state.var) == INITIAL_VAR).all())
