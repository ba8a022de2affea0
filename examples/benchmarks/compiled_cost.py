"""Compiled cost of batch normalization on an NVIDIA H100 and a TPU v5e; neither device is needed.

    pip install "jax-cuda12-plugin==$(python -c 'import jax; print(jax.__version__)')" libtpu
    python examples/benchmarks/compiled_cost.py --device h100 --what train

This compiles, ahead of time, one layer forward and backward (alone, followed by a ReLU, and with a residual and a
ReLU), a training step of ResNet-50 (He et al., 2015; SGD, the last scale of a block starts at zero), and its
evaluation. It compares no normalization, Flax's layers and jaxbn's layers; the latter with activation and residual
inside (fused), with recomputation in the backward pass, and folded. For each program it prints these numbers, and their
ratios to those of Flax's default layer (`use_fast_variance=True`):

    moved        bytes that the kernels read and write; `hlo_cost.py` documents how they are counted
    by norm      bytes moved by the norm: the difference to the program without a norm
    temporary    memory in addition to inputs and outputs
    kernels      number of kernel launches
    accessed     bytes accessed according to XLA, on-chip memory included, if XLA reports them (TPU)
    collectives  number of collectives between the chips

For a single layer, bytes are multiples of N, the size of its input. Numbers and batch sizes are per chip. No program
runs, so the same versions give the same numbers on every machine.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chips  # before JAX
import flax.linen as nn
import hlo_cost
import jax
import jax.numpy as jnp
import numpy as np
from chips import DEVICES, Program
from flax import nnx
from flax.nnx import bridge
from hlo_cost import Cost
from jax.typing import DTypeLike
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from timing import add_progress_option, bars

import jaxbn.linen
import jaxbn.nnx
from jaxbn import checkpoint_policies as policies

IMAGE, CLASSES, STAGES, EXPANSION = (224, 224, 3), 1000, (3, 4, 6, 3), 4
LAYER = (28, 28, 128)  # input of a single layer without the batch axis, as in the second stage
NO_NORM, FLAX = "none", "flax"  # the baselines of the column "by norm" and of the ratios


class Form(NamedTuple):
    """A way to normalize; a row of each table in which it differs from the other forms."""

    layer: Callable[..., Callable[..., jax.Array]]  # maps fields to a layer; a fused layer also takes a residual
    fused: bool = False  # whether activation and residual are inside the layer
    policy: Callable[..., Any] | None = None  # checkpoint policy of recomputation in the backward pass
    in_halves: bool = False  # whether to recompute half of the network at once, instead of each block
    fold: Callable[..., Any] | None = None  # transformation of the network before evaluation

    @property
    def in_layers(self) -> bool:
        """Whether the layer itself differs, and not only the way in which the network runs."""
        return self.policy is None and self.fold is None


def no_norm(**fields: Any) -> Callable[..., jax.Array]:
    """A layer without normalization."""
    del fields
    return lambda x: x


def in_linen(layer: Callable[..., nnx.Module]) -> Callable[..., Callable[..., jax.Array]]:
    """Wraps an NNX layer for a linen network."""

    def make(**fields: Any) -> Callable[..., jax.Array]:
        return lambda x, **call: bridge.ToLinen(layer, args=x.shape[-1:], kwargs=fields)(x, **call)

    return make


_recompute_all = jax.checkpoint_policies.nothing_saveable
_fused = functools.partial(Form, jaxbn.linen.BatchNorm, fused=True)
FORMS = {
    NO_NORM: Form(no_norm),
    FLAX: Form(nn.BatchNorm),
    "flax-safe": Form(functools.partial(nn.BatchNorm, use_fast_variance=False)),
    "flax-nnx": Form(in_linen(nnx.BatchNorm)),
    "flax-remat": Form(nn.BatchNorm, policy=_recompute_all),
    "jaxbn": Form(jaxbn.linen.BatchNorm),
    "jaxbn-nnx": Form(in_linen(jaxbn.nnx.BatchNorm)),
    "fused": _fused(),
    "fused-nnx": Form(in_linen(jaxbn.nnx.BatchNorm), fused=True),
    "fused-outputs": _fused(policy=policies.save_norm_inputs_and_outputs),
    "fused-inputs": _fused(policy=policies.save_norm_inputs, in_halves=True),
    "fused-inner": _fused(policy=policies.save_inner_norm_inputs),
    "fused-statistics": _fused(policy=policies.save_norm_statistics),
    "fused-remat": _fused(policy=_recompute_all),
    "flax-fold": Form(nn.BatchNorm, fold=jaxbn.linen.fold),
    "fused-fold": _fused(fold=jaxbn.linen.fold),
}


class Normed(nn.Module):
    """A norm, the sum with a residual, and an activation, in one layer or as separate operations."""

    form: Form
    train: bool
    dtype: DTypeLike
    activation: Callable[[jax.Array], jax.Array] | None = jax.nn.relu
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        layer = functools.partial(
            self.form.layer,
            use_running_average=not self.train,
            momentum=0.9,
            dtype=self.dtype,
            scale_init=self.scale_init,
        )
        if self.form.fused:
            return layer(activation=self.activation)(x, residual=residual)
        y = layer()(x)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


class Block(nn.Module):
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions with a shortcut."""

    width: int
    stride: int
    normed: Callable[..., Normed]
    conv: Callable[..., nn.Conv]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = EXPANSION * self.width
        y = self.normed()(self.conv(self.width, (1, 1))(x))
        y = self.normed()(self.conv(self.width, (3, 3), self.stride)(y))
        y = self.conv(features, (1, 1))(y)
        if x.shape != y.shape:
            x = self.normed(activation=None)(self.conv(features, (1, 1), self.stride)(x))
        return self.normed(scale_init=nn.initializers.zeros)(y, x)


