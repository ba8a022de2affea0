"""What `fold` did with every normalization of a model."""

import dataclasses
import textwrap
from typing import Any, NamedTuple

from jaxbn._src.display.tables import names_of, short


class LayerFold(NamedTuple):
    """What became of one normalization layer."""

    folded: bool
    into: str | None  # the path of the layer into which it was folded
    reason: str  # where it went, or why it stays


_HEAD = ("layer", "folded", "where to, or why not")
_WIDTH = 100  # of the table
_WIDEST_PATH = 44


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold` did. Prints as a table with a line for each normalization layer.

    Example:
        >>> layers = {"norm": jaxbn.LayerFold(True, "conv", "behind 'conv'")}
        >>> print(jaxbn.FoldReport(layers, error=2.5e-7, tolerance=1e-4))
        1 of 1 normalization layers folded; outputs on the example differ by 2.5e-7
        layer  folded  where to, or why not
        norm   yes     behind 'conv'
    """

    layers: dict[str, LayerFold]
    error: float  # the largest difference of outputs on the example, relative to the largest of them
    tolerance: float

    @property
    def folded(self) -> tuple[str, ...]:
        """The layers that are gone."""
        return tuple(path for path, layer in self.layers.items() if layer.folded)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, numbers, strings and None, for `json.dumps`."""
        layers = {path: layer._asdict() for path, layer in self.layers.items()}
        return {"layers": layers, "error": self.error, "tolerance": self.tolerance}

    def __str__(self) -> str:
        names = names_of(self.layers, _WIDEST_PATH)
        widest = max(map(len, ("layer", *names.values())))
        lines = [
            f"{len(self.folded)} of {len(self.layers)} normalization layers folded; outputs on the example differ by "
            f"{short(self.error)}"
        ]
        for first, second, third in (_HEAD, *(_cells(names[path], layer) for path, layer in self.layers.items())):
            start = f"{first:{widest}}  {second:6}  "
            lines += textwrap.wrap(third, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join(lines)


def _cells(name: str, layer: LayerFold) -> tuple[str, str, str]:
    return name, "yes" if layer.folded else "no", layer.reason
