"""Arrays of one model for another of the same architecture: which layer is which, and the conversion both ways.

The proposal is by equal names; else by order, where the shapes come in the same order in both. Where the orders differ,
as far as shapes show, layers are paired that have a shape of their own in that part of the model, or names that differ
by numbers alone. Anything else is an error, which says what to write.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._src.display.tables import Column, table
from jaxbn._src.framework.conversion import takes_over
from jaxbn._src.framework.selection import natural
from jaxbn._src.interop.torch_layouts import CONV, CONV_TRANSPOSE, CONV_TRANSPOSE_FLIPPED, DENSE, Layer, Model, layout

_SHOWN = 8  # layers in an error


@dataclasses.dataclass(frozen=True, repr=False)
class Match:
    """Which layer of one model is which of another; made by `match`. Prints as a table."""

    names: dict[str, str]  # layer of the target -> layer of the source
    source: Model
    target: Model
    flattened: dict[str, tuple[int, ...]]

    def convert(self, values: Any, *, batch_values: float | Mapping[str, float] | None = None) -> Any:
        """Values of the source, in the form in which `match` got it, for the target.

        It shares no memory with `values`, which may be trained on. `values` are variables for linen. `batch_values` are
        the values per channel, batch times space, of a batch of training, for all layers or by the path of the Flax
        layer: running variances of PyTorch are those of unbiased estimates, n / (n - 1) times Flax's. None: they are
        carried over as they are.
        """
        return self._convert(self.source, self.target, self.names, values, batch_values)

    def convert_back(self, values: Any, *, batch_values: float | Mapping[str, float] | None = None) -> Any:
        """Values of the target for the source.

        A state dict is complete, its counters as they were. It has tensors where the one given to `match` has them, so
        that PyTorch's `load_state_dict` takes it, and NumPy arrays where that has these.
        """
        names = {source: target for target, source in self.names.items()}
        return self._convert(self.target, self.source, names, values, batch_values)

    def __repr__(self) -> str:
        """One line; `print` shows the table."""
        return f"<Match: {len(self.names)} layers of {self.target.kind} and {self.source.kind}>"

    def __str__(self) -> str:
        layers = {layer.path: layer for layer in self.target.layers}
        rows = {path: [name, _shapes(layers[path])] for path, name in self.names.items()}
        columns = [Column(self.source.kind, is_number=False), Column("shapes, as PyTorch has them", is_number=False)]
        return table(columns, rows, first=self.target.kind)

    def _convert(self, source: Model, target: Model, names: Mapping[str, str], values: Any, batch_values: Any) -> Any:
        counts = self._counts(batch_values)
        known, flat, arrays = {layer.path: layer for layer in source.layers}, source.flatten(values), {}
        to_flax = source.kind == "torch"
        for layer in target.layers:
            origin = known[names[layer.path]]
            found, path = source.read(flat, origin), (layer if to_flax else origin).path
            if path in self.flattened:
                found["weight"] = _flatten_first(found["weight"], self.flattened[path], to_flax=to_flax)
            if path in counts:
                biased = 1 - 1 / counts[path]
                found["running_var"] = found["running_var"] * (biased if to_flax else 1 / biased)
            arrays[layer.path] = {
                slot: array
                for slot, array in found.items()
                if slot in layer.keys and (slot in layer.shapes or takes_over(slot, origin.keys, layer.keys))
            }
        return target.write(target.given, arrays)

    def _counts(self, batch_values: float | Mapping[str, float] | None) -> dict[str, float]:
        """The values of a batch by the path of the Flax layer."""
        if batch_values is None:
            return {}
        if self.flax is None:
            raise ValueError("batch_values are for running variances of PyTorch, and neither model is PyTorch's.")
        known = [layer.path for layer in self.flax.layers if "running_var" in layer.shapes]
        counts = dict(batch_values if isinstance(batch_values, Mapping) else dict.fromkeys(known, batch_values))
        for path, count in counts.items():
            if path not in known:
                raise ValueError(f"batch_values: {path!r} has no running variance; there are {_some(known)}.")
            if not count > 1:
                raise ValueError(f"batch_values: {count} for {path!r}; an unbiased variance is of 2 values or more.")
        return counts

    @property
    def flax(self) -> Model | None:
        """The model that is not PyTorch's; None if neither is."""
        models = [model for model in (self.source, self.target) if model.kind != "torch"]
        return models[0] if len(models) == 1 else None


