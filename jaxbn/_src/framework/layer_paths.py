"""The method of a layer whose variables do not tell it: from the keys of moments, or from the names of statistics."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._src import internals as _internals
from jaxbn._src.framework.method import Factory, Method, name_of
from jaxbn._src.methods.batch_norm import BatchNormState, batch_norm
from jaxbn._src.methods.batch_renorm import BatchRenormState, batch_renorm
from jaxbn._src.methods.domain_batch_norm import DomainBatchNormState
from jaxbn._src.methods.ghost_batch_norm import GhostBatchNormState
from jaxbn._src.methods.moving_average_batch_norm import MovingAverageBatchNormState, moving_average_batch_norm
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics.moments import Moments

# Methods that install statistics in the same way whatever their arguments are; the names of the statistics tell them.
_OURS = frozenset("batch_norm batch_renorm domain_batch_norm ghost_batch_norm moving_average_batch_norm".split())


def _as_they_are() -> NormTransform[Any, Any]:
    """Batch norm whose `postproc` writes its moments unchanged, NaN included, to restore earlier statistics."""

    def postproc(state: State, moments: Moments) -> State:
        seen, (mean, var) = moments.count > 0, (state.mean, state.var)
        return state._replace(
            mean=jnp.where(seen, moments.mean.astype(mean.dtype), mean),
            var=jnp.where(seen, moments.var.astype(var.dtype), var),
        )

    transform: NormTransform[Any, Any] = batch_norm()
    return transform._replace(postproc=postproc)


AS_THEY_ARE: Method = functools.partial(_as_they_are)


def is_put_back(path: str) -> bool:
    """Whether the moments under this key are statistics from before a pass, which are restored unchanged."""
    return isinstance(path, LayerPath) and path.method is AS_THEY_ARE


class LayerPath(str):
    """The path of a layer as a key of moments, with the method of the layer.

    The variables of a linen model do not tell the method of a layer, so the keys of its moments do. A `LayerPath`
    equals the plain path, and survives everything that keeps the keys of a dict: jit, `jax.tree.map`, comprehensions. A
    pickle keeps only the name of the method.

    Paths with different methods are not equal, because jit compiles for the keys, and a program that installs
    statistics for one method must not be reused for another.
    """

    method: Method

    def __new__(cls, path: str, method: Method) -> "LayerPath":
        """The path with a method."""
        made = super().__new__(cls, path)
        made.method = method
        return made

    @functools.cached_property
    def _contents(self) -> Any:
        return contents_of(self.method)

    def __eq__(self, other: object) -> bool:
        # For other types `str.__eq__` returns NotImplemented, which is truthy.
        same = str.__eq__(self, other) is True
        return same and not (isinstance(other, LayerPath) and self._contents != other._contents)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        # The hash of the plain path, because the two are equal and dicts must find one by the other.
        return str.__hash__(self)

    # `copy.deepcopy` would otherwise use `__reduce__`, which drops the arguments of the method.
    def __deepcopy__(self, memo: Any) -> "LayerPath":
        return self

    def __reduce__(self) -> tuple[Callable[[str, str], str], tuple[str, str]]:
        # The arguments of a method may be functions, such as a lambda, that pickle cannot store.
        return by_name, (str(self), name_of(self.method))


def contents_of(value: Any, *, depth: int = 14) -> Any:
    """A hashable form of a value that is equal for equal values, even if they are created anew for each call.

    Functions are compared by their code and their closures. `depth` bounds functions that refer to themselves.
    """
    inside = functools.partial(contents_of, depth=depth - 1)
    # The truth value of a comparison of tracers is not known during tracing.
    if depth == 0 or _internals.is_tracer(value):
        return type(value)
    if isinstance(value, np.ndarray | jax.Array):
        values = np.asarray(value)
        return values.shape, values.dtype.name, values.tobytes()
    if isinstance(value, functools.partial):
        return inside(value.func), inside(value.args), inside(value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), inside(vars(value))
    if isinstance(value, Mapping):
        return tuple((name, inside(part)) for name, part in value.items())
    if isinstance(value, tuple | list):
        return type(value), *map(inside, value)
    if inspect.isfunction(value):
        # A `def` or lambda that runs again gives a function with the same code object, but with new cells.
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, inside(value.__defaults__), inside(value.__kwdefaults__), inside(cells)
    return value


def as_key(path: str, method: Method | None) -> str:
    """The path as a key of moments; a plain string if the method is unknown or its arguments are traced."""
    if method is None:
        return path
    if any(map(_internals.is_tracer, jax.tree.leaves(method.keywords))):
        # Keys are static: they outlive the trace, and must not hold its tracers.
        return by_name(path, name_of(method))
    return LayerPath(path, method)


def by_name(path: str, name: str) -> str:
    """A key of moments if only the name of the method is known, which is enough for the methods of jaxbn."""
    return path if name in _OURS else LayerPath(path, Method(_unknown, name))


def keyed(moments: Mapping[str, Moments], known: Iterable[str]) -> dict[str, Moments]:
    """The moments under keys with the methods of the layers; layers without a known key were not reached."""
    keys = {str(key): key for key in known}
    return {keys.get(path, LayerPath(path, NOT_REACHED)): found for path, found in moments.items()}


def _not_reached() -> NormTransform[Any, Any]:
    return batch_norm(momentum=None)._replace(postproc=lambda state, moments: state)


def _unknown(name: str) -> NormTransform[Any, Any]:
    raise ValueError(
        f"Only the name of the method of a layer is known, {name}, but not how it installs statistics: its arguments "
        f"are traced, or it was read from a file. Give the layer plain numbers, and use the keys that capture_moments "
        f"returns; or use the functions of the method itself."
    )


# The method of a layer that the model did not call: it keeps its statistics.
NOT_REACHED: Method = Method(_not_reached)


def check_single(path: str, single: ArrayLike, seen: str, name: str | None = None) -> None:
    """Raises a ValueError for variances of a single value, which are 0, unless the method of the layer allows them.

    Args:
        path: The key of the moments.
        single: Which variances are of a single value.
        seen: The beginning of the message.
        name: The name of the method, if the key does not tell it.
    """
    method = path.method if isinstance(path, LayerPath) else Method(batch_norm)
    own = name_of(method) if name is None else name
    # Unknown methods decide for themselves; moving average batch norm uses the second moment about zero.
    allowed = own not in _OURS or own == moving_average_batch_norm.__name__
    if method is AS_THEY_ARE or method.keywords.get("allow_single_value", allowed) or allowed or not np.any(single):
        return
    raise ValueError(
        f"{seen} one value per channel of {str(path)!r}: its variance is 0, every output would be the bias. Use larger "
        f"batches; with jaxbn.pooled() several small ones will do, as all their values count together; or pass "
        f"allow_single_value=True to a layer of jaxbn if this is intended. No statistics were installed."
    )


# Variables of linen have names only. Among our states they determine the class, except that ghost and domain batch
# norm have the names of batch norm; they install statistics in the same way.
_BY_STATE: Mapping[Any, Factory] = {
    BatchNormState: batch_norm,
    BatchRenormState: batch_renorm,
    MovingAverageBatchNormState: moving_average_batch_norm,
}


@functools.cache
def method_with(names: frozenset[str]) -> NormTransform[Any, Any] | None:
    """The method of jaxbn whose state has statistics with these names, with its default arguments; None if none has."""
    # A leaf that is None is not a variable of the model, so a layer may have fewer names than the state has fields.
    return next((factory() for state, factory in _BY_STATE.items() if names <= set(state._fields)), None)


def method_at(path: str, names: Iterable[str]) -> NormTransform[Any, Any]:
    """The method of a layer, from the key of its moments or else from the names of its statistics.

    Raises:
        ValueError: If neither determines it.
    """
    if isinstance(path, LayerPath):
        return path.method()  # raises if only the name is known
    held = frozenset(names)
    found = method_with(held)
    if found is not None:
        return found
    raise ValueError(
        f"The statistics of {path!r} are {', '.join(sorted(held))}: they are of no method of jaxbn, and its moments do "
        f"not say which it is, as their key is a plain string. Use the keys of the moments that capture_moments gives."
    )


def averaging_method(path: str, names: Iterable[str], momentum: Any) -> NormTransform[Any, Any]:
    """The functions by which the running averages of a layer are updated; see `jaxbn.linen.move_averages`.

    Raises:
        ValueError: If the momentum of the layer is not known, or the one given does not fit its method.
    """
    if isinstance(momentum, NormTransform):
        return momentum
    known = method_at(path, names)
    if isinstance(path, LayerPath) and path.method is NOT_REACHED:
        return known
    if momentum is None:
        if not isinstance(path, LayerPath):
            raise ValueError(
                f"It is not known how {path!r} averages, as the key of its moments is a plain string. Pass momentum=, "
                f"or use the keys of the moments that capture_moments gives."
            )
        return known
    # The class of the state is all that is needed, so no arrays are created.
    _, state = jax.eval_shape(lambda: known.init(1))
    # A method of the user may have a state of one of our classes, so its name is checked too.
    own = name_of(path.method) if isinstance(path, LayerPath) and name_of(path.method) not in _OURS else None
    if own or type(state) not in (BatchNormState, GhostBatchNormState, DomainBatchNormState):
        raise ValueError(
            f"momentum={momentum!r} says how batch norm averages, and the statistics of {path!r} are of another "
            f"method, {own or type(state).__name__}. Leave momentum out, for moments under the keys that "
            f"capture_moments gives; or pass the transform of the method, such as jaxbn.batch_renorm()."
        )
    return batch_norm(momentum=momentum)
