"""The result of a diagnosis: numbers for each layer and findings in order of effect, as text, dict and plot."""

import dataclasses
from typing import Any

import numpy as np

from jaxbn._src.display.plots import draw_diagnosis
from jaxbn._src.display.tables import Column, definitions, listed, paragraph, short, table


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    r"""The effect of batches on one layer; NaN where a number is unknown.

    In batch B a channel of the input of the layer has the mean :math:`\mu_B` and the standard deviation
    :math:`\sigma_B`; in all batches together it has :math:`\mu` and :math:`\sigma`, which the running averages
    approach. Epsilon is part of both standard deviations. "In std" means divided by :math:`\sigma`. The statistics that
    the layer uses in evaluation are :math:`\hat\mu` and :math:`\hat\sigma`.

    Attributes:
        channels: Number of channels.
        values: Values per channel in a batch. 0: the layer was not reached or is frozen, and all other numbers are NaN.
        examples: Examples in a batch.
        d_quantiles: 5, 50 and 95 % of :math:`d = (\mu_B - \mu) / \sigma` over batches and channels.
        r_quantiles: 5, 50 and 95 % of :math:`r = \sigma_B / \sigma`.
        d_bound: "mean off" in the table. 95 % of :math:`|d|` are below it: `d_max` of Batch Renormalization.
        r_bound: "std off" in the table. 95 % of r are within [1 / r_bound, r_bound]: `r_max` of Batch Renormalization.
        outside: "beyond limits" in the table. Share of batches and channels outside the given `r_max` or `d_max`.
        noise: Standard deviation of a batch mean if the examples are independent, in std.
        ratio: "spread vs. chance" in the table. The mean square between batches over the mean square within batches
            (one-way analysis of variance of the means of the examples), averaged over the channels. About 1 if batches
            are drawn at random.
        p_value: Probability of this ratio, or of its largest channel, if batches are drawn at random. It is not
            corrected for the number of layers.
        excess: Standard deviation of the batch means beyond the noise, in standard deviations between examples: the
            root of the intraclass correlation.
        off: "eval error" in the table. Rms error of the normalized input in evaluation, in std:
            :math:`\sqrt{(\sigma / \hat\sigma - 1)^2 + (\mu - \hat\mu)^2 / \hat\sigma^2}`, averaged over the channels.
        dead: Channels whose input is constant, or whose variance is below a hundredth of epsilon.
        exploding: Channels whose root mean square is above 1e4; float16 ends at 65504.
        huge_mean: The largest :math:`|\mu| / \sigma` of a channel.
        held: Whether the call evaluates this layer while it trains others.
        calls: How often the layer is called in one run of the model, as far as the calls can be told apart.
        calls_differ: Rms difference between the statistics of these calls, without noise, in std.
        calls_noise: The noise that was subtracted from it.
    """

    channels: int
    values: float
    examples: float
    d_quantiles: tuple[float, float, float]
    r_quantiles: tuple[float, float, float]
    d_bound: float
    r_bound: float
    outside: float
    noise: float
    ratio: float
    p_value: float
    excess: float
    off: float
    dead: int
    exploding: int
    huge_mean: float
    held: bool
    calls: int
    calls_differ: float
    calls_noise: float

    @property
    def reached(self) -> bool:
        """Whether a batch reached the layer and it is not frozen."""
        return self.values > 0


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem, and advice on what to do about it."""

    name: str  # such as "non_iid"
    effect: float  # in standard deviations of the normalized input, in the worst layer; findings are sorted by it
    layers: tuple[str, ...]  # the affected layers, the worst first
    text: str
    advice: str


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
    """The result of `diagnose`. `print` shows a table of the layers, and findings with advice in order of effect.

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
    output_gap: float  # rms of outputs in training minus in evaluation, in std of the former; the worst of several
    layers: dict[str, LayerDiagnosis]
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        """One line; `print` shows the table and the advice."""
        found = ", ".join(finding.name for finding in self.findings) or "no findings"
        return f"<Diagnosis: {len(self.layers)} layers in {self.batches} batches; {found}>"

    def __str__(self) -> str:
        rows = {path: _cells(layer) for path, layer in self.layers.items()}
        lines = [self._headline(), table(_COLUMNS, rows), "", definitions(self._definitions()), ""]
        if np.isfinite(self.output_gap):
            lines += [f"Outputs in training and in evaluation differ by {self.output_gap:.2g} std."]
        if not self.findings and not self.unjudged:
            lines += ["No problem with the batch statistics was found."]
        for number, finding in enumerate(self.findings, 1):
            size = f"{finding.effect:.2g} std; " if np.isfinite(finding.effect) else ""
            where = listed(finding.layers) or "after the last layer"
            lines += [paragraph(f"{finding.text} ({size}{where})", start=f"{number}. ")]
            lines += [paragraph(finding.advice, start="   -> ")]
        lines += [paragraph(reason, start="Not judged: ") for reason in self.unjudged]
        return "\n".join(lines)

    def _headline(self) -> str:
        sizes = [layer.examples for layer in self.layers.values() if np.isfinite(layer.examples)]
        ends = [short(end) for end in (min(sizes), max(sizes))] if sizes else []
        of_examples = f" of {' to '.join(dict.fromkeys(ends))} examples" if ends else ""
        return f"{self.batches} batches{of_examples}"

    def _definitions(self) -> dict[str, str]:
        return {
            "mean off": "95 % of the batch means are this close to the overall mean, in std",
            "std off": "95 % of the batch std are within this factor of the overall std",
            "beyond limits": f"batches and channels outside r_max={self.r_max:g} or d_max={self.d_max:g}",
            "spread": "variance of the batch means / that of batches drawn at random",
            "p-value": "probability of this spread if batches are drawn at random",
            "eval error": "error of the normalized input with the running statistics, in std",
            "dead": "channels whose input is constant, or small next to epsilon",
        }

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Checks that were not possible with these batches, each as a sentence."""
        missed = [path for path, layer in self.layers.items() if not layer.reached]
        untested = [path for path, layer in self.layers.items() if layer.reached and np.isnan(layer.p_value)]
        found = [
            (missed, "{} was not reached, or is frozen."),
            (
                untested,
                "Whether batches are drawn at random, at {}: the examples are not on the leading axis.",
            ),
        ]
        reasons = [text.format(listed(paths)) for paths, text in found if paths]
        if np.isnan(self.output_gap):
            reasons += ["Whether outputs differ between training and evaluation: they are constant, or there are none."]
        return tuple(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as numbers, strings, lists and dicts, for JSON; NaN becomes None."""
        return _plain(dataclasses.asdict(self))

    def plot(self) -> Any:
        """Returns a matplotlib figure with a row for each layer: `diagnosis.plot().savefig("diagnosis.png")`."""
        reached = {path: layer for path, layer in self.layers.items() if layer.reached}
        names = ("d_quantiles", "r_quantiles", "noise", "excess", "off")
        numbers = {name: np.array([getattr(layer, name) for layer in reached.values()]) for name in names}
        found = ", ".join(finding.name for finding in self.findings) or "nothing found"
        return draw_diagnosis(f"{self.batches} batches: {found}", list(reached), numbers)


_COLUMNS = [
    Column(head)
    for head in (
        "mean\noff",
        "std\noff",
        "beyond\nlimits",
        "spread\nvs.\nchance",
        "p-value",
        "eval\nerror",
        "dead",
    )
]


def _cells(layer: LayerDiagnosis) -> list[str]:
    if not layer.reached:
        return ["-"] * len(_COLUMNS)
    p_value = "<1e-4" if layer.p_value < 1e-4 else short(round(layer.p_value, 3))
    numbers = short(layer.d_bound), short(layer.r_bound), f"{100 * layer.outside:.1f}%", short(layer.ratio)
    return [*numbers, p_value, short(layer.off), f"{layer.dead}/{layer.channels}"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