def match(
    source: Any,
    target: Any,
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
) -> Match:
    """Finds which layer of one model is which of another: of linen, NNX and PyTorch, of stock layers and jaxbn's.

    For a model trained elsewhere that goes on in Flax, or the way round. The proposal is by order and shape, and is
    checked; look at it with `print`, and at the outputs of both models. Settings are not in the arrays: give the layers
    of the new model the epsilon of the old, and the momentum, which in PyTorch is one minus that of Flax; for PyTorch's
    averages of the unbiased variance `momentum=jaxbn.constant(0.9, unbiased=True)`. Convolutions are to pad alike:
    `padding=1` and not "SAME" where PyTorch's stride is 2.

    Args:
        source: `lambda: net.init(key, x)` for linen, a model for NNX, `model.state_dict()` for PyTorch, whose tensors
            may be NumPy arrays. PyTorch's and NNX's layers come in the order in which they were set, which `nnx.clone`
            and `nnx.merge` forget, linen's in that of their calls.
        target: Likewise.
        names: Layers of the target, and which of the source each is, such as `{"Block_0/Conv_1":
            "layer1.0.conv2"}`; those that are wrong in the proposal, or all. A parameter outside of a layer has a name
            of its own.
        flattened: For Dense layers on flattened images, which PyTorch flattens as `[C, H, W]` and Flax as `[H, W, C]`:
            by the path of the Flax layer the shape that PyTorch has, such as `{"Dense_0": (64, 7, 7)}`; `()` for a
            layer that is on nothing of the kind.

    Returns:
        A `Match`: `match.convert(values)` makes values of the target from those of the source, `match.convert_back` the
        way round. What one side alone has, such as counters, stays as the other was given. PyTorch's
        `num_batches_tracked` is the `count` of those averages of jaxbn that have one.

    Raises:
        TypeError: If one of them is none of these.
        ValueError: If a layer has no counterpart, or more than one may be, or a name is wrong, or a Dense layer may be
            on flattened images: with what to write.

    Example:
        >>> state_dict = {"0.weight": np.ones((2, 3)), "0.bias": np.ones(2), "1.weight": np.ones(2)}
        >>> state_dict |= {"1.bias": np.ones(2), "1.running_mean": np.zeros(2), "1.running_var": np.ones(2)}
        >>> net = flax.linen.Sequential([flax.linen.Dense(2), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> found = jaxbn.serving.match(state_dict, lambda: net.init(jax.random.key(0), jnp.ones((4, 3))))
        >>> print(found)
        linen     torch  shapes, as PyTorch has them
        layers_0  0      bias (2,), weight (2, 3)
        layers_1  1      bias (2,), running_mean (2,), running_var (2,), weight (2,)
        >>> net.apply(found.convert(state_dict), jnp.ones((1, 3))).round(2)
        Array([[5., 5.]], dtype=float32)
    """
    one, other = layout(source), layout(target)
    proposed = _propose(one.layers, other.layers, dict(names or {}))
    found = Match(proposed, one, other, dict(flattened or {}))
    if found.flax is not None:
        _check_flattened(found.flax, found.flattened)
    elif flattened:
        raise ValueError("flattened= is between PyTorch and Flax; these models flatten images alike.")
    return dataclasses.replace(found, flattened={path: shape for path, shape in found.flattened.items() if shape})


def _propose(source: Sequence[Layer], target: Sequence[Layer], given: Mapping[str, str]) -> dict[str, str]:
    """{path in the target: path in the source} of all layers."""
    pairs = _checked(source, target, given)
    names = {_dotted(layer): layer for layer in source if layer.path not in pairs.values()}
    for layer in target:
        same = names.get(_dotted(layer))
        if layer.path not in pairs and same is not None and same.signature == layer.signature:
            pairs[layer.path] = same.path
    olds = [layer for layer in source if layer.path not in pairs.values()]
    news = [layer for layer in target if layer.path not in pairs]
    _check_complete(olds, news)
    open_layers: dict[str, list[str]] = {}
    for of_old, of_new in _segments(olds, news):
        for signature in dict.fromkeys(layer.signature for layer in of_new):
            alike = [[layer.path for layer in part if layer.signature == signature] for part in (of_old, of_new)]
            if len(alike[0]) == 1 or all(map(_is_numbered, alike)):
                pairs |= dict(zip(alike[1], alike[0], strict=True))
            else:
                open_layers |= dict.fromkeys(alike[1], alike[0])
    if open_layers:
        raise ValueError(_question(open_layers))
    return {layer.path: pairs[layer.path] for layer in target}


def _segments(olds: Sequence[Layer], news: Sequence[Layer]) -> list[tuple[list[Layer], list[Layer]]]:
    """Both orders cut into the shortest parts of the same shapes: single layers, where the orders agree.

    Where they do not, all that stands beside these layers in one module is part of it: a branch that one model calls
    first, and the other last, exchanges layers of equal shape with those around it.
    """
    parts: list[tuple[list[Layer], list[Layer]]] = [([], [])]
    balance = Counter[Any]()
    for old, new in zip(olds, news, strict=True):
        parts[-1][0].append(old)
        parts[-1][1].append(new)
        balance[old.signature] += 1
        balance[new.signature] -= 1
        if not any(balance.values()):
            parts.append(([], []))
    merged: list[tuple[list[Layer], list[Layer]]] = []
    for part in parts[:-1]:
        merged.append(part)
        while len(merged) > 1 and _belong_together(*merged[-2:]):
            last = merged.pop()
            merged[-1] = (merged[-1][0] + last[0], merged[-1][1] + last[1])
    return merged