class BasicBlock(nn.Module):
    """A basic block: two 3x3 convolutions with a shortcut."""

    width: int
    stride: int
    normed: Callable[..., Normed]
    conv: Callable[..., nn.Conv]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.normed()(self.conv(self.width, (3, 3), self.stride)(x))
        y = self.conv(self.width, (3, 3))(y)
        if x.shape != y.shape:
            x = self.normed(activation=None)(self.conv(self.width, (1, 1), self.stride)(x))
        return self.normed(scale_init=nn.initializers.zeros)(y, x)


class Half(nn.Module):
    """Two consecutive stages of the network."""

    first: int
    stages: Sequence[int]
    block: Callable[..., nn.Module]
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, blocks in list(enumerate(self.stages))[self.first : self.first + 2]:
            for i in range(blocks):
                x = self.block(self.width << stage, 2 if stage and not i else 1)(x)
        return x


class ResNet(nn.Module):
    """A ResNet, by default ResNet-50, with the stride in the 3x3 convolutions."""

    form: Form
    train: bool
    dtype: DTypeLike
    stages: Sequence[int] | None = None
    block: type[nn.Module] = Block
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normed = functools.partial(Normed, self.form, self.train, self.dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        block, half = self._in_pieces()
        block = functools.partial(block, normed=normed, conv=conv)
        half = functools.partial(half, stages=self.stages or STAGES, block=block, width=self.width)
        x = normed()(conv(self.width, (7, 7), 2, padding=3)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = half(2)(half(0)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)

    def _in_pieces(self) -> tuple[Callable[..., nn.Module], Callable[..., Half]]:
        """The modules of a block and of a half; one of them is rematerialized if the form has a policy."""
        form = self.form
        if form.policy is None:
            return self.block, Half
        again = functools.partial(nn.remat, policy=form.policy)
        return (self.block, again(Half)) if form.in_halves else (again(self.block), Half)


def shapes_of(module: nn.Module, *data: jax.ShapeDtypeStruct) -> Any:
    """Shapes of the variables of a module."""
    return jax.eval_shape(module.init, jax.random.key(0), *data)


def layer_program(
    form: Form, dtype: DTypeLike, batch: int, *, activation: Callable[..., Any] | None, residual: bool
) -> Program:
    """The forward and backward pass of one layer."""
    layer = Normed(form, True, dtype, activation)
    x = jax.ShapeDtypeStruct((batch, *LAYER), dtype)
    inputs = (x, x) if residual else (x,)

    def run(variables: Any, dy: jax.Array, *inputs: jax.Array) -> Any:
        rest = {name: variables[name] for name in variables if name != "params"}

        def forward(params: Any, *inputs: jax.Array) -> Any:
            return layer.apply({"params": params, **rest}, *inputs, mutable=["batch_stats"])

        # One program for both passes, so that XLA may reuse reads and saved arrays as in a network.
        y, pull, updates = jax.vjp(forward, variables.get("params", {}), *inputs, has_aux=True)
        return y, updates, pull(dy)

    return Program(run, shapes_of(layer, *inputs), (x, *inputs))


def train_program(form: Form, dtype: DTypeLike, batch: int, *, size: int = IMAGE[0], **network: Any) -> Program:
    """A training step with stochastic gradient descent."""
    net = ResNet(form, True, dtype, **network)
    images = jax.ShapeDtypeStruct((batch, size, size, IMAGE[-1]), dtype)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def step(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
        rest = {name: variables[name] for name in variables if name != "params"}

        def loss(params: Any) -> Any:
            logits, updates = net.apply({"params": params, **rest}, images, mutable=["batch_stats"])
            of_label = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -of_label.mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **updates}, value

    # Donated as in a real loop: the new variables reuse the memory of the old ones.
    return Program(step, shapes_of(net, images), (images, labels), donates=True)


def eval_program(form: Form, dtype: DTypeLike, batch: int) -> Program:
    """The evaluation of a batch."""
    net = ResNet(form, False, dtype)
    images = jax.ShapeDtypeStruct((batch, *IMAGE), dtype)
    if form.fold is None:
        return Program(net.apply, shapes_of(net, images), (images,))
    # Folding reads values, so initialize for real, on a small image: the variables do not depend on its size.
    small = jnp.ones((1, 32, 32, 3), dtype)
    run, variables, _ = form.fold(net.apply, jax.jit(net.init)(jax.random.key(0), small), small)
    return Program(run, jax.eval_shape(lambda: variables), (images,))


class What(NamedTuple):
    """A program to compile for every form."""

    title: str
    program: Callable[[Form, DTypeLike, int], Program]
    batch: int | None = None  # examples per chip; None: the default of the device
    forms: Callable[[Form], bool] = lambda form: True  # selects the forms that differ in this program


def _layer(title: str, *, activation: Callable[..., Any] | None = None, residual: bool = False) -> What:
    program = functools.partial(layer_program, activation=activation, residual=residual)
    fuses = activation is not None
    return What(title, program, 256, lambda form: form.in_layers and (fuses or not form.fused))


WHAT = {
    "layer": _layer("layer"),
    "layer-relu": _layer("layer, ReLU", activation=jax.nn.relu),
    "layer-residual": _layer("layer, residual, ReLU", activation=jax.nn.relu, residual=True),
    "train": What("ResNet-50 training", train_program, forms=lambda form: form.fold is None),
    "eval": What("ResNet-50 evaluation", eval_program, 64, lambda form: form.policy is None),
}


class Group(NamedTuple):
    """The settings that all programs of a table share."""

    device: str
    what: str
    dtype: str
    batch: int  # examples per chip

    @property
    def unit(self) -> tuple[str, float]:
        """The unit of bytes in the table: its name and size."""
        if self.what.startswith("layer"):
            size = self.batch * int(np.prod(LAYER)) * jnp.dtype(self.dtype).itemsize
            return f"N = {size / 1e6:.1f} MB", size
        return "GB", 1e9


def cost_of(group: Group, form: str) -> Cost | None:
    """Compiles a program and measures its cost; None if it does not fit into the memory of the device."""
    batch = DEVICES[group.device].chips * group.batch
    with chips.quiet():
        program = WHAT[group.what].program(FORMS[form], jnp.dtype(group.dtype), batch)
        compiled = chips.compile_for(group.device, program)
    return compiled and hlo_cost.measure(compiled)


class Column(NamedTuple):
    """A column of a table."""

    title: str
    of: Callable[[Cost, Cost | None], float | None]  # takes a cost, and the cost of the program without a norm
    in_bytes: bool = True


COLUMNS = [
    Column("moved", lambda cost, bare: cost.moved),
    Column("by norm", lambda cost, bare: bare and cost.moved - bare.moved),
    Column("temporary", lambda cost, bare: cost.temporary),
    Column("kernels", lambda cost, bare: cost.kernels, in_bytes=False),
    Column("accessed", lambda cost, bare: cost.accessed),
]


def cells(column: Column, costs: dict[str, Cost | None], unit: float) -> Iterator[tuple[str, str]]:
    """The number of each program, and its ratio to the number of Flax's layer."""
    known = {name: cost and column.of(cost, costs.get(NO_NORM)) for name, cost in costs.items()}
    for number in known.values():
        if number is None:
            yield "-", "-"
        else:
            text = f"{number / unit:.2f}" if column.in_bytes else f"{number}"
            yield text, f"{number / known[FLAX]:.2f}" if known.get(FLAX) else "-"


def table(group: Group, costs: dict[str, Cost | None]) -> Table:
    """A row for each form, without the columns that would be empty."""
    device, (unit, size) = DEVICES[group.device], group.unit
    examples = f"{group.batch} examples{' per chip' if device.chips > 1 else ''}"
    made = Table("Norm", title=f"{device.title}, {WHAT[group.what].title}, {group.dtype}, {examples} ({unit})")
    found = [list(costs)]
    for column in COLUMNS:
        pairs = list(cells(column, costs, size))
        if any(text != "-" for text, _ in pairs):
            made.add_column(column.title, justify="right", no_wrap=True)
            made.add_column("x", justify="right", no_wrap=True)
            found += zip(*pairs, strict=True)
    for op in hlo_cost.COLLECTIVES:
        counts = [cost.collectives.get(op, 0) if cost else "-" for cost in costs.values()]
        if any(count not in (0, "-") for count in counts):
            made.add_column(op, justify="right", no_wrap=True)
            found.append([str(count) for count in counts])
    for row in zip(*found, strict=True):
        made.add_row(*row)
    return made


def records(group: Group, costs: dict[str, Cost | None]) -> list[dict[str, Any]]:
    """The costs in JSON format."""
    return [group._asdict() | {"norm": name, "cost": cost and cost._asdict()} for name, cost in costs.items()]


def show(made: Table, console: Console) -> None:
    """Prints a table without line breaks, even if it is wider than the screen."""
    whole = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, whole, made).maximum)
    console.print(made)


