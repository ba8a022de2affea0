"""Figures with a row for each layer, in the order of the layers. matplotlib is optional and imported when drawing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._src.display.tables import names_of

_WIDEST_PATH = 40  # characters
_WIDTH, _ROW, _ENDS = 11.0, 0.19, 1.7  # inches: figure width, height per layer, and margins above and below the rows
_BLUE, _RED, _LIGHT = "#0072B2", "#D55E00", "#56B4E9"


def draw_report(title: str, paths: Sequence[str], numbers: Mapping[str, np.ndarray]) -> Any:
    """Draws the changes that a statistics pass made, in three columns.

    Args:
        title: Title of the figure.
        paths: Paths of the layers, from top to bottom.
        numbers: Arrays with a value for each layer: `mean_shift`, `worst_mean_shift`, `min_var_ratio`, `max_var_ratio`,
            `worst_mean_error` and `worst_var_error`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    rows = np.arange(len(paths))
    figure, columns = _figure(paths, title)
    shift, ratio, error = columns

    shift.plot(numbers["mean_shift"], rows, "o", color=_BLUE, markersize=4, label="average over channels")
    shift.plot(numbers["worst_mean_shift"], rows, "x", color=_RED, markersize=4, label="worst channel")
    # A logarithmic axis that can show 0, as for a layer that did not change.
    shift.set_xscale("symlog", linthresh=0.01)
    largest = max(0.02, 1.5 * np.nanmax(numbers["worst_mean_shift"], initial=0))
    shift.set_xlim(0, largest)
    if largest < 1e4:
        shift.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 0.01 rather than a power of ten
    shift.set_xlabel("|old mean - new mean| (std)")

    ends = numbers["min_var_ratio"], numbers["max_var_ratio"]
    ratio.hlines(rows, *ends, color=_LIGHT, linewidth=4, label="smallest to largest channel")
    ratio.axvline(1, color="0.3", linewidth=1)
    for end in ends:
        ratio.plot(end, rows, "|", color=_LIGHT, markersize=7, zorder=3)  # visible even if the layer hardly changed
    _set_log(ratio, [0.5, 2, *ends[0], *ends[1]])
    ratio.set_xlabel("old variance / new variance")

    ends = numbers["worst_mean_error"], numbers["worst_var_error"]
    error.plot(ends[0], rows, "o", color=_BLUE, markersize=4, label="mean (std)")
    error.plot(ends[1], rows, "x", color=_RED, markersize=4, label="variance (relative)")
    _set_log(error, [*ends[0], *ends[1]])
    error.set_xlabel("standard error, worst channel")

    _finish(columns)
    return figure


def draw_diagnosis(title: str, paths: Sequence[str], numbers: Mapping[str, np.ndarray]) -> Any:
    """Draws the effect of batches on each layer, in three columns.

    Args:
        title: Title of the figure.
        paths: Paths of the layers, from top to bottom.
        numbers: Arrays with a row for each layer: `d_quantiles` and `r_quantiles` (5, 50 and 95 %), `noise`, `excess`
            and `off`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    rows = np.arange(len(paths))
    figure, columns = _figure(paths, title)
    means, deviations, errors = columns
    for spread, name in ((means, "d_quantiles"), (deviations, "r_quantiles")):
        low, middle, high = numbers[name].T
        spread.hlines(rows, low, high, color=_LIGHT, linewidth=4, label="90 % of batches and channels")
        spread.plot(middle, rows, "o", color=_BLUE, markersize=3, label="median")
    means.axvline(0, color="0.3", linewidth=1)
    means.set_xlabel("batch mean - overall mean (std)")
    deviations.axvline(1, color="0.3", linewidth=1)
    deviations.set_xlabel("batch std / overall std")
    errors.plot(numbers["noise"], rows, "o", color=_BLUE, markersize=4, label="noise of batch means")
    errors.plot(numbers["excess"], rows, "s", color=_LIGHT, markersize=4, label="order of the examples")
    errors.plot(numbers["off"], rows, "x", color=_RED, markersize=4, label="running statistics, in evaluation")
    largest = max(1, *(np.nan_to_num(numbers[name]).max(initial=0) for name in ("noise", "excess", "off")))
    errors.set(xlabel="error (std)", xlim=(0, 1.1 * largest))
    if largest > 5:
        errors.set_xscale("symlog", linthresh=1)
    _finish(columns)
    return figure


def _figure(paths: Sequence[str], title: str) -> tuple[Any, Sequence[Any]]:
    """A figure of three columns, which share a row for each layer."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is optional: pip install matplotlib") from error
    # Not pyplot, which would keep every figure in a global list and may open windows.
    figure = Figure(figsize=(_WIDTH, _ENDS + _ROW * max(len(paths), 4)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 3, sharey=True)
    # The limits are reversed, so that the first layer is at the top.
    axes[0].set(yticks=range(len(paths)), ylim=(len(paths) - 0.3, -0.7))
    names = names_of(paths, _WIDEST_PATH)
    axes[0].set_yticklabels([names[path] for path in paths], fontsize=8)
    return figure, axes


def _finish(axes: Sequence[Any]) -> None:
    """Adds grids, and legends above the columns."""
    for column in axes:
        column.spines[["top", "right"]].set_visible(False)
        column.grid(True, color="0.9")
        column.set_axisbelow(True)
        column.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False)


def _set_log(axes: Any, values: list[float]) -> None:
    """Makes the axis logarithmic, to hold the positive values, with as many ticks as fit."""
    from matplotlib import ticker

    shown = np.array([value for value in values if np.isfinite(value) and value > 0])
    if not shown.size:
        return
    # At least a decade, so that there is a tick with a label.
    low, high = min(shown.min() / 1.3, shown.max() / 10), shown.max() * 1.3
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if high / low > 1e4:  # labels as powers of ten
        axes.xaxis.set_major_locator(ticker.LogLocator(numticks=7))
        return
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
