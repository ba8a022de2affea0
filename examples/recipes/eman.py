"""EMAN: a teacher network whose parameters and statistics are moving averages of the student's.

    python examples/recipes/eman.py

The teacher always runs in evaluation mode, so its output for an example does not depend on the rest of the batch. A
teacher that averages only the parameters would use the student's statistics, which belong to other parameters.

Cai et al., Exponential Moving Average Normalization for Self-supervised and Semi-supervised Learning, 2021.
"""

from typing import Any

import optax
from flax import nnx
from shared import SGD, compare, load, predict, train

DECAY = 0.95  # use 0.999 if training takes thousands of steps


def follow(teacher: Any, student: Any, decay: float = DECAY) -> Any:
    """The recipe: update the moving average of all variables, both `params` and `batch_stats`.

    The `count` of a debiased average may be averaged too, because evaluation does not read it. Copy integer counters.
    """
    return optax.incremental_update(student, teacher, 1 - decay)


def follow_nnx(teacher: nnx.Module, student: nnx.Module, decay: float = DECAY) -> None:
    """The recipe in NNX. The filter leaves out other variables, such as the random streams of dropout."""
    of = nnx.Any(nnx.Param, nnx.BatchStat)
    nnx.update(teacher, follow(nnx.state(teacher, of), nnx.state(student, of), decay))


def main(epochs: int = 3) -> dict[str, float]:
    """Prints and returns the held-out accuracy of the student and the teachers."""
    data, held_out = load()
    teacher = None
    for state in train(SGD, data, epochs):
        student = {"params": state.params, "batch_stats": state.batch_stats}
        # Start from the first student: an average from other weights would keep a share of them.
        teacher = student if teacher is None else follow(teacher, student)
    networks = {
        "student": student,
        "teacher, with the student's statistics": teacher | {"batch_stats": student["batch_stats"]},
        "teacher, with averaged statistics": teacher,
    }
    return compare({name: predict(variables, held_out) for name, variables in networks.items()}, held_out)


if __name__ == "__main__":
    main()
