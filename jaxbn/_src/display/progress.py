"""A progress bar on standard error, shown by process 0 and only in a terminal."""

from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_Item = TypeVar("_Item")


def track(
    items: Iterable[_Item], title: str, progress: bool | None = None, length: int | None = None
) -> Generator[_Item, None, None]:
    """Yields the items and shows a progress bar.

    Args:
        items: Any iterable.
        title: Text before the bar.
        progress: Whether to show the bar. None: if standard error is a terminal, on process 0.
        length: Number of items, if `items` has no length.

    Yields:
        The items.

    Example:
        >>> from jaxbn._src.display import progress
        >>> sum(progress.track([1, 2, 3], "Adding", progress=False))
        6
    """
    console = Console(stderr=True)
    if not (console.is_terminal and jax.process_index() == 0 if progress is None else progress):
        for item in items:  # not `yield from`, which closes a generator when the caller stops before its end
            yield item
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    total = len(items) if isinstance(items, Sized) else length
    # The finished bar stays in a log file and disappears from a terminal.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            bar.advance(task)
