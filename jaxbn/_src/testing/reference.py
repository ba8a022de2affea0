r"""The formulas of the vectors in float64 NumPy, written from the papers, independent of the library.

Everything operates on rows, `x [M, C]`, with weights `w [M, C]` from a mask; space, time and devices are rows too.
Sums are rounded once (`math.fsum`), so that the numbers are the same on every machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

State = Mapping[str, np.ndarray]


class Trained(NamedTuple):
    """The result of a training call; `backward` maps the cotangent of y to `dx`, `dscale` and `dbias`."""

    y: np.ndarray
    state: State
    moments: "Moments"
    backward: Callable[[np.ndarray], dict[str, np.ndarray]]


class Moments(NamedTuple):
    """Moments of a batch: sum of weights, mean, biased variance; each [C], and 0 for channels without values."""

    count: np.ndarray  # type: ignore[assignment]  # hides tuple.count
    mean: np.ndarray
    var: np.ndarray


class Method(NamedTuple):
    """One normalization method with its hyper-parameters."""

    # (params, state, x, w, **where); `where` is the domain of each row, for domain_batch_norm only
    train: Callable[..., Trained]
    evaluate: Callable[..., np.ndarray]  # (params, state, x, **where)


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
    """Ioffe & Szegedy 2015, Algorithms 1 and 2, and the derivative at the end of section 3."""

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray) -> Trained:
        found, seen = moments(x, w), total(w) > 0
        y, backward = normalized(params, state, x, w, epsilon)
        # Channels without values keep their state.
        a = np.where(seen, momentum, 1.0)
        new = {name: a * state[name] + (1 - a) * getattr(found, name) for name in ("mean", "var")}
        return Trained(y, new, found, backward)

    def evaluate(params: State, state: State, x: np.ndarray) -> np.ndarray:
        return affine(params, (x - state["mean"]) / np.sqrt(state["var"] + epsilon))

    return Method(train, evaluate)


def batch_renorm(
    *, momentum: float = 0.99, epsilon: float = 1e-3, r_max: float, d_max: float, track_variance: bool = False
) -> Method:
    r"""Ioffe 2017, Algorithm 1. The state holds :math:`\sigma^2 - \epsilon`; with `track_variance`, its average."""

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray) -> Trained:
        found, seen = moments(x, w), total(w) > 0
        # r and d are constants for the derivative (the paper stops their gradient).
        r, d = renorm_constants(state, found, epsilon=epsilon, r_max=r_max, d_max=d_max)
        y, backward = normalized(params, state, x, w, epsilon, r, d)
        # The paper averages the standard deviation with epsilon inside the root.
        old, new = (np.sqrt(var + epsilon) for var in (state["var"], found.var))
        var = (momentum * old + (1 - momentum) * new) ** 2 - epsilon
        updated = {
            "mean": momentum * state["mean"] + (1 - momentum) * found.mean,
            "var": momentum * state["var"] + (1 - momentum) * found.var if track_variance else var,
        }
        return Trained(y, {name: np.where(seen, updated[name], state[name]) for name in updated}, found, backward)

    return Method(train, batch_norm(epsilon=epsilon).evaluate)


def ghost_batch_norm(
    *, ghost_size: int, grouping: str = "contiguous", running: str = "group_mean", momentum: float, epsilon: float
) -> Method:
    """Hoffer et al. 2017, Algorithm 1: batch norm of each group of rows, with one update of the running averages."""

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray) -> Trained:
        rows = np.arange(len(x))
        groups = rows.reshape(-1, ghost_size) if grouping == "contiguous" else rows.reshape(ghost_size, -1).T
        parts = [normalized(params, state, x[rows], w[rows], epsilon) for rows in groups]
        # `order` undoes the grouping: concatenated groups back to the order of the rows.
        found, order = moments(x, w), np.argsort(groups.ravel())
        each = [moments(x[rows], w[rows]) for rows in groups]
        within = total(np.array([one.count * one.var for one in each])) / np.where(found.count > 0, found.count, 1)
        a = np.where(found.count > 0, momentum, 1.0)
        new = {"mean": found.mean, "var": found.var if running == "pooled" else within}

        def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            of_groups = [back(dy[rows]) for (_, back), rows in zip(parts, groups, strict=True)]
            summed = {f"d{name}": total(np.array([one[f"d{name}"] for one in of_groups])) for name in params}
            return {"dx": np.concatenate([one["dx"] for one in of_groups])[order]} | summed

        y = np.concatenate([y for y, _ in parts])[order]
        return Trained(y, {name: a * state[name] + (1 - a) * new[name] for name in new}, found, backward)

    return Method(train, batch_norm(epsilon=epsilon).evaluate)


def renorm_constants(
    state: State, found: Moments, *, epsilon: float, r_max: float, d_max: float
) -> tuple[np.ndarray, np.ndarray]:
    r""":math:`r = clip(\sigma_B / \sigma),\; d = clip((\mu_B - \mu) / \sigma)`; 1 and 0 for channels without values."""
    sigma = np.sqrt(state["var"] + epsilon)
    r = np.clip(np.sqrt(found.var + epsilon) / sigma, 1 / r_max, r_max)
    d = np.clip((found.mean - state["mean"]) / sigma, -d_max, d_max)
    return np.where(found.count > 0, r, 1.0), np.where(found.count > 0, d, 0.0)


def moving_average_batch_norm(
    *, momentum: float = 0.98, epsilon: float = 1e-5, window: int = 16, warmup: int = 100, r_max: float = 5.0
) -> Method:
    r"""Yan et al. 2020, the released layer. These calls do not update the window of psi.

    With t counted from 1: :math:`V = \chi_B^2` for :math:`t \le W` or t below the warm-up, else the mean of the last W;
    :math:`s^2 = V + \epsilon,\; z = x / s,\; r = clip(s / s_{run})`, 1 in the first 1000 steps, :math:`y = \gamma r z +
    \beta,\; g = \gamma r\, \partial y,\; dx = (g - w z \Psi) / s`; :math:`\Psi` follows from :math:`\sum g z / n` as V
    does from :math:`\chi_B^2`.
    """

    def newest(values: np.ndarray, value: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean of the last W values, and these values."""
        pushed = np.concatenate([values[1:], value[None]])
        return total(pushed) / window, np.where(seen, pushed, values)

    def counts(steps: np.ndarray) -> bool:
        return bool(steps + 1 > window and steps + 1 >= warmup)

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray) -> Trained:
        found, seen = moments(x, w), total(w) > 0
        chi = total(w * x**2) / np.where(seen, found.count, 1)
        mean_of_window, squares = newest(state["square_window"], chi, seen)
        v = np.where(seen, mean_of_window if counts(state["step"]) else chi, state["var"])
        s = np.sqrt(v + epsilon)
        # The released code keeps r at 1 until the running statistics are of use.
        bound = 1.0 if state["step"] + 1 <= max(1000, warmup) else r_max
        r = np.where(seen, np.clip(s / np.sqrt(state["var"] + epsilon), 1 / bound, bound), 1.0)
        # MABN does not subtract the batch mean.
        z = (x - np.where(seen, 0, state["mean"])) / s

        def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            g = dy * params.get("scale", np.float64(1)) * r
            psi = total(g * z) / np.where(seen, found.count, 1)
            mean_psi, _ = newest(state["gradient_window"] * state["loss_scale"], psi, seen)
            dx = (g - w * z * np.where(seen, mean_psi if counts(state["gradients"]) else psi, 0)) / s
            learned = {"scale": total(dy * r * z), "bias": total(dy)}
            return {"dx": dx} | {f"d{name}": learned[name] for name in params}

        updated = {
            "mean": momentum * state["mean"],
            "var": momentum * state["var"] + (1 - momentum) * v,
            "values": found.count,
        }
        new = dict(state) | {name: np.where(seen, updated[name], state[name]) for name in updated}
        new |= {"square_window": squares, "step": state["step"] + float(seen.any())}
        return Trained(affine(params, r * z), new, found, backward)

    return Method(train, batch_norm(epsilon=epsilon).evaluate)


