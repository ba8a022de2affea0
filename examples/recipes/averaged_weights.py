"""Averaged weights (SWA, EMA, schedule-free): estimate their statistics, because training never ran with them.

    python examples/recipes/averaged_weights.py

The running averages of training belong to other weights. A statistics pass with the averaged weights replaces them, as
PyTorch's `update_bn` does after SWA. `optax.contrib.schedule_free` needs the same pass, since it trains at one point
and evaluates at another. On this small network the wrong statistics cost a digit or two; the last column shows how far
off the running means are, which costs more in a deep network.

Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018, section 3.2.
"""

from typing import Any

import jax
import optax
from shared import SGD, Batch, accuracy, in_batches, load, predict, show, train

import jaxbn.linen

DECAY = 0.95  # of the EMA
# Schedule-free replaces the momentum of the optimizer that it wraps.
SCHEDULE_FREE = optax.contrib.schedule_free(optax.sgd(1.0), learning_rate=1.0)


def averages(data: Batch, epochs: int) -> dict[str, tuple[Any, Any]]:
    """For each kind of average: the averaged params and the running statistics of training."""
    states = list(train(SGD, data, epochs))
    ema = states[0].params
    for state in states:
        # Only params are averaged. The statistics come from the pass below, not from an average.
        ema = optax.incremental_update(state.params, ema, 1 - DECAY)
    # SWA averages the second half of training with equal weights.
    swa = jax.tree.map(lambda *p: sum(p) / len(p), *(state.params for state in states[len(states) // 2 :]))
    *_, free = train(SCHEDULE_FREE, data, epochs)
    evaluated = optax.contrib.schedule_free_eval_params(free.opt_state, free.params)
    return {
        "SWA": (swa, states[-1].batch_stats),
        "EMA": (ema, states[-1].batch_stats),
        "schedule-free": (evaluated, free.batch_stats),
    }


def with_own_statistics(params: Any, batch_stats: Any, data: Batch) -> tuple[Any, Any]:
    """The recipe: the averaged params with their population statistics, and the report of the pass."""
    variables = {"params": params, "batch_stats": batch_stats}
    return jaxbn.linen.postproc(predict, variables, in_batches(data))


def main(epochs: int = 3) -> dict[str, tuple[float, float]]:
    """Prints and returns the held-out accuracy with the running statistics and with the population statistics."""
    data, held_out = load()
    found, rows = {}, []
    for name, (params, batch_stats) in averages(data, epochs).items():
        before = accuracy(predict({"params": params, "batch_stats": batch_stats}, held_out), held_out)
        variables, report = with_own_statistics(params, batch_stats, data)
        found[name] = before, accuracy(predict(variables, held_out), held_out)
        off = max(layer.mean_shift.max() for layer in report.layers.values())
        rows.append([name, f"{before:.3f}", f"{found[name][1]:.3f}", f"{off:.2f} std"])
    show(["weights", "running statistics", "population statistics", "largest mean shift"], rows)
    return found


if __name__ == "__main__":
    main()
