"""What a diagnosis found: numbers per layer, findings in order of effect, as text, dict and picture."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbn._src.display.plots import draw_diagnosis
from jaxbn._src.display.tables import names_of, short

_WIDEST_PATH = 30


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """What batches do to one layer. Standard deviations are those of the layer's input, epsilon included.

    mu and sigma are the mean and standard deviation of all batches together, which is what running averages settle on;
    mu_B and sigma_B those of one batch. NaN where nothing can be said.
    """

    channels: int
    values: float  # per channel in a batch; 0: not reached, or frozen, and all else is NaN
    examples: float  # in a batch
    d_quantiles: tuple[float, float, float]  # of (mu_B - mu) / sigma over batches and channels: 5, 50 and 95 %
    r_quantiles: tuple[float, float, float]  # of sigma_B / sigma
    d_bound: float  # 95 % of |mu_B - mu| / sigma are within; d_max of Batch Renormalization
    r_bound: float  # 95 % of sigma_B / sigma are within [1 / r_bound, r_bound]; its r_max
    outside: float  # share of batches and channels outside the given r_max or d_max
    noise: float  # std of the mean of a batch if its examples are independent, in standard deviations
    ratio: float  # variance of the batches' means over that expected of independent examples
    p_value: float  # of that ratio, or of its largest channel; not corrected for the number of layers
    excess: float  # std of the batches' means beyond the noise, in standard deviations between examples
    off: float  # rms error of the normalized input with the stored statistics, in standard deviations
    dead: int  # channels whose input is constant, or small beside epsilon
    exploding: int  # channels whose input is above 1e4
    huge_mean: float  # the largest |mean| / std of a channel
    held: bool  # whether the call asks for its stored statistics, and asks other layers for those of the batch
    calls: int  # in one run of the model, as far as they can be told apart
    calls_differ: float  # rms error of the normalized input with the moments of all calls; noise is taken out
    calls_noise: float  # and how much that was

    @property
    def reached(self) -> bool:
        """Whether any value went through the layer, and it is not frozen."""
        return self.values > 0


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    name: str  # such as "non_iid"
    effect: float  # in standard deviations of the normalized input, in the worst layer; findings are sorted by it
    layers: tuple[str, ...]  # in which it was found, the worst first
    text: str
    advice: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Prints as a table within 100 columns, and advice in order of effect.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> batches = 7 + jax.random.normal(jax.random.key(0), (10, 32, 4))
        >>> found = jaxbn.linen.diagnose(net.apply, net.init(jax.random.key(0), batches[0]), batches)
        >>> [finding.name for finding in found.findings]
        ['unestimated']
        >>> found.to_dict()["layers"][""]["examples"]
        32.0
    """

    batches: int
    r_max: float
    d_max: float
    output_gap: float  # rms of outputs in training minus in evaluation, in std of the former; of several, the worst
    layers: dict[str, LayerDiagnosis]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = [*self._table(), ""]
        if np.isfinite(self.output_gap):
            lines += [f"Outputs in training and in evaluation differ by {self.output_gap:.2g} std."]
        if not self.findings and not self.unjudged:
            lines += ["Nothing is wrong with the statistics that these batches could show."]
        for number, finding in enumerate(self.findings, 1):
            size = f"{finding.effect:.2g} std; " if np.isfinite(finding.effect) else ""
            where = _listed(finding.layers) or "after the last layer"
            lines += _wrapped(f"{number}. ", f"{finding.text} ({size}{where})")
            lines += _wrapped("   -> ", finding.advice)
        for reason in self.unjudged:
            lines += _wrapped("Not judged: ", reason)
        return "\n".join(lines)

    @property
    def unjudged(self) -> tuple[str, ...]:
        """What these batches could not show, each as a sentence; empty if all was judged."""
        missed = [path for path, layer in self.layers.items() if not layer.reached]
        untested = [path for path, layer in self.layers.items() if layer.reached and np.isnan(layer.p_value)]
        found = [
            (missed, "No batch went through {}, or the layer is frozen."),
            (
                untested,
                "Whether batches are drawn at random, at {}: the examples are not along the leading axis there.",
            ),
        ]
        reasons = [text.format(_listed(paths)) for paths, text in found if paths]
        if np.isnan(self.output_gap):
            reasons += ["Whether outputs differ between training and evaluation: they do not vary, or there are none."]
        return tuple(reasons)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, for JSON; NaN becomes None."""
        return _plain(dataclasses.asdict(self))

    def plot(self) -> Any:
        """A figure of matplotlib, with a row for each layer: `diagnosis.plot().savefig("diagnosis.png")`."""
        reached = {path: layer for path, layer in self.layers.items() if layer.reached}
        names = ("d_quantiles", "r_quantiles", "noise", "excess", "off")
        numbers = {name: np.array([getattr(layer, name) for layer in reached.values()]) for name in names}
        found = ", ".join(finding.name for finding in self.findings) or "nothing found"
        return draw_diagnosis(f"{self.batches} batches: {found}", list(reached), numbers)

    def _table(self) -> list[str]:
        names = names_of(self.layers, _WIDEST_PATH)
        width = max(map(len, ("layer", *names.values())))
        limits = f"r_max {self.r_max:g}, d_max {self.d_max:g}"
        lines = [
            f"{self.batches} batches, in std of each layer's input; d, r: 95 % of them are within; beyond {limits}",
            f"{'':{width}}  examples    mean     std   share  spread of means  stored     dead",
            f"{'layer':{width}}  in batch   off: d  off: r  beyond  /chance       p  off by  channels",
        ]
        for path, layer in self.layers.items():
            if not layer.reached:
                lines.append(f"{names[path]:{width}}  not reached, or frozen")
                continue
            lines.append(f"{names[path]:{width}}{_cells(layer)}")
        return lines


def _cells(layer: LayerDiagnosis) -> str:
    p_value = "<1e-4" if layer.p_value < 1e-4 else short(round(layer.p_value, 3))
    dead, outside = f"{layer.dead}/{layer.channels}", f"{100 * layer.outside:.1f}%"
    return (
        f"  {short(layer.examples):>8}  {short(layer.d_bound):>7} {short(layer.r_bound):>7}  {outside:>6}"
        f"  {short(layer.ratio):>7}  {p_value:>6}  {short(layer.off):>6}  {dead:>8}"
    )


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(repr(path) for path in paths[:3]) + more


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=" " * len(start))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
