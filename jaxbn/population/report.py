"""What a statistics pass changed, per layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn.core.moments import Moments
from jaxbn.population.estimate import Pass
from jaxbn.population.layers import LayerKind

_WIDEST_PATH = 44


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """Old and new statistics of one layer, in the shape of its features, on the host."""

    count: float  # values per channel that the new statistics were computed from; 0: not reached or frozen
    old_mean: np.ndarray
    old_var: np.ndarray
    new_mean: np.ndarray
    new_var: np.ndarray
    kind: LayerKind | None = None  # None: not reached, or frozen
    reached: np.ndarray | bool = True  # which statistics any value went into; all but in a stack of layers in part

    @property
    def mean_shift(self) -> np.ndarray:
        """How far the old mean was from the new one, in new standard deviations."""
        return np.abs(self.old_mean - self.new_mean) / np.sqrt(np.maximum(self.new_var, np.finfo(np.float32).tiny))

    @property
    def std_shift(self) -> np.ndarray:
        """How far the old standard deviation was from the new one, in new standard deviations."""
        return np.abs(np.sqrt(self.var_ratio) - 1)

    @property
    def var_ratio(self) -> np.ndarray:
        """Old variance over new variance."""
        return self.old_var / np.maximum(self.new_var, np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pass did. Prints as a table, within 100 columns.

    Example:
        >>> zero, one = np.zeros(2), np.ones(2)
        >>> change = jaxbn.LayerChange(96.0, zero + 1, one, zero, one * 4)
        >>> print(jaxbn.Report("pooled", 3, {"BatchNorm_0": change}))
        pooled statistics from 3 batches
        layer           values   old mean off by (new std)   old var / new var
                                        mean       worst         min        max
        BatchNorm_0         96           0.5         0.5        0.25       0.25
    """

    estimator: str
    batches: int
    layers: dict[str, LayerChange]
    skipped: int = 0  # batches whose moments were not finite
    sweeps: int = 1  # over all batches
    change: float | None = None  # how far any statistic moved in the last sweep, in standard deviations; of several

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Layers that no batch went through; their statistics are the old ones."""
        return tuple(path for path, change in self.layers.items() if change.count == 0)

    def _headline(self) -> str:
        line = f"{self.estimator} statistics from {self.batches} batches"
        if self.skipped:
            line += f", {self.skipped} of which were not finite and left out"
        if self.change is not None:
            line += f"; {self.sweeps} sweeps, the last of which moved them by {self.change:.2g} std"
        return line

    def __str__(self) -> str:
        width = min(max(len("layer"), *map(len, self.layers)), _WIDEST_PATH)
        lines = [
            self._headline(),
            f"{'layer':{width}}  {'values':>9}   old mean off by (new std)   old var / new var",
            f"{'':{width}}  {'':>9}          mean       worst         min        max",
        ]
        for path, change in self.layers.items():
            name = path if len(path) <= width else "..." + path[3 - width :]
            if change.count == 0:
                lines.append(f"{name:{width}}  not reached, or frozen; its statistics are the old ones")
                continue
            shift, ratio = change.mean_shift, change.var_ratio
            lines.append(
                f"{name:{width}}  {change.count:>9.0f}   {shift.mean():>11.3g} {shift.max():>11.3g}"
                f"   {ratio.min():>9.3g}  {ratio.max():>9.3g}"
            )
        return "\n".join(lines)


def report(
    estimator: str,
    done: Pass,
    moments: Mapping[str, Moments],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    sweeps: int = 1,
    change: float | None = None,
) -> Report:
    """What a pass did; states are anything with a mean and a var. A ValueError if it reached no layer."""
    kinds = dict(done.kinds)

    def arrays(state: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(state.mean), np.asarray(state.var)

    def of(path: str) -> LayerChange:
        counts = np.asarray(moments[path].count)
        return LayerChange(float(counts.max()), *arrays(old[path]), *arrays(new[path]), kinds.get(path), counts > 0)

    layers = {path: of(path) for path in old}
    made = Report(estimator, int(done.batches), layers, skipped=int(done.skipped), sweeps=sweeps, change=change)
    if len(made.not_reached) == len(made.layers):
        raise ValueError(
            f"No batch went through a normalization layer of this model; it has "
            f"{', '.join(map(repr, made.layers))}. Does `call` run the model that it is given?"
        )
    return made
