"""Freezing models of plain functions, and the table of their layers."""

from typing import Any

from jaxbn._src.framework.framework import Call
from jaxbn._src.inference import frozen as _frozen
from jaxbn._src.inference import summary as _summary
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.pytree.framework import PYTREE
from jaxbn._src.statistics.pass_report import Report


def freeze(state: Any, report: Report | None = None) -> Frozen:
    """Makes the frozen network of a model of plain functions, after checking its statistics.

    Args:
        state: A pytree that holds states of methods, with running averages (Method ONE) or as `postproc` returned it
            (Method TWO).
        report: The report that `postproc` returned with it, which tells the origin of the statistics.

    Returns:
        A `Frozen`, whose `variables` are a copy of the tree, and go into your function: `call(frozen.variables, x)`.

    Raises:
        ValueError: If the statistics of a layer were never estimated, if they are not finite, or if the report does not
            belong to them.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)
        >>> call = lambda state, x: bn.eval(params, state["norm"], x)
        >>> data = jnp.arange(10.0)[:, None]
        >>> frozen = jaxbn.freeze(*jaxbn.postproc(call, {"norm": state}, [data]))
        >>> frozen.info.layer("norm")
        LayerInfo(method='batch_norm', epsilon=1e-05, estimator='pooled', rows=10.0)
        >>> print(f"{call(frozen.variables, data[:1])[0, 0]:.2f}")
        -1.57
    """
    return _frozen.freeze(PYTREE, state, report)


def summary(state: Any, call: Call | None = None, batch: Any = None) -> str:
    """Returns a table of the normalization layers of a model of plain functions, and the origin of their statistics.

    Args:
        state: A pytree that holds states of methods, or a `Frozen`, which has more information.
        call: Runs the model, as in `postproc`. It tells the method and the epsilon of each layer, which the states do
            not. It is traced only.
        batch: The batch for the call, or its shapes.

    Returns:
        Text, with a line per layer.

    Raises:
        ValueError: If there is no state of a method.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(8)
        >>> print(jaxbn.summary({"norm": state}, lambda state, x: bn.eval(params, state["norm"], x), jnp.ones((4, 8))))
        1 normalization layer, 8 channels
        layer  channels  method      epsilon  statistics      rows
        norm          8  batch_norm  1e-05    initial values     -
    """
    return _summary.summary(PYTREE, state, call, batch)
