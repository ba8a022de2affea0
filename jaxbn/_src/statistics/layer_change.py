"""The old and new statistics of one layer, and how a statistics pass estimated them."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.statistics import standard_errors as _standard_errors
from jaxbn._src.statistics.standard_errors import Errors


class Way(NamedTuple):
    """How `consistent=True` estimated the statistics of a layer."""

    stage: int  # counted from 1
    sweeps: int = 1  # more for a layer in a cycle: one that sees its own output, or in a loop that remains a loop
    last_change: float | None = None  # the largest change in the last sweep: of a mean in std, of a variance relative


@dataclasses.dataclass(frozen=True, repr=False)
class LayerChange:
    """Old and new statistics of one layer: NumPy arrays in the shape of its features."""

    count: float  # values per channel behind the new statistics; 0: not reached or frozen
    old_mean: np.ndarray
    old_var: np.ndarray
    new_mean: np.ndarray
    new_var: np.ndarray
    kind: LayerKind | None = None  # None: not reached or frozen
    reached: np.ndarray | bool = True  # channels that were reached; False occurs in stacks of layers
    batches: float | None = None  # number of batches in which the layer was reached
    errors: Errors | None = None  # standard errors of new_mean and new_var, in their units
    way: Way | None = None  # how it was estimated; None: without `consistent`, not reached or frozen

    def __repr__(self) -> str:
        """One line; `to_dict` has the numbers."""
        return f"<LayerChange: {self.new_mean.size} channels, {self.count:.0f} values, mean shift {self.shift:.2g} std>"

    @property
    def mean_shift(self) -> np.ndarray:
        """Distance between the old and the new mean, in new standard deviations."""
        return np.abs(self.old_mean - self.new_mean) / np.sqrt(self._divisor)

    @property
    def std_shift(self) -> np.ndarray:
        """Distance between the old and the new standard deviation, in new standard deviations."""
        return np.abs(np.sqrt(self.var_ratio) - 1)

    @property
    def var_ratio(self) -> np.ndarray:
        """Old variance over new variance."""
        return self.old_var / self._divisor

    @property
    def relative_errors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Standard errors of the mean in new std, and of the variance relative to it; 0 in constant channels."""
        return None if self.errors is None else _standard_errors.relative(self.errors, self.new_mean, self.new_var)

    @property
    def per_batch(self) -> float | None:
        """Values per channel in a batch, averaged over the batches in which the layer was reached."""
        return self.count / self.batches if self.batches else None

    @property
    def constant(self) -> np.ndarray:
        """Reached channels that are constant; numbers relative to their variance have no meaning."""
        return _standard_errors.is_constant(self.new_mean, self.new_var) & self.reached

    @property
    def shift(self) -> float:
        """The larger of both shifts, averaged over the channels; NaN if all are constant."""
        return float(np.mean(self._shown(np.maximum(self.mean_shift, self.std_shift))))

    @property
    def summary(self) -> dict[str, float]:
        """Shifts, ratios and the largest standard errors of the channels that were reached and are not constant."""
        shift, ratio = self._shown(self.mean_shift), self._shown(self.var_ratio)
        errors = [self._shown(part) for part in self.relative_errors or (np.full_like(self.mean_shift, np.nan),) * 2]
        numbers = shift.mean(), shift.max(), ratio.min(), ratio.max(), *(part.max() for part in errors)
        return dict(zip(SUMMARY, map(float, numbers), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Returns numbers, lists and None; complex means are pairs."""
        errors = self.errors and {"mean": _listed(self.errors.mean), "var": _listed(self.errors.var)}
        return {
            "values": self.count,
            "values_per_batch": self.per_batch,
            "method": self.kind and self.kind.method,
            "epsilon": self.kind and self.kind.epsilon,
            "old": {"mean": _listed(self.old_mean), "var": _listed(self.old_var)},
            "new": {"mean": _listed(self.new_mean), "var": _listed(self.new_var)},
            "standard_error": errors,
            "way": self.way and self.way._asdict(),
            **({name: _listed(value) for name, value in self.summary.items()} if self.count else {}),
        }

    @property
    def _divisor(self) -> np.ndarray:
        return np.maximum(self.new_var.astype(np.float64), np.finfo(np.float32).tiny)

    def _shown(self, values: np.ndarray) -> np.ndarray:
        shown = values[np.broadcast_to(self.reached, values.shape) & ~self.constant]
        return shown if shown.size else np.array([np.nan])


SUMMARY = ("mean_shift", "worst_mean_shift", "min_var_ratio", "max_var_ratio", "worst_mean_error", "worst_var_error")


def _listed(values: Any) -> Any:
    """Nested lists of numbers, or None where they are not finite."""
    values = np.asarray(values)
    if np.iscomplexobj(values):
        values = np.stack([values.real, values.imag], -1)
    values = values.astype(np.float64)
    listed: Any = np.where(np.isfinite(values), values.astype(object), None)
    return listed.tolist()
