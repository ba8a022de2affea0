"""The report of a pass, drawn."""

from typing import Any

import numpy as np

from jaxbn.population import figures
from jaxbn.population.report import Report
from jaxbn.population.tables import names_of

_WIDEST_PATH = 40
_AVERAGE, _WORST, _RANGE = "#0072B2", "#D55E00", "#56B4E9"


def draw(report: Report) -> Any:
    """A figure with a row for each layer that was reached, in the order of the model, and three columns.

    Args:
        report: Of a pass.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    paths = [path for path in report.layers if path not in report.not_reached]
    rows, names = np.arange(len(paths)), names_of(paths, _WIDEST_PATH)
    summaries = [report.layers[path].summary for path in paths]
    numbers = {name: np.array([summary[name] for summary in summaries]) for name in summaries[0]}
    title = f"{report.estimator} statistics from {report.batches} batches"
    figure, columns = figures.of_layers([names[path] for path in paths], title, 3)
    shift, ratio, error = columns

    shift.plot(numbers["mean_shift"], rows, "o", color=_AVERAGE, markersize=4, label="channel average")
    shift.plot(numbers["worst_mean_shift"], rows, "x", color=_WORST, markersize=4, label="worst channel")
    shift.set_xscale("symlog", linthresh=0.01)
    shift.set_xlim(0, max(0.02, 1.5 * np.nanmax(numbers["worst_mean_shift"], initial=0)))
    shift.set_xlabel("old mean off by (new std)")

    ends = numbers["min_var_ratio"], numbers["max_var_ratio"]
    ratio.hlines(rows, *ends, color=_RANGE, linewidth=4, label="smallest to largest channel")
    ratio.axvline(1, color="0.3", linewidth=1)
    for end in ends:
        ratio.plot(end, rows, "|", color=_RANGE, markersize=7, zorder=3)  # a layer that hardly changed is seen too
    _set_log(ratio, [0.5, 2, *ends[0], *ends[1]])
    ratio.set_xlabel("old variance / new variance")

    ends = numbers["worst_mean_error"], numbers["worst_var_error"]
    error.plot(ends[0], rows, "o", color=_AVERAGE, markersize=4, label="of the mean (new std)")
    error.plot(ends[1], rows, "x", color=_WORST, markersize=4, label="of the variance (relative)")
    _set_log(error, [*ends[0], *ends[1]])
    error.set_xlabel("standard error, worst channel")

    figures.finish(columns)
    return figure


def _set_log(axes: Any, values: list[float]) -> None:
    """A logarithmic axis that holds the positive ones of these values, with as many ticks as there is room for."""
    from matplotlib import ticker

    shown = np.array([value for value in values if np.isfinite(value) and value > 0])
    if not shown.size:
        return
    low, high = min(shown.min() / 1.3, shown.max() / 10), shown.max() * 1.3
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if high / low > 1e4:  # powers of ten, written so
        axes.xaxis.set_major_locator(ticker.LogLocator(numticks=7))
        return
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
