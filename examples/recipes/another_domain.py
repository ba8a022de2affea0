"""AdaBN: adapt a trained network to another domain by re-estimating its statistics; the weights do not change.

    python examples/recipes/another_domain.py

One statistics pass over data of the new domain is enough. It needs no labels.

Li et al., Revisiting Batch Normalization For Practical Domain Adaptation, 2016.
"""

from typing import Any

from shared import Batch, another_camera, compare, in_batches, load, predict, trained

import jaxbn.linen


def adapt(variables: Any, unlabelled: list[Batch]) -> Any:
    """The recipe: the same params with the population statistics of the new data."""
    adapted, _ = jaxbn.linen.postproc(predict, variables, unlabelled)
    return adapted


def main(epochs: int = 4) -> dict[str, float]:
    """Prints and returns the held-out accuracy on both domains."""
    data, held_out = load()
    variables = trained(data, epochs)
    elsewhere = another_camera(held_out)
    adapted = adapt(variables, in_batches(another_camera(data)))
    logits = {
        "trained and evaluated on one camera": predict(variables, held_out),
        "evaluated on another camera": predict(variables, elsewhere),
        "with the statistics of that camera": predict(adapted, elsewhere),
    }
    return compare(logits, held_out)


if __name__ == "__main__":
    main()
