"""The check for modules with running statistics whose class jaxbn does not know."""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.tracing import records as _records
from jaxbn._src.tracing import sow as _sow


@dataclasses.dataclass(frozen=True)
class Touched:
    """The tag of a sown value of an unknown module that ran; harvesting finds it even if the program is cached."""

    path: str
    size: int
    cls: str
    register: str  # the function that registers the class

    def on(self, outputs: Any, index: jax.Array) -> Any:
        """Sows this tag on the first array of the outputs of the module."""
        leaves, structure = jax.tree.flatten(outputs)
        for position, leaf in enumerate(leaves):
            if _internals.is_array_of_jax(leaf):
                # The tag alone tells that the module ran; there is nothing to measure.
                empty = Moments(*(jnp.zeros((), jnp.float32) for _ in Moments._fields))
                leaves[position] = _sow.sow(jnp.asarray(leaf), index, empty, layer=self)
                break
        return jax.tree.unflatten(structure, leaves)


def name_of(cls: Any, inside: Any = None) -> str:
    """The name of a class, with the class inside if it is a bridge."""
    name = f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
    return name if inside is None else f"{name} of {name_of(inside)}"


def check(touched: Mapping[str, str], served: Collection[str], *, register: str) -> None:
    """Raises a ValueError for modules with running statistics, path -> class, that ran and are not known layers.

    It is a warning if other layers are known, because the module may not be a normalization.
    """
    left = {path: cls for path, cls in touched.items() if path not in served}
    if not left:
        return
    named = ", ".join(f"{path!r} ({cls})" for path, cls in list(left.items())[:_NAMED])
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    text = (
        f"{named}{more} keeps running statistics, and jaxbn does not know its class: it ran as without jaxbn, and its "
        f"statistics were neither measured nor held. If it is batch normalization, say so once: "
        f"{register}(cls, evaluation={{'use_running_average': True}}), with what makes its call evaluate."
    )
    if not served:
        raise ValueError(text)
    warnings.warn(f"{text} The other {len(served)} layers were served.", stacklevel=2)


def all_served(records: Sequence[_records.Record]) -> list[_records.Record]:
    """The records of known layers, after checking those of unknown modules."""
    touched = {record.layer.path: record.layer for record in records if isinstance(record.layer, Touched)}
    layers: list[Any] = [record for record in records if not isinstance(record.layer, Touched)]
    served = {record.layer.path for record in layers}
    for register in {one.register for one in touched.values()}:
        check({path: one.cls for path, one in touched.items()}, served, register=register)
    return layers


_NAMED = 3  # maximum number of layers in a message


class Watch:
    """Records the unknown modules with running statistics that run in a call, and the known layers.

    As a context manager it checks them at the end of the outermost call. Known layers are remembered, because Python
    does not run again when a compiled program is cached.
    """

    _reaching: "weakref.WeakSet[type]" = weakref.WeakSet()  # classes whose calls contain a known layer

    def __init__(self, register: str) -> None:
        self._register = register
        self._touched: dict[str, str] = {}
        self._served: set[str] = set()
        self._around: list[tuple[str, type]] = []
        self._depth = 0

    def __enter__(self) -> None:
        if not self._depth:
            self._touched.clear()
        self._depth += 1

    def __exit__(self, error: type | None, *_: object) -> None:
        self._depth -= 1
        if not self._depth and error is None:
            check(self._touched, self._served, register=self._register)

    def serve(self, path: str) -> None:
        """Records the call of a known layer."""
        self._served.add(path)
        self._reaching.update(cls for outer, cls in self._around if outer == path)

    def run(self, path: str, cls: type, call: Callable[[], Any], keeps: Callable[[], bool], inside: Any = None) -> Any:
        """Runs the call of another module; `keeps` tells afterwards whether it has running statistics."""
        self._around.append((path, cls))
        try:
            outputs = call()
        finally:
            self._around.pop()
        if path not in self._served and cls not in self._reaching and keeps():
            self._touched[path] = name_of(cls, inside)
        return outputs
