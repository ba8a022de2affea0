"""Tools for `generate`: reproducible numbers, calls of the reference formulas, and a registry of the vectors."""

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn._src.testing import reference
from jaxbn._src.testing.vectors import Arrays, Step, Vector

VECTORS: dict[str, Callable[[], Vector]] = {}

STEP = 1 / 64  # between possible inputs, which are therefore exact in any precision
PLAIN = {"momentum": 0.875, "epsilon": 1e-5}  # the momentum is exact too


class Draw:
    """Reproducible random numbers; Python guarantees the sequence of `random()` only."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random

    def uniform(self, shape: Sequence[int], low: float = -2.0, high: float = 3.0, *, step: float = STEP) -> np.ndarray:
        """Multiples of `step` from [low, high)."""
        # Integer steps are exact, while arithmetic on random floats could differ between machines.
        steps = [int(self._random() * ((high - low) / step)) for _ in range(int(np.prod(shape)))]
        return low + step * np.array(steps, np.float64).reshape(shape)

    def params(self, channels: int) -> Arrays:
        """A scale and a bias."""
        return {"scale": self.uniform([channels], 0.5, 2.0), "bias": self.uniform([channels], -1.0, 1.0)}

    def batch(self, *shape: int, **more: Any) -> Arrays:
        """The inputs of a training call."""
        return {"x": self.uniform(shape), "cotangent": self.uniform(shape, -1.0, 1.0)} | more


class Call(NamedTuple):
    """A call of a method, with its inputs."""

    call: str
    inputs: Arrays


def vector(function: Callable[[Draw], dict[str, Any]]) -> Callable[[], Vector]:
    """Registers a function that returns the fields of a vector, except the name and the description."""
    name, about = function.__name__, inspect.getdoc(function) or ""

    def make() -> Vector:
        return Vector(name=name, about=about.splitlines()[0], **function(Draw(name)))

    VECTORS[name] = make
    return make


def calls(
    method: str,
    arguments: dict[str, Any],
    params: Arrays,
    state: Arrays,
    sequence: Sequence[Call],
    *,
    devices: int = 1,
) -> dict[str, Any]:
    """The fields of a vector: calls a method of `reference` in sequence. `params` selects scale and bias."""
    formulas = getattr(reference, method)(**{k: v for k, v in arguments.items() if not k.startswith("use_")})
    steps: list[Step] = []
    now: reference.State = state
    for call, inputs in sequence:
        outputs, now = (_train if call == "train" else _evaluate)(formulas, params, now, inputs)
        steps.append(Step(call, inputs, outputs, dict(now)))
    return {
        "method": method,
        "arguments": arguments,
        "devices": devices,
        "params": params,
        "state": state,
        "steps": tuple(steps),
    }


def passes(estimator: str, arguments: dict[str, Any], batches: Sequence[np.ndarray]) -> dict[str, Any]:
    """The fields of a vector: runs an estimator of `reference` over these batches."""
    # Batches without a mask: all values have weight 1.
    seen = [reference.moments(x, np.ones_like(x)) for x in batches]
    mean, var = getattr(reference, estimator)(seen, **arguments)
    updates = [Step("update", {"x": x}, found._asdict(), {}) for x, found in zip(batches, seen, strict=True)]
    steps = (*updates, Step("finalize", {}, {"mean": mean, "var": var}, {}))
    return {"method": estimator, "arguments": arguments, "devices": 1, "params": {}, "state": {}, "steps": steps}


def _train(
    formulas: reference.Method, params: Arrays, state: reference.State, inputs: Arrays
) -> tuple[Arrays, reference.State]:
    x = inputs["x"]
    weights = np.broadcast_to(np.asarray(inputs.get("mask", 1.0), np.float64), x.shape)
    done = formulas.train(params, state, _rows(x), _rows(weights), **_where(inputs))
    gradients = done.backward(_rows(inputs["cotangent"]))
    outputs = {"y": done.y.reshape(x.shape), "dx": gradients.pop("dx").reshape(x.shape)}
    return outputs | gradients | done.moments._asdict(), done.state


def _evaluate(
    formulas: reference.Method, params: Arrays, state: reference.State, inputs: Arrays
) -> tuple[Arrays, reference.State]:
    x = inputs["x"]
    return {"y": formulas.evaluate(params, state, _rows(x), **_where(inputs)).reshape(x.shape)}, state


def _where(inputs: Arrays) -> Arrays:
    """The domain of each row, if the examples have domains."""
    if "domain" not in inputs:
        return {}
    domain = inputs["domain"]
    return {"domain": np.repeat(domain.ravel(), inputs["x"][..., 0].size // domain.size)}


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])
