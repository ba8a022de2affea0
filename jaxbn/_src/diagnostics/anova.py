"""The observations of a diagnosis: the moments of each layer in each batch, and an analysis of their variance.

Each batch runs twice in one program: in mode "batch", as in training, and in mode "eval". If the call trains some
layers and evaluates others, the first run does as the call asks. In the second run the activations of an example depend
on this example only. So only there do batches of independent examples have independent means.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxbn._src.display.progress import track
from jaxbn._src.framework import processes as _processes
from jaxbn._src.framework.batches import check_batch
from jaxbn._src.framework.layers import HEEDED, Measured, count_examples
from jaxbn._src.framework.program_cache import Recipe, compiled
from jaxbn._src.numerics.collectives import pin, replicate
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics import multihost as _multihost

# (model, batch) -> (outputs, Measured)
Capture = Callable[[Any, Any], tuple[Any, Measured]]

# Batches that may be computed at the same time.
_IN_FLIGHT = 8


class Observation(NamedTuple):
    """The observations of one batch: a pytree."""

    trained: Measured  # normalized with the statistics of the batch
    evaluated: Measured  # normalized with the running statistics
    rows: jax.Array  # f32[]: examples in the batch; NaN if unknown
    gap: jax.Array  # f32[2, L]: squares of (train - eval) and of train about its mean, summed over each output

    @property
    def is_finite(self) -> bool:
        """Whether the input of every layer is finite in training."""
        return all(np.isfinite(part).all() for moments in self.trained.moments.values() for part in moments)

    @property
    def is_empty(self) -> bool:
        """Whether the batch has no examples."""
        return bool(self.rows == 0)


# (model, batch) -> Observation
Observe = Callable[[Any, Any], Observation]


def observer(in_mode: Callable[[str], Capture]) -> Observe:
    """Returns the function that observes a batch."""

    def observe_batch(model: Any, batch: Any) -> Observation:
        (outputs, trained), (eval_outputs, evaluated) = in_mode("batch")(model, batch), in_mode("eval")(model, batch)
        if trained.is_mixed:
            outputs, trained = in_mode(HEEDED)(model, batch)
        count = count_examples(batch)
        examples = jnp.float32(np.nan if count is None else count)
        return Observation(trained, evaluated, examples, _gap(outputs, eval_outputs))

    return observe_batch


def observe(look: Recipe, model: Any, batches: Iterable[Any], *, progress: bool | None) -> list[Observation]:
    """Returns the observations of the batches of all processes as NumPy arrays, the same on each process.

    Args:
        look: The recipe of an `Observe`, which is compiled once for each shape of a batch.
        model: A pytree.
        batches: The batches of this process, or global batches, as for a statistics pass.
        progress: Whether to show a progress bar. None: only in a terminal.

    Returns:
        The observations batch by batch, those of process 0 first.
    """
    _processes.check_unstacked(model)
    length = len(batches) if isinstance(batches, Sized) else None
    if jax.process_count() == 1:
        return _observe(compiled(look), model, batches, progress, length)
    opened, mesh, _ = _multihost.opened(lambda: batches)
    if mesh is None:
        model, alone = _processes.here(model), _multihost.own_alone(opened)
        # Processes may have different numbers of local batches, so they exchange their observations only at the end.
        mine, _ = _processes.agree(lambda: (_observe(compiled(look), model, alone, progress, length), None))
        return [one for of_process in _processes.gather(mine) for one in of_process]
    model, program, together = replicate(model, mesh), compiled(look, _pinned, mesh), _multihost.in_step(opened)
    first = next(together)
    # All processes check that it traces before any of them runs it.
    _processes.agree(lambda: (jax.eval_shape(program, model, first), None))
    return _observe(program, model, itertools.chain([first], together), progress, length)


def _pinned(look: Observe, mesh: Mesh) -> Observe:
    return lambda model, batch: pin(look(model, batch), mesh)


def _observe(
    program: Observe, model: Any, batches: Iterable[Any], progress: bool | None, length: int | None
) -> list[Observation]:
    seen: list[Observation] = []
    under_way: collections.deque[Observation] = collections.deque()
    for number, batch in enumerate(track(batches, "Diagnosing", progress, length)):
        check_batch(batch, number)
        under_way.append(program(model, batch))
        # Dispatch is asynchronous: without a bound, the host would read ahead and fill the device memory.
        if len(under_way) > _IN_FLIGHT:
            seen.append(jax.device_get(under_way.popleft()))
    return seen + [jax.device_get(one) for one in under_way]


class Batches(NamedTuple):
    """The moments of a layer in each batch, [B, C], in float64 or complex128."""

    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Moments]], path: str) -> "Batches":
        """Takes the moments of one layer from those of all layers in each batch."""
        columns = zip(*(one[path] for one in parts), strict=True)
        # A product with float64 widens real and complex arrays alike; a cast to float64 would drop imaginary parts.
        return cls(*(np.stack([np.ravel(part) for part in column]) * np.float64(1) for column in columns))

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and variance of all batches together."""
        count = self.count.sum(0)
        divisor = np.where(count > 0, count, 1)
        mean = (self.count * self.mean).sum(0) / divisor
        # The sum of squares within batches, plus that between their means.
        return mean, (self.m2 + self.count * np.abs(self.mean - mean) ** 2).sum(0) / divisor


