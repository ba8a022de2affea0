"""What a diagnosis looks at: the moments of every layer in every batch, and what independent examples would give.

Every batch runs twice in one program: in mode "batch", as in training, and in mode "eval". Where the call asks some
layers for the statistics of the batch and others for the stored ones, it is that of training, and the first run does
what it asks. In the second an example's
activations depend on nothing but the example, so that there, and only there, batches of independent examples have
independent means.
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

# Batches that may be under way at once.
_IN_FLIGHT = 8


class Seen(NamedTuple):
    """What one batch showed: a pytree."""

    trained: Measured  # normalized with the statistics of the batch
    stored: Measured  # normalized with the stored statistics
    rows: jax.Array  # f32[]: examples in the batch; NaN if that is not known
    gap: jax.Array  # f32[2, L]: squares of (train - eval) and of train about its mean, summed over each output

    @property
    def is_finite(self) -> bool:
        """Whether no layer saw NaN or infinity in training."""
        return all(np.isfinite(part).all() for moments in self.trained.moments.values() for part in moments)

    @property
    def is_empty(self) -> bool:
        """Whether there are no examples in it."""
        return bool(self.rows == 0)


# (model, batch) -> Seen
Look = Callable[[Any, Any], Seen]


def looking(in_mode: Callable[[str], Capture]) -> Look:
    """How a batch is looked at."""

    def look(model: Any, batch: Any) -> Seen:
        (trained, in_training), (evaluated, stored) = in_mode("batch")(model, batch), in_mode("eval")(model, batch)
        if in_training.is_mixed:
            trained, in_training = in_mode(HEEDED)(model, batch)
        rows = count_examples(batch)
        return Seen(in_training, stored, jnp.float32(np.nan if rows is None else rows), _gap(trained, evaluated))

    return look


def observe(look: Recipe, model: Any, batches: Iterable[Any], *, progress: bool | None) -> list[Seen]:
    """What each batch of all processes shows, on the host: the same on each of them.

    Args:
        look: Makes a `Look`, which is compiled once for each shape of a batch.
        model: A pytree.
        batches: Those of this process, or global ones, as of a statistics pass.
        progress: Show a bar. None: if this is a terminal.

    Returns:
        Batch by batch, of process 0 first.
    """
    _processes.check_unstacked(model)
    length = len(batches) if isinstance(batches, Sized) else None
    if jax.process_count() == 1:
        return _observe(compiled(look), model, batches, progress, length)
    opened, mesh, _ = _multihost.opened(lambda: batches)
    if mesh is None:
        model, alone = _processes.here(model), _multihost.own_alone(opened)
        mine, _ = _processes.agree(lambda: (_observe(compiled(look), model, alone, progress, length), None))
        return [one for of_process in _processes.gather(mine) for one in of_process]
    model, program, together = replicate(model, mesh), compiled(look, _pinned, mesh), _multihost.in_step(opened)
    first = next(together)
    _processes.agree(lambda: (jax.eval_shape(program, model, first), None))  # before one runs it, all can
    return _observe(program, model, itertools.chain([first], together), progress, length)


def _pinned(look: Look, mesh: Mesh) -> Look:
    return lambda model, batch: pin(look(model, batch), mesh)


def _observe(
    program: Look, model: Any, batches: Iterable[Any], progress: bool | None, length: int | None
) -> list[Seen]:
    seen: list[Seen] = []
    under_way: collections.deque[Seen] = collections.deque()
    for number, batch in enumerate(track(batches, "Diagnosing", progress, length)):
        check_batch(batch, number)
        under_way.append(program(model, batch))
        if len(under_way) > _IN_FLIGHT:
            seen.append(jax.device_get(under_way.popleft()))
    return seen + [jax.device_get(one) for one in under_way]


class Batches(NamedTuple):
    """The moments of a layer in each batch, [B, C], in at least float64."""

    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Moments]], path: str) -> "Batches":
        """Of the moments of all layers, batch by batch."""
        columns = zip(*(one[path] for one in parts), strict=True)
        return cls(*(np.stack([np.ravel(part) for part in column]) * np.float64(1) for column in columns))

    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of all batches together."""
        count = self.count.sum(0)
        divisor = np.where(count > 0, count, 1)
        mean = (self.count * self.mean).sum(0) / divisor
        return mean, (self.m2 + self.count * np.abs(self.mean - mean) ** 2).sum(0) / divisor


