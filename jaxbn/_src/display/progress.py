"""A progress bar for long work: on standard error, from one process, and only where somebody is looking."""

from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_Item = TypeVar("_Item")


def track(
    items: Iterable[_Item], title: str, progress: bool | None = None, length: int | None = None
) -> Generator[_Item, None, None]:
    """Yields the items and shows how far it got.

    Args:
        items: Any iterable.
        title: What is being done.
        progress: Whether to show the bar. None: if standard error is a terminal, on process 0.
        length: Of the items, where they do not tell it themselves.

    Yields:
        The items.

    Example:
        >>> from jaxbn._src.display import progress
        >>> sum(progress.track([1, 2, 3], "Adding", progress=False))
        6
    """
    console = Console(stderr=True)
    if not (console.is_terminal and jax.process_index() == 0 if progress is None else progress):
        for item in items:  # and not `yield from`, which would close a generator that is left before its end
            yield item
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    total = len(items) if isinstance(items, Sized) else length
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:  # a log keeps its last line
        task = bar.add_task(title, total=total)
        for item in items:
            yield item
            bar.advance(task)
