"""The one table printer: plain text, laid out by rich, with a row for each layer.

Layers keep the order in which they are given, and long paths are shortened so that they stay distinguishable.
"""

import io
import math
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.table import Table

# Characters in a line where standard output is not a terminal. In a terminal, lines are as wide as it is.
WIDTH = 80

_WIDEST = 120  # long lines are hard to read even where there is room for them
_GAP = 2  # characters between columns
_SHORTEST_NAME = 16
_SHORTEST_TEXT = 36  # a column of text wraps rather than cut the names of layers
_ELLIPSIS = "..."


class Column(NamedTuple):
    """A column of a table."""

    head: str  # lines of words
    is_number: bool = True  # aligned to the right


def table(
    columns: Sequence[Column],
    rows: Mapping[str, Sequence[str]],
    *,
    first: str = "layer",
    marked: Collection[str] = (),
) -> str:
    """Returns a table with a row for each layer.

    Args:
        columns: The columns after that of the layers. A last column of text is wrapped if lines become too long.
        rows: By path of the layer, the cells of its row.
        first: The head of the column of layers.
        marked: Paths of layers that are marked with an asterisk.

    Returns:
        Lines of plain text without trailing spaces. Paths are cut in the middle or at the start if they are too long.

    Example:
        >>> from jaxbn._src.display.tables import Column, table
        >>> print(table([Column("values"), Column("method", False)], {"norm_0": ["96", "batch_norm"]}))
        layer   values  method
        norm_0      96  batch_norm
    """
    width = line_width()
    widths = [max(map(len, [*column.head.split("\n"), *cells])) for column, cells in _columns(columns, rows)]
    if columns and not columns[-1].is_number:
        widths[-1] = min(widths[-1], _SHORTEST_TEXT)
    prefix = 2 * bool(marked)
    room = max(width - sum(widths) - _GAP * len(columns) - prefix, _SHORTEST_NAME)
    names = names_of(rows, room)
    made, lines = _grid(header=True), 1 + max((column.head.count("\n") for column in columns), default=0)
    made.add_column("\n" * (lines - 1) + " " * prefix + first, no_wrap=True)
    for column in columns:
        above = "\n" * (lines - 1 - column.head.count("\n"))  # heads stand on the row below them
        made.add_column(above + column.head, justify="right" if column.is_number else "left", no_wrap=column.is_number)
    for path, cells in rows.items():
        mark = ("* " if path in marked else "  ")[:prefix]
        made.add_row(mark + names[path], *cells)
    # If even the shortest names do not fit, make the lines longer: rich would cut cells.
    return _rendered(made, max(width, len(columns) * _GAP + sum(widths) + room + prefix))


def definitions(entries: Mapping[str, str]) -> str:
    """Returns the terms and their meanings in two columns; the second is wrapped."""
    made = _grid(header=False)
    made.add_column(no_wrap=True)
    made.add_column()
    for term, meaning in entries.items():
        made.add_row(term, meaning)
    return _rendered(made, line_width())


def paragraph(text: str, *, start: str = "") -> str:
    """Returns the text wrapped, with `start` before its first line and as many spaces before the others."""
    made = _grid(header=False, gap=0)
    if start:
        made.add_column(no_wrap=True)
    made.add_column()
    made.add_row(*[start][: bool(start)], text)
    return _rendered(made, line_width())


def line_width() -> int:
    """Returns the characters in a line: as many as the terminal has, within 80 and 120; 80 if there is no terminal."""
    if sys.stdout is None or not sys.stdout.isatty():
        return WIDTH
    return min(max(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH), _WIDEST)


def names_of(paths: Iterable[str], width: int) -> dict[str, str]:
    """Returns a name of at most `width` characters for each path; no two names are equal.

    Long names lose their beginning, then the end that all have in common, then another part, then are numbered.
    """
    names = {path: path or "(the model)" for path in paths}
    for ended in (names, _without_common_end(names)):
        # `head` is the number of characters that stay at the beginning.
        for head in range(width - len(_ELLIPSIS) + 1):
            cut = {path: _shortened(name, width, head) for path, name in ended.items()}
            if len(set(cut.values())) == len(cut):
                return cut
    numbered = {path: f"{i}: {name}" for i, (path, name) in enumerate(names.items(), 1)}
    # The head holds the number and its colon, so that the names stay distinct.
    return {path: _shortened(name, width, len(str(len(names))) + 2) for path, name in numbered.items()}


def in_order(paths: Iterable[str], first: Iterable[str]) -> list[str]:
    """Returns the paths: those in `first` in its order, and then the others as they come."""
    position = {path: i for i, path in enumerate(first)}
    # The sort is stable, so the others keep their order.
    return sorted(paths, key=lambda path: position.get(path, len(position)))


def listed(paths: Sequence[str], most: int = 3) -> str:
    """Returns the first of the paths in quotes, and how many more there are."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(repr(path) for path in paths[:most]) + more


def short(value: float) -> str:
    """Returns the number in about six characters: three digits from 0.1 on, two below; a dash for NaN."""
    size = abs(value)
    if math.isnan(value):
        return "-"
    if size and not 1e-3 <= size < 99999 and math.isfinite(size):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if 100 <= size < math.inf else f"{value:.{3 if size >= 0.1 else 2}g}"


def _columns(columns: Sequence[Column], rows: Mapping[str, Sequence[str]]) -> list[tuple[Column, list[str]]]:
    """Returns each column with its cells."""
    return [(column, [cells[i] for cells in rows.values()]) for i, column in enumerate(columns)]


def _grid(*, header: bool, gap: int = _GAP) -> Table:
    return Table(box=None, show_header=header, header_style="", pad_edge=False, padding=(0, gap, 0, 0))


def _rendered(made: RenderableType, width: int) -> str:
    """The lines of a table: no colors, whatever the environment asks for, and no notebook's HTML."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system=None, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    console.print(made)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _without_common_end(names: Mapping[str, str]) -> dict[str, str]:
    """Returns the names without the last parts of their paths, if these are the same in all of them."""
    # commonprefix compares characters, so shorten the common end to whole parts of the paths.
    end = os.path.commonprefix([name[::-1] for name in names.values()])[::-1]
    lost = len(end) - end.find("/") - 1 if "/" in end else 0
    return {path: name[: len(name) - lost] + _ELLIPSIS * bool(lost) for path, name in names.items()}


def _shortened(name: str, width: int, head: int) -> str:
    """The first `head` characters and as many of the last as fit, if not all do."""
    tail = width - len(_ELLIPSIS) - head
    return name if len(name) <= width else f"{name[:head]}{_ELLIPSIS}{name[len(name) - tail :]}"
