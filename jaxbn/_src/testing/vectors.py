"""The format of the reference vectors, and how they are read and written.

A vector is a file of JSON, `data/<name>.json`, that any language reads: a method with its hyper-parameters, its
parameters and its state, and calls in sequence, each with its inputs, its outputs and the state after it. Arrays are
nested lists, channels last; numbers have all digits of a float64. Inputs, parameters and initial states are float32
numbers exactly, so that a library of either precision sees the same data.
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

    A call `"train"` takes `x`, perhaps a `mask` of booleans or real weights that broadcasts to it, of a method of
    domains the `domain` of each example, and a `cotangent`, the derivative of a loss by the output. It gives `y`; the
    derivatives `dx`, `dscale` and `dbias` of that loss; and of the batch the `count` of values, the `mean` and the
    biased `var`, which are 0 where the count is. `"eval"` takes `x` (and `domain`) and gives `y`. Of an estimator,
    `"update"` takes a batch `x` and gives its moments, and `"finalize"` gives the `mean` and `var` of the population.
    """

    call: str
    inputs: Arrays
    outputs: Arrays
    state: Arrays  # after the call


class Vector(NamedTuple):
    """A sequence of calls. `jaxbn` has a factory with the name of the method, which takes the arguments.

    With several devices, the leading axis of `x`, `mask`, `cotangent`, `y` and `dx` counts them; the statistics are
    those of all devices together, and `dscale` and `dbias` are sums over them.
    """

    name: str
    about: str
    method: str
    arguments: dict[str, Any]
    devices: int
    params: Arrays  # scale, bias; those that there are
    state: Arrays  # before the first call; empty for an estimator
    steps: tuple[Step, ...]


def names() -> tuple[str, ...]:
    """The names of all vectors, in alphabetical order.

    Returns:
        Names for :func:`load`. Each starts with that of its method.

    Example:
        >>> "batch_norm_masked" in jaxbn.testing.names()
        True
    """
    found = (file.name for file in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)))


def load(name: str) -> Vector:
    """Reads a vector: a sequence of calls with everything that goes in and must come out.

    Without JAX read the files, `jaxbn/_src/testing/data/*.json`, which have the fields of `Vector` and `Step`.
    PyTorch's momentum is one minus the one here, and its running variance multiplies `var` by count / (count - 1).

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
    """The text of the file of a vector: a line for each array, and the digits that give each float64 again."""
    return _text(vector._asdict() | {"steps": [step._asdict() for step in vector.steps]}) + "\n"


def _arrays(values: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(value) for name, value in values.items()}


def _text(value: Any, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value)