def _belong_together(one: tuple[list[Layer], list[Layer]], other: tuple[list[Layer], list[Layer]]) -> bool:
    """Whether the orders differ in one part, and layers of the other stand in the same modules."""
    modules = [[{_dotted(layer).rpartition(".")[0] for layer in side} for side in part] for part in (one, other)]
    return max(len(one[0]), len(other[0])) > 1 and any(mine & others for mine, others in zip(*modules, strict=True))


def _is_numbered(paths: Sequence[str]) -> bool:
    """Whether the names are the same but for numbers, which grow."""
    return len({re.sub(r"\d+", "#", path) for path in paths}) == 1 and sorted(paths, key=natural) == list(paths)


def _checked(source: Sequence[Layer], target: Sequence[Layer], given: Mapping[str, str]) -> dict[str, str]:
    """The pairs that were given; a ValueError if one cannot be."""
    olds, news = {layer.path: layer for layer in source}, {layer.path: layer for layer in target}
    for new, old in given.items():
        for path, known, which in ((new, news, "target"), (old, olds, "source")):
            if path not in known:
                raise ValueError(f"names: there is no layer {path!r} in the {which}; there are {_some(list(known))}.")
        if olds[old].signature != news[new].signature:
            raise ValueError(
                f"names: {new!r} has {_shapes(news[new])}, and {old!r} has {_shapes(olds[old])}, in PyTorch's layout."
            )
    twice = [old for old, count in Counter(given.values()).items() if count > 1]
    if twice:
        raise ValueError(f"names: {twice[0]!r} is given for several layers.")
    return dict(given)


def _check_complete(olds: Sequence[Layer], news: Sequence[Layer]) -> None:
    counts = [Counter(layer.signature for layer in layers) for layers in (olds, news)]
    alone = [
        [layer for layer in layers if mine[layer.signature] > others[layer.signature]]
        for layers, mine, others in ((olds, counts[0], counts[1]), (news, counts[1], counts[0]))
    ]
    if any(alone):
        parts = (
            f"in the {which} {_some([f'{layer.path!r} ({_shapes(layer)})' for layer in layers])}"
            for which, layers in zip(("source", "target"), alone, strict=True)
            if layers
        )
        raise ValueError(
            f"The architectures differ: more layers of these shapes than on the other side are {'; '.join(parts)}."
        )


def _check_flattened(model: Model, flattened: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError for a wrong shape, or for none of a Dense layer that has several times the channels."""
    known = {layer.path: layer for layer in model.layers if layer.kind == DENSE}
    for path, shape in flattened.items():
        if path not in known:
            raise ValueError(f"flattened: there is no Dense layer {path!r}; there are {_some(list(known))}.")
        size = known[path].shapes["weight"][-1]
        if shape and math.prod(shape) != size:
            raise ValueError(f"flattened: {path!r} takes {size} features, and {shape} are {math.prod(shape)}.")
    channels = 0
    for layer in (layer for layer in model.layers if "weight" in layer.shapes):
        shape = layer.shapes["weight"]
        if layer.kind == DENSE and channels and shape[-1] > channels and not shape[-1] % channels:
            if layer.path not in flattened:
                raise ValueError(
                    f"{layer.path!r} takes {shape[-1]} features after a convolution of {channels} channels. If it is "
                    f"on flattened images, which PyTorch and Flax order differently, write flattened={{{layer.path!r}: "
                    f"({channels}, H, W)}} with their height and width, H W = {shape[-1] // channels}; else "
                    f"flattened={{{layer.path!r}: ()}}."
                )
        if layer.kind in (CONV, DENSE):
            channels = shape[0] if layer.kind == CONV else 0
        if layer.kind in (CONV_TRANSPOSE, CONV_TRANSPOSE_FLIPPED):
            channels = shape[1]


def _flatten_first(weight: np.ndarray, shape: tuple[int, ...], *, to_flax: bool) -> np.ndarray:
    """A weight `[O, I]` whose inputs were `[C, H, W]` for inputs `[H, W, C]`, or the way round."""
    whole = (-1, *shape) if to_flax else (-1, *shape[1:], shape[0])
    moved = np.moveaxis(weight.reshape(whole), *((1, -1) if to_flax else (-1, 1)))
    return moved.reshape(weight.shape)


def _dotted(layer: Layer) -> str:
    return layer.path.replace("/", ".")


def _question(open_layers: Mapping[str, list[str]]) -> str:
    choices = [f"{new!r}: {' or '.join(map(repr, candidates))}" for new, candidates in open_layers.items()]
    return (
        f"Layers of equal shape do not come in the same order in both models. Say which is which, of each shape all "
        f"but the last: names={{{_some(choices)}}}"
    )


def _shapes(layer: Layer) -> str:
    return ", ".join(f"{slot} {shape}".strip() for slot, shape in sorted(layer.shapes.items()))


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
