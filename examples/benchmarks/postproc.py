"""What a statistics pass costs: `postproc` beside a bare forward pass, a Flax loop, and PyTorch, on this machine.

    python examples/benchmarks/postproc.py

runs one small residual network (ten normalized layers) over the same batches in several ways:

    forward      the network in training mode, jitted, and nothing else
    Flax loop    what users write today: the same, and `batch_stats` that move with every batch (momentum 0.99)
    postproc     jaxbn.linen.postproc or jaxbn.nnx.postproc, from the call to the new statistics and the report
    update_bn    torch.optim.swa_utils.update_bn, if PyTorch is installed
    fvcore       fvcore.nn.precise_bn.update_bn_stats, if fvcore is installed too

The first three run in linen and in NNX, with jaxbn's layers and with stock ones. In each round every program runs once,
in one order and in the next round in the other, and only times of one round are divided by each other: what else the
machine does then hits all alike. Times and ratios are medians over the rounds; the ratio decides whether a goal is met.
CPU time is that of all threads of this process, which does not grow while other processes have the cores. The first
batch, with tracing and compilation, is shown apart, and in none of the other numbers.

The pass need not compute what comes after the last norm, which `forward` does. PyTorch runs as its users run it, not
compiled, with channels last in memory as in JAX, which is faster. `--compiled` adds what XLA says that a batch costs,
of a pass the step `postproc_step`; that is the same in every run.
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
FORWARD, LOOP, POSTPROC = "forward", "Flax loop", "postproc"
TORCH, UPDATE_BN, FVCORE = "PyTorch", "update_bn", "fvcore"
# The most that a pass should take, in multiples of another program on the same network.
GOALS = {"jaxbn": {FORWARD: 1.05, LOOP: 1.0}, "stock": {FORWARD: 1.15, LOOP: 1.0}}
HOSTS = {"both": ("linen", "NNX"), "linen": ("linen",), "nnx": ("NNX",)}

Key = tuple[str, str]  # of a program: its network and its name
Shape = tuple[int, int]  # of a network: the width of its first convolution, and the number of blocks


class Program(NamedTuple):
    """A way to run a network."""

    run: Callable[[int], Any]  # over the first batches, as many as it is told; what it gives may be under way still
    lower: Callable[[], Any] | None = None  # the step of a batch, to be compiled


class Found(NamedTuple):
    """What was measured of a program."""

    first: float  # seconds for its first batch, compilation included
    times: Times  # for all batches


class Ratio(NamedTuple):
    """A program in multiples of another, by the round."""

    over: Key
    under: Key
    wall: np.ndarray  # [rounds]
    cpu: np.ndarray  # [rounds]
    goal: float | None  # the most that it should be


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
    """What the linear layer takes."""
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
    def move(params: Any, stats: Any, x: jax.Array) -> Any:
        _, updates = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return updates["batch_stats"]

    def call(variables: Any, x: jax.Array) -> Any:
        return net.apply(variables, x, train=False)

    def run_loop(count: int) -> Any:
        return functools.reduce(functools.partial(move, params), batches[:count], stats)

    def run_postproc(count: int) -> None:
        jaxbn.linen.postproc(call, variables, batches[:count], progress=False)  # the report waits for the statistics

    steps = jaxbn.linen.make_steps(net, no_loss, optax.identity(), inputs=lambda x: x)
    return {
        FORWARD: Program(
            lambda count: [forward(variables, x) for x in batches[:count]], lambda: forward.lower(variables, example)
        ),
        LOOP: Program(run_loop, lambda: move.lower(params, stats, example)),
        POSTPROC: Program(run_postproc, lambda: lower(steps, example)),
    }


def nnx_programs(norm: Callable[..., Any], shape: Shape, batches: list[jax.Array]) -> dict[str, Program]:
    """The programs of an NNX network."""
    model, example = NnxNet(norm, shape, nnx.Rngs(0)), batches[0]
    graphdef, state = nnx.split(model)
    moving = nnx.clone(model)

    @jax.jit
    def forward(state: Any, x: jax.Array) -> Any:
        return nnx.merge(graphdef, state)(x)

    @nnx.jit
    def move(model: NnxNet, x: jax.Array) -> None:
        model(x)

    def run_loop(count: int) -> Any:
        for x in batches[:count]:
            move(moving, x)
        return nnx.state(moving)

    def run_postproc(count: int) -> None:
        jaxbn.nnx.postproc(model, batches[:count], progress=False)  # the report waits for the statistics

    steps = jaxbn.nnx.make_steps(model, no_loss, optax.identity(), inputs=lambda x: x)
    return {
        FORWARD: Program(
            lambda count: [forward(state, x) for x in batches[:count]], lambda: forward.lower(state, example)
        ),
        LOOP: Program(run_loop, lambda: move.lower(moving, example)),
        POSTPROC: Program(run_postproc, lambda: lower(steps, example)),
    }


def torch_programs(shape: Shape, batches: list[jax.Array]) -> dict[str, Program]:
    """The programs of PyTorch, as far as they are installed for the device that JAX has."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or its threads take the cores even while they wait
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
    """Nothing is trained here."""
    del batch
    return outputs.sum(), {}


def lower(steps: jaxbn.Steps, x: jax.Array) -> Any:
    """The step of the pass, to be compiled."""
    state = jax.eval_shape(steps.init, jax.random.key(0), x)
    return jax.jit(steps.postproc_step).lower(state, jax.eval_shape(steps.start, state, x), x)


