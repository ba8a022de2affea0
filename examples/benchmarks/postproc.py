"""Cost of a statistics pass: `postproc` compared with a forward pass, a Flax loop, and PyTorch, on this machine.

    python examples/benchmarks/postproc.py

This runs a small residual network with ten BatchNorm layers over the same batches in several ways:

    forward      the jitted network in training mode
    Flax loop    the usual workaround in Flax: forward passes that update `batch_stats` (momentum 0.99)
    postproc     jaxbn.linen.postproc or jaxbn.nnx.postproc, including installation and report
    stages       the same with consistent=True; all values that wait between the stages stay on the device
    on host      the same with memory=0: all of them wait in host memory
    update_bn    torch.optim.swa_utils.update_bn, if PyTorch is installed
    fvcore       fvcore.nn.precise_bn.update_bn_stats, if fvcore is also installed

The first five run in linen and in NNX, with jaxbn's and with Flax's layers. Each program runs once per round, in
alternating order, and ratios only compare times of the same round, so that background load affects all programs alike.
Times and ratios are medians over the rounds; the median ratio decides whether a goal is met. CPU time covers all
threads of this process and does not include waiting for other processes. The first batch includes tracing and
compilation; it is reported separately and excluded from all other numbers.

The pass skips the operations after the last norm, which `forward` computes. PyTorch runs in eager mode, the usual way,
with the faster channels-last memory format. `--compiled` adds the cost per batch according to XLA (`postproc_step` for
the pass), which is the same in every run.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from timing import Times, add_progress_option, bars, clock, interleave, table

import jaxbn
import jaxbn.linen
import jaxbn.nnx

IMAGE, CLASSES = (32, 32, 3), 10
FORWARD, LOOP, POSTPROC, STAGES, HOST = "forward", "Flax loop", "postproc", "stages", "on host"
TORCH, UPDATE_BN, FVCORE = "PyTorch", "update_bn", "fvcore"
# The options of the statistics passes, and the largest acceptable time relative to another program on the same network.
PASSES: dict[str, dict[str, Any]] = {
    POSTPROC: {},
    STAGES: {"consistent": True},
    HOST: {"consistent": True, "memory": 0},
}
GOALS: dict[str, dict[str, dict[str, float | None]]] = {
    POSTPROC: {"jaxbn": {FORWARD: 1.05, LOOP: 1.0}, "stock": {FORWARD: 1.15, LOOP: 1.0}},
    STAGES: {"jaxbn": {FORWARD: 1.2}, "stock": {FORWARD: 1.2}},
    HOST: {"jaxbn": {FORWARD: None}, "stock": {FORWARD: None}},
}
APIS = {"both": ("linen", "NNX"), "linen": ("linen",), "nnx": ("NNX",)}

Key = tuple[str, str]  # of a program: its network and its name
Shape = tuple[int, int]  # of a network: the width of its first convolution, and the number of blocks


class Program(NamedTuple):
    """A way to run a network."""

    run: Callable[[int], Any]  # takes a number of batches; the result may still be in progress
    lower: Callable[[], Any] | None = None  # lowers the step of one batch


class Found(NamedTuple):
    """The measurements of a program."""

    first: float  # seconds for its first batch, compilation included
    times: Times  # for all batches


class Ratio(NamedTuple):
    """The time of a program relative to another one, per round."""

    over: Key
    under: Key
    wall: np.ndarray  # [rounds]
    cpu: np.ndarray  # [rounds]
    goal: float | None  # the largest acceptable median


def places(shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Inputs, features and stride of each block; all but the first halve the image and double the width."""
    width, blocks = shape
    for block in range(blocks):
        yield width << max(block - 1, 0), width << block, 2 if block else 1


