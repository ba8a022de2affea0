"""The list of all methods. The contract tests run over it: add a row to cover a new method.

A row names the method's factory and its layers in linen and NNX, and gives its formulas in float64 NumPy, written from
the paper and without code of the library.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

Arrays = Mapping[str, np.ndarray]


class Case(NamedTuple):
    """One method with one choice of hyper-parameters."""

    name: str
    factory: Callable[..., jaxbn.NormTransform]
    linen: type[nn.Module]
    nnx: type[nnx.Module]
    arguments: dict[str, Any]
    # (x [rows, C], weights [rows, 1], params, state, rows of an example) -> (y, new state), all float64
    train: Callable[[np.ndarray, np.ndarray, Arrays, Arrays, int], tuple[np.ndarray, dict[str, np.ndarray]]]
    # (x, params, state) -> y
    evaluate: Callable[[np.ndarray, Arrays, Arrays], np.ndarray]
    # (state, all values [rows, C]) -> state
    postproc: Callable[[Arrays, np.ndarray], dict[str, np.ndarray]]
    # x [N, ...] -> further arguments of a call: `domain=`
    where: Callable[[Any], dict[str, Any]] = lambda x: {}

    def transform(self, **changes: Any) -> jaxbn.NormTransform:
        made = self.factory(**self.arguments | changes)
        return made._replace(
            train=lambda params, state, x, **given: made.train(params, state, x, **given, **self.where(x)),
            eval=lambda params, state, x, **given: made.eval(params, state, x, **given, **self.where(x)),
            measure=lambda x, **given: made.measure(x, **given, **self.where(x)),
        )

    def linen_module(self, **changes: Any) -> nn.Module:
        return self.linen(**self.arguments | changes)

    def nnx_module(self, num_features: int, **changes: Any) -> nnx.Module:
        return self.nnx(num_features, **self.arguments | changes, rngs=nnx.Rngs(0))


def _affine(z: np.ndarray, params: Arrays) -> np.ndarray:
    return z * params.get("scale", 1.0) + params.get("bias", 0.0)


def _batch_norm(
    *,
    epsilon: float = 1e-5,
    decay: Callable[[float, float], float | None] = lambda count, n: 0.99,
    advance: Callable[[float, float], float] = lambda count, n: count + 1,
) -> dict[str, Any]:
    """Ioffe & Szegedy 2015, Algorithms 1 and 2, with a running average of the given decay (None: no average)."""

    def train(
        x: np.ndarray, weights: np.ndarray, params: Arrays, state: Arrays, space: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        n = weights.sum()
        if n == 0:
            return evaluate(x, params, state), dict(state)
        mean = (weights * x).sum(0) / n
        var = (weights * (x - mean) ** 2).sum(0) / n
        y = _affine((x - mean) / np.sqrt(var + epsilon), params)
        count = state.get("count", 0.0)
        a = decay(count, n / space)
        if a is None:
            return y, dict(state)
        new = {"mean": a * state["mean"] + (1 - a) * mean, "var": a * state["var"] + (1 - a) * var}
        return y, new | ({"count": advance(count, n / space)} if "count" in state else {})

    def evaluate(x: np.ndarray, params: Arrays, state: Arrays) -> np.ndarray:
        return _affine((x - state["mean"]) / np.sqrt(state["var"] + epsilon), params)

    def postproc(state: Arrays, values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(state) | {"mean": values.mean(0), "var": values.var(0)}

    return {"train": train, "evaluate": evaluate, "postproc": postproc}


def _debiased(a: float) -> Callable[[float, float], float]:
    """The zero-started average divided by 1 - a^t, written as one step from the previous quotient."""
    return lambda count, n: a * (1 - a**count) / (1 - a ** (count + 1))


def _of_horizon(samples: float) -> Callable[[float, float], float]:
    return lambda count, n: 1 - (1 - np.exp(-n / samples)) / (1 - np.exp(-(count + n) / samples))


def _batch_norm_case(name: str, arguments: dict[str, Any], **formula: Any) -> Case:
    return Case(name, jaxbn.batch_norm, jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm, arguments, **_batch_norm(**formula))


def _batch_renorm(
    r_max: Callable[[float], float], d_max: Callable[[float], float], *, decay: float = 0.99, epsilon: float = 1e-3
) -> dict[str, Any]:
    """Ioffe 2017, Algorithm 1; the state holds sigma^2 - epsilon instead of sigma."""

    def train(
        x: np.ndarray, weights: np.ndarray, params: Arrays, state: Arrays, space: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        n = weights.sum()
        sigma, step = np.sqrt(state["var"] + epsilon), state.get("step", 0.0)
        if n == 0:
            return _affine((x - state["mean"]) / sigma, params), dict(state)
        mean = (weights * x).sum(0) / n
        sigma_batch = np.sqrt((weights * (x - mean) ** 2).sum(0) / n + epsilon)
        r = np.clip(sigma_batch / sigma, 1 / r_max(step), r_max(step))
        d = np.clip((mean - state["mean"]) / sigma, -d_max(step), d_max(step))
        y = _affine((x - mean) / sigma_batch * r + d, params)
        moved = decay * sigma + (1 - decay) * sigma_batch
        new = {"mean": decay * state["mean"] + (1 - decay) * mean, "var": moved**2 - epsilon}
        return y, new | ({"step": step + 1} if "step" in state else {})

    return {"train": train} | {
        name: function for name, function in _batch_norm(epsilon=epsilon).items() if name != "train"
    }


def _batch_renorm_case(name: str, arguments: dict[str, Any], **formula: Any) -> Case:
    return Case(
        name, jaxbn.batch_renorm, jaxbn.linen.BatchRenorm, jaxbn.nnx.BatchRenorm, arguments, **_batch_renorm(**formula)
    )


def _moving_average_batch_norm(*, window: int, decay: float = 0.98, epsilon: float = 1e-5) -> dict[str, Any]:
    """Yan et al. 2020, the released layer in its first 1000 steps (r = 1), with a warm-up of the window only."""

    def train(
        x: np.ndarray, weights: np.ndarray, params: Arrays, state: Arrays, space: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        n = weights.sum()
        if n == 0:
            return evaluate(x, params, state), dict(state)
        square = (weights * x**2).sum(0) / n
        squares = np.concatenate([state["square_window"][1:], square[None]])
        v = squares.mean(0) if state["step"] >= window else square
        return _affine(x / np.sqrt(v + epsilon), params), dict(state) | {
            "mean": decay * state["mean"],  # 0 in training; the contract starts from something else
            "var": decay * state["var"] + (1 - decay) * v,
            "square_window": squares,
            "values": np.full(x.shape[1], n),
            "step": state["step"] + 1,
        }

    def evaluate(x: np.ndarray, params: Arrays, state: Arrays) -> np.ndarray:
        return _affine((x - state["mean"]) / np.sqrt(state["var"] + epsilon), params)

    def postproc(state: Arrays, values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(state) | {"mean": np.zeros(values.shape[1]), "var": (values**2).mean(0)}

    return {"train": train, "evaluate": evaluate, "postproc": postproc}


def _domain_batch_norm() -> dict[str, Any]:
    """Chang et al. 2019, equations 3 to 6: batch norm of the rows of each domain; see `_domain` for the ids."""
    plain = _batch_norm()

    def part(arrays: Arrays, domain: int) -> dict[str, np.ndarray]:
        return {name: value[domain] if value.ndim == 2 else value for name, value in arrays.items()}

    def train(
        x: np.ndarray, weights: np.ndarray, params: Arrays, state: Arrays, space: int
    ) -> tuple[np.ndarray, dict[str, Any]]:
        ids, y, new = _domain_of_rows(x), np.zeros_like(x), {name: value.copy() for name, value in state.items()}
        for domain in range(_DOMAINS):
            rows = ids == domain
            known = part(params, domain), part(state, domain)
            y[rows], after = plain["train"](x[rows], weights[rows], *known, space)
            for name in new:
                new[name][domain] = after[name]
        return y, new

    def evaluate(x: np.ndarray, params: Arrays, state: Arrays) -> np.ndarray:
        ids = _domain_of_rows(x)
        rows = {name: value[ids] if value.ndim == 2 else value for name, value in (params | state).items()}
        return plain["evaluate"](x, rows, rows)

    def postproc(state: Arrays, values: np.ndarray) -> dict[str, np.ndarray]:
        parts = [values[_domain_of_rows(values) == domain] for domain in range(_DOMAINS)]
        return {"mean": np.stack([p.mean(0) for p in parts]), "var": np.stack([p.var(0) for p in parts])}

    return {"train": train, "evaluate": evaluate, "postproc": postproc}


_DOMAINS = 3


def _domain(x: Any) -> dict[str, Any]:
    """Computes the domain of each example from its first value, so that tests may split batches in any way."""
    first = jax.numpy.asarray(x).reshape(x.shape[0], -1)[:, 0]
    return {"domain": (jax.numpy.floor(first) % _DOMAINS).astype(jax.numpy.int32)}


def _domain_of_rows(x: np.ndarray, space: int = 3) -> np.ndarray:
    first = x.reshape(-1, space, x.shape[-1])[:, 0, 0]
    return np.repeat(np.floor(first) % _DOMAINS, space).astype(int)


def _domain_batch_norm_case(name: str, arguments: dict[str, Any]) -> Case:
    return Case(
        name,
        jaxbn.domain_batch_norm,
        jaxbn.linen.DomainBatchNorm,
        jaxbn.nnx.DomainBatchNorm,
        {"num_domains": _DOMAINS} | arguments,
        **_domain_batch_norm(),
        where=_domain,
    )


def _r_max(step: Any) -> Any:
    return 1.5 + 0.1 * step


def _d_max(step: Any) -> Any:
    return 2.1 + 0.1 * step


def _warm_up(step: jax.Array) -> jax.Array:
    return jax.numpy.minimum(step / (step + 1), 0.9)


CASES = [
    _batch_norm_case("batch_norm", {}),
    _batch_norm_case("batch_norm momentum 0.9", {"momentum": 0.9}, decay=lambda count, n: 0.9),
    _batch_norm_case("batch_norm epsilon 1e-3 two-pass", {"epsilon": 1e-3, "use_fast_variance": False}, epsilon=1e-3),
    _batch_norm_case("batch_norm autodiff", {"autodiff": True}),
    _batch_norm_case("batch_norm no scale", {"use_scale": False}),
    _batch_norm_case("batch_norm no bias", {"use_bias": False}),
    _batch_norm_case("batch_norm no average", {"momentum": None}, decay=lambda count, n: None),
    _batch_norm_case("batch_norm debiased", {"momentum": jaxbn.constant(0.9, debias=True)}, decay=_debiased(0.9)),
    _batch_norm_case(
        "batch_norm cumulative", {"momentum": jaxbn.cumulative()}, decay=lambda count, n: count / (count + 1)
    ),
    _batch_norm_case(
        "batch_norm scheduled",
        {"momentum": jaxbn.scheduled(_warm_up)},
        decay=lambda count, n: min(count / (count + 1), 0.9),
    ),
    _batch_norm_case(
        "batch_norm horizon",
        {"momentum": jaxbn.horizon(100)},
        decay=_of_horizon(100),
        advance=lambda count, n: count + n,
    ),
    # With these bounds the contract clips some channels and leaves others.
    _batch_renorm_case("batch_renorm", {"r_max": _r_max, "d_max": _d_max}, r_max=_r_max, d_max=_d_max),
    # The batch is one group, as in batch norm; tests/methods/test_ghost_batch_norm.py tests several groups.
    Case(
        "ghost_batch_norm",
        jaxbn.ghost_batch_norm,
        jaxbn.linen.GhostBatchNorm,
        jaxbn.nnx.GhostBatchNorm,
        {"ghost_size": 16},
        **_batch_norm(),
    ),  # fmt: skip
    # The window is full in the last of the three steps of the contract.
    Case(
        "moving_average_batch_norm",
        jaxbn.moving_average_batch_norm,
        jaxbn.linen.MovingAverageBatchNorm,
        jaxbn.nnx.MovingAverageBatchNorm,
        {"window": 2, "warmup": 0},
        **_moving_average_batch_norm(window=2),
    ),
    _domain_batch_norm_case("domain_batch_norm", {}),
    _domain_batch_norm_case("domain_batch_norm shared affine", {"share_affine": True}),
]
