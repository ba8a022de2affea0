"""Selection and order of layers by their paths."""

import re
from collections.abc import Iterable, Sequence


def select(paths: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The layers at or below the paths; a ValueError for a path without layers. The path "" selects all."""
    known, chosen = list(known), []
    for path in [paths] if isinstance(paths, str) else paths:
        found = [layer for layer in known if is_at_or_below(layer, path)]
        if not found:
            raise ValueError(
                f"No normalization layer is at {path!r} or below it; there are {', '.join(map(repr, known))}."
            )
        chosen += found
    # Paths may overlap; a dict drops repeated layers and keeps their order.
    return list(dict.fromkeys(chosen))


def is_at_or_below(layer: str, path: str) -> bool:
    """Whether a path leads to the layer or to a module around it."""
    return path in ("", layer) or layer.startswith(f"{path}/")


def named(path: str) -> str:
    """A path for messages."""
    return repr(path) if path else "the model itself"


def natural(path: str) -> list[tuple[int, int | str]]:
    """A sort key that compares numbers in names by value: BatchNorm_2 comes before BatchNorm_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path)]
