"""The rules that turn the numbers of a diagnosis into findings and advice.

| finding | rule for a layer |
|---|---|
| non_iid | the batch means vary more than with independent examples: p < 0.01, and by 0.2 std of the examples |
| tiny_batches | the noise of a batch mean is 0.3 std or more, as with 11 or fewer independent values |
| unestimated, stale, shifted | the running statistics change the normalized input by 0.25 std or more |
| dead | the variance of a channel is a rounding error, or less than a hundredth of epsilon |
| exploding | the input of a channel is above 1e4: float16 ends at 65504 |
| huge_mean | the mean of a channel is 100 std or more: bfloat16 has fewer than three steps within a std |
| calls_differ | the calls of a layer in one step differ by 0.25 std or more, and by twice the noise |
| never_trains | the call evaluates this layer while it trains others, and its statistics are off by 0.25 std or more |
| nonfinite | a batch gave NaN or infinity |
| not_reached | no batch went through any layer |
| gap | no other rule applies, but outputs in training and in evaluation differ by 0.5 std or more |

Wrong running statistics are "unestimated" if they are the initial values. They are "stale" if a remaining share of the
initial values, equal in all layers as running averages leave it, explains most of the error. Otherwise they are
"shifted".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn._src.diagnostics.anova import Observation
from jaxbn._src.diagnostics.diagnosis import Finding, LayerDiagnosis
from jaxbn._src.numerics.averages import INITIAL_MEAN, INITIAL_VAR

_P_VALUE, _EXCESS, _NOISE, _OFF, _HUGE_MEAN, _GAP = 0.01, 0.2, 0.3, 0.25, 1e2, 0.5
# The share of the squared error that the initial values must explain for statistics to be stale.
_EXPLAINED = 0.75
_SHARES = np.linspace(0, 1, 201)


class Pair(NamedTuple):
    """Statistics of the input of a layer in all batches together, and its running statistics: f64[C]."""

    mean: np.ndarray
    var: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    epsilon: float

    @property
    def sigma(self) -> np.ndarray:
        """The standard deviation, with epsilon."""
        return np.sqrt(self.var + self.epsilon)

    def of(self, channels: np.ndarray) -> "Pair":
        """The statistics of some channels."""
        return self._replace(**{name: part[channels] for name, part in self._asdict().items() if name != "epsilon"})

    def off(self, share: float = 0.0) -> np.ndarray:
        """Expected squared error of the normalized input with the running statistics.

        A share of the true statistics is replaced by the initial values, as in a running average that has not
        converged.
        """
        mean = share * INITIAL_MEAN + (1 - share) * self.mean
        sigma = np.sqrt(share * INITIAL_VAR + (1 - share) * self.var + self.epsilon)
        running = np.sqrt(np.maximum(self.running_var + self.epsilon, np.finfo(np.float32).tiny))
        # The error of a normalized value z is (sigma / running - 1) z + (mean - running_mean) / running, where z has
        # mean 0 and variance 1.
        return (sigma / running - 1) ** 2 + (np.abs(mean - self.running_mean) / running) ** 2

    @property
    def is_initial(self) -> bool:
        """Whether the running statistics are the initial values."""
        return bool((self.running_mean == INITIAL_MEAN).all() and (self.running_var == INITIAL_VAR).all())


def findings(layers: Mapping[str, LayerDiagnosis], pairs: Mapping[str, Pair], gap: float) -> list[Finding]:
    """Returns the findings in order of effect; `gap` is that of the outputs."""
    reached = {path: layer for path, layer in layers.items() if layer.reached}
    if not reached:
        return [_not_reached(layers)]
    # A layer that the call evaluates does not depend on the batches, and its statistics are not running averages.
    training = {path: layer for path, layer in reached.items() if not layer.held}
    of_batches, of_inputs = (_non_iid, _tiny_batches, _calls_differ), (_dead, _exploding, _huge_mean)
    found = [rule(training) for rule in of_batches] + [rule(reached) for rule in of_inputs]
    found += [*_running_statistics(training, pairs), _never_trains(reached)]
    there = [finding for finding in found if finding is not None]
    there += [_gap(training, gap)] if gap >= _GAP and not there else []
    return sorted(there, key=lambda finding: -finding.effect)


def nonfinite(seen: Sequence[Observation], order: Sequence[str]) -> list[Finding]:
    """Returns a finding for batches that gave NaN or infinity, with the layer in which these first appeared."""
    bad = [index for index, one in enumerate(seen) if not (one.is_finite and np.isfinite(one.gap).all())]
    if not bad:
        return []
    parts = seen[bad[0]].trained.moments
    # In the order of the calls: NaN spreads from the first layer to all later ones.
    layers = tuple(path for path in order if not all(np.isfinite(part).all() for part in parts[path]))
    where = "" if layers else ", only in the outputs"
    text = f"{len(bad)} of {len(seen)} batches are not finite{where}, the first of them batch {bad[0]} (counted from 0)"
    advice = "Look for NaN or infinity in this batch and in the parameters. The table describes the other batches."
    return [Finding("nonfinite", np.inf, layers[:1], text, advice)]


def _finding(
    name: str, layers: Mapping[str, LayerDiagnosis], effect: Callable[[LayerDiagnosis], float], text: str, advice: str
) -> Finding | None:
    """A finding about these layers; None if there are no layers."""
    if not layers:
        return None
    worst = sorted(layers, key=lambda path: -effect(layers[path]))
    return Finding(name, effect(layers[worst[0]]), tuple(worst), text, advice)


def _bounds(layers: Mapping[str, LayerDiagnosis]) -> str:
    """The bounds with which Batch Renormalization clips 5 % in the worst layer."""
    r, d = (max((getattr(layer, name) for layer in layers.values()), default=1.0) for name in ("r_bound", "d_bound"))
    return f"r_max={r:.2g}, d_max={d:.2g}"


def _non_iid(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    tests = sum(not np.isnan(layer.p_value) for layer in layers.values())
    # One test for each layer: Bonferroni's correction.
    found = {p: v for p, v in layers.items() if v.p_value * tests < _P_VALUE and v.excess >= _EXCESS}
    worst = max((layer.ratio for layer in found.values()), default=0.0)
    return _finding(
        "non_iid",
        found,
        lambda layer: layer.excess,
        f"Batches are not drawn at random: the variance of their means is up to {worst:.3g} times that of batches of "
        f"independent examples",
        f"Shuffle the examples. If you cannot, use Batch Renormalization with {_bounds(found)}, which clips 5 %, or "
        f"freeze the statistics during training. A statistics pass is correct for any order.",
    )


def _tiny_batches(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {path: layer for path, layer in layers.items() if layer.noise >= _NOISE}
    return _finding(
        "tiny_batches",
        found,
        lambda layer: layer.noise,
        "Too few examples in a batch: the batch means are noisy",
        f"Use larger batches, or synchronize over devices (jit over sharded arrays, or axis_name=). Otherwise use "
        f"Batch Renormalization with {_bounds(found)}, which clips 5 %, or freeze well-estimated statistics.",
    )


def _dead(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {path: layer for path, layer in layers.items() if layer.dead}
    count = sum(layer.dead for layer in found.values())
    return _finding(
        "dead",
        found,
        lambda layer: layer.dead / layer.channels,
        f"The input of {count} channels is constant, or small next to epsilon",
        "Check the weights before these layers and the data: constant features, dead ReLUs, too much weight decay.",
    )


def _exploding(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {path: layer for path, layer in layers.items() if layer.exploding}
    count = sum(layer.exploding for layer in found.values())
    return _finding(
        "exploding",
        found,
        lambda layer: layer.exploding / layer.channels,
        f"The input of {count} channels is above 1e4, near the end of float16",
        "Use weight decay on the weights before these layers, or a lower learning rate. Do not run them in float16.",
    )


def _huge_mean(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {path: layer for path, layer in layers.items() if layer.huge_mean >= _HUGE_MEAN}
    worst = max((layer.huge_mean for layer in found.values()), default=0.0)
    lag = worst * float(np.finfo(np.float32).eps) / 2  # half a step of float32
    running = f" Running averages stop {lag:.2g} / (1 - momentum) std short of it; postproc does not." * (lag > 1e-3)
    return _finding(
        "huge_mean",
        found,
        lambda layer: layer.huge_mean * float(np.finfo(np.float16).eps) * 4,  # half a step of bfloat16
        f"The mean of a channel is up to {worst:.3g} std: half precision and Flax's fast variance lose the signal",
        "Subtract the mean from the data, or normalize before this layer in float32. The variance of jaxbn is exact."
        + running,
    )


def _calls_differ(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {p: v for p, v in layers.items() if v.calls_differ >= max(_OFF, 2 * v.calls_noise)}
    most = max((layer.calls for layer in found.values()), default=1)
    return _finding(
        "calls_differ",
        found,
        lambda layer: layer.calls_differ,
        f"A layer is called up to {most} times in one step, on inputs of different distributions: training normalizes "
        f"each call with its own statistics, and evaluation uses one average for all calls, which fits none of them",
        "Concatenate the inputs and call the layer once (siamese networks, real and generated images, shared heads), "
        "or use DomainBatchNorm with a domain for each call.",
    )


def _never_trains(layers: Mapping[str, LayerDiagnosis]) -> Finding | None:
    found = {path: layer for path, layer in layers.items() if layer.held and layer.off >= _OFF}
    return _finding(
        "never_trains",
        found,
        lambda layer: layer.off,
        f"This call trains the network, but evaluates {len(found)} of {len(layers)} layers: their running statistics "
        f"do not fit their input and are never updated",
        "Pass the training flag to these layers too (use_running_average). If you freeze them on purpose, run postproc "
        "before you train the rest.",
    )


def _not_reached(layers: Mapping[str, LayerDiagnosis]) -> Finding:
    text = "No batch reached a normalization layer that is not frozen"
    advice = "Does `call` run the model that it is given? A network with all layers frozen needs no diagnosis."
    return Finding("not_reached", np.nan, tuple(layers), text, advice)


def _gap(layers: Mapping[str, LayerDiagnosis], gap: float) -> Finding:
    """A finding for outputs that differ although no single layer explains it."""
    # For Gaussian values the noise of the batch std has half the variance of that of the mean, so together 1.5.
    squares = [1.5 * np.nan_to_num(layer.noise) ** 2 + np.nan_to_num(layer.off) ** 2 for layer in layers.values()]
    if gap <= 2 * np.sqrt(sum(squares)):
        text = "no single layer is the cause: the batch noise and the statistics errors of all layers add up"
        advice = "Use larger batches, postproc(..., consistent=True), or frozen statistics at the end of training."
    else:
        text = "the statistics of the layers do not explain it"
        advice = (
            "Run postproc(..., consistent=True), and diagnose again. If the gap remains, look for calls of one layer "
            "in a while loop that differ, examples that depend on each other, and channels that hardly vary."
        )
    worst = tuple(sorted(layers, key=lambda path: -layers[path].noise))
    return Finding("gap", gap, worst, f"Outputs in training and in evaluation differ, and {text}", advice)


def _running_statistics(layers: Mapping[str, LayerDiagnosis], pairs: Mapping[str, Pair]) -> list[Finding | None]:
    """Findings about wrong running statistics, with the likely cause."""
    if not layers:
        return []
    # If batch means vary, an average over about ten of them has an error by chance, which is allowed here.
    # d_bound, which 95 % of the deviations do not exceed, is about two standard deviations.
    found = {p: v for p, v in layers.items() if v.off**2 > _OFF**2 + 0.2 * (v.d_bound / 2) ** 2}
    unestimated = {path: layer for path, layer in found.items() if pairs[path].is_initial}
    others = {path: layer for path, layer in found.items() if path not in unestimated}
    share, explained = _initial_share([pairs[path] for path in layers])
    stale = explained > _EXPLAINED
    some = len(unestimated) < len(layers)
    return [
        _finding(
            "unestimated",
            unestimated,
            lambda layer: layer.off,
            "The running statistics are the initial values: they were never estimated"
            + (", in contrast to those of other layers" if some else ""),
            "Check that the training flag reaches these layers: diagnose the call that you train with. If it does, run "
            "postproc, or let training update the running averages."
            if some
            else "Run postproc, or let training update the running averages.",
        ),
        _finding(
            "stale" if stale else "shifted",
            others,
            lambda layer: layer.off,
            f"The running averages lag behind: {100 * share:.0f} % of them is still the initial value"
            if stale
            else "The running statistics do not fit these data and weights",
            "Run postproc with the present weights; or use a lower momentum, more steps, or a debiased average."
            if stale
            else "Run postproc with the present weights, on data from the domain in which you use the network.",
        ),
    ]


def _initial_share(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The share of initial values that best explains the running statistics, and the part of the error explained."""
    errors = np.array([sum(float(pair.off(share).sum()) for pair in pairs) for share in _SHARES])
    best = int(np.argmin(errors))
    return float(_SHARES[best]), 1 - float(errors[best] / errors[0]) if errors[0] > 0 else 0.0
