"""A diagnosis, drawn."""

from typing import Any

import numpy as np

from jaxbn.population import figures
from jaxbn.population.diagnosis import Diagnosis
from jaxbn.population.tables import names_of

_WIDEST_PATH = 40
_MEDIAN, _RANGE, _STORED = "#0072B2", "#56B4E9", "#D55E00"


def draw(diagnosis: Diagnosis) -> Any:
    """A figure with a row for each layer that was reached, in the order of the model, and three columns.

    Args:
        diagnosis: Of a network.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    layers = {path: layer for path, layer in diagnosis.layers.items() if layer.reached}
    names, rows = names_of(layers, _WIDEST_PATH), np.arange(len(layers))
    found = ", ".join(finding.name for finding in diagnosis.findings) or "nothing found"
    figure, axes = figures.of_layers([names[path] for path in layers], f"{diagnosis.batches} batches: {found}", 3)
    means, deviations, errors = axes

    def column(name: str) -> np.ndarray:
        return np.array([getattr(layer, name) for layer in layers.values()])

    for spread, name in ((means, "d_quantiles"), (deviations, "r_quantiles")):
        low, middle, high = column(name).T
        spread.hlines(rows, low, high, color=_RANGE, linewidth=4, label="90 % of batches and channels")
        spread.plot(middle, rows, "o", color=_MEDIAN, markersize=3, label="median")
    means.axvline(0, color="0.3", linewidth=1)
    means.set_xlabel("mean of a batch, from that of all (std)")
    deviations.axvline(1, color="0.3", linewidth=1)
    deviations.set_xlabel("std of a batch / std of all")
    errors.plot(column("noise"), rows, "o", color=_MEDIAN, markersize=4, label="noise of a batch's mean (std)")
    errors.plot(column("excess"), rows, "s", color=_RANGE, markersize=4, label="order (std of examples)")
    errors.plot(column("off"), rows, "x", color=_STORED, markersize=4, label="stored statistics (std)")
    largest = max(1, *(np.nan_to_num(column(name)).max(initial=0) for name in ("noise", "excess", "off")))
    errors.set(xlabel="effect (std)", xlim=(0, 1.1 * largest))
    if largest > 5:
        errors.set_xscale("symlog", linthresh=1)
    figures.finish(axes)
    return figure