def normalized(
    params: State,
    state: State,
    x: np.ndarray,
    w: np.ndarray,
    epsilon: float,
    r: np.ndarray | float = 1.0,
    d: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, Callable[[np.ndarray], dict[str, np.ndarray]]]:
    r""":math:`y = \gamma (z r + d) + \beta,\; z = (x - \mu_B) / s`, and its derivative, with r and d as constants.

    With :math:`g = \gamma r\, \partial y`, :math:`dx = (g - w / n\, (\sum g + z \sum g z)) / s`; the sums are over all
    rows, since those of weight 0 depend on the statistics too. Channels without values are normalized with the running
    statistics, as constants.
    """
    found = moments(x, w)
    seen = found.count > 0
    mean, var = (np.where(seen, getattr(found, name), state[name]) for name in ("mean", "var"))
    # Infinity makes the correction 0: statistics that are constants have no derivative.
    share = w / np.where(seen, found.count, np.inf)
    s = np.sqrt(var + epsilon)
    z = (x - mean) / s
    x_hat = z * r + d

    def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
        g = dy * params.get("scale", np.float64(1)) * r
        dx = (g - share * (total(g) + z * total(g * z))) / s
        learned = {"scale": total(dy * x_hat), "bias": total(dy)}
        return {"dx": dx} | {f"d{name}": learned[name] for name in params}

    return affine(params, x_hat), backward