class LinenNet(nn.Module):
    """A convolution, residual blocks, and a linear layer; each convolution is followed by a norm."""

    norm: Callable[..., Any]
    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def normed(x: jax.Array, features: int, size: int, stride: int) -> jax.Array:
            x = nn.Conv(features, (size, size), stride, padding=size // 2, use_bias=False)(x)
            return self.norm(use_running_average=not train)(x)

        x = nn.relu(normed(x, self.shape[0], 3, 1))
        for _, features, stride in places(self.shape):
            y = nn.relu(normed(x, features, 3, stride))
            x = nn.relu(normed(y, features, 3, 1) + normed(x, features, 1, stride))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """The same network in NNX."""

    def __init__(self, norm: Callable[..., Any], shape: Shape, rngs: nnx.Rngs):
        def normed(inputs: int, features: int, size: int, stride: int) -> nnx.Sequential:
            conv = nnx.Conv(inputs, features, (size, size), stride, padding=size // 2, use_bias=False, rngs=rngs)
            return nnx.Sequential(conv, norm(features, rngs=rngs))

        self.stem = normed(IMAGE[-1], shape[0], 3, 1)
        self.first = nnx.List([normed(inputs, features, 3, stride) for inputs, features, stride in places(shape)])
        self.second = nnx.List([normed(features, features, 3, 1) for _, features, _ in places(shape)])
        self.shortcut = nnx.List([normed(inputs, features, 1, stride) for inputs, features, stride in places(shape)])
        self.head = nnx.Linear(features_of(shape), CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for first, second, shortcut in zip(self.first, self.second, self.shortcut, strict=True):
            x = nnx.relu(second(nnx.relu(first(x))) + shortcut(x))
        return self.head(x.mean((1, 2)))


def torch_net(torch: Any, shape: Shape) -> Any:
    """The same network in PyTorch."""

    def normed(inputs: int, features: int, size: int, stride: int) -> Any:
        conv = torch.nn.Conv2d(inputs, features, size, stride, padding=size // 2, bias=False)
        return torch.nn.Sequential(conv, torch.nn.BatchNorm2d(features))

    class Block(torch.nn.Module):
        def __init__(self, inputs: int, features: int, stride: int):
            super().__init__()
            self.first, self.second = normed(inputs, features, 3, stride), normed(features, features, 3, 1)
            self.shortcut = normed(inputs, features, 1, stride)

        def forward(self, x: Any) -> Any:
            return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))

    stem, blocks = normed(IMAGE[-1], shape[0], 3, 1), [Block(*place) for place in places(shape)]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(features_of(shape), CLASSES)]
    return torch.nn.Sequential(stem, torch.nn.ReLU(), *blocks, *head)


def features_of(shape: Shape) -> int:
    """The number of inputs of the linear layer."""
    return [features for _, features, _ in places(shape)][-1]


def linen_programs(norm: Callable[..., Any], shape: Shape, batches: list[jax.Array]) -> dict[str, Program]:
    """The programs of a linen network."""
    net, example = LinenNet(norm, shape), batches[0]
    variables = jax.jit(functools.partial(net.init, train=True))(jax.random.key(0), example)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def forward(variables: Any, x: jax.Array) -> Any:
        return net.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    @jax.jit
    def update(params: Any, stats: Any, x: jax.Array) -> Any:
        _, updates = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    def call(variables: Any, x: jax.Array) -> Any:
        return net.apply(variables, x, train=False)

    def run_loop(count: int) -> Any:
        # Each update waits for the last one on the device only; the host does not block.
        return functools.reduce(functools.partial(update, params), batches[:count], stats)

    def run_postproc(options: Any, count: int) -> None:
        # The report waits for the statistics.
        jaxbn.linen.postproc(call, variables, batches[:count], progress=False, **options)

    steps = jaxbn.linen.make_steps(net, no_loss, optax.identity(), inputs=lambda x: x)
    return {
        FORWARD: Program(
            lambda count: [forward(variables, x) for x in batches[:count]], lambda: forward.lower(variables, example)
        ),
        LOOP: Program(run_loop, lambda: update.lower(params, stats, example)),
        **passes(run_postproc, lambda: lower(steps, example)),
    }


def nnx_programs(norm: Callable[..., Any], shape: Shape, batches: list[jax.Array]) -> dict[str, Program]:
    """The programs of an NNX network."""
    model, example = NnxNet(norm, shape, nnx.Rngs(0)), batches[0]
    graphdef, state = nnx.split(model)
    # The loop updates statistics in place; `postproc` below must start from the initial ones.
    updated = nnx.clone(model)

    @jax.jit
    def forward(state: Any, x: jax.Array) -> Any:
        return nnx.merge(graphdef, state)(x)

    @nnx.jit
    def update(model: NnxNet, x: jax.Array) -> None:
        model(x)

    def run_loop(count: int) -> Any:
        for x in batches[:count]:
            update(updated, x)
        return nnx.state(updated)

    def run_postproc(options: Any, count: int) -> None:
        # The report waits for the statistics.
        jaxbn.nnx.postproc(model, batches[:count], progress=False, **options)

    steps = jaxbn.nnx.make_steps(model, no_loss, optax.identity(), inputs=lambda x: x)
    return {
        FORWARD: Program(
            lambda count: [forward(state, x) for x in batches[:count]], lambda: forward.lower(state, example)
        ),
        LOOP: Program(run_loop, lambda: update.lower(updated, example)),
        **passes(run_postproc, lambda: lower(steps, example)),
    }


def passes(run: Callable[[Any, int], Any], lower_step: Callable[[], Any]) -> dict[str, Program]:
    """The programs of the statistics passes; only the step of the plain one is a single program."""
    return {
        name: Program(functools.partial(run, options), lower_step if name == POSTPROC else None)
        for name, options in PASSES.items()
    }


def torch_programs(shape: Shape, batches: list[jax.Array]) -> dict[str, Program]:
    """The programs of PyTorch that are installed for the device of JAX."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # by default, waiting OpenMP threads occupy the cores
    try:
        import torch
        from torch.optim.swa_utils import update_bn
    except ImportError:
        return {}
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not (jax.default_backend() == "gpu" and torch.cuda.is_available()):
        return {}
    where = {"device": device, "memory_format": torch.channels_last}
    net = torch_net(torch, shape).to(**where)
    # Copy to the device in advance, as for JAX: only the pass is measured.
    images = [torch.tensor(np.moveaxis(np.asarray(x), -1, 1)).to(**where) for x in batches]

    def program(run: Callable[[list[Any]], Any]) -> Program:
        def run_to_the_end(count: int) -> None:
            with torch.no_grad():
                run(images[:count])
            if device == "cuda":
                torch.cuda.synchronize()

        return Program(run_to_the_end)

    programs = {
        FORWARD: program(lambda images: [net(x) for x in images]),
        UPDATE_BN: program(lambda images: update_bn(images, net)),
    }
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        return programs
    return programs | {FVCORE: program(lambda images: update_bn_stats(net, images, len(images)))}


def no_loss(outputs: jax.Array, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A placeholder loss; this benchmark does not train."""
    del batch
    return outputs.sum(), {}


def lower(steps: jaxbn.Steps, x: jax.Array) -> Any:
    """Lowers one step of the statistics pass."""
    state = jax.eval_shape(steps.init, jax.random.key(0), x)
    return jax.jit(steps.postproc_step).lower(state, jax.eval_shape(steps.start, state, x), x)


def make_programs(args: argparse.Namespace) -> dict[Key, Program]:
    """Makes all programs, over the same batches."""
    images = np.random.default_rng(0).normal(size=(args.batches, args.batch_size, *IMAGE)).astype(np.float32)
    batches, shape = [jnp.asarray(x) for x in images], (args.width, args.blocks)
    makers = {"linen": (linen_programs, jaxbn.linen, nn), "NNX": (nnx_programs, jaxbn.nnx, nnx)}
    networks = {}
    for api in APIS[args.api]:
        make, ours, stock = makers[api]
        networks[f"{api}, jaxbn"] = make(ours.BatchNorm, shape, batches)
        networks[f"{api}, stock"] = make(stock.BatchNorm, shape, batches)
    networks[TORCH] = torch_programs(shape, batches)
    return {(network, name): program for network, found in networks.items() for name, program in found.items()}


def measure(programs: dict[Key, Program], args: argparse.Namespace) -> dict[Key, Found]:
    """Runs every program for its first batch, once as a warm-up, and once per round."""
    runs = {key: functools.partial(program.run, args.batches) for key, program in programs.items()}
    first = {}
    for key in args.bar(list(runs), "Compiling"):
        # The first call compiles; the second warms up caches with the full number of batches.
        first[key] = clock(functools.partial(programs[key].run, 1))[0]
        clock(runs[key])
    times = interleave(runs, args.bar(range(args.repeats), "Measuring"))
    return {key: Found(first[key], times[key]) for key in runs}


def compare(found: dict[Key, Found]) -> list[Ratio]:
    """The ratios of each pass to the programs that it is compared with, as far as these were measured."""
    ratios = []
    for network, name in found:
        if name in PASSES:
            unders = {(network, under): goal for under, goal in GOALS[name][network.split()[-1]].items()}
            unders |= dict.fromkeys([(TORCH, UPDATE_BN), (TORCH, FVCORE)] if name == POSTPROC else [])
        else:
            unders = {(TORCH, FORWARD): None} if name in (UPDATE_BN, FVCORE) else {}
        over = found[network, name].times
        for key, goal in unders.items():
            if key in found:
                under = found[key].times
                ratios.append(Ratio((network, name), key, over.wall / under.wall, over.cpu / under.cpu, goal))
    return ratios


def time_rows(found: dict[Key, Found], args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Table rows: milliseconds per batch."""
    for (network, name), (first, times) in found.items():
        wall, cpu = (1000 * seconds / args.batches for seconds in times)
        yield network, name, f"{first:.1f}", f"{np.median(wall):.2f}", f"{np.median(cpu):.2f}"
    for name in (UPDATE_BN, FVCORE):
        if (TORCH, name) not in found:
            yield TORCH, name, "skipped"


def ratio_rows(ratios: list[Ratio]) -> Iterator[Sequence[str]]:
    """Table rows: median and maximum of each ratio, and whether the rounded median meets the goal."""
    for (network, over), (_, under), wall, cpu, goal in ratios:
        numbers = [f"{number:.2f}" for number in (np.median(wall), wall.max(), np.median(cpu))]
        verdict = "" if goal is None else f"{goal:.2f} {'met' if round(np.median(wall), 2) <= goal else 'missed'}"
        yield over if network == TORCH else f"{network}, {over}", under, *numbers, verdict


def cost_rows(programs: dict[Key, Program]) -> Iterator[Sequence[str]]:
    """Table rows: the cost per batch according to XLA."""
    for (network, name), program in programs.items():
        if program.lower:
            compiled = program.lower().compile()
            cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            numbers = cost.get("flops"), cost.get("bytes accessed"), memory and memory.temp_size_in_bytes
            yield network, name, *("-" if number is None else f"{number / 1e6:.1f}" for number in numbers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=50, help="batches per pass (50)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (64)")
    parser.add_argument("--width", type=int, default=16, help="features of the first convolution (16)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks with three norms each (3)")
    parser.add_argument("--repeats", type=int, default=10, help="number of rounds (10)")
    parser.add_argument("--api", choices=APIS, default="both", help="API of Flax (both)")
    parser.add_argument("--compiled", action="store_true", help="also show the compiled cost per batch")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.batches, args.batch_size, args.width, args.blocks, args.repeats) < 1:
        parser.error("all sizes and counts must be 1 or more")
    args.bar = bars(args)
    return args


def main(argv: Sequence[str] | None = None) -> tuple[dict[Key, Found], list[Ratio]]:
    """Runs the program; returns its measurements."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    programs = make_programs(args)
    found = measure(programs, args)
    ratios = compare(found)
    size = f"{args.batches} batches of {args.batch_size} images, width {args.width}, {1 + 3 * args.blocks} norms"
    numbers = ["First batch (s)", "Per batch (ms)", "CPU (ms)"]
    console.print(table(size, ["Network", "Program"], numbers, time_rows(found, args)))
    title, numbers = f"Pass relative to other programs, {args.repeats} rounds", ["Ratio", "Max", "CPU", "Goal"]
    console.print(table(title, ["Pass", "Over"], numbers, ratio_rows(ratios)))
    if args.compiled:
        title, numbers = "Cost per batch according to XLA", ["MFLOP", "MB accessed", "MB temporary"]
        console.print(table(title, ["Network", "Program"], numbers, cost_rows(programs)))
    for name, package in ((UPDATE_BN, "torch"), (FVCORE, "fvcore")):
        if (TORCH, name) not in found:
            console.print(f"{name} is skipped: {package} for the {jax.default_backend()} is not installed.")
    return found, ratios


if __name__ == "__main__":
    main()
