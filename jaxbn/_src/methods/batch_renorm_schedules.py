"""Schedules for the bounds of Batch Renormalization: the ramp of the paper, and a hard switch.

Any function of the step may be a bound, including an optax schedule. The schedules here are dataclasses, so that layers
with equal arguments compare equal and share compiled programs.
"""

import dataclasses
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# (the number of training steps so far, []) -> the bound in the next step
Schedule = Callable[[jax.Array], ArrayLike]


class RenormBounds(TypedDict):
    """Schedules of both bounds, to pass as `batch_renorm(**bounds)`."""

    r_max: Schedule
    d_max: Schedule


@dataclasses.dataclass(frozen=True)
class _Ramp:
    """`start` up to the step `begin`, then linear, then `stop` from the step `end` on."""

    start: float
    stop: float
    begin: float
    end: float

    def __call__(self, step: jax.Array) -> jax.Array:
        return self.start + (self.stop - self.start) * jnp.clip((step - self.begin) / (self.end - self.begin), 0, 1)


@dataclasses.dataclass(frozen=True)
class _Switch:
    """`before` up to the step `at`, and `after` from there on."""

    before: float
    after: float
    at: float

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.where(step >= self.at, jnp.full_like(step, self.after), self.before)


def renorm_ramp(warmup: float = 5000, *, r_max: float = 3.0, d_max: float = 5.0) -> RenormBounds:
    """The schedule of the Batch Renormalization paper: plain batch norm first, then bounds that open linearly.

    With the defaults r_max goes from 1 to 3 between steps 5000 and 40000, and d_max from 0 to 5 between 5000 and 25000.
    The paper trained for about 160 thousand steps; scale the schedule to yours with `warmup`. Bounds that open early,
    at a high learning rate, have led to sudden large gradients.

    Args:
        warmup: Steps of plain batch norm. The ramp of d_max ends at 5 times as many steps, that of r_max at 8 times.
        r_max: The final r_max, at least 1.
        d_max: The final d_max, at least 0.

    Returns:
        The two schedules, as the keyword arguments `r_max` and `d_max`.

    Raises:
        ValueError: If `warmup` is not positive, or a bound is outside its range.

    Example:
        >>> bounds = jaxbn.renorm_ramp(warmup=100)
        >>> [float(bounds["r_max"](jnp.float32(step))) for step in (0, 100, 450, 800)]
        [1.0, 1.0, 2.0, 3.0]
        >>> layer = jaxbn.linen.BatchRenorm(**bounds)

    References:
        Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017, section 4.
    """
    if not warmup > 0:
        raise ValueError(f"warmup={warmup} must be positive; for bounds that hold from the first step, pass numbers.")
    check_bounds(r_max, d_max)
    return {"r_max": _Ramp(1.0, r_max, warmup, 8 * warmup), "d_max": _Ramp(0.0, d_max, warmup, 5 * warmup)}


def renorm_switch(at: float = 100_000, *, r_max: float = 3.0, d_max: float = 5.0) -> RenormBounds:
    """A hard switch: plain batch norm up to a step, and fixed bounds from that step on.

    Use it in reinforcement learning, as CrossQ and sbx do; the defaults are theirs.

    Args:
        at: The first step of Batch Renormalization, counted from 0.
        r_max: The bound of r from that step on, at least 1.
        d_max: The bound of d from that step on, at least 0.

    Returns:
        The two schedules, as the keyword arguments `r_max` and `d_max`.

    Raises:
        ValueError: If a bound is outside its range.

    Example:
        >>> bounds = jaxbn.renorm_switch(10)
        >>> [float(bounds["d_max"](jnp.float32(step))) for step in (0, 9, 10)]
        [0.0, 0.0, 5.0]
    """
    check_bounds(r_max, d_max)
    return {"r_max": _Switch(1.0, r_max, at), "d_max": _Switch(0.0, d_max, at)}


def check_bounds(r_max: float | Schedule, d_max: float | Schedule) -> None:
    """Raises a ValueError for bounds outside their range; the values of a schedule cannot be checked here."""
    if not callable(r_max) and not r_max >= 1:
        raise ValueError(f"r_max={r_max} must be at least 1: r lies in [1 / r_max, r_max]. 1 is plain batch norm.")
    if not callable(d_max) and not d_max >= 0:
        raise ValueError(f"d_max={d_max} must not be negative: d lies in [-d_max, d_max]. 0 is plain batch norm.")


RAMP = renorm_ramp()  # the default
