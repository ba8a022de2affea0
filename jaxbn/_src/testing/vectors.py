"""The format of the reference vectors, and functions that read and write them.

A vector is a JSON file, `data/<name>.json`, which any language can read: a method with its hyper-parameters, its
parameters and its state, and a sequence of calls, each with inputs, outputs and the state after it. Arrays are nested
lists, channels last; numbers have all digits of a float64. Inputs, parameters and initial states are exact float32
numbers, so that libraries of either precision use the same data.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]  # float64; masks of booleans are bool

_FOLDER = resources.files("jaxbn._src.testing") / "data"
_SUFFIX = ".json"


class Step(NamedTuple):
    """One call of a vector.

    `"train"` takes `x`, optionally a `mask` of booleans or real weights that broadcasts to it, the `domain` of each
    example for methods with domains, and a `cotangent`, the derivative of a loss with respect to the output. It
    returns `y`; the derivatives `dx`, `dscale` and `dbias` of that loss; and the `count` of values, the `mean` and the
    biased `var` of the batch, which are 0 where the count is 0. `"eval"` takes `x` (and `domain`) and returns `y`. For
    an estimator, `"update"` takes a batch `x` and returns its moments, and `"finalize"` returns the `mean` and `var` of
    the population.
    """

    call: str
    inputs: Arrays
    outputs: Arrays
    state: Arrays  # after the call


class Vector(NamedTuple):
    """A sequence of calls. `jaxbn` has a factory with the name of the method, which takes the arguments.

    With several devices, they are the leading axis of `x`, `mask`, `cotangent`, `y` and `dx`; the statistics are those
    of all devices together, and `dscale` and `dbias` are sums over devices.
    """

    name: str
    about: str
    method: str
    arguments: dict[str, Any]
    devices: int
    params: Arrays  # scale and bias, if the vector has them
    state: Arrays  # before the first call; empty for an estimator
    steps: tuple[Step, ...]


def names() -> tuple[str, ...]:
    """The names of all vectors, in alphabetical order.

    Returns:
        Names for :func:`load`. Each starts with the name of its method.

    Example:
        >>> "batch_norm_masked" in jaxbn.testing.names()
        True
    """
    found = (file.name for file in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def load(name: str) -> Vector:
    """Reads a vector: a sequence of calls with all inputs and expected outputs.

    Without JAX, read the files `jaxbn/_src/testing/data/*.json`, which have the fields of `Vector` and `Step`.
    PyTorch's momentum is one minus the momentum here, and its running variance multiplies `var` by count / (count - 1).

    Args:
        name: One of :func:`names`.

    Returns:
        A `Vector` of NumPy arrays in float64.

    Raises:
        ValueError: If there is no such vector.

    Example:
        >>> vector = jaxbn.testing.load("batch_norm")
        >>> vector.arguments
        {'momentum': 0.875, 'epsilon': 1e-05}
        >>> transform = getattr(jaxbn, vector.method)(**vector.arguments)
        >>> params, state = jax.tree.map(jnp.float32, (vector.params, vector.state))
        >>> params, state = jaxbn.NormParams(**params), jaxbn.BatchNormState(**state)
        >>> for step in vector.steps:
        ...     if step.call == "train":
        ...         y, state = transform.train(params, state, jnp.float32(step.inputs["x"]))
        ...         np.testing.assert_allclose(y, step.outputs["y"], rtol=1e-5, atol=1e-5)
        ...         np.testing.assert_allclose(state.var, step.state["var"], rtol=1e-5)
    """
    if name not in names():
        raise ValueError(f"There is no vector {name!r}; there are {', '.join(names())}.")
    read = json.loads((_FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))
    steps = (Step(step["call"], *(_arrays(step[part]) for part in Step._fields[1:])) for step in read.pop("steps"))
    return Vector(**read | {part: _arrays(read[part]) for part in ("params", "state")}, steps=tuple(steps))


def dumps(vector: Vector) -> str:
    """The text of the file of a vector: one line per array, with enough digits to restore each float64."""
    return _text(vector._asdict() | {"steps": [step._asdict() for step in vector.steps]}) + "\n"


def _arrays(values: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(value) for name, value in values.items()}


def _text(value: Any, indent: str = "") -> str:
    # json.dumps would write one line per number; this keeps each array on one line.
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value)
