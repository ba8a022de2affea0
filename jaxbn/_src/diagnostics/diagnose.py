"""The numbers of a diagnosis, computed from the moments of each layer in each batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._src.diagnostics.anova import Batches, Calls, Observation, Observe, Spread, observe, observer
from jaxbn._src.diagnostics.diagnosis import Diagnosis, LayerDiagnosis
from jaxbn._src.diagnostics.rules import Pair, findings, nonfinite
from jaxbn._src.display.tables import in_order
from jaxbn._src.framework.framework import Call, Framework, capture_arrays
from jaxbn._src.framework.layers import Weights
from jaxbn._src.framework.processes import here
from jaxbn._src.framework.program_cache import Recipe

# A channel is dead if its variance is below this share of epsilon.
_DEAD = 0.01
_EXPLODING = 1e4
_TINY = np.finfo(np.float32).tiny


def diagnose_model(
    framework: Framework,
    call: Call,
    model: Any,
    batches: Iterable[Any],
    *,
    r_max: float,
    d_max: float,
    weights: Weights | None,
    progress: bool | None,
) -> Diagnosis:
    """The diagnosis of a model of any framework; see `jaxbn.linen.diagnose`."""
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"r_max={r_max} must be 1 or more, and d_max={d_max} not negative.")
    framework.check(model)
    structure, arrays = framework.split(model)
    # The cache of programs holds `call` and `weights` weakly, since they may close over arrays.
    seen = observe(Recipe(_observer, (call, weights), (framework, structure)), arrays, batches, progress=progress)
    return diagnose(seen, framework.states(model), r_max=r_max, d_max=d_max)


def _observer(call: Call, weights: Weights | None, framework: Framework, structure: Any) -> Observe:
    return observer(lambda mode: capture_arrays(framework, structure, call, mode, weights, examples=True))


def diagnose(seen: Sequence[Observation], states: Mapping[str, Any], *, r_max: float, d_max: float) -> Diagnosis:
    """Returns the diagnosis of a model whose layers have these statistics."""
    good = [one for one in seen if one.is_finite and not one.is_empty]
    if len(good) < 2:
        raise ValueError(
            f"There were {len(seen)} batches, {len(good)} of them finite and not empty; a diagnosis compares "
            f"batches. Give it two or more, and ten or more for a sharp one."
        )
    states = here(states)
    kinds, first = dict(good[0].trained.kinds), good[0].trained
    layers, pairs, held = {}, {}, first.held if first.is_mixed else ()
    for path in in_order(states, kinds):  # in the order in which data meets them
        state = states[path]
        values = Batches.of((one.trained.moments for one in good), path)
        mean, var = (np.ravel(np.asarray(part)) * np.float64(1) for part in (state.mean, state.var))
        pair = Pair(*values.pooled(), mean, var, (kinds[path].epsilon or 0.0) if path in kinds else 0.0)
        alive = _alive(values, pair)
        layers[path] = _layer(good, path, values, pair, alive, r_max, d_max, path in held)
        pairs[path] = pair.of(alive)
    gap = _gap(good)
    found = nonfinite(seen, list(kinds)) + findings(layers, pairs, gap)
    return Diagnosis(len(seen), r_max, d_max, gap, layers, tuple(found))


def _alive(values: Batches, pair: Pair) -> np.ndarray:
    """Channels that were reached, and whose variance is above rounding errors and not small next to epsilon."""
    rounding = np.finfo(np.float32).eps * np.abs(pair.mean)
    return (values.count.sum(0) > 0) & (pair.var > np.maximum(_DEAD * pair.epsilon, rounding**2))


def _layer(
    seen: Sequence[Observation],
    path: str,
    values: Batches,
    pair: Pair,
    alive: np.ndarray,
    r_max: float,
    d_max: float,
    is_held: bool,
) -> LayerDiagnosis:
    # Dead channels are left out of all averages below; 1 only avoids a division by 0.
    reached, sigma = values.count.sum(0) > 0, np.where(alive, pair.sigma, 1)
    there = (values.count > 0) & alive
    difference = values.mean - pair.mean
    # A complex difference has no sign; its absolute value is compared with d_max.
    d = ((np.abs(difference) if np.iscomplexobj(difference) else difference) / sigma)[there]
    r = (np.sqrt(values.m2 / np.maximum(values.count, _TINY) + pair.epsilon) / sigma)[there]
    outside = (np.abs(d) > d_max) | (r > r_max) | (r < 1 / r_max)
    rows = np.array([one.rows for one in seen], float)
    # The noise is that of training. Whether batches are drawn at random is tested in evaluation, where examples do
    # not influence each other through the statistics.
    trained = Spread.of(Batches.of((one.trained.examples for one in seen), path), rows)
    independent = Spread.of(Batches.of((one.evaluated.examples for one in seen), path), rows)
    ratios = independent.ratios(alive)
    calls = Calls.of((one.trained.calls for one in seen), path, sigma, alive)
    return LayerDiagnosis(
        channels=reached.size,
        values=float(values.count.mean()),
        examples=trained.examples,
        d_quantiles=_quantiles(d),
        r_quantiles=_quantiles(r),
        d_bound=_quantiles(np.abs(d))[-1],
        r_bound=_quantiles(np.maximum(r, 1 / np.maximum(r, _TINY)))[-1],
        outside=_mean(outside),
        noise=_noise(trained, sigma, alive, d),
        ratio=_mean(ratios),
        p_value=independent.p_value(alive),
        excess=independent.excess(alive),
        off=float(np.sqrt(_mean(pair.of(alive).off()))),
        dead=int((reached & ~alive).sum()),
        exploding=int((np.sqrt(np.abs(pair.mean) ** 2 + pair.var) > _EXPLODING).sum()),
        huge_mean=float((np.abs(pair.mean) / sigma)[alive].max(initial=0)),
        held=is_held,
        calls=calls.number,
        calls_differ=calls.differ,
        calls_noise=calls.noise,
    )


def _noise(trained: Spread, sigma: np.ndarray, alive: np.ndarray, d: np.ndarray) -> float:
    """Std of a batch mean if the examples are independent; the observed one if the examples are unknown."""
    known = alive & np.isfinite(trained.within)
    expected = trained.within[known] / trained.examples / sigma[known] ** 2
    return float(np.sqrt(_mean(expected if expected.size else d**2)))


def _gap(seen: Sequence[Observation]) -> float:
    """Rms of the outputs in training minus in evaluation, in std of the former; the worst of several outputs."""
    difference, variance = np.sum([one.gap for one in seen], 0, dtype=float)
    known = variance > 0
    return float(np.sqrt((difference[known] / variance[known]).max())) if known.any() else np.nan


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    if not values.size:
        return np.nan, np.nan, np.nan
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return float(low), float(middle), float(high)