class Calls(NamedTuple):
    """How far the calls of a layer in one step differ, in all batches together."""

    number: int
    differ: (
        float  # rms error of the normalized input with what all calls share, in standard deviations; noise taken out
    )
    noise: float  # that of the estimate

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Moments]], path: str, sigma: np.ndarray, alive: np.ndarray) -> "Calls":
        """Of the moments [K, ...] of the layers called several times, batch by batch; sigma is that of all calls."""
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
        apart = [_apart(values / sigma[alive], there) for values in (mean, std)]
        between, noise = (float(sum(part[kind].mean() for part in apart)) for kind in (0, 1))
        return cls(count.shape[1], float(np.sqrt(max(between - noise, 0))), float(np.sqrt(noise)))


def _apart(values: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance over calls of their means over batches, and how much of it is noise; [B, K, C] -> [C] each."""
    batches = there.sum(0)
    known = batches > 1
    center = np.where(there, values, 0).sum(0) / np.maximum(batches, 1)
    noise = (np.abs(values - center) ** 2 * there).sum(0) / np.maximum(batches * (batches - 1), 1)
    calls = np.maximum(known.sum(0), 1)
    middle = (center * known).sum(0) / calls
    # Of K noisy values the variance about their mean is 1 - 1 / K of the noise.
    return (np.abs(center - middle) ** 2 * known).sum(0) / calls, (noise * known).sum(0) / calls * (1 - 1 / calls)


class Spread(NamedTuple):
    """One-way analysis of variance: how far the means of batches differ, and how far examples do; f64[C]."""

    between: np.ndarray  # mean square between batches
    within: np.ndarray  # mean square within batches, which is what `between` should be if examples are independent
    examples: float  # in a batch; NaN if they are not known
    degrees: tuple[float, float]  # of freedom, between and within

    @classmethod
    def of(cls, examples: Batches, rows: np.ndarray) -> "Spread":
        """Of the moments of the means of the examples, in batches of so many rows [B].

        A layer that is called k times for a batch is given each example k times, at worst alike: then the means of
        batches differ k times as much without being out of order, and so `between` is divided by k.
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
        calls = np.nanmax(np.ceil((examples.count / rows[:, None])[:, known]))
        fewest = degrees[:, known].min(1)
        per_batch = float((counts / batches)[known].mean() / calls)
        return cls(between / calls, within, per_batch, (float(fewest[0]), float(fewest[1])))

    def ratios(self, channels: np.ndarray) -> np.ndarray:
        """Between over within, in those of the channels in which anything is known."""
        known = channels & (np.nan_to_num(self.within) > 0) & np.isfinite(self.between)
        return self.between[known] / self.within[known]

    def excess(self, channels: np.ndarray) -> float:
        """Std between batches over that between examples, noise taken out: the root of the intraclass correlation."""
        beyond = np.maximum(self.ratios(channels) - 1, 0)
        return float(np.sqrt((beyond / (beyond + self.examples)).mean())) if beyond.size else np.nan

    def p_value(self, channels: np.ndarray) -> float:
        """Probability of such a mean ratio, or of such a largest one, if examples are independent.

        The mean of F-distributed ratios, however they depend on each other, is spread at most as far as one of them,
        whose tail is taken for its own; and it hardly minds outliers. For the largest it is Bonferroni's bound.
        """
        from scipy import special  # here: to import it takes longer than all of jaxbn

        ratios = self.ratios(channels)
        if not ratios.size:
            return np.nan
        tails = special.fdtrc(*self.degrees, ratios.mean()), ratios.size * special.fdtrc(*self.degrees, ratios.max())
        return float(min(1, 2 * min(tails)))


def _gap(trained: Any, evaluated: Any) -> jax.Array:
    sums = [jnp.zeros((2, 0))]
    for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(evaluated), strict=True):
        if jnp.issubdtype(jnp.result_type(a), jnp.floating):
            a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
            middle = a.sum() / max(a.size, 1)
            sums.append(jnp.stack([jnp.square(a - b).sum(), jnp.square(a - middle).sum()])[:, None])
    return jnp.concatenate(sums, axis=1)
