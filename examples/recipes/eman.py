"""EMAN: a teacher whose parameters and statistics both follow the student's, as moving averages.

    python examples/recipes/eman.py

The teacher always evaluates, so that what it says of an example does not depend on the examples beside it. A teacher
that averages its parameters alone has the statistics of another network, the student's.

Cai et al., Exponential Moving Average Normalization for Self-supervised and Semi-supervised Learning, 2021.
"""

from typing import Any

import optax
from flax import nnx
from shared import SGD, compare, load, predict, train

DECAY = 0.95  # 0.999 where training takes thousands of steps


def follow(teacher: Any, student: Any, decay: float = DECAY) -> Any:
    """The recipe: all variables, `params` and `batch_stats` alike, move towards the student's.

    The `count` of a debiased average may follow too, as evaluation does not read it; copy counters that are integers.
    """
    return optax.incremental_update(student, teacher, 1 - decay)


def follow_nnx(teacher: nnx.Module, student: nnx.Module, decay: float = DECAY) -> None:
    """The recipe in NNX. The filter leaves the rest out, such as the random streams of dropout."""
    of = nnx.Any(nnx.Param, nnx.BatchStat)
    nnx.update(teacher, follow(nnx.state(teacher, of), nnx.state(student, of), decay))


def main(epochs: int = 3) -> dict[str, float]:
    """Prints the held-out accuracy of student and teachers; returns it."""
    data, held_out = load()
    teacher = None
    for state in train(SGD, data, epochs):
        student = {"params": state.params, "batch_stats": state.batch_stats}
        teacher = student if teacher is None else follow(teacher, student)
    networks = {
        "student": student,
        "teacher, with the student's statistics": teacher | {"batch_stats": student["batch_stats"]},
        "teacher, with averaged statistics": teacher,
    }
    return compare({name: predict(variables, held_out) for name, variables in networks.items()}, held_out)


if __name__ == "__main__":
    main()
