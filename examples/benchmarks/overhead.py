"""Tracing, lowering, compilation and import time of jaxbn compared with Flax.

    python examples/benchmarks/overhead.py

This builds a network of 50 convolutions, each followed by a norm and a ReLU, with Flax's and with jaxbn's layers;
"fused" means that the ReLU is inside the layer. It traces the forward pass in training and a full training step, and
prints the number of equations (nested ones included), the seconds to trace, to lower to StableHLO and to compile, and
the ratios to Flax's layer of the same API (linen or NNX). The programs are timed in alternation for `--rounds` rounds
with cleared caches; `timing.py` documents the ratios and their 95 % intervals. Finally it measures, in fresh processes,
the time that importing jaxbn adds to importing JAX and Flax.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from timing import add_progress_option, bars, machine_line, ratio, table, take_turns, write_json

import jaxbn.linen
import jaxbn.nnx

IMAGES, FEATURES = (8, 8, 8), 16  # a small batch, because the programs do not run
IMPORTS = """
import time
start = time.perf_counter()
import flax.linen, flax.nnx, jax
middle = time.perf_counter()
import jaxbn, jaxbn.linen, jaxbn.nnx
print(middle - start, time.perf_counter() - middle)
"""
WHAT, STAGES = ("forward", "step"), ("tracing", "lowering", "compilation")


class Norm(NamedTuple):
    """A normalization layer."""

    layer: Callable[..., Any]
    flax: str  # the name of the layer to compare with
    fused: bool = False


NORMS = {
    "flax": Norm(nn.BatchNorm, "flax"),
    "jaxbn": Norm(jaxbn.linen.BatchNorm, "flax"),
    "jaxbn fused": Norm(jaxbn.linen.BatchNorm, "flax", fused=True),
    "flax NNX": Norm(nnx.BatchNorm, "flax NNX"),
    "jaxbn NNX": Norm(jaxbn.nnx.BatchNorm, "flax NNX"),
    "jaxbn NNX fused": Norm(jaxbn.nnx.BatchNorm, "flax NNX", fused=True),
}
Key = tuple[str, str]  # of a program: forward or step, and the norm


class LinenNet(nn.Module):
    """Convolutions, each followed by a norm and a ReLU."""

    norm: Norm
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = nn.Conv(FEATURES, (3, 3), use_bias=False)(x)
            if self.norm.fused:
                x = self.norm.layer(use_running_average=False, activation=jax.nn.relu)(x)
            else:
                x = jax.nn.relu(self.norm.layer(use_running_average=False)(x))
        return x


class NnxNet(nnx.Module):
    """The same network in NNX."""

    def __init__(self, norm: Norm, layers: int):
        rngs, fields = nnx.Rngs(0), {"activation": jax.nn.relu} if norm.fused else {}
        self.convs = nnx.List([nnx.Conv(FEATURES, FEATURES, (3, 3), use_bias=False, rngs=rngs) for _ in range(layers)])
        self.norms = nnx.List([norm.layer(FEATURES, rngs=rngs, **fields) for _ in range(layers)])
        self.activation = (lambda x: x) if norm.fused else jax.nn.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.activation(norm(conv(x)))
        return x


class Program(NamedTuple):
    """A function to trace, and the shapes of its arguments."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]


