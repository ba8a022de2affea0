"""Converts the arrays of a model to another model of the same architecture: pairs their layers, then maps both ways.

Layers are paired by equal names; otherwise by order, if both models have the shapes in the same order. Where the orders
differ, layers are paired if their shape is unique in that part of the model, or if their names differ by numbers only.
Anything else is an error that says what to write.
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

_SHOWN = 8  # layers listed in an error


@dataclasses.dataclass(frozen=True, repr=False)
class Match:
    """The pairing of the layers of two models; created by `match`. Prints as a table."""

    names: dict[str, str]  # layer of the target -> layer of the source
    source: Model
    target: Model
    flattened: dict[str, tuple[int, ...]]

    def convert(self, values: Any, *, batch_values: float | Mapping[str, float] | None = None) -> Any:
        """Converts values of the source, in the form that `match` received, to values of the target.

        The result shares no memory with `values`, so you can go on training with them. For linen, `values` are
        variables. `batch_values` is the number of values per channel (batch times space) of a training batch, for all
        layers or by the path of the Flax layer: PyTorch's running variance averages unbiased estimates, n / (n - 1)
        times Flax's. None copies running variances unchanged.
        """
        return self._convert(self.source, self.target, self.names, values, batch_values)

    def convert_back(self, values: Any, *, batch_values: float | Mapping[str, float] | None = None) -> Any:
        """Converts values of the target to values of the source.

        A state dict is complete, with its counters unchanged. It has tensors where the state dict given to `match` has
        them, so that PyTorch's `load_state_dict` accepts it, and NumPy arrays elsewhere.
        """
        names = {source: target for target, source in self.names.items()}
        return self._convert(self.target, self.source, names, values, batch_values)

    def __repr__(self) -> str:
        """One line; `print` shows the table."""
        return f"<Match: {len(self.names)} layers of {self.target.kind} and {self.source.kind}>"

    def __str__(self) -> str:
        layers = {layer.path: layer for layer in self.target.layers}
        rows = {path: [name, _shapes(layers[path])] for path, name in self.names.items()}
        columns = [Column(self.source.kind, is_number=False), Column("shapes in PyTorch's layout", is_number=False)]
        return table(columns, rows, first=self.target.kind)

    def _convert(self, source: Model, target: Model, names: Mapping[str, str], values: Any, batch_values: Any) -> Any:
        counts = self._counts(batch_values)
        known, flat, arrays = {layer.path: layer for layer in source.layers}, source.flatten(values), {}
        to_flax = source.kind == "torch"
        for layer in target.layers:
            origin = known[names[layer.path]]
            found, path = source.read(flat, origin), (layer if to_flax else origin).path
            # Count and shape options are by the path of the Flax layer, on whichever side that is.
            if path in self.flattened:
                found["weight"] = _flatten_first(found["weight"], self.flattened[path], to_flax=to_flax)
            if path in counts:
                # Bessel's factor: PyTorch's var * (n - 1) / n is Flax's.
                biased = 1 - 1 / counts[path]
                found["running_var"] = found["running_var"] * (biased if to_flax else 1 / biased)
            arrays[layer.path] = {
                slot: array
                for slot, array in found.items()
                if slot in layer.keys and (slot in layer.shapes or takes_over(slot, origin.keys, layer.keys))
            }
        return target.write(target.given, arrays)

    def _counts(self, batch_values: float | Mapping[str, float] | None) -> dict[str, float]:
        """The number of values in a batch, by the path of the Flax layer."""
        if batch_values is None:
            return {}
        if self.flax is None:
            raise ValueError("batch_values are for running variances of PyTorch, but neither model is PyTorch's.")
        known = [layer.path for layer in self.flax.layers if "running_var" in layer.shapes]
        counts = dict(batch_values if isinstance(batch_values, Mapping) else dict.fromkeys(known, batch_values))
        for path, count in counts.items():
            if path not in known:
                raise ValueError(f"batch_values: {path!r} has no running variance; there are {_some(known)}.")
            if not count > 1:
                raise ValueError(f"batch_values: {count} for {path!r}; an unbiased variance needs at least 2 values.")
        return counts

    @property
    def flax(self) -> Model | None:
        """The model in Flax, if the other one is in PyTorch; otherwise None."""
        models = [model for model in (self.source, self.target) if model.kind != "torch"]
        return models[0] if len(models) == 1 else None


def match(
    source: Any,
    target: Any,
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, tuple[int, ...]] | None = None,
) -> Match:
    """Pairs the layers of two models in linen, NNX or PyTorch, with stock layers or jaxbn's, to convert their arrays.

    Use it to continue in Flax with a model that was trained elsewhere, or the other way round. The pairing is by order
    and shape, and it is checked; inspect it with `print`, and compare the outputs of both models. Arrays do not hold
    settings: give the new layers the epsilon of the old ones, and their momentum, where PyTorch's is one minus Flax's.
    For PyTorch's averages of the unbiased variance use `momentum=jaxbn.constant(0.9, unbiased=True)`. Convolutions must
    pad alike: use `padding=1` instead of "SAME" where PyTorch's stride is 2.

    Args:
        source: `lambda: net.init(key, x)` for linen, a model for NNX, `model.state_dict()` for PyTorch, whose tensors
            may be NumPy arrays. Layers of PyTorch and NNX are in the order in which they were assigned, which
            `nnx.clone` and `nnx.merge` do not keep; layers of linen are in the order of their calls.
        target: The same.
        names: For layers of the target, the layers of the source, such as `{"Block_0/Conv_1": "layer1.0.conv2"}`; only
            those that the proposal gets wrong, or all. A parameter outside of a layer has its own name.
        flattened: For Dense layers on flattened images, which PyTorch flattens as `[C, H, W]` and Flax as `[H, W, C]`:
            PyTorch's shape by the path of the Flax layer, such as `{"Dense_0": (64, 7, 7)}`; `()` for a layer whose
            input is not a flattened image.

    Returns:
        A `Match`: `match.convert(values)` converts values of the source to the target, `match.convert_back` converts
        values of the target to the source. Arrays that only one model has, such as counters, keep their values in that
        model. PyTorch's `num_batches_tracked` becomes the `count` of jaxbn's averages that have one.

    Raises:
        TypeError: If a model is of another kind.
        ValueError: If a layer has no counterpart or several possible ones, if a name is wrong, or if a Dense layer may
            be on flattened images; the message says what to write.

    Example:
        >>> state_dict = {"0.weight": np.ones((2, 3)), "0.bias": np.ones(2), "1.weight": np.ones(2)}
        >>> state_dict |= {"1.bias": np.ones(2), "1.running_mean": np.zeros(2), "1.running_var": np.ones(2)}
        >>> net = flax.linen.Sequential([flax.linen.Dense(2), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> found = jaxbn.serving.match(state_dict, lambda: net.init(jax.random.key(0), jnp.ones((4, 3))))
        >>> print(found)
        linen     torch  shapes in PyTorch's layout
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
        raise ValueError("flattened= is for a model of PyTorch and one of Flax; these models flatten images alike.")
    return dataclasses.replace(found, flattened={path: shape for path, shape in found.flattened.items() if shape})


def _propose(source: Sequence[Layer], target: Sequence[Layer], given: Mapping[str, str]) -> dict[str, str]:
    """Pairs all layers: {path in the target: path in the source}."""
    pairs = _checked(source, target, given)
    # First the given pairs, then equal names, then order and shape for the rest.
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
    """Cuts both orders into the shortest segments with the same shapes: single layers where the orders agree.

    Where they differ, a segment includes the neighbouring layers in the same module: if one model calls a branch first
    and the other calls it last, layers of equal shape inside and outside the branch could be exchanged.
    """
    parts: list[tuple[list[Layer], list[Layer]]] = [([], [])]
    balance = Counter[Any]()
    for old, new in zip(olds, news, strict=True):
        # A segment ends where both sides have seen the same shapes equally often.
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
    """Whether the orders differ within a part, and both parts have layers in the same modules."""
    modules = [[{_dotted(layer).rpartition(".")[0] for layer in side} for side in part] for part in (one, other)]
    return max(len(one[0]), len(other[0])) > 1 and any(mine & others for mine, others in zip(*modules, strict=True))


def _is_numbered(paths: Sequence[str]) -> bool:
    """Whether the names differ by numbers only, in increasing order."""
    return len({re.sub(r"\d+", "#", path) for path in paths}) == 1 and sorted(paths, key=natural) == list(paths)


def _checked(source: Sequence[Layer], target: Sequence[Layer], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the given pairs; raises a ValueError if one is impossible."""
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
    # Compare how often each set of shapes occurs, since the order may differ.
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
            f"The architectures differ. One model has more layers of these shapes than the other: {'; '.join(parts)}."
        )


def _check_flattened(model: Model, flattened: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a ValueError for a wrong shape, or for a missing one if the input has a multiple of the channels."""
    known = {layer.path: layer for layer in model.layers if layer.kind == DENSE}
    for path, shape in flattened.items():
        if path not in known:
            raise ValueError(f"flattened: there is no Dense layer {path!r}; there are {_some(list(known))}.")
        size = known[path].shapes["weight"][-1]
        if shape and math.prod(shape) != size:
            raise ValueError(f"flattened: {path!r} takes {size} features, and {shape} are {math.prod(shape)}.")
    # Flattening multiplies the features of a Dense layer by H W, which reveals it. A plain Dense resets the search.
    channels = 0
    for layer in (layer for layer in model.layers if "weight" in layer.shapes):
        shape = layer.shapes["weight"]
        if layer.kind == DENSE and channels and shape[-1] > channels and not shape[-1] % channels:
            if layer.path not in flattened:
                raise ValueError(
                    f"{layer.path!r} takes {shape[-1]} features after a convolution of {channels} channels. If its "
                    f"input is a flattened image, which PyTorch and Flax order differently, write "
                    f"flattened={{{layer.path!r}: ({channels}, H, W)}} with its height and width, "
                    f"H W = {shape[-1] // channels}; otherwise write flattened={{{layer.path!r}: ()}}."
                )
        if layer.kind in (CONV, DENSE):
            channels = shape[0] if layer.kind == CONV else 0
        if layer.kind in (CONV_TRANSPOSE, CONV_TRANSPOSE_FLIPPED):
            channels = shape[1]


def _flatten_first(weight: np.ndarray, shape: tuple[int, ...], *, to_flax: bool) -> np.ndarray:
    """Reorders a weight `[O, I]` from inputs `[C, H, W]` to inputs `[H, W, C]`, or back."""
    whole = (-1, *shape) if to_flax else (-1, *shape[1:], shape[0])
    moved = np.moveaxis(weight.reshape(whole), *((1, -1) if to_flax else (-1, 1)))
    return moved.reshape(weight.shape)


def _dotted(layer: Layer) -> str:
    return layer.path.replace("/", ".")


def _question(open_layers: Mapping[str, list[str]]) -> str:
    choices = [f"{new!r}: {' or '.join(map(repr, candidates))}" for new, candidates in open_layers.items()]
    return (
        f"Layers of equal shape have different orders in the two models. Name the pairs, for each shape all but the "
        f"last: names={{{_some(choices)}}}"
    )


def _shapes(layer: Layer) -> str:
    return ", ".join(f"{slot} {shape}".strip() for slot, shape in sorted(layer.shapes.items()))


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
