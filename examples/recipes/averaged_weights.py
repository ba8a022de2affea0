"""Averaged weights: SWA, EMA and schedule-free. No network ran with these weights, so their statistics are nobody's.

    python examples/recipes/averaged_weights.py

A pass with the averaged weights gives them statistics of their own. `optax.contrib.schedule_free` trains at one point
and evaluates at another, and is the same case. On so small a network it costs a digit or two; how far off the running
averages are shows what it may cost on a deep one.

Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018, section 3.2.
"""

from typing import Any

import jax
import optax
from shared import SGD, Batch, accuracy, in_batches, load, predict, train

import jaxbn.linen

DECAY = 0.95  # of the EMA
SCHEDULE_FREE = optax.contrib.schedule_free(optax.sgd(1.0), learning_rate=1.0)  # around an optimizer without momentum


def averages(data: Batch, epochs: int) -> dict[str, tuple[Any, Any]]:
    """By the kind of average: the averaged params, and the running averages of training beside them."""
    states = list(train(SGD, data, epochs))
    ema = states[0].params
    for state in states:
        ema = optax.incremental_update(state.params, ema, 1 - DECAY)
    swa = jax.tree.map(lambda *p: sum(p) / len(p), *(state.params for state in states[len(states) // 2 :]))
    *_, free = train(SCHEDULE_FREE, data, epochs)
    evaluated = optax.contrib.schedule_free_eval_params(free.opt_state, free.params)
    return {
        "SWA": (swa, states[-1].batch_stats),
        "EMA": (ema, states[-1].batch_stats),
        "schedule-free": (evaluated, free.batch_stats),
    }


def with_own_statistics(params: Any, batch_stats: Any, data: Batch) -> tuple[Any, Any]:
    """The recipe: the averaged params with statistics of their own, and the report of the pass."""
    variables = {"params": params, "batch_stats": batch_stats}
    return jaxbn.linen.postproc(predict, variables, in_batches(data))


def main(epochs: int = 3) -> dict[str, tuple[float, float]]:
    """Prints the held-out accuracy with either statistics; returns it."""
    data, held_out = load()
    found = {}
    print(f"{'weights':15}statistics of training   of their own   running means were off by")
    for name, (params, batch_stats) in averages(data, epochs).items():
        before = accuracy(predict({"params": params, "batch_stats": batch_stats}, held_out), held_out)
        variables, report = with_own_statistics(params, batch_stats, data)
        found[name] = before, accuracy(predict(variables, held_out), held_out)
        off = max(layer.mean_shift.max() for layer in report.layers.values())
        print(f"{name:15}{before:22.3f}   {found[name][1]:12.3f}   {off:9.2f} std at most")
    return found


if __name__ == "__main__":
    main()
