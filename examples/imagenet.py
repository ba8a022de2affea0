"""ImageNet: trains a ResNet-50 in linen or NNX on all devices, evaluates it with Methods ONE and TWO, and can resume.

    python examples/imagenet.py DATA --checkpoints DIR
    python examples/imagenet.py --fake 64 --batch-size 16 --image-size 64 --stages 1 1 1 1 --width 16 --epochs 3

DATA contains `train` and `val`, each with folders `class_name/*.jpg` or shards `images_*.npy` and `labels_*.npy` (see
images.py). The second command generates images and runs on any machine. The program prints a line after each epoch and
at the end:

    loss         mean training loss since the previous line
    top-1 ONE    accuracy with Method ONE: the running averages of training
    top-1 TWO    accuracy with Method TWO: statistics estimated on training batches with fixed parameters
    images/s     training speed without compilation

The state is replicated and each batch is split over the devices; the layers normalize with the statistics of the whole
batch. To resume after an interruption, run the same command again: it continues from the last checkpoint with the same
batches as an uninterrupted run.
"""

import argparse
import contextlib
import functools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from images import Batch, Loader, centre_crop, make_images, open_images, random_crop
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from resnet import RESNET_50, LinenResNet, NnxResNet
from rich.console import Console
from rich.progress import track

import jaxbn
import jaxbn.linen
import jaxbn.nnx

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)  # of ImageNet, pixels in 0..1
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)
# Statistics are estimated on training crops by default: the parameters were trained on them, and the running averages
# are those of the same crops, so ONE and TWO are two estimates of the same statistics. In centre crops objects look
# smaller (Touvron et al., 2019, arXiv:1906.06423); --statistics-crops centre tests whether their statistics are better.
CROPS = {"random": random_crop, "centre": centre_crop}
COUNTS = "stages width image_size batch_size epochs statistics_batches save_every workers fake stop_after".split()
# A resumed run must have the same values of these, because batches and schedule depend on them.
SETTINGS = (
    "api stages width dtype image_size batch_size epochs warmup learning_rate weight_decay label_smoothing seed".split()
)


class Data(NamedTuple):
    """The three sequences of batches."""

    train: Loader
    statistics: Loader
    held_out: Loader


class Row(NamedTuple):
    """A line of the table. Loss and speed are None if no step was taken."""

    epoch: int
    step: int
    loss: float | None
    top1_one: float
    top1_two: float
    images_per_s: float | None

    def __str__(self) -> str:
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        rate = "-" if self.images_per_s is None else f"{self.images_per_s:.1f}"
        return f"{self.epoch:>5}  {self.step:>7}  {loss:>7}  {self.top1_one:>9.4f}  {self.top1_two:>9.4f}  {rate:>8}"


HEADER = f"{'epoch':>5}  {'step':>7}  {'loss':>7}  {'top-1 ONE':>9}  {'top-1 TWO':>9}  {'images/s':>8}"


class Checkpoints:
    """Keeps the last three states on disk, if `--checkpoints` names a folder."""

    def __init__(self, args: argparse.Namespace, data: Data):
        """Opens the folder; raises a ValueError if its checkpoints are from a run with other settings."""
        self.settings = {name: getattr(args, name) for name in SETTINGS} | {"images": len(data.train.source.labels)}
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(args.save_every),
            preservation_policy=ocp.checkpoint_managers.LatestN(3),
            enable_async_checkpointing=False,
        )
        folder = args.checkpoints and args.checkpoints.absolute()
        self.manager = folder and ocp.CheckpointManager(folder, options=options)
        self.latest = folder and self.manager.latest_step()
        if self.latest:
            saved = self.manager.metadata(self.latest).custom_metadata or {}
            other = [f"{k}={saved.get(k)}, not {v}" for k, v in self.settings.items() if saved.get(k) != v]
            if other:
                raise ValueError(f"{args.checkpoints} contains checkpoints of a run with {', '.join(other)}")

    def restore(self, state: Any) -> Any:
        """The last saved state, or the given one if there is none."""
        return self.manager.restore(self.latest, args=ocp.args.StandardRestore(state)) if self.latest else state

    def save(self, step: int, state: Any, *, force: bool) -> None:
        """Saves the state if a checkpoint is due, or if `force` is set."""
        if self.manager and self.manager.latest_step() != step and (force or self.manager.should_save(step)):
            # Copy to host memory, because the next step reuses the donated device memory.
            copy = ocp.args.StandardSave(jax.device_get(state))
            self.manager.save(step, args=copy, custom_metadata=self.settings, force=True)

    def close(self) -> None:
        """Stops the threads of the manager."""
        if self.manager:
            self.manager.close()


@functools.cache
def sharding(*axes: str) -> NamedSharding:
    """Sharding over all devices: `sharding("data")` splits the first axis, `sharding()` replicates."""
    return NamedSharding(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)), P(*axes))


