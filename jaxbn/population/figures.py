"""What the pictures of layers share. matplotlib is optional: it is imported where something is drawn."""

from collections.abc import Sequence
from typing import Any

_WIDTH, _ROW, _ENDS = 11.0, 0.19, 1.7  # inches: of the figure, of a layer, and of what is above and below the rows


def of_layers(names: Sequence[str], title: str, columns: int) -> tuple[Any, Sequence[Any]]:
    """A figure with a row for each layer, and its columns, which share the rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib, which is optional: pip install matplotlib") from error
    figure = Figure(figsize=(_WIDTH, _ENDS + _ROW * max(len(names), 4)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, columns, sharey=True)
    axes[0].set(yticks=range(len(names)), ylim=(len(names) - 0.3, -0.7))
    axes[0].set_yticklabels(names, fontsize=8)
    return figure, axes


def finish(axes: Sequence[Any]) -> None:
    """Grids, and legends above the columns."""
    for column in axes:
        column.spines[["top", "right"]].set_visible(False)
        column.grid(True, color="0.9")
        column.set_axisbelow(True)
        column.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False)
