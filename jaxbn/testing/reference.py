r"""The formulas of the vectors in float64 NumPy, written from the papers. They share nothing with the library.

Everything works on rows, `x [M, C]`, with weights `w [M, C]` from a mask; space, time and devices are rows like others.
Sums are rounded once (`math.fsum`), so that the numbers are the same on every machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

State = Mapping[str, np.ndarray]


class Trained(NamedTuple):
    """What a training call gives: `backward` maps the cotangent of y to `dx`, `dscale` and `dbias`."""

    y: np.ndarray
    state: State
    moments: "Moments"
    backward: Callable[[np.ndarray], dict[str, np.ndarray]]


class Moments(NamedTuple):
    """Of a batch: number of values (sum of weights), mean, biased variance; each [C], and 0 where nothing was seen."""

    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
    mean: np.ndarray
    var: np.ndarray


class Method(NamedTuple):
    """One normalization method with its hyper-parameters."""

    train: Callable[[State, State, np.ndarray, np.ndarray], Trained]  # (params, state, x, w)
    evaluate: Callable[[State, State, np.ndarray], np.ndarray]  # (params, state, x)


def total(values: np.ndarray) -> np.ndarray:
    """The sum over rows."""
    return np.array([math.fsum(channel) for channel in values.T])


def moments(x: np.ndarray, w: np.ndarray) -> Moments:
    r""":math:`n = \sum w,\; \mu_B = \sum w x / n,\; \sigma_B^2 = \sum w (x - \mu_B)^2 / n`."""
    n = total(w)
    divisor = np.where(n > 0, n, 1)
    mean = total(w * x) / divisor
    return Moments(n, mean, total(w * (x - mean) ** 2) / divisor)


def batch_norm(*, momentum: float = 0.99, epsilon: float = 1e-5) -> Method:
    r"""Ioffe & Szegedy 2015, Algorithms 1 and 2, and the derivative at the end of section 3.

    Weighted form, with :math:`g = \gamma\, \partial y` and sums over all rows, as rows of weight 0 depend on the
    statistics too: :math:`dx = (g - w / n\, (\sum g + z \sum g z)) / s`. What saw no value is normalized with the
    stored statistics, which then are constants.
    """

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray) -> Trained:
        found = moments(x, w)
        seen = found.count > 0
        mean, var = (np.where(seen, getattr(found, name), state[name]) for name in ("mean", "var"))
        share = w / np.where(seen, found.count, np.inf)
        s = np.sqrt(var + epsilon)
        z = (x - mean) / s

        def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            g = dy * params.get("scale", np.float64(1))
            dx = (g - share * (total(g) + z * total(g * z))) / s
            learned = {"scale": total(dy * z), "bias": total(dy)}
            return {"dx": dx} | {f"d{name}": learned[name] for name in params}

        a = np.where(seen, momentum, 1.0)
        new = {name: a * state[name] + (1 - a) * getattr(found, name) for name in ("mean", "var")}
        return Trained(affine(params, z), new, found, backward)

    def evaluate(params: State, state: State, x: np.ndarray) -> np.ndarray:
        return affine(params, (x - state["mean"]) / np.sqrt(state["var"] + epsilon))

    return Method(train, evaluate)


def affine(params: State, z: np.ndarray) -> np.ndarray:
    r""":math:`\gamma z + \beta`."""
    return z * params.get("scale", np.float64(1)) + params.get("bias", np.float64(0))


def pooled(batches: Sequence[Moments], *, unbiased: bool = False) -> tuple[np.ndarray, np.ndarray]:
    r"""The law of total variance, :math:`\sum n_B (\sigma_B^2 + (\mu_B - \mu)^2) / n`; over n - 1 if unbiased."""
    n = total(np.array([b.count for b in batches]))
    mean = total(np.array([b.count * b.mean for b in batches])) / n
    spread = total(np.array([b.count * (b.var + (b.mean - mean) ** 2) for b in batches]))
    return mean, spread / (n - 1 if unbiased else n)


def mean_of_batches(batches: Sequence[Moments], *, unbiased: bool = True) -> tuple[np.ndarray, np.ndarray]:
    r"""Ioffe & Szegedy 2015, Algorithm 2, step 10: :math:`E[\mu_B]` and :math:`E[m / (m - 1) \sigma_B^2]`."""
    mean = total(np.array([b.mean for b in batches])) / len(batches)
    var = [b.var * (b.count / (b.count - 1) if unbiased else 1) for b in batches]
    return mean, total(np.array(var)) / len(batches)


def moving_average(batches: Sequence[Moments], *, decay: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The mean moves from 0, and the standard deviation, whose square is the variance, from 1."""
    mean, std = np.zeros_like(batches[0].mean), np.ones_like(batches[0].var)
    for batch in batches:
        mean = decay * mean + (1 - decay) * batch.mean
        std = decay * std + (1 - decay) * np.sqrt(batch.var)
    return mean, std**2