def schedule(args: argparse.Namespace, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay to zero; the peak is proportional to the batch size."""
    # Linear scaling rule (Goyal et al., 2017).
    peak = args.learning_rate * args.batch_size / 256
    warmup, total = round(args.warmup * steps_per_epoch), args.epochs * steps_per_epoch
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)


def make_optimizer(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """SGD with Nesterov momentum, and weight decay of kernels only, not of biases and BatchNorm scales."""

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels), optax.sgd(rate, momentum=0.9, nesterov=True)
    )


def inputs(batch: Batch) -> jax.Array:
    """The input of the model: standardized pixels, computed on the device."""
    return (jnp.asarray(batch["image"], jnp.float32) / 255 - MEAN) / STD


def cross_entropy(logits: jax.Array, batch: Batch, *, smoothing: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy with label smoothing; no metrics."""
    labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, labels).mean(), {}


def make_steps(args: argparse.Namespace, data: Data) -> jaxbn.Steps:
    """Makes and compiles the steps of linen or NNX. All code that uses them is the same for both."""
    classes = data.train.source.classes
    options = {"stages": tuple(args.stages), "num_classes": classes, "width": args.width, "dtype": args.dtype}
    loss = functools.partial(cross_entropy, smoothing=args.label_smoothing)
    optimizer = make_optimizer(schedule(args, len(data.train)), args.weight_decay)
    if args.api == "linen":
        steps = jaxbn.linen.make_steps(LinenResNet(**options), loss, optimizer, inputs=inputs)
        steps = steps._replace(init=jax.jit(steps.init))  # in NNX, `init` only copies the state of the model
    else:
        model = NnxResNet(**options, rngs=nnx.Rngs(args.seed))
        steps = jaxbn.nnx.make_steps(model, loss, optimizer, inputs=inputs)
    return steps._replace(
        train_step=jax.jit(steps.train_step, donate_argnums=0),
        postproc_step=jax.jit(steps.postproc_step),
        eval_step=jax.jit(steps.eval_step),
    )


def run(args: argparse.Namespace, data: Data, checkpoints: Checkpoints) -> Iterator[Row]:
    """Trains, and yields an evaluated row after each epoch and at the end."""
    steps, per_epoch = make_steps(args, data), len(data.train)
    state = checkpoints.restore(initial_state(steps, args))
    # The schedule depends on `--epochs` alone, so a run that stops early can be resumed.
    end = min(args.epochs * per_epoch, args.stop_after or math.inf)
    for epoch, start, stop in segments(int(state.step), end, per_epoch):
        batches = data.train.batches(epoch, start, stop)
        shown = args.bar(batches, f"Training, epoch {epoch + 1}", total=stop - start)
        state, loss, rate = train(steps, state, shown, checkpoints)
        step = int(state.step)
        started = math.ceil(step / per_epoch)
        yield Row(started, step, loss, *evaluate(steps, state, data, started, args), rate)


def initial_state(steps: jaxbn.Steps, args: argparse.Namespace) -> Any:
    """The replicated state before the first step."""
    image = np.zeros((args.batch_size, args.image_size, args.image_size, 3), np.uint8)
    batch = {"image": image, "label": np.zeros(args.batch_size, np.int32)}
    return jax.device_put(steps.init(jax.random.key(args.seed), batch), sharding())


def segments(step: int, end: int, per_epoch: int) -> Iterator[tuple[int, int, int]]:
    """Yields (epoch, first batch, batch to stop at) between evaluations; yields at least one segment."""
    while True:
        epoch, start = divmod(step, per_epoch)
        stop = min(per_epoch, start + max(end - step, 0))
        yield epoch, start, stop
        step = epoch * per_epoch + stop
        if step >= end:
            return


def train(
    steps: jaxbn.Steps, state: Any, batches: Iterable[Batch], checkpoints: Checkpoints
) -> tuple[Any, float | None, float | None]:
    """Takes a step per batch; returns the state, the mean loss, and the images per second after the first step."""
    losses, images, began = [], 0, 0.0
    for step, batch in enumerate(batches, int(state.step) + 1):
        state, metrics = steps.train_step(state, put(batch))
        losses.append(metrics["loss"])
        # Wait for the previous step, so that one step runs while the next batch is loaded.
        jax.block_until_ready(losses[-2:-1] or losses)
        images, began = (images + len(batch["label"]), began) if began else (0, time.perf_counter())
        checkpoints.save(step, state, force=False)
    if not losses:
        return state, None, None
    loss = float(np.mean(jax.device_get(losses)))
    rate = images / (time.perf_counter() - began) if images else None
    checkpoints.save(step, state, force=True)
    return state, loss, rate


def evaluate(steps: jaxbn.Steps, state: Any, data: Data, epoch: int, args: argparse.Namespace) -> tuple[float, float]:
    """Held-out accuracy with the running averages, and with the population statistics."""
    accumulator, count = None, min(args.statistics_batches, len(data.statistics))
    for batch in map(put, args.bar(data.statistics.batches(epoch, stop=count), "Estimating statistics", total=count)):
        last = steps.start(state, batch) if accumulator is None else accumulator
        accumulator = steps.postproc_step(state, last, batch)
        jax.block_until_ready(last)
    # Without an accumulator, `finalize` uses the running averages (Method ONE).
    networks = [steps.finalize(state, acc)[0] for acc in (None, accumulator)]
    correct = []
    for batch in map(put, args.bar(data.held_out.batches(), "Evaluating", total=len(data.held_out))):
        answers = [steps.eval_step(network, batch).argmax(-1) for network in networks]
        correct.append([jnp.sum(answer == batch["label"]) for answer in answers])  # the label of padding is -1
        jax.block_until_ready(correct[-2:-1])
    one, two = np.sum(jax.device_get(correct), axis=0) / len(data.held_out.source.labels)
    return float(one), float(two)