def make_programs(args: argparse.Namespace) -> dict[Key, Program]:
    """All programs, over the same batches."""
    images = np.random.default_rng(0).normal(size=(args.batches, args.batch_size, *IMAGE)).astype(np.float32)
    batches, shape = [jnp.asarray(x) for x in images], (args.width, args.blocks)
    makers = {"linen": (linen_programs, jaxbn.linen, nn), "NNX": (nnx_programs, jaxbn.nnx, nnx)}
    networks = {}
    for host in HOSTS[args.api]:
        make, ours, stock = makers[host]
        networks[f"{host}, jaxbn"] = make(ours.BatchNorm, shape, batches)
        networks[f"{host}, stock"] = make(stock.BatchNorm, shape, batches)
    networks[TORCH] = torch_programs(shape, batches)
    return {(network, name): program for network, found in networks.items() for name, program in found.items()}


def measure(programs: dict[Key, Program], args: argparse.Namespace) -> dict[Key, Found]:
    """Runs every program for its first batch, once to warm up, and once in each round."""
    runs = {key: functools.partial(program.run, args.batches) for key, program in programs.items()}
    first = {}
    for key in args.bar(list(runs), "Compiling"):
        first[key] = clock(functools.partial(programs[key].run, 1))[0]
        clock(runs[key])
    times = interleave(runs, args.bar(range(args.repeats), "Measuring"))
    return {key: Found(first[key], times[key]) for key in runs}


def compare(found: dict[Key, Found]) -> list[Ratio]:
    """Each pass over what it is compared with, where that was measured."""
    ratios = []
    for network, name in found:
        if name == POSTPROC:
            unders: dict[Key, float | None] = {(network, n): g for n, g in GOALS[network.split()[-1]].items()}
            unders |= dict.fromkeys([(TORCH, UPDATE_BN), (TORCH, FVCORE)])
        else:
            unders = {(TORCH, FORWARD): None} if name in (UPDATE_BN, FVCORE) else {}
        over = found[network, name].times
        for key, goal in unders.items():
            if key in found:
                under = found[key].times
                ratios.append(Ratio((network, name), key, over.wall / under.wall, over.cpu / under.cpu, goal))
    return ratios


def time_rows(found: dict[Key, Found], args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Milliseconds for a batch."""
    for (network, name), (first, times) in found.items():
        wall, cpu = (1000 * seconds / args.batches for seconds in times)
        yield network, name, f"{first:.1f}", f"{np.median(wall):.2f}", f"{np.median(cpu):.2f}"
    for name in (UPDATE_BN, FVCORE):
        if (TORCH, name) not in found:
            yield TORCH, name, "skipped"


def ratio_rows(ratios: list[Ratio]) -> Iterator[Sequence[str]]:
    """Median, smallest and largest, and what the median should be, to the digits that are shown."""
    for (network, over), (_, under), wall, cpu, goal in ratios:
        numbers = np.median(wall), wall.min(), wall.max(), np.median(cpu)
        verdict = "" if goal is None else f"{goal:.2f} {'met' if round(numbers[0], 2) <= goal else 'missed'}"
        yield network if over == POSTPROC else over, under, *(f"{number:.2f}" for number in numbers), verdict


def cost_rows(programs: dict[Key, Program]) -> Iterator[Sequence[str]]:
    """What XLA says of the step of a batch."""
    for (network, name), program in programs.items():
        if program.lower:
            compiled = program.lower().compile()
            cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            numbers = cost.get("flops"), cost.get("bytes accessed"), memory and memory.temp_size_in_bytes
            yield network, name, *("-" if number is None else f"{number / 1e6:.1f}" for number in numbers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=50, help="in a pass (50)")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch (64)")
    parser.add_argument("--width", type=int, default=16, help="features of the first convolution (16)")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks, of three norms each (3)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds, in which every program runs once (10)")
    parser.add_argument("--api", choices=HOSTS, default="both", help="of Flax (both)")
    parser.add_argument("--compiled", action="store_true", help="show the compiled cost of a batch too")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.batches, args.batch_size, args.width, args.blocks, args.repeats) < 1:
        parser.error("all numbers must be 1 or more")
    args.bar = bars(args)
    return args


def main(argv: Sequence[str] | None = None) -> tuple[dict[Key, Found], list[Ratio]]:
    """Runs the program; returns what it measured."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    programs = make_programs(args)
    found = measure(programs, args)
    ratios = compare(found)
    size = f"{args.batches} batches of {args.batch_size} images, width {args.width}, {1 + 3 * args.blocks} norms"
    numbers = ["First batch (s)", "Per batch (ms)", "CPU (ms)"]
    console.print(table(size, ["Network", "Program"], numbers, time_rows(found, args)))
    title, numbers = f"A pass over another program, {args.repeats} rounds", ["Ratio", "Min", "Max", "CPU", "Goal"]
    console.print(table(title, ["Pass", "Over"], numbers, ratio_rows(ratios)))
    if args.compiled:
        title, numbers = "What XLA says of a batch", ["MFLOP", "MB accessed", "MB temporary"]
        console.print(table(title, ["Network", "Program"], numbers, cost_rows(programs)))
    for name, package in ((UPDATE_BN, "torch"), (FVCORE, "fvcore")):
        if (TORCH, name) not in found:
            console.print(f"{name} is skipped: {package} for the {jax.default_backend()} is not installed.")
    return found, ratios


if __name__ == "__main__":
    main()
