"""The report of a statistics pass: changes and standard errors for each layer, and the old statistics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._src.display import tables as _tables
from jaxbn._src.display.plots import draw_report
from jaxbn._src.framework.layer_paths import AS_THEY_ARE, LayerPath
from jaxbn._src.framework.processes import here
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics.estimators import Estimator
from jaxbn._src.statistics.layer_change import SUMMARY, LayerChange, Way
from jaxbn._src.statistics.sweep import Pass

_MARKED = 3  # layers that changed most
_NAMED = 5  # layers named in a note


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The changes that a statistics pass made. `print` shows a table of the layers, in the order of the data.

    `to_dict` is for logs, and `plot` makes a figure. The report holds the old statistics:
    `jaxbn.linen.install_moments(variables, report.old)` restores them, and likewise in NNX. Standard errors are those
    of the worst channel: of the mean in new standard deviations, of the variance relative to it. They are estimated
    from the differences between batches, so they exclude any error that all batches have in common.

    Example:
        >>> zero, one = np.zeros(2), np.ones(2)
        >>> change = jaxbn.LayerChange(96.0, zero + 1, one, zero, one * 4, batches=3)
        >>> print(jaxbn.Report("pooled", 3, {"BatchNorm_0": change}))
        pooled statistics from 3 batches
                              mean   mean    var    var  error  error
                             shift  shift  ratio  ratio     of     of
        layer        values  (avg)  (max)  (min)  (max)   mean    var
        BatchNorm_0      96    0.5    0.5   0.25   0.25      -      -
        <BLANKLINE>
        values      per channel, of all batches together
        mean shift  |old mean - new mean| in standard deviations (std)
        var ratio   old variance / new variance
        error       largest standard error: of the mean in std, of the variance relative
    """

    estimator: str
    batches: int
    layers: dict[str, LayerChange]
    skipped: int = 0  # batches whose moments were not finite
    stages: int | None = None  # number of stages of a consistent pass
    stop_when: float | None = None  # the requested standard error
    stopped: bool = False  # whether it was reached before the batches ended

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Layers that no batch reached; their statistics are unchanged."""
        return tuple(path for path, change in self.layers.items() if change.count == 0)

    @property
    def sweeps(self) -> int:
        """The largest number of sweeps that a layer took."""
        return max((change.way.sweeps for change in self.layers.values() if change.way), default=1)

    @property
    def change(self) -> float | None:
        """The largest change in a last sweep, of means in standard deviations; None if there were no further sweeps."""
        changes = [change.way.last_change for change in self.layers.values() if change.way]
        return max((each for each in changes if each is not None), default=None)

    @property
    def old(self) -> dict[str, Moments]:
        """The statistics before the pass, for `install_moments`; their count is 1 where the pass changed them."""
        changed = {path: change for path, change in self.layers.items() if change.count}
        return {LayerPath(path, AS_THEY_ARE): _as_moments(change) for path, change in changed.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns dicts, lists, numbers, strings and None, for `json.dumps`; numbers that are not finite are None."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "layers"]
        layers = {path: change.to_dict() for path, change in self.layers.items()}
        return {name: getattr(self, name) for name in [*names, "sweeps", "change"]} | {"layers": layers}

    def plot(self) -> Any:
        """Returns a matplotlib figure with a row for each layer: `report.plot().savefig("report.png")`."""
        paths = [path for path in self.layers if path not in self.not_reached]
        summaries = [self.layers[path].summary for path in paths]
        numbers = {name: np.array([summary[name] for summary in summaries]) for name in SUMMARY}
        return draw_report(f"{self.estimator} statistics from {self.batches} batches", paths, numbers)

    def __repr__(self) -> str:
        """One line; `print` shows the table."""
        return f"<Report: {self.estimator} statistics of {len(self.layers)} layers from {self.batches} batches>"

    def __str__(self) -> str:
        reached = [path for path in self.layers if path not in self.not_reached]
        changed = sorted(reached, key=lambda path: -np.nan_to_num(self.layers[path].shift, nan=-1))
        marked = changed[:_MARKED] if len(changed) > _MARKED else []
        rows = {path: _cells(change) for path, change in self.layers.items()}
        lines = [_tables.paragraph(self._headline()), *self._stop_notes(), _tables.table(_COLUMNS, rows, marked=marked)]
        lines += [_tables.paragraph(note) for note in self._notes(bool(marked))]
        return "\n".join([*lines, "", _tables.definitions(_DEFINITIONS)])

    def _headline(self) -> str:
        line = f"{self.estimator} statistics from {self.batches} batches"
        if self.skipped:
            line += f", {self.skipped} of which were not finite and left out"
        if self.stages is not None:
            line += f", in {self.stages} stage{'s' * (self.stages != 1)}"
        if self.change is not None:
            swept = [path for path, each in self.layers.items() if each.way and each.way.last_change is not None]
            line += (
                f"; {_named(swept)} in {self.sweeps} sweeps, the last of which changed them by {self.change:.2g} std"
            )
        return line

    def _stop_notes(self) -> list[str]:
        if self.stop_when is None:
            return []
        errors = [change.summary[name] for change in self.layers.values() if change.count for name in SUMMARY[-2:]]
        largest = max(errors)
        if not self.stopped:
            return [f"not stopped early: stop_when={self.stop_when:g}, and the largest standard error is {largest:.2g}"]
        if self.stages is None or largest <= self.stop_when:
            return [f"stopped early: no standard error was above {self.stop_when:g}"]
        # The batches are read in the first stage, which knows the errors of its layers only.
        return [
            f"stopped early: no standard error of the first stage was above {self.stop_when:g}; the largest of all is "
            f"{largest:.2g}"
        ]

    def _notes(self, marked: bool) -> list[str]:
        notes = [f"* the {_MARKED} layers that changed most"] if marked else []
        if self.not_reached:
            notes += [f"not reached or frozen, with unchanged statistics: {_named(self.not_reached)}"]
        single = [path for path, change in self.layers.items() if 0 < (change.per_batch or 0) <= 1]
        alone = [path for path in single if self.layers[path].constant.any()]
        if alone:
            notes += [f"one value per channel in a batch, which has variance 0: {_named(alone)}"]
        reached = {path: change for path, change in self.layers.items() if change.count and path not in alone}
        constant = {path: int(change.constant.sum()) for path, change in reached.items()}
        found = [f"{number} in {path!r}" for path, number in constant.items() if number]
        if found:
            more = [f"{len(found) - _NAMED} more layers"] * (len(found) > _NAMED)
            notes += [f"constant channels, which are left out above: {', '.join([*found[:_NAMED], *more])}"]
        return notes


_COLUMNS = [
    _tables.Column(head)
    for head in (
        "values",
        "mean\nshift\n(avg)",
        "mean\nshift\n(max)",
        "var\nratio\n(min)",
        "var\nratio\n(max)",
        "error\nof\nmean",
        "error\nof\nvar",
    )
]
_DEFINITIONS = {
    "values": "per channel, of all batches together",
    "mean shift": "|old mean - new mean| in standard deviations (std)",
    "var ratio": "old variance / new variance",
    "error": "largest standard error: of the mean in std, of the variance relative",
}


def report(
    estimator: Estimator,
    done: Pass,
    moments: Mapping[str, Moments],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    ways: Mapping[str, Way] | None = None,
    **about: Any,
) -> Report:
    """Makes the report of a pass.

    Args:
        estimator: The estimator of the statistics.
        done: The pass.
        moments: The moments that were installed, by path.
        old: The states before, by path; each has a mean and a var.
        new: The states after.
        ways: How a consistent pass estimated each layer.
        **about: Further fields of the `Report`.

    Returns:
        The report.

    Raises:
        ValueError: If no layer was reached.
    """
    done, moments, old, new = here((done, moments, old, new))  # arrays may be spread over processes
    kinds, errors = dict(done.kinds), estimator.errors(done.estimate) if estimator.errors else {}

    def of(path: str) -> LayerChange:
        counts, found = np.asarray(moments[path].count), errors.get(path)
        old_mean, old_var, new_mean, new_var = (
            np.asarray(leaf) for state in (old[path], new[path]) for leaf in (state.mean, state.var)
        )
        batches = float(done.batches - done.skipped if found is None else found.batches.max())
        states, way = (old_mean, old_var, new_mean, new_var), (ways or {}).get(path)
        return LayerChange(float(counts.max()), *states, kinds.get(path), counts > 0, batches, found, way)

    layers = {path: of(path) for path in _tables.in_order(old, kinds)}  # in the order in which data meets them
    made = Report(estimator.name, int(done.batches), layers, skipped=int(done.skipped), **about)
    if len(made.not_reached) == len(made.layers):
        if done.kinds:
            raise ValueError(
                f"The {int(done.batches)} batches hold no values: they have no rows, or all masks or weights are 0. "
                f"Leave empty batches out."
            )
        raise ValueError(
            f"No batch went through a normalization layer of this model; it has "
            f"{', '.join(map(repr, made.layers))}. Does `call` run the model that it is given?"
        )
    return made


def _cells(change: LayerChange) -> list[str]:
    """The numbers of a row."""
    if not change.count:
        return ["-"] * len(_COLUMNS)
    values = f"{change.count:.0f}" if change.count < 1e7 else _tables.short(change.count)
    summary = change.summary
    return [values, *(_tables.short(summary[name]) for name in SUMMARY)]


def _named(paths: Sequence[str]) -> str:
    return _tables.listed(paths, _NAMED)


def _as_moments(change: LayerChange) -> Moments:
    """The old statistics as moments with count 1 in the channels that were changed, and 0 elsewhere."""
    var = change.old_var.astype(np.promote_types(change.old_var.dtype, np.float32))
    reached = np.broadcast_to(change.reached, var.shape)
    return Moments(*map(jnp.asarray, (reached.astype(var.dtype), change.old_mean, np.where(reached, var, 0))))