def programs_of(norm: Norm, layers: int) -> dict[str, Program]:
    """The forward pass in training with updated averages, and a step of gradient descent."""
    x = jax.ShapeDtypeStruct((*IMAGES, FEATURES), jnp.float32)
    if norm.flax == "flax":
        net = LinenNet(norm, layers)
        variables = jax.eval_shape(net.init, jax.random.key(0), x)
        params, stats = variables["params"], variables["batch_stats"]

        def forward(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            y, updates = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.square(y).mean(), updates["batch_stats"]
    else:
        model = nnx.eval_shape(lambda: NnxNet(norm, layers))
        graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def forward(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            # A copy, because the call updates the statistics in place.
            model = nnx.merge(graphdef, params, stats, copy=True)
            return jnp.square(model(x)).mean(), nnx.state(model, nnx.BatchStat)

    def step(params: Any, stats: Any, x: jax.Array) -> Any:
        (loss, stats), grads = jax.value_and_grad(forward, has_aux=True)(params, stats, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), stats, loss

    return dict(zip(WHAT, (Program(run, (params, stats, x)) for run in (forward, step)), strict=True))


def make(program: Program) -> list[float]:
    """Seconds to trace, to lower and to compile a program with empty caches."""
    jax.clear_caches()
    # A new jit per round: a reused one would return its cached trace.
    fresh = jax.jit(program.run)
    times = [time.perf_counter()]
    traced = fresh.trace(*program.arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return np.diff(times).tolist()


def count_equations(program: Any) -> int:
    """The number of equations of a program, nested ones included."""
    # Sub-programs of scan, cond, pjit and custom derivatives are parameters of their equation.
    inner = [leaf for e in program.eqns for leaf in jax.tree.leaves(e.params) if hasattr(leaf, "eqns")]
    return len(program.eqns) + sum(map(count_equations, inner))


def time_imports() -> list[float]:
    """Seconds to import JAX and Flax, and then jaxbn, in a fresh process."""
    output = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True).stdout
    return [float(seconds) for seconds in output.split()]


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Disables the compilation cache on disk."""
    before = jax.config.jax_enable_compilation_cache
    use_cache(False)
    try:
        yield
    finally:
        use_cache(before)


def use_cache(used: bool) -> None:
    """Enables or disables the cache; JAX reads the flag again only after a reset."""
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()


def show_counts(count: int, flax: int) -> tuple[str, str]:
    """The number of equations, and the ratio to Flax's."""
    return str(count), f"{count / flax:.2f}"


def show_seconds(seconds: np.ndarray, flax: np.ndarray) -> tuple[str, str]:
    """The median, and the ratio to Flax's."""
    return f"{np.median(seconds):.2f}", str(ratio(seconds, flax))


def rows(found: dict[Key, Any], show: Callable[[Any, Any], tuple[str, str]]) -> Iterator[Sequence[str]]:
    """Table rows: one per norm, with both programs."""
    for name, norm in NORMS.items():
        yield name, *(cell for what in WHAT for cell in show(found[what, name], found[what, norm.flax]))


def records(equations: dict[Key, int], seconds: dict[Key, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The numbers of all rounds in JSON format."""
    for (what, name), times in seconds.items():
        stages = dict(zip(STAGES, times.T.tolist(), strict=True))
        yield {"program": what, "norm": name, "equations": equations[what, name]} | stages


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=50, help="layers of the network (50)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.layers, args.rounds) < 1:
        parser.error("--layers and --rounds must be 1 or more")
    args.bar = bars(args)
    return args


def main(argv: Sequence[str] | None = None) -> tuple[dict[Key, int], dict[Key, np.ndarray], np.ndarray]:
    """Runs the program; returns equations and seconds of each program, and import times."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    made = {name: programs_of(norm, args.layers) for name, norm in NORMS.items()}
    programs = {(what, name): made[name][what] for name in made for what in WHAT}
    equations = {key: count_equations(jax.make_jaxpr(p.run)(*p.arguments)) for key, p in programs.items()}
    with uncached():
        rounds = args.bar(range(args.rounds), "Compiling")
        seconds = take_turns(list(programs), rounds, lambda key: make(programs[key]))
    imports = np.array([time_imports() for _ in args.bar(range(args.rounds), "Importing")])
    tables = {"equations": rows(equations, show_counts)}
    for i, stage in enumerate(STAGES):
        tables[f"{stage} (s)"] = rows({key: s[:, i] for key, s in seconds.items()}, show_seconds)
    for title, found in tables.items():
        console.print(table(f"{args.layers} layers: {title}", ["Norm"], ["forward", "/ Flax", "step", "/ Flax"], found))
    flax, ours = np.median(imports, axis=0)
    console.print(f"Importing jaxbn takes {ours:.2f} s in addition to {flax:.2f} s for JAX and Flax.")
    console.print(machine_line())
    write_json(args.json, {"programs": list(records(equations, seconds)), "imports": imports.tolist()})
    return equations, seconds, imports


if __name__ == "__main__":
    main()
