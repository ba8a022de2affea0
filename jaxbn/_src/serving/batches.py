"""The batches of an exported program, whose number of examples and other named axes are dynamic."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from jaxbn._src.serving.arrays import name_of


def leave_open(example: Any) -> Any:
    """Returns the shapes of the example, with a symbol for the number of examples and for named axes."""
    shapes = [(path, jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(example)]
    for path, shape in shapes:
        if not shape:
            raise ValueError(f"{name_of(path) or 'The example'!r} has no axis of examples; pass arrays [N, ...].")
    firsts = {str(shape[0]) for _, shape in shapes}
    if len(firsts) != 1:
        raise ValueError(f"The arrays of the example must have one number of examples; got {text(example)}.")
    named = any(not isinstance(size, int) for _, shape in shapes for size in shape)
    # A program looks up its number of examples by name, so an expression such as 2*b is not enough.
    if named and not firsts.pop().isidentifier():
        raise ValueError(
            f"Axes of the example have names, but the first, the axis of examples, has none: {text(example)}. Name it "
            f'too, as in jax.export.symbolic_shape("b, h, w, 3").'
        )
    (b,) = (None,) if named else jax_export.symbolic_shape("b")

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = jnp.shape(leaf) if b is None else (b, *jnp.shape(leaf)[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)))

    return jax.tree.map(spec, example)


def lacks_examples(run: Callable[[Any], Any], example: Any, *, alone: bool) -> bool:
    """Whether a function accepts the example with an additional first axis; `alone`: and not without it."""

    def runs(*axes: int) -> bool:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((*axes, *jnp.shape(leaf)), jnp.result_type(leaf)), example
        )
        try:
            jax.eval_shape(run, shapes)
        except Exception:  # any error of the model means that it does not accept these shapes
            return False
        return True

    return runs(1) and not (alone and runs())


def check_batch(batch: Any, wanted: Any) -> dict[str, int]:
    """Returns the sizes of the dynamic axes; raises a ValueError if the batch does not fit the program."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (batch, wanted)]
    if structures[0] != structures[1]:
        raise ValueError(f"The program takes {text(wanted)}; got {text(batch)}.")
    sizes: dict[str, int] = {}
    for (path, given), like in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(wanted), strict=True):
        # An expression such as 2*h is not checked here: JAX checks it when the program runs.
        fixed = zip(given.shape, like.shape, strict=False)
        fits = given.ndim == len(like.shape) and all(a == b for a, b in fixed if isinstance(b, int))
        if not fits or given.dtype != like.dtype:
            name = f"{name_of(path)!r}" if path else "the batch"
            raise ValueError(f"The program takes {text(like)} for {name}; got {text(given)}.")
        for size, axis in zip(given.shape, map(str, like.shape), strict=True):
            if axis.isidentifier() and sizes.setdefault(axis, size) != size:
                what = "number of examples" if axis == str(like.shape[0]) else f"size {axis!r}"
                raise ValueError(f"A batch has one {what}; got {text(batch)} for {text(wanted)}.")
    return sizes


def without_examples(run: Callable[[Any], Any], batch: Any, outputs: Any, axis: str) -> Any:
    """Returns the outputs for a batch without examples. The program is not run: it needs at least one example."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)

    def empty(path: Any, leaf: Any, like: Any) -> jax.Array:
        shape = tuple(0 if str(name) == axis else size for size, name in zip(leaf.shape, like.shape, strict=True))
        if shape == leaf.shape:
            raise ValueError(
                f"{name_of(path) or 'The output'!r} is {text(like)}, without an axis of examples; it has no value "
                f"for an empty batch."
            )
        return jnp.zeros(shape, leaf.dtype)

    return jax.tree.map_with_path(empty, jax.eval_shape(run, one), outputs)


def shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


class _Bare(str):
    """Text that is shown without quotes inside of dicts and tuples."""

    __repr__ = str.__str__


def text(tree: Any) -> str:
    """Returns the shapes and dtypes of a tree as text."""
    return str(jax.tree.map(lambda a: _Bare(f"{jnp.result_type(a)}[{', '.join(map(str, jnp.shape(a)))}]"), tree))