def versions() -> dict[str, str]:
    """Versions of the packages that determine the numbers."""
    found = {}
    for package in ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--device", choices=DEVICES, default=list(DEVICES), **several, help=", ".join(DEVICES))
    parser.add_argument("--what", choices=WHAT, default=list(WHAT), **several, help=", ".join(WHAT))
    parser.add_argument("--norms", choices=FORMS, default=list(FORMS), **several, help=", ".join(FORMS))
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[:1], **several, help="bfloat16 (default), float32")
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="examples per chip")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if args.batch and min(args.batch) < 1:
        parser.error("--batch must be 1 or more")
    return args


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """The requested tables whose compiler is installed."""
    for device in filter(chips.is_installed, args.device):
        for what in args.what:
            for dtype in args.dtype:
                for batch in args.batch or [WHAT[what].batch or DEVICES[device].batch]:
                    yield Group(device, what, dtype, batch)


def main(argv: Sequence[str] | None = None) -> dict[Group, dict[str, Cost | None]]:
    """Runs the program; returns the costs."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    jax.config.update("jax_platforms", "cpu")  # leave local devices alone: nothing runs
    found, bar = {}, bars(args)
    for group in groups(args):
        forms = [name for name in args.norms if WHAT[group.what].forms(FORMS[name])]
        found[group] = {name: cost_of(group, name) for name in bar(forms, f"{group.device} {group.what}")}
        show(table(group, found[group]), console)
        for name in [name for name, cost in found[group].items() if cost is None]:
            console.print(f"{name} does not fit into the memory of the device.")
    for device in args.device:
        if not chips.is_installed(device):
            console.print(f"{device} is skipped: {DEVICES[device].package} is not installed.")
    used = versions()
    console.print(", ".join(f"{package} {version}" for package, version in used.items()))
    if args.json:
        costs = [record for group, costs in found.items() for record in records(group, costs)]
        args.json.write_text(json.dumps({"versions": used, "costs": costs}, indent=2))
    return found


if __name__ == "__main__":
    main()
