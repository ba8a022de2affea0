"""The base of the layers for flax.nnx, and BatchNorm: fields and variables. The methods do the arithmetic."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.bridge.wrappers import current_linen_module
from flax.nnx.nn import dtypes
from flax.nnx.nn.initializers import ones_init, zeros_init
from flax.nnx.rnglib import Rngs
from flax.typing import Initializer, PromoteDtypeFn
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src import internals as _internals
from jaxbn._src.framework.method import (
    REQUIRED,
    check_leaves,
    evaluate,
    fields_of,
    for_an_example,
    loaded,
    operands_for,
)
from jaxbn._src.framework.norm_layer import NormLayer
from jaxbn._src.methods.batch_norm import batch_norm
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics.averages import Averaging
from jaxbn._src.numerics.axes import static
from jaxbn._src.numerics.collectives import check_groups

_ZEROS, _ONES = zeros_init(), ones_init()
_KINDS = ("init", "metadata")
_MISSING_FLAG = (
    "No `use_running_average` argument was provided to {name}. Pass it to the constructor, as in "
    "{name}(..., use_running_average=True); or to the call, as in layer(x, use_running_average=True); or use "
    "nnx.view(model, use_running_average=True)."
)


def _with_defaults_of_method(init: Callable[..., None]) -> Callable[..., None]:
    """Gives the constructor the defaults of the method of a layer instead of those of batch norm."""

    @functools.wraps(init)
    def __init__(self: Any, num_features: int | Sequence[int], **given: Any) -> None:
        defaults = fields_of(self.factory).items()
        # A subclass may set further arguments as attributes before it calls this; their defaults are not needed then.
        unset = {n: value for n, value in defaults if value is not REQUIRED and n not in vars(self)}
        init(self, num_features, **unset | given)

    return __init__


class Norm(nnx.Module, NormLayer):  # in this order the layout of objects stays that of a module
    """Base of all layers: Flax's fields, and the variables of a method.

    A layer names the `factory` of its method, whose arguments are its fields; those beyond the common ones are given by
    name. The params and the statistics of the method are its variables.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Wraps the factory, because `nnx.tabulate` replaces every public function of a class for a while."""
        super().__init_subclass__(**options)
        if "factory" in vars(cls):
            cls.factory = staticmethod(functools.partial(cls.factory))

    @_with_defaults_of_method
    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: ArrayLike | Averaging | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _ZEROS,
        scale_init: Initializer = _ONES,
        axis_name: str | tuple[str, ...] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Callable[[jax.Array], jax.Array] | None = None,
        allow_single_value: bool = False,
        autodiff: bool = False,
        **of_method: Any,
    ):
        # Hyper-parameters are plain attributes and the transform is built per call: equal models have equal graphdefs.
        arguments = fields_of(self.factory)
        if unknown := sorted(of_method.keys() - arguments.keys()):
            raise TypeError(f"{type(self).__name__} does not take {unknown[0]}=; its method takes {sorted(arguments)}.")
        self.num_features = static(num_features)
        self.use_running_average = use_running_average
        self.axis = static(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = check_groups(axis_name, axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.activation = activation
        self.allow_single_value = allow_single_value
        self.autodiff = autodiff
        for name in arguments:
            if name in of_method:
                setattr(self, name, of_method[name])
            elif not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} needs {name}=.")

        # As in Flax's layer, an absent variable is data that is None.
        self.scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        _add_variables(self, rngs, {"scale": (scale_init, scale_metadata), "bias": (bias_init, bias_metadata)})

    @property
    def state(self) -> State:
        """The statistics as the functions of the method take them."""
        return load(self, self.transform)[1]

    @property
    def params(self) -> Any:
        """The learned params as the functions of the method take them."""
        return load(self, self.transform)[0]

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view(model, use_running_average=...)`.

        Args:
          use_running_average: True: normalize with the running statistics. False:
            normalize with those of the batch and update the running averages.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        domain: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes x `[..., C]`, adds the residual and applies the activation.

        Args:
            x: The input; its shape may change from call to call, except for the features.
            use_running_average: True: normalize with the running statistics. False: normalize with those of the batch
                and update the running averages. None: use the attribute, which `train()`, `eval()` and `nnx.view` set.
            mask: Booleans or real weights, broadcastable to `x`, for the statistics in training. For rows pass
                `[N, 1]`; a mask of lower rank that also fits the leading axes is an error.
            residual: Added to the normalized input before the activation, of the shape of `x`.
            domain: Only for `DomainBatchNorm`: the domain of each example, integers `[N]`.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: If `use_running_average` is not given at all, or the input does not fit; see `batch_norm`.
        """
        flag = self.use_running_average if use_running_average is None else use_running_average
        if flag is None:
            raise ValueError(_MISSING_FLAG.format(name=type(self).__name__))
        # As in the `init` of linen, an example may be of any size, on one device.
        transform = for_an_example(self.made_by) if _is_given_an_example(self) else self.transform
        params, state = load(self, transform)
        operands = {"mask": mask, "residual": residual, "domain": domain}
        if flag:
            return evaluate(transform, params, state, x, **operands)
        y, new_state = transform.train(params, state, x, **operands_for(transform.train, **operands))
        for name, leaf in new_state._asdict().items():
            if leaf is not getattr(state, name):  # equal without a running average
                getattr(self, name).set_value(leaf)  # `[...] =` walks through all that is traced so far
        return y


