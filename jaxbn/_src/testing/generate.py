"""Generates the files of the reference vectors: `python -m jaxbn._src.testing.generate`.

Each vector is a function in this file with `@vector`; its name and its first line become those of the vector. For your
own method, add its formulas to `reference`, as a `Method` of the same name, and a function here.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._src.testing.draw import PLAIN, VECTORS, Call, Draw, calls, passes, vector
from jaxbn._src.testing.vectors import Arrays, dumps


def _started(channels: int) -> Arrays:
    """Statistics at their initial values."""
    return {"mean": np.zeros(channels), "var": np.ones(channels)}


def _masked(draw: Draw) -> list[Call]:
    """Calls with some positions masked, with all masked, and with the complement of the first."""
    some, none = (np.array(mask, bool) for mask in ([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], np.zeros((4, 3))))
    return [Call("train", draw.batch(4, 3, 2, mask=mask[..., None])) for mask in (some, none, ~some)]


def _on_devices(draw: Draw) -> list[Call]:
    """Calls on three devices with four rows each, some of them invalid."""
    steps = []
    for counts in ([4, 1, 0], [2, 4, 3]):
        # Valid rows come first on each device, as in a padded last batch.
        mask = (np.arange(4) < np.array(counts)[:, None])[..., None]
        batch = draw.batch(3, 4, 2, mask=mask)
        steps.append(Call("train", batch | {"cotangent": batch["cotangent"] * mask}))
    return steps


@vector
def batch_norm(draw: Draw) -> dict[str, Any]:
    """Three training steps, then an evaluation of two rows with the running averages."""
    steps = [Call("train", draw.batch(6, 3)) for _ in range(3)]
    evaluation = Call("eval", {"x": draw.uniform([2, 3])})
    return calls("batch_norm", PLAIN, draw.params(3), _started(3), [*steps, evaluation])


@vector
def batch_norm_images(draw: Draw) -> dict[str, Any]:
    """Images [N, H, W, C], with a large epsilon and statistics other than the initial ones."""
    steps = [Call("train", draw.batch(2, 2, 3, 2)) for _ in range(2)]
    state = {"mean": draw.uniform([2]), "var": draw.uniform([2], 0.5, 4.0)}
    evaluation = Call("eval", {"x": draw.uniform([1, 2, 2, 2])})
    return calls("batch_norm", PLAIN | {"epsilon": 0.5}, draw.params(2), state, [*steps, evaluation])


@vector
def batch_norm_without_affine(draw: Draw) -> dict[str, Any]:
    """Neither scale nor bias."""
    arguments = PLAIN | {"use_scale": False, "use_bias": False}
    steps = [Call("train", draw.batch(5, 2)), Call("eval", {"x": draw.uniform([3, 2])})]
    return calls("batch_norm", arguments, {}, _started(2), steps)


@vector
def batch_norm_last_batch(draw: Draw) -> dict[str, Any]:
    """Momentum 0, the weight of the OLD value: the running statistics are those of the last batch."""
    steps = [Call("train", draw.batch(4, 2)) for _ in range(2)]
    return calls("batch_norm", PLAIN | {"momentum": 0.0}, draw.params(2), _started(2), steps)


@vector
def batch_norm_masked(draw: Draw) -> dict[str, Any]:
    """A mask of positions; the second batch is fully masked, so the state stays and normalizes it."""
    steps = _masked(draw)
    return calls("batch_norm", PLAIN, draw.params(2), _started(2), steps)


@vector
def batch_norm_weighted(draw: Draw) -> dict[str, Any]:
    """A mask of real weights, one for each row."""
    steps = [Call("train", draw.batch(6, 3, mask=draw.uniform([6, 1], 0.0, 2.0))) for _ in range(2)]
    return calls("batch_norm", PLAIN, draw.params(3), _started(3), steps)


@vector
def batch_norm_synchronized(draw: Draw) -> dict[str, Any]:
    """Three devices that hold 4, 1 and no valid rows; masked cotangents are 0, so the rows may be omitted."""
    steps = _on_devices(draw)
    return calls("batch_norm", PLAIN, draw.params(2), _started(2), steps, devices=3)


@vector
def batch_norm_constant_channel(draw: Draw) -> dict[str, Any]:
    """The first channel is constant: its outputs are the bias, and its gradients are divided by the root of epsilon."""
    batch = draw.batch(5, 2)
    batch["x"][:, 0] = 0.75
    return calls("batch_norm", PLAIN, draw.params(2), _started(2), [Call("train", batch)])


@vector
def batch_norm_huge_mean(draw: Draw) -> dict[str, Any]:
    """Mean 1e4 and standard deviation about 1e-2, where E[x^2] - E[x]^2 has no correct digit in float32."""
    steps = []
    for centre in (10_000.0, -10_000.0):
        # Symmetric about the centre: the mean is then an exact float32 number, so the test is of the variance.
        offset = draw.uniform([4, 2], 1 / 1024, 24 / 1024, step=1 / 1024)
        steps.append(Call("train", draw.batch(8, 2) | {"x": centre + np.concatenate([offset, -offset])}))
    return calls("batch_norm", PLAIN, draw.params(2), _started(2), steps)


RENORM = PLAIN | {"epsilon": 1e-3, "r_max": 1.25, "d_max": 0.25}


@vector
def batch_renorm(draw: Draw) -> dict[str, Any]:
    """Steps in which r and d are clipped in some channels only, then an evaluation."""
    steps = [Call("train", draw.batch(6, 4)) for _ in range(3)]
    # Close enough to the batch that some channels stay within the bounds.
    state = {"mean": draw.uniform([4], -0.5, 1.5), "var": draw.uniform([4], 1.0, 4.0)}
    evaluation = Call("eval", {"x": draw.uniform([2, 4])})
    return calls("batch_renorm", RENORM, draw.params(4), state, [*steps, evaluation])


@vector
def batch_renorm_unbounded(draw: Draw) -> dict[str, Any]:
    """Bounds so wide that training gives the outputs of evaluation with the averages before the step."""
    steps = [Call("train", draw.batch(4, 3)) for _ in range(2)]
    # Bounds that never clip.
    arguments = RENORM | {"r_max": 1e6, "d_max": 1e6}
    return calls("batch_renorm", arguments, draw.params(3), _started(3), steps)


@vector
def batch_renorm_of_variance(draw: Draw) -> dict[str, Any]:
    """Averages the variance instead of the standard deviation."""
    steps = [Call("train", draw.batch(3, 2)) for _ in range(2)]
    return calls("batch_renorm", RENORM | {"track_variance": True}, draw.params(2), _started(2), steps)


@vector
def batch_renorm_masked(draw: Draw) -> dict[str, Any]:
    """A mask of positions; the second batch is fully masked, so the state stays and normalizes it."""
    steps = _masked(draw)
    return calls("batch_renorm", RENORM, draw.params(2), _started(2), steps)


@vector
def batch_renorm_synchronized(draw: Draw) -> dict[str, Any]:
    """Three devices that hold 4, 1 and no valid rows; r and d come from the statistics of all devices."""
    steps = _on_devices(draw)
    return calls("batch_renorm", RENORM, draw.params(2), _started(2), steps, devices=3)


@vector
def ghost_batch_norm(draw: Draw) -> dict[str, Any]:
    """Groups of four neighbouring rows, then an evaluation with the running averages."""
    steps = [*(Call("train", draw.batch(8, 3)) for _ in range(2)), Call("eval", {"x": draw.uniform([2, 3])})]
    return calls("ghost_batch_norm", PLAIN | {"ghost_size": 4}, draw.params(3), _started(3), steps)


@vector
def ghost_batch_norm_strided(draw: Draw) -> dict[str, Any]:
    """Row i is in group i mod 3, and the running variance averages that of the whole batch."""
    arguments = PLAIN | {"ghost_size": 4, "grouping": "strided", "running": "pooled"}
    steps = [Call("train", draw.batch(12, 2)) for _ in range(2)]
    return calls("ghost_batch_norm", arguments, draw.params(2), _started(2), steps)


@vector
def ghost_batch_norm_masked(draw: Draw) -> dict[str, Any]:
    """A mask of rows; the second group of the first batch is empty and is normalized with the running statistics."""
    # Groups of three consecutive rows: rows 3 to 5 of the first mask are the empty group.
    masks = ([1, 1, 0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0, 1, 1])
    steps = [Call("train", draw.batch(9, 2, mask=np.array(mask, bool)[:, None])) for mask in masks]
    return calls("ghost_batch_norm", PLAIN | {"ghost_size": 3}, draw.params(2), _started(2), steps)


@vector
def ghost_batch_norm_synchronized(draw: Draw) -> dict[str, Any]:
    """Three devices with a group of four rows on each, not all of them valid."""
    arguments = PLAIN | {"ghost_size": 4}
    return calls("ghost_batch_norm", arguments, draw.params(2), _started(2), _on_devices(draw), devices=3)


def _windowed(draw: Draw, window: int, channels: int, steps: float) -> Arrays:
    """A state of moving average batch normalization after some steps."""
    counters = {name: np.array(value) for name, value in (("step", steps), ("gradients", steps), ("loss_scale", 1.0))}
    return counters | {
        "mean": np.zeros(channels),
        "var": draw.uniform([channels], 1.0, 8.0),
        "square_window": draw.uniform([window, channels], 1.0, 4.0),
        "gradient_window": draw.uniform([window, channels], -0.5, 0.5),
        "values": np.zeros(channels),
    }


MABN = PLAIN | {"window": 3, "warmup": 0, "r_max": 1.25}


@vector
def moving_average_batch_norm(draw: Draw) -> dict[str, Any]:
    """Full windows, r clipped in some channels only, then an evaluation."""
    steps = [Call("train", draw.batch(4, 4)) for _ in range(3)]
    evaluation = Call("eval", {"x": draw.uniform([2, 4])})
    state = _windowed(draw, 3, 4, 2000.0)
    return calls("moving_average_batch_norm", MABN, draw.params(4), state, [*steps, evaluation])


@vector
def moving_average_batch_norm_warmup(draw: Draw) -> dict[str, Any]:
    """The last two steps of the warm-up, which use batch statistics only, and the first step after it."""
    steps = [Call("train", draw.batch(3, 2)) for _ in range(3)]
    # The state is after step 4, so steps 5 and 6 are in the warm-up and step 7 is not.
    arguments, state = MABN | {"warmup": 7}, _windowed(draw, 3, 2, 4.0)
    return calls("moving_average_batch_norm", arguments, draw.params(2), state, steps)


@vector
def moving_average_batch_norm_masked(draw: Draw) -> dict[str, Any]:
    """A mask of positions; the second batch is fully masked, so the state stays and normalizes it."""
    state = _windowed(draw, 3, 2, 2000.0)
    return calls("moving_average_batch_norm", MABN, draw.params(2), state, _masked(draw))


DOMAINS = PLAIN | {"num_domains": 3}


def _by_domain(draw: Draw) -> tuple[Arrays, Arrays]:
    """A scale and a bias, and statistics, for each of three domains."""
    params = {"scale": draw.uniform([3, 2], 0.5, 2.0), "bias": draw.uniform([3, 2], -1.0, 1.0)}
    return params, {"mean": draw.uniform([3, 2]), "var": draw.uniform([3, 2], 0.5, 4.0)}


@vector
def domain_batch_norm(draw: Draw) -> dict[str, Any]:
    """Images of three domains in unequal numbers; the last is absent from the second step and keeps its state."""
    params, state = _by_domain(draw)
    ids = np.array([[0, 1, 0, 2, 2, 0], [1, 0, 0, 1, 1, 1]])
    steps = [Call("train", draw.batch(6, 2, 2, domain=domain)) for domain in ids]
    evaluation = Call("eval", {"x": draw.uniform([3, 2, 2]), "domain": np.array([2, 0, 1])})
    return calls("domain_batch_norm", DOMAINS, params, state, [*steps, evaluation])


@vector
def domain_batch_norm_masked(draw: Draw) -> dict[str, Any]:
    """A mask of rows that covers the whole second domain."""
    params, state = _by_domain(draw)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)[:, None]
    batch = draw.batch(8, 2, mask=mask, domain=np.array([0, 1, 0, 2, 1, 2, 0, 2]))
    return calls("domain_batch_norm", DOMAINS, params, state, [Call("train", batch)])


@vector
def domain_batch_norm_synchronized(draw: Draw) -> dict[str, Any]:
    """Two devices with different mixes of domains; the last domain is on one of them only."""
    params, state = _by_domain(draw)
    batch = draw.batch(2, 4, 2, domain=np.array([[0, 0, 1, 0], [1, 2, 1, 2]]))
    return calls("domain_batch_norm", DOMAINS, params, state, [Call("train", batch)], devices=2)


def _ragged(draw: Draw) -> list[np.ndarray]:
    return [draw.uniform([rows, 2]) + shift for rows, shift in ((5, 0), (2, 1), (3, -2))]


@vector
def pooled(draw: Draw) -> dict[str, Any]:
    """Mean and variance of all values of batches of 5, 2 and 3 rows together."""
    return passes("pooled", {}, _ragged(draw))


@vector
def pooled_unbiased(draw: Draw) -> dict[str, Any]:
    """Mean and unbiased variance (over n - 1) of all values of batches of 5, 2 and 3 rows together."""
    return passes("pooled", {"unbiased": True}, _ragged(draw))


@vector
def mean_of_batches(draw: Draw) -> dict[str, Any]:
    """The mean of the batch means and of the unbiased batch variances, with equal weights."""
    return passes("mean_of_batches", {}, _ragged(draw))


@vector
def moving_average(draw: Draw) -> dict[str, Any]:
    """Averages over batches of the mean, from 0, and of the standard deviation, from 1."""
    return passes("moving_average", {"decay": 0.75}, _ragged(draw))


def main() -> None:
    """Writes all files into the data folder of this package."""
    folder = Path(__file__).parent / "data"
    for name, make in VECTORS.items():
        (folder / f"{name}.json").write_text(dumps(make()), encoding="utf-8")
    print(f"{len(VECTORS)} vectors in {folder}")


if __name__ == "__main__":
    main()
