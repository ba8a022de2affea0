"""Converts one batch normalization layer of Keras, dm-haiku or Equinox to variables of the Flax layer, and back.

All have the same affine map, but other names, shapes and state of the running averages. None of the three libraries is
imported: the functions read attributes of their objects and copy the arrays. For PyTorch and whole models, use `match`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.numerics.averages import LONG


def from_keras(layer: Any) -> dict[str, Any]:
    """Converts a Keras `BatchNormalization` to variables of the Flax layer; :func:`to_keras` converts back.

    Args:
        layer: The layer, built. Momentum and epsilon mean the same in Flax; Keras' default epsilon is 1e-3.

    Returns:
        `{"params": ..., "batch_stats": ...}` for linen's layer; the attributes of NNX's layer have the same names.

    Example:
        >>> import types
        >>> layer = types.SimpleNamespace(gamma=None, beta=[1.0], moving_mean=[2.0], moving_variance=[4.0])
        >>> variables = jaxbn.serving.from_keras(layer)
        >>> norm = jaxbn.linen.BatchNorm(use_running_average=True, use_scale=False, epsilon=1e-3)
        >>> norm.apply(variables, jnp.array([[4.0]])).round(3)
        Array([[2.]], dtype=float32)

    References:
        Keras, `BatchNormalization <https://keras.io/api/layers/normalization_layers/batch_normalization/>`_.
    """
    return _variables(layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)


def to_keras(variables: Any) -> list[np.ndarray]:
    """Converts variables of a Flax layer to the list that `set_weights` of a Keras `BatchNormalization` takes.

    Args:
        variables: Variables of one linen layer: `{"params": {...}, "batch_stats": {...}}`.

    Returns:
        gamma and beta, if present, the moving mean and the moving variance, float32 `[C]`.

    Example:
        >>> norm = jaxbn.linen.BatchNorm(use_running_average=True, use_bias=False)
        >>> [a.tolist() for a in jaxbn.serving.to_keras(norm.init(jax.random.key(0), jnp.ones((4, 1))))]
        [[1.0], [0.0], [1.0]]
    """
    params, stats = variables.get("params", {}), variables["batch_stats"]
    arrays = [params.get("scale"), params.get("bias"), stats["mean"], stats["var"]]
    return [np.array(array) for array in arrays if array is not None]


def from_haiku(params: Any, state: Any, name: str = "batch_norm") -> dict[str, Any]:
    """Converts a Haiku `BatchNorm` to variables of the Flax layer; :func:`to_haiku` converts back.

    Uses the averages with which Haiku evaluates, which are debiased for their start at zero. To continue debiasing, use
    `momentum=jaxbn.constant(decay_rate, debias=True)` in the layer and set its `count` to the counter.

    Args:
        params: The parameters of the model.
        state: The state of the model.
        name: Name of the layer, such as `"res_net/~/initial_batchnorm"`.

    Returns:
        `{"params": ..., "batch_stats": ...}` for linen's layer; the attributes of NNX's layer have the same names.

    Example:
        >>> ema = {"hidden": np.full((1, 1), 0.2), "average": np.full((1, 1), 2.0), "counter": np.int32(1)}
        >>> state = {"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}
        >>> jaxbn.serving.from_haiku({}, state)["batch_stats"]["mean"]
        Array([2.], dtype=float32)

    References:
        Haiku, `BatchNorm <https://dm-haiku.readthedocs.io/en/latest/api.html#batchnorm>`_.
    """
    # `average` is the debiased value that Haiku evaluates with; `hidden` is the raw one.
    own, mean, var = params.get(name, {}), *(state[f"{name}/~/{part}_ema"]["average"] for part in ("mean", "var"))
    return _variables(own.get("scale"), own.get("offset"), mean, var)


def to_haiku(
    variables: Any, params: Any, state: Any, name: str = "batch_norm"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns Haiku parameters and state in which one `BatchNorm` has the variables of a Flax layer.

    Args:
        variables: Variables of one linen layer: `{"params": {...}, "batch_stats": {...}}`.
        params: The parameters of the Haiku model.
        state: The state of the model. The counters of the layer are set to a large number, so that its averages
            continue without debiasing, like Flax's.
        name: Name of the layer.

    Returns:
        New `(params, state)`.

    Example:
        >>> ema = {"hidden": np.zeros((1, 1)), "average": np.zeros((1, 1)), "counter": np.int32(0)}
        >>> state = {"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}
        >>> norm = jaxbn.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        >>> params, state = jaxbn.serving.to_haiku(norm.init(jax.random.key(0), jnp.ones((4, 1))), {}, state)
        >>> state["batch_norm/~/var_ema"]["average"]
        Array([[1.]], dtype=float32)
    """
    given, stats = variables.get("params", {}), variables["batch_stats"]
    params, state = dict(params), dict(state)
    if name in params:
        names = {"scale": "scale", "offset": "bias"}
        params[name] = {own: _shaped(given[names[own]], old) for own, old in params[name].items()}
    for part in ("mean", "var"):
        old = state[f"{name}/~/{part}_ema"]
        value = _shaped(stats[part], old["average"])
        state[f"{name}/~/{part}_ema"] = {
            "hidden": value,
            "average": value,
            "counter": jnp.full_like(old["counter"], LONG),
        }
    return params, state


def from_equinox(layer: Any, state: Any) -> dict[str, Any]:
    """Converts an Equinox `BatchNorm` to variables of the Flax layer; :func:`to_equinox` converts back.

    Uses the statistics with which Equinox evaluates. In mode `"batch"` they are too large in the first steps, since
    the variance starts at 1 but is debiased as if it started at 0.

    Args:
        layer: The layer, in mode `"ema"` or `"batch"`.
        state: The `State` of the model.

    Returns:
        `{"params": ..., "batch_stats": ...}` for linen's layer; the attributes of NNX's layer have the same names.

    Example:
        >>> import types
        >>> layer = types.SimpleNamespace(weight=None, bias=None, mode="ema", ema_state_index="averages")
        >>> state = {"averages": ([2.0], [4.0])}
        >>> jaxbn.serving.from_equinox(layer, state)["batch_stats"]["var"]
        Array([4.], dtype=float32)

    References:
        Equinox, `BatchNorm <https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm>`_.
    """
    if layer.mode == "ema":
        mean, var = state.get(layer.ema_state_index)
        return _variables(layer.weight, layer.bias, mean, var)
    count = int(state.get(layer.batch_counter))
    # The same debiasing as in Equinox's own evaluation, so that both give the same outputs.
    weight = 1 - layer.momentum**count if count else 1
    mean, var = (np.asarray(hidden) / weight for hidden in state.get(layer.batch_state_index))
    return _variables(layer.weight, layer.bias, mean, var)


def to_equinox(variables: Any, layer: Any, state: Any) -> tuple[Any, Any]:
    """Returns an Equinox `BatchNorm`, and the state of its model, with the variables of a Flax layer.

    Args:
        variables: Variables of one linen layer: `{"params": {...}, "batch_stats": {...}}`.
        layer: The Equinox layer; replace it in the model with `equinox.tree_at`.
        state: The `State` of the model. Equinox invalidates it, so do not use it again. In mode `"batch"` the counter
            is set to a large number, so that the averages continue without debiasing, like Flax's.

    Returns:
        `(layer, state)`.

    Example:
        >>> import types
        >>> layer = types.SimpleNamespace(weight=None, bias=None, mode="ema", ema_state_index=0, ema_first_time_index=1)
        >>> class State(dict):
        ...     def set(self, index, value):
        ...         return State({**self, index: value})
        >>> norm = jaxbn.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        >>> variables = norm.init(jax.random.key(0), jnp.ones((4, 1)))
        >>> jaxbn.serving.to_equinox(variables, layer, State())[1][0]
        (Array([0.], dtype=float32), Array([1.], dtype=float32))
    """
    copies = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), dict(variables))
    params, stats = copies.get("params", {}), copies["batch_stats"]
    new = {id(layer.weight): params.get("scale"), id(layer.bias): params.get("bias")}
    # Find the leaves by identity, since the class of the layer is not imported here.
    if layer.weight is not None:
        layer = jax.tree.map(lambda leaf: new.get(id(leaf), leaf), layer)
    averages = (stats["mean"], stats["var"])
    if layer.mode == "ema":
        return layer, state.set(layer.ema_first_time_index, jnp.array(False)).set(layer.ema_state_index, averages)
    return layer, state.set(layer.batch_counter, jnp.array(LONG)).set(layer.batch_state_index, averages)


def _variables(scale: Any, bias: Any, mean: Any, var: Any) -> dict[str, Any]:
    params = {"scale": scale, "bias": bias}
    flat = {name: _flat(array) for name, array in params.items() if array is not None}
    return ({"params": flat} if flat else {}) | {"batch_stats": {"mean": _flat(mean), "var": _flat(var)}}


def _flat(array: Any) -> jax.Array:
    """The array in the shape of the features; NumPy reads the value of a Keras variable."""
    return jnp.array(np.asarray(array, np.float32).ravel(), copy=True)


def _shaped(array: Any, old: Any) -> jax.Array:
    return jnp.array(array, copy=True).reshape(old.shape)