def _add_variables(layer: Norm, rngs: Rngs, given: Mapping[str, tuple[Initializer, Mapping[str, Any]]]) -> None:
    """Adds the variables of the method; `given` are the initializers and the metadata of params by name."""
    params, state = _initialize(layer, layer.transform)
    fields = {f"{name}_{kind}": part for name, parts in given.items() for kind, part in zip(_KINDS, parts, strict=True)}
    check_leaves(layer, Norm, params, state, fields)
    for name, leaf in state._asdict().items():
        if leaf is not None:
            setattr(layer, name, nnx.BatchStat(leaf))
    for name, leaf in params._asdict().items():
        if leaf is not None and name in given:
            initializer, metadata = given[name]
            setattr(layer, name, nnx.Param(initializer(rngs.params(), leaf.shape, layer.param_dtype), **metadata))
        elif leaf is not None:  # the method initializes its other params
            setattr(layer, name, nnx.Param(leaf.astype(layer.param_dtype)))


def load(layer: Norm, transform: NormTransform[Any, Any]) -> tuple[Any, State]:
    """The params and the state of a layer, as the functions of its method take them."""
    held = variables_of(layer)
    return loaded(transform, held, held)


def variables_of(module: Any, kind: type[nnx.Variable[Any]] = nnx.Variable) -> dict[str, Any]:
    """The values of the variables of a module itself, by name."""
    return {name: value.get_value() for name, value in vars(module).items() if isinstance(value, kind)}


def _initialize(layer: Norm, transform: NormTransform[Any, Any]) -> tuple[Any, State]:
    dtype = layer.param_dtype if jnp.issubdtype(layer.param_dtype, jnp.complexfloating) else jnp.float32
    return transform.init(layer.num_features, dtype=dtype)


def _is_given_an_example(layer: Norm) -> bool:
    """Whether a call only displays or initializes the layer, or a linen model around it."""
    around = current_linen_module()
    return _internals.is_given_an_example(layer) or around is not None and around.is_initializing()


class BatchNorm(Norm):
    r"""Batch normalization: a drop-in replacement for `flax.nnx.BatchNorm`, with the same variables and checkpoints.

    Change only the import. It differs from Flax's layer as :class:`jaxbn.linen.BatchNorm` does, and in dtypes, which
    follow linen's rules: statistics are computed from the unrounded input, and running statistics are never rounded;
    `promote_dtype` is accepted and ignored. One value per channel is an error in training, except in calls that only
    display or initialize the layer: `nnx.tabulate`, `nnx.bridge.lazy_init` and the `init` of a linen model around the
    layer. A trace for shapes, as of `jax.eval_shape`, looks like one of `jax.jit`, so it raises as training does.

    Args:
        num_features: Number of features, or their shape for several feature axes.
        use_running_average: See the call.
        axis: Feature axis, or several.
        momentum: Weight of the OLD running value, in [0, 1); None keeps no running average; or a
            :class:`jaxbn.Averaging`. All but a plain number add the variable `count`.
        epsilon: Added to the variance.
        dtype: Dtype of the output; None: the promoted dtype of input and parameters.
        param_dtype: Dtype of the parameters.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Axis of a `shard_map`, `pmap` or `vmap` over which the batch is sharded; not used in evaluation.
        axis_index_groups: Groups of devices that share statistics.
        use_fast_variance: True sums about a shift, False centers first; both are numerically safe.
        promote_dtype: Accepted and ignored.
        rngs: Keys for the initializers.
        bias_metadata: Metadata of the variable of the bias.
        scale_metadata: Metadata of the variable of the scale.
        activation: Applied to the output; `jax.nn.relu` and `jax.nn.leaky_relu` cost no memory traffic here.
        allow_single_value: Accept one value per channel in training.
        autodiff: Use JAX's own derivative; forward mode needs it.
        of_method: Not used here. Layers of other methods take further arguments of their factories.

    Returns:
        A module.

    Example:
        >>> layer = jaxbn.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, 0.0], [3.0, 8.0]]))
        >>> layer.mean[...].round(3)
        Array([0.2, 0.4], dtype=float32)

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015.
    """

    factory = staticmethod(batch_norm)
