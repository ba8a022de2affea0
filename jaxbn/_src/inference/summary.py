"""What is normalized in a model, how, and by what its statistics were estimated, as a table."""

from collections.abc import Iterable, Mapping

from jaxbn._src.display.tables import names_of
from jaxbn._src.framework.layers import AFFINE, LayerKind
from jaxbn._src.inference.frozen import AS_GIVEN, Info, LayerInfo, is_initial
from jaxbn._src.methods.protocol import State

_HEAD = ("layer", "channels", "learns", "method", "epsilon", "statistics", "rows")
_TO_THE_RIGHT = {"channels", "rows"}
_WIDEST_PATH = 44


def tabulate(
    states: Mapping[str, State],
    params: Iterable[str],
    *,
    info: Info | None = None,
    kinds: Mapping[str, LayerKind] | None = None,
) -> str:
    """The table.

    Args:
        states: The statistics of each layer, by path.
        params: The paths of all learned parameters.
        info: What is known of a frozen network.
        kinds: What the layers do, where there is no `info`.

    Returns:
        Text, with a line per layer.
    """
    params = set(params)
    known = dict(info.layers) if info else {}
    rows = [_HEAD]
    names = names_of(states, _WIDEST_PATH)
    for path, state in states.items():
        learned = ", ".join(_beside(path, params)) or "-"
        rows.append((names[path], str(state.mean.size), learned, *_cells(state, path, known, kinds or {})))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    channels = sum(state.mean.size for state in states.values())
    lines = [f"{len(states)} normalization layer{'s'[: len(states) > 1]}, {channels} channel{'s'[: channels > 1]}"]
    for row in rows:
        cells = (
            cell.rjust(width) if name in _TO_THE_RIGHT else cell.ljust(width)
            for name, cell, width in zip(_HEAD, row, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _beside(layer: str, params: Iterable[str]) -> list[str]:
    """The names of the parameters of a layer: scale and bias, and then what its method learns besides."""
    split = [param.rpartition("/") for param in params]
    names = sorted(name for path, _, name in split if path == layer)
    return sorted(names, key=lambda name: AFFINE.index(name) if name in AFFINE else len(AFFINE))


def _cells(
    state: State, path: str, known: Mapping[str, LayerInfo], kinds: Mapping[str, LayerKind]
) -> tuple[str, str, str, str]:
    """Method, epsilon, statistics and rows; a dash stands for what is not known."""
    info = known.get(path)
    kind = info or kinds.get(path)
    statistics = info.estimator if info else "initial values" if is_initial(state).all() else AS_GIVEN
    return (
        (kind and kind.method) or "-",
        "-" if kind is None or kind.epsilon is None else f"{kind.epsilon:g}",
        statistics,
        "-" if info is None or info.rows is None else f"{info.rows:.0f}",
    )
