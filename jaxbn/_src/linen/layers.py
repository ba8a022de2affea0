"""The base of the layers for flax.linen, and BatchNorm: fields and variables. The methods do the arithmetic."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import ones, zeros
from flax.typing import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.framework.method import (
    REQUIRED,
    check_leaves,
    defaults_that_differ,
    evaluate,
    for_an_example,
    inherited_defaults,
    operands_for,
)
from jaxbn._src.framework.norm_layer import NormLayer
from jaxbn._src.methods.batch_norm import batch_norm
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics.averages import Averaging

STATISTICS = "batch_stats"


class Norm(NormLayer, nn.Module):
    """Base of all layers: Flax's fields, and the variables of a method.

    A layer names the `factory` of its method, whose arguments are its fields: those that the class does not declare are
    added, with their defaults. The params and the statistics of the method are its variables.
    """

    # Flax's fields in Flax's order, which is also the order of positional arguments.
    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: ArrayLike | Averaging | None = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    _: dataclasses.KW_ONLY
    activation: Callable[[jax.Array], jax.Array] | None = None
    allow_single_value: bool = False
    autodiff: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Adds the arguments of the method as fields, unless the class declares them."""
        declared, inherited = inspect.get_annotations(cls), inherited_defaults(cls.__mro__[1:])
        differing = defaults_that_differ(cls.factory, cls) if "factory" in vars(cls) else {}
        for name, default in differing.items():
            if name not in declared:
                # A field of the base keeps its position. Others are keyword-only, so that the positional arguments stay
                # those of Flax.
                new = {} if name in inherited else {"kw_only": True}
                setattr(cls, name, dataclasses.field(**new | ({} if default is REQUIRED else {"default": default})))
                declared = declared | {name: Any}
        if differing:
            # A dataclass has a field for each annotation.
            cls.__annotations__ = declared
        # Flax makes the class a dataclass here, so its fields must be complete.
        super().__init_subclass__(**options)

    @nn.compact
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
                and update the running averages; the collection `batch_stats` must be mutable. Pass it here or as a
                field.
            mask: Booleans or real weights, broadcastable to `x`, for the statistics in training. For rows pass
                `[N, 1]`; a mask of lower rank that also fits the leading axes is an error.
            residual: Added to the normalized input before the activation, of the shape of `x`.
            domain: Only for `DomainBatchNorm`: the domain of each example, integers `[N]`.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: If `use_running_average` is given twice or not at all, or the input does not fit; see
                `batch_norm`.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x, starting = jnp.asarray(x), self.is_initializing()
        transform = for_an_example(self.made_by) if starting else self.transform
        dtype = x.dtype if jnp.iscomplexobj(x) else jnp.float32
        init = functools.partial(transform.init, _axes.feature_shape(x.shape, self.axis), dtype=dtype)
        shapes = jax.eval_shape(init)  # the values are needed only for variables that do not exist yet
        variables, state = self._load_state(x, shapes[1], init)
        initializers = {"scale": self.scale_init, "bias": self.bias_init}
        given = {f"{name}_init": initializer for name, initializer in initializers.items()}
        check_leaves(self, Norm, shapes[0], shapes[1], given)
        params = self._load_params(shapes[0], init, initializers)
        operands = {"mask": mask, "residual": residual, "domain": domain}
        # `init` accepts an empty batch, which has no statistics.
        if use_running_average or starting and not x.size:
            return evaluate(transform, params, state, x, **operands)
        y, new_state = transform.train(params, state, x, **operands_for(transform.train, **operands))
        # As in Flax, `init` does not update the running averages with its example.
        for name, variable in variables.items() if not starting else ():
            leaf = getattr(new_state, name)
            if leaf is not getattr(state, name):  # equal without a running average: the collection may be immutable
                variable.value = leaf
        return y

    @nn.nowrap
    def _load_state(
        self, x: jax.Array, shapes: State, init: Callable[[], tuple[Any, State]]
    ) -> tuple[dict[str, nn.Variable[jax.Array]], State]:
        variables = {
            name: self.variable(STATISTICS, name, lambda name=name: getattr(init()[1], name))
            for name, leaf in shapes._asdict().items()
            if leaf is not None
        }
        values = {name: variable.value for name, variable in variables.items()}
        # Flax checks the shapes of params, but not those of other variables.
        if values["mean"].shape != shapes.mean.shape:
            _axes.check_features(x.shape, self.axis, values["mean"].shape)
        return variables, shapes._replace(**values)

    @nn.nowrap
    def _load_params(
        self, shapes: Any, init: Callable[[], tuple[Any, State]], initializers: Mapping[str, Initializer]
    ) -> Any:
        def load(name: str, like: jax.Array) -> jax.Array:
            if name in initializers:
                return self.param(name, initializers[name], like.shape, self.param_dtype)
            # The method says where its other params start.
            return self.param(name, lambda _: getattr(init()[0], name).astype(self.param_dtype))

        return shapes._replace(**{n: load(n, leaf) for n, leaf in shapes._asdict().items() if leaf is not None})


class BatchNorm(Norm):
    r"""Batch normalization: a drop-in replacement for `flax.linen.BatchNorm`, with the same variables and checkpoints.

    Change only the import. It differs from Flax's layer:

    1. The variance is numerically safe: `use_fast_variance=True` sums about a shift, False centers first.
       `force_float32_reductions=False` is accepted, but statistics stay float32.
    2. A mask may hold real weights; counts are summed over devices; a fully masked batch does not change
       the statistics and is normalized with the running ones (Flax: NaN).
    3. One value per channel, counted over devices, is an error in training unless `allow_single_value=True`.
    4. No gradient flows into the running statistics, and batch statistics that are not finite are not stored.
    5. Forward-mode differentiation needs `autodiff=True`.
    6. The statistics keep the dtype of their initialization; NaN in masked positions is ignored; groups of devices work
       under shard_map too.
    7. Invalid arguments are errors: a momentum of 1 (give `use_running_average=True` instead), a negative
       epsilon, an empty batch in training.

    Attributes:
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
        use_fast_variance: See 1.
        force_float32_reductions: See 1.
        activation: Applied to the output; `jax.nn.relu` and `jax.nn.leaky_relu` cost no memory traffic here.
        allow_single_value: See 3.
        autodiff: See 5.

    Example:
        >>> layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9)
        >>> x = jnp.array([[1.0, 0.0], [3.0, 8.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"].round(3)
        Array([0.2, 0.4], dtype=float32)

    References:
        Ioffe & Szegedy, `Batch Normalization <https://arxiv.org/abs/1502.03167>`_, 2015.
    """

    factory = staticmethod(batch_norm)
