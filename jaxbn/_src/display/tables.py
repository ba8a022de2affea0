"""What tables of layers share: names of a given width that stay distinguishable, and short numbers."""

import math
from collections.abc import Iterable

_GAP = "..."


def names_of(paths: Iterable[str], width: int) -> dict[str, str]:
    """What to call each path in at most `width` characters; no two alike.

    Long names lose their beginning, or where that would make two of them alike, all lose another part.
    """
    names = {path: path or "(the model)" for path in paths}
    kept = width - len(_GAP)
    for head in range(kept + 1):
        cut = {path: _shortened(name, width, head) for path, name in names.items()}
        if len(set(cut.values())) == len(cut):
            return cut
    numbered = {path: f"{i}: {name}" for i, (path, name) in enumerate(names.items(), 1)}
    return {path: _shortened(name, width, len(str(len(names))) + 2) for path, name in numbered.items()}


def short(value: float) -> str:
    """The number in six characters or so: three digits from 0.1 on, two below; for NaN, what is not known, a dash."""
    size = abs(value)
    if math.isnan(value):
        return "-"
    if size and not 1e-3 <= size < 99999 and math.isfinite(size):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if 100 <= size < math.inf else f"{value:.{3 if size >= 0.1 else 2}g}"


def _shortened(name: str, width: int, head: int) -> str:
    """The first `head` characters and as many of the last as fit, if not all do."""
    tail = width - len(_GAP) - head
    return name if len(name) <= width else f"{name[:head]}{_GAP}{name[len(name) - tail :]}"