class Calls(NamedTuple):
    """The differences between the calls of a layer in one step, in all batches together."""

    number: int
    differ: float  # rms error of the normalized input with the statistics of all calls, in std, without noise
    noise: float  # the noise that was subtracted

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Moments]], path: str, sigma: np.ndarray, alive: np.ndarray) -> "Calls":
        """Takes the moments [K, ...] of a layer that is called K times; sigma is that of all calls together."""
        found = [one[path] for one in parts if path in one]
        alike = [one for one in found if one.count.shape == found[0].count.shape]
        if not alike or not alive.any():
            return cls(1, 0.0, 0.0)
        columns = zip(*alike, strict=True)
        count, mean, m2 = (
            np.stack([np.reshape(p, (len(p), -1)) for p in c])[..., alive] * np.float64(1) for c in columns
        )
        there = count > 0
        std = np.sqrt(m2 / np.where(there, count, 1))
        # The errors that a wrong mean and a wrong std cause in the normalized input add up in squares.
        apart = [_apart(values / sigma[alive], there) for values in (mean, std)]
        between, noise = (float(sum(part[kind].mean() for part in apart)) for kind in (0, 1))
        return cls(count.shape[1], float(np.sqrt(max(between - noise, 0))), float(np.sqrt(noise)))


def _apart(values: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the variance between the means of the calls, and the noise in it; [B, K, C] -> [C] each."""
    batches = there.sum(0)
    known = batches > 1
    center = np.where(there, values, 0).sum(0) / np.maximum(batches, 1)
    # The squared standard error of the mean over batches.
    noise = (np.abs(values - center) ** 2 * there).sum(0) / np.maximum(batches * (batches - 1), 1)
    calls = np.maximum(known.sum(0), 1)
    middle = (center * known).sum(0) / calls
    # The expected variance of K noisy values about their mean is 1 - 1 / K of the noise.
    return (np.abs(center - middle) ** 2 * known).sum(0) / calls, (noise * known).sum(0) / calls * (1 - 1 / calls)


class Spread(NamedTuple):
    """One-way analysis of variance of the means of the examples; f64[C]."""

    between: np.ndarray  # mean square between batches
    within: np.ndarray  # mean square within batches: the expected value of `between` if examples are independent
    examples: float  # in a batch; NaN if unknown
    degrees: tuple[float, float]  # degrees of freedom between and within batches

    @classmethod
    def of(cls, examples: Batches, rows: np.ndarray) -> "Spread":
        """Analyzes the moments of the means of the examples, in batches of `rows` [B] examples.

        A layer that is called k times for a batch receives each example k times. If these are equal, the mean square
        between batches is k times as large although the batches are drawn at random, so `between` is divided by k.
        """
        present = examples.count > 0
        counts, batches = examples.count.sum(0), present.sum(0)
        degrees = np.stack([batches - 1, counts - batches])
        known = (degrees > 0).all(0)
        mean = (examples.count * examples.mean).sum(0) / np.where(counts > 0, counts, 1)
        squares = np.stack([(examples.count * np.abs(examples.mean - mean) ** 2).sum(0), examples.m2.sum(0)])
        between, within = np.where(known, squares / np.where(known, degrees, 1), np.nan)
        if not known.any():
            return cls(between, within, np.nan, (0.0, 0.0))
        # Examples that are masked entirely do not count, so the quotient may be too small: round up, take the largest.
        calls = np.nanmax(np.ceil((examples.count / rows[:, None])[:, known]))
        fewest = degrees[:, known].min(1)
        per_batch = float((counts / batches)[known].mean() / calls)
        return cls(between / calls, within, per_batch, (float(fewest[0]), float(fewest[1])))

    def ratios(self, channels: np.ndarray) -> np.ndarray:
        """Returns between / within for the given channels in which both are known."""
        known = channels & (np.nan_to_num(self.within) > 0) & np.isfinite(self.between)
        return self.between[known] / self.within[known]

    def excess(self, channels: np.ndarray) -> float:
        """Returns the std between batches, without noise, over that between examples: see `LayerDiagnosis.excess`."""
        # For n examples in a batch, the expected ratio is about 1 + n q, q the variance between batches relative to
        # that between examples. The intraclass correlation is q / (1 + q).
        beyond = np.maximum(self.ratios(channels) - 1, 0)
        return float(np.sqrt((beyond / (beyond + self.examples)).mean())) if beyond.size else np.nan

    def p_value(self, channels: np.ndarray) -> float:
        """Returns the probability of a mean ratio, or a largest ratio, at least as large with independent examples.

        The mean of F-distributed ratios has at most the variance of one of them, whatever their dependence, so the tail
        of a single ratio is used. It is robust to outliers. Bonferroni's bound is used for the largest ratio.
        """
        from scipy import special  # here, because this import takes longer than that of jaxbn

        ratios = self.ratios(channels)
        if not ratios.size:
            return np.nan
        tails = special.fdtrc(*self.degrees, ratios.mean()), ratios.size * special.fdtrc(*self.degrees, ratios.max())
        # Two tests on the same ratios: Bonferroni's correction.
        return float(min(1, 2 * min(tails)))


def _gap(trained: Any, evaluated: Any) -> jax.Array:
    """Sums for the difference of the outputs, f32[2, L]: see `Observation.gap`."""
    sums = [jnp.zeros((2, 0))]
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(evaluated), strict=True):
        if jnp.issubdtype(jnp.result_type(a), jnp.floating):
            a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
            middle = a.sum() / max(a.size, 1)
            sums.append(jnp.stack([jnp.square(a - b).sum(), jnp.square(a - middle).sum()])[:, None])
    return jnp.concatenate(sums, axis=1)
