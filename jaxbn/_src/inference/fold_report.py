"""The report of `fold`: the result for each normalization layer of a model."""

import dataclasses
from typing import Any, NamedTuple

from jaxbn._src.display.tables import Column, paragraph, short, table


class LayerFold(NamedTuple):
    """The result for one normalization layer."""

    folded: bool
    into: str | None  # the path of the layer into which it was folded
    reason: str  # where it was folded to, or why it was not folded


@dataclasses.dataclass(frozen=True, repr=False)
class FoldReport:
    """The result of `fold`. `print` shows a table with a row for each normalization layer.

    Example:
        >>> layers = {"norm": jaxbn.LayerFold(True, "conv", "into 'conv' before it")}
        >>> print(jaxbn.FoldReport(layers, error=2.5e-7, tolerance=1e-4))
        1 of 1 normalization layers folded; outputs on the example differ by 2.5e-7
        layer  folded  where to, or why not
        norm   yes     into 'conv' before it
    """

    layers: dict[str, LayerFold]
    error: float  # largest difference of the outputs on the example, relative to the largest output
    tolerance: float

    @property
    def folded(self) -> tuple[str, ...]:
        """The layers that were folded."""
        return tuple(path for path, layer in self.layers.items() if layer.folded)

    def to_dict(self) -> dict[str, Any]:
        """Returns dicts, numbers, strings and None, for `json.dumps`."""
        layers = {path: layer._asdict() for path, layer in self.layers.items()}
        return {"layers": layers, "error": self.error, "tolerance": self.tolerance}

    def __repr__(self) -> str:
        """One line; `print` shows the table."""
        return f"<FoldReport: {len(self.folded)} of {len(self.layers)} normalization layers folded>"

    def __str__(self) -> str:
        rows = {path: ["yes" if layer.folded else "no", layer.reason] for path, layer in self.layers.items()}
        headline = (
            f"{len(self.folded)} of {len(self.layers)} normalization layers folded; outputs on the example differ by "
            f"{short(self.error)}"
        )
        columns = [Column("folded", is_number=False), Column("where to, or why not", is_number=False)]
        return f"{paragraph(headline)}\n{table(columns, rows)}"
