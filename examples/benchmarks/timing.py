"""What the benchmarks that time something share: rounds, intervals, tables, and what machine it was.

In each round every program runs once, in one order and in the next round in the other, and only times of one round are
divided by each other: what else the machine does then hits all alike. A ratio is the median over the rounds. Its 95 %
interval is a bootstrap's: the rounds are drawn again, with replacement, and the middle 95 % of the medians are it. Over
several cases ratios have a geometric mean, and the interval of it draws the rounds of each case again.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

DRAWS = 2000  # of the bootstrap
PACKAGES = ("jaxbn", "jax", "jaxlib", "flax", "numpy", "dm-haiku", "equinox", "keras", "torch")

_Key = TypeVar("_Key", bound=Hashable)


class Times(NamedTuple):
    """Seconds of a program."""

    wall: np.ndarray  # [rounds]
    cpu: np.ndarray  # [rounds]: of all threads of this process


class Interval(NamedTuple):
    """A number, and between which it lies."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until what a program gives is there, and seconds of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def take_turns(keys: Sequence[_Key], rounds: Iterable[int], measure: Callable[[_Key], Any]) -> dict[_Key, np.ndarray]:
    """Measures everything once in each round, forwards and backwards in turn; what was found, [rounds, ...]."""
    found = [{key: measure(key) for key in (keys[::-1] if turn % 2 else keys)} for turn in rounds]
    return {key: np.array([measured[key] for measured in found]) for key in keys}


def interleave(programs: Mapping[_Key, Callable[[], Any]], rounds: Iterable[int]) -> dict[_Key, Times]:
    """Runs every program once in each round."""
    found = take_turns(list(programs), rounds, lambda key: clock(programs[key]))
    return {key: Times(*seconds.T) for key, seconds in found.items()}


def repeat(call: Callable[[], Any], count: int) -> Any:
    """Calls a function of JAX so often, one call after the other.

    A GPU works in order on what it is given. A CPU would run several calls at once, so that each is waited for.
    """
    result = None
    for _ in range(count):
        result = call()
        if jax.default_backend() == "cpu":
            jax.block_until_ready(result)
    return result


def repeats_for(run: Callable[[int], Any], seconds: float) -> int:
    """How often a program, which runs as often as it is told, is to run in one measurement to take so long."""
    run(1)  # to warm up
    taken = min(clock(functools.partial(run, 1))[0] for _ in range(2))
    return max(1, math.ceil(seconds / taken))


def ratio(over: np.ndarray, under: np.ndarray) -> Interval:
    """The median of the ratios of paired times, [rounds]."""
    return geometric_mean([over / under])


def geometric_mean(ratios: Sequence[np.ndarray]) -> Interval:
    """The geometric mean over cases of the median ratio of each, [rounds]."""
    rng = np.random.default_rng(0)
    drawn = [r[rng.integers(len(r), size=(DRAWS, len(r)))] for r in ratios]
    means = np.exp(np.mean([np.log(np.median(draws, axis=1)) for draws in drawn], axis=0))
    value = math.exp(np.mean([np.log(np.median(r)) for r in ratios]))
    return Interval(value, *(float(bound) for bound in np.quantile(means, [0.025, 0.975])))


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes that the device reads and writes in a second where it copies so many float32."""
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: -x)  # a plain copy might not be made
    run = functools.partial(repeat, functools.partial(copy, x), 10)
    jax.block_until_ready(run())
    return 10 * 2 * x.nbytes / min(clock(run)[0] for _ in range(5))


def table(title: str, names: Sequence[str], numbers: Sequence[str], rows: Iterator[Sequence[str]]) -> Table:
    """Names on the left, numbers on the right; where there are several names, a line where the first changes."""
    made, last = Table(*names, title=title), None
    for number in numbers:
        made.add_column(number, justify="right")
    for row in rows:
        if len(names) > 1 and last not in (None, row[0]):
            made.add_section()
        made.add_row(*row)
        last = row[0]
    return made


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0].device_kind
    return {"device": device, "devices": jax.device_count(), "CPU cores": os.cpu_count(), "versions": found}


def machine_line() -> str:
    """The same for people."""
    found = machine()
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return f"{found['devices']} x {found['device']}, {found['CPU cores']} CPU cores; {versions}"


def write_json(file: Path | None, results: Any) -> None:
    """The results and the machine, where a file is asked for."""
    if file:
        file.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Which `bars` reads."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def bars(args: argparse.Namespace) -> Callable[..., Iterable[Any]]:
    """Shows how far work over a sequence is, if somebody looks."""
    screen = Console(stderr=True)
    no_bars = args.no_progress or not screen.is_terminal
    return functools.partial(track, console=screen, transient=True, disable=no_bars)