def put(batch: Batch) -> Batch:
    """Splits a batch over the devices, asynchronously."""
    return jax.device_put(batch, sharding("data"))


def load(args: argparse.Namespace) -> Data:
    """Opens the images; raises a ValueError if they do not fit the options."""
    train, held_out = open_images(args.data)
    if len(train.labels) < args.batch_size:
        raise ValueError(f"{args.data}/train has {len(train.labels)} images, fewer than --batch-size {args.batch_size}")
    loader = functools.partial(Loader, batch_size=args.batch_size, image_size=args.image_size, workers=args.workers)
    return Data(
        train=loader(train, crop=random_crop, shuffle=True, seed=(args.seed, 0)),
        statistics=loader(train, crop=CROPS[args.statistics_crops], shuffle=True, seed=(args.seed, 1)),
        held_out=loader(held_out, crop=centre_crop, shuffle=False),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="folder with train and val, each with folders of images or .npy shards")
    add("--fake", type=int, metavar="N", help="generate N images instead of reading DATA")
    add("--api", choices=("linen", "nnx"), default="linen", help="API of Flax (linen)")
    add("--stages", type=int, nargs="+", default=list(RESNET_50), help="blocks in each stage (3 4 6 3: ResNet-50)")
    add("--width", type=int, default=64, help="features of the first convolution (64)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of activations (bfloat16)")
    add("--image-size", type=int, default=224, help="height and width of the crops (224)")
    add("--batch-size", type=int, default=256, help="images per batch, over all devices (256)")
    add("--epochs", type=int, default=90, help="passes over the training images (90)")
    add("--warmup", type=float, help="epochs of learning rate warm-up (1/18 of all epochs: 5 of 90)")
    add("--learning-rate", type=float, default=0.1, help="peak learning rate for a batch of 256 (0.1)")
    add("--weight-decay", type=float, default=1e-4, help="weight decay of kernels (0.0001)")
    add("--label-smoothing", type=float, default=0.1, help="weight of the uniform distribution in labels (0.1)")
    add("--statistics-batches", type=int, default=100, help="training batches of the statistics pass (100)")
    add("--statistics-crops", choices=CROPS, default="random", help="crops of the statistics pass (random)")
    add("--checkpoints", type=Path, metavar="DIR", help="folder for checkpoints; resumes from the last one (none)")
    add("--save-every", type=int, default=1000, help="steps between checkpoints within an epoch (1000)")
    add("--stop-after", type=int, metavar="STEP", help="stop after this step, as if interrupted")
    add("--workers", type=int, default=8, help="threads that decode images (8)")
    add("--seed", type=int, default=0, help="seed of initialization, order and crops (0)")
    add("--no-progress", action="store_true", help="show no progress bars")
    args = parser.parse_args(argv)
    args.warmup = args.epochs / 18 if args.warmup is None else args.warmup
    for complaint in complaints(args):
        parser.error(complaint)
    screen = Console(stderr=True)
    no_bars = args.no_progress or not screen.is_terminal
    args.bar = functools.partial(track, console=screen, transient=True, disable=no_bars)
    return args


def complaints(args: argparse.Namespace) -> Iterator[str]:
    """Yields error messages for invalid options, before any work starts."""
    if (args.data is None) == (args.fake is None):
        yield "give either a folder DATA or --fake N"
    for name in COUNTS:
        value = getattr(args, name)
        if value is not None and np.min(value) < 1:
            yield f"--{name.replace('_', '-')} must be 1 or more"
    if args.batch_size % jax.device_count():
        yield f"--batch-size must be a multiple of {jax.device_count()}, the number of devices"
    if not (args.learning_rate > 0 and args.weight_decay >= 0 and args.seed >= 0 and 0 <= args.label_smoothing < 1):
        yield "--learning-rate must be positive, --weight-decay and --seed 0 or more, --label-smoothing in [0, 1)"
    if not 0 <= args.warmup < args.epochs:
        yield "--warmup must be 0 or more, and less than --epochs"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the program; returns the lines of the table."""
    args, console, rows = parse(argv), Console(highlight=False, markup=False, soft_wrap=True), []
    with contextlib.ExitStack() as stack:
        if args.fake:
            args.data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_images(args.data, args.fake, args.image_size, args.seed)
        try:
            data = load(args)
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(args, data)))
        except (OSError, ValueError) as error:
            raise SystemExit(f"imagenet.py: error: {error}") from None
        if checkpoints.latest:
            console.print(f"Resuming from step {checkpoints.latest} in {args.checkpoints}")
        console.print(HEADER)
        for row in run(args, data, checkpoints):
            console.print(str(row))
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