def domain_batch_norm(*, num_domains: int, momentum: float = 0.99, epsilon: float = 1e-5) -> Method:
    """Chang et al. 2019, equations 3 to 6: batch norm of the rows of each domain; parameters and state are [D, C]."""
    one = batch_norm(momentum=momentum, epsilon=epsilon)

    def part(arrays: State, k: int | np.ndarray) -> State:
        return {name: value[k] for name, value in arrays.items()}

    def train(params: State, state: State, x: np.ndarray, w: np.ndarray, *, domain: np.ndarray) -> Trained:
        rows = [domain == k for k in range(num_domains)]
        done = [one.train(part(params, k), part(state, k), x[r], w[r]) for k, r in enumerate(rows)]
        # NaN shows rows without a domain, which no vector may contain.
        y = np.full_like(x, np.nan)
        for r, of_domain in zip(rows, done, strict=True):
            y[r] = of_domain.y

        def backward(dy: np.ndarray) -> dict[str, np.ndarray]:
            parts = [of_domain.backward(dy[r]) for r, of_domain in zip(rows, done, strict=True)]
            dx = np.zeros_like(x)
            for r, found in zip(rows, parts, strict=True):
                dx[r] = found.pop("dx")
            return {"dx": dx} | {name: np.stack([found[name] for found in parts]) for name in parts[0]}

        new = {name: np.stack([of_domain.state[name] for of_domain in done]) for name in state}
        found = Moments(*(np.stack(values) for values in zip(*(d.moments for d in done), strict=True)))
        return Trained(y, new, found, backward)

    def evaluate(params: State, state: State, x: np.ndarray, *, domain: np.ndarray) -> np.ndarray:
        return one.evaluate(part(params, domain), part(state, domain), x)

    return Method(train, evaluate)


def affine(params: State, z: np.ndarray) -> np.ndarray:
    r""":math:`\gamma z + \beta`."""
    return z * params.get("scale", np.float64(1)) + params.get("bias", np.float64(0))


def pooled(batches: Sequence[Moments], *, unbiased: bool = False) -> tuple[np.ndarray, np.ndarray]:
    r"""The law of total variance, :math:`\sum n_B (\sigma_B^2 + (\mu_B - \mu)^2) / n`; over n - 1 if unbiased."""
    n = total(np.array([b.count for b in batches]))
    mean = total(np.array([b.count * b.mean for b in batches])) / n
    # Within batches plus between their means, about the mean of all values.
    spread = total(np.array([b.count * (b.var + (b.mean - mean) ** 2) for b in batches]))
    return mean, spread / (n - 1 if unbiased else n)


def mean_of_batches(batches: Sequence[Moments], *, unbiased: bool = True) -> tuple[np.ndarray, np.ndarray]:
    r"""Ioffe & Szegedy 2015, Algorithm 2, step 10: :math:`E[\mu_B]` and :math:`E[m / (m - 1) \sigma_B^2]`."""
    mean = total(np.array([b.mean for b in batches])) / len(batches)
    var = [b.var * (b.count / (b.count - 1) if unbiased else 1) for b in batches]
    return mean, total(np.array(var)) / len(batches)


def moving_average(batches: Sequence[Moments], *, decay: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """The mean is averaged from 0, and the standard deviation, the square root of the variance, from 1."""
    mean, std = np.zeros_like(batches[0].mean), np.ones_like(batches[0].var)
    for batch in batches:
        mean = decay * mean + (1 - decay) * batch.mean
        std = decay * std + (1 - decay) * np.sqrt(batch.var)
    return mean, std**2
