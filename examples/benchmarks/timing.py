"""Shared by the benchmarks that measure time: rounds, intervals, tables, and a description of the machine.

Each program runs once per round, in alternating order, and ratios only compare times of the same round, so that
background load affects all programs alike. A ratio is the median over the rounds, with a 95 % bootstrap interval: the
rounds are resampled with replacement, and the interval contains the middle 95 % of the medians. Ratios of several cases
are combined by the geometric mean; its interval resamples the rounds of each case.
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
    """The run times of a program, in seconds."""

    wall: np.ndarray  # [rounds]
    cpu: np.ndarray  # [rounds]: of all threads of this process


class Interval(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """Runs a program until its result is ready; returns wall time and CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def take_turns(keys: Sequence[_Key], rounds: Iterable[int], measure: Callable[[_Key], Any]) -> dict[_Key, np.ndarray]:
    """Measures everything once per round, in alternating order; returns the measurements, [rounds, ...]."""
    # Reverse every other round, so that drifts such as heating cancel.
    found = [{key: measure(key) for key in (keys[::-1] if turn % 2 else keys)} for turn in rounds]
    return {key: np.array([measured[key] for measured in found]) for key in keys}


def interleave(programs: Mapping[_Key, Callable[[], Any]], rounds: Iterable[int]) -> dict[_Key, Times]:
    """Times every program once per round."""
    found = take_turns(list(programs), rounds, lambda key: clock(programs[key]))
    return {key: Times(*seconds.T) for key, seconds in found.items()}


def repeat(call: Callable[[], Any], count: int) -> Any:
    """Calls a JAX function `count` times, one after the other.

    A GPU runs calls in order. A CPU may run several calls at once, so the loop waits for each of them.
    """
    result = None
    for _ in range(count):
        result = call()
        if jax.default_backend() == "cpu":
            jax.block_until_ready(result)
    return result


def repeats_for(run: Callable[[int], Any], seconds: float) -> int:
    """The number of runs per measurement, so that a measurement takes at least `seconds`."""
    run(1)  # warm-up
    # The minimum is least affected by other load.
    taken = min(clock(functools.partial(run, 1))[0] for _ in range(2))
    return max(1, math.ceil(seconds / taken))


def ratio(over: np.ndarray, under: np.ndarray) -> Interval:
    """The median of the ratios of paired times, [rounds]."""
    return geometric_mean([over / under])


def geometric_mean(ratios: Sequence[np.ndarray]) -> Interval:
    """The geometric mean over cases of the median ratio of each, [rounds]."""
    rng = np.random.default_rng(0)
    # Resample whole rounds, because times within a round are correlated.
    drawn = [r[rng.integers(len(r), size=(DRAWS, len(r)))] for r in ratios]
    means = np.exp(np.mean([np.log(np.median(draws, axis=1)) for draws in drawn], axis=0))
    value = math.exp(np.mean([np.log(np.median(r)) for r in ratios]))
    return Interval(value, *(float(bound) for bound in np.quantile(means, [0.025, 0.975])))


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Bytes per second that the device reads and writes when it copies `size` float32 numbers."""
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: -x)  # XLA might elide a plain copy
    run = functools.partial(repeat, functools.partial(copy, x), 10)
    jax.block_until_ready(run())
    return 10 * 2 * x.nbytes / min(clock(run)[0] for _ in range(5))


def table(title: str, names: Sequence[str], numbers: Sequence[str], rows: Iterator[Sequence[str]]) -> Table:
    """Makes a table of names and numbers. With several columns of names, a line separates changes of the first."""
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
    """The machine and the package versions of a measurement."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0].device_kind
    return {"device": device, "devices": jax.device_count(), "CPU cores": os.cpu_count(), "versions": found}


def machine_line() -> str:
    """The description of the machine in one line."""
    found = machine()
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    return f"{found['devices']} x {found['device']}, {found['CPU cores']} CPU cores; {versions}"


def write_json(file: Path | None, results: Any) -> None:
    """Writes the results and the description of the machine, if a file is given."""
    if file:
        file.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `bars` reads."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def bars(args: argparse.Namespace) -> Callable[..., Iterable[Any]]:
    """A function that shows a progress bar over a sequence, if stderr is a terminal."""
    screen = Console(stderr=True)
    no_bars = args.no_progress or not screen.is_terminal
    return functools.partial(track, console=screen, transient=True, disable=no_bars)
