"""A diagnosis, drawn."""

from typing import Any

import numpy as np

from jaxbn.population.diagnosis import Diagnosis
from jaxbn.population.plots import figure_module
from jaxbn.population.tables import names_of

_INCHES = {"layer": 0.19, "ends": 1.9, "width": 11.0}
_LIGHT, _DARK, _OTHER = "#56B4E9", "#0072B2", "#D55E00"


def draw(diagnosis: Diagnosis) -> Any:
    """A figure with a row for each layer, in the order of the model, and three columns.

    Args:
        diagnosis: Of a network.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    layers = {path: layer for path, layer in diagnosis.layers.items() if layer.reached}
    names, rows = names_of(list(layers), 40), np.arange(len(layers))
    height = _INCHES["ends"] + _INCHES["layer"] * max(len(rows), 4)
    figure = figure_module().Figure(figsize=(_INCHES["width"], height), layout="constrained")
    found = ", ".join(finding.name for finding in diagnosis.findings) or "nothing found"
    figure.suptitle(f"{diagnosis.batches} batches: {found}", fontsize=10)
    means, deviations, errors = figure.subplots(1, 3, sharey=True)

    def column(name: str) -> np.ndarray:
        return np.array([getattr(layer, name) for layer in layers.values()])

    spreads = (means, "d_quantiles", "mean of a batch (std)"), (deviations, "r_quantiles", "std of a batch / std")
    for axes, name, unit in spreads:
        low, middle, high = column(name).T
        axes.hlines(rows, low, high, color=_LIGHT, linewidth=4, label="90 % of batches and channels")
        axes.plot(middle, rows, "o", color=_DARK, markersize=3, label="median")
        axes.set_xlabel(unit)
    means.axvline(0, color="0.3", linewidth=1)
    deviations.axvline(1, color="0.3", linewidth=1)
    deviations.set_xscale("log")
    for name, label, color, marker in (
        ("noise", "noise of a batch's mean", _DARK, "o"),
        ("excess", "order: std between batches / examples", _LIGHT, "s"),
        ("off", "stored statistics", _OTHER, "x"),
    ):
        errors.plot(column(name), rows, marker, color=color, markersize=4, label=label)
    errors.set_xscale("symlog", linthresh=0.1)
    errors.set(xlabel="error of the normalized input (std)", xlim=(0, None))
    means.set(yticks=rows, ylim=(len(rows) - 0.3, -0.7))
    means.set_yticklabels([names[path] or "the model" for path in layers], fontsize=8)
    for axes in (means, deviations, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, frameon=False)
    return figure
