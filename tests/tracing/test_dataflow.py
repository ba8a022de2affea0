"""Producers and users of values in small programs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxbn._src.tracing.dataflow import follow, tag

X = np.ones((2, 3), np.float32)


def flow_of(function, *args):
    return follow(jax.make_jaxpr(function)(*args))


def labels(nodes):
    return [node.label for node in nodes]


def test_calls_are_inlined_and_dead_code_is_removed():
    @jax.jit
    def inner(x):
        jnp.exp(x)  # of no use
        x = jax.lax.with_sharding_constraint(
            checkpoint_name(x, "kept"), jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        return jax.checkpoint(jax.nn.relu)(x)

    flow = flow_of(lambda x: tag(inner(tag(x, "in")), "out"), X)
    (given,), (back,) = flow.tagged("in"), flow.tagged("out")
    assert flow.uses(given.outputs[0]) == [flow.makers[back.inputs[0]]]
    assert labels(flow.nodes) == ["jaxbn_tag", "relu", "jaxbn_tag"]
    assert not flow.unreadable and flow.outputs == {back.outputs[0]}


def test_a_value_is_used_by_the_world_and_as_an_output_too():
    def function(x):
        y = tag(x, "y")
        jax.debug.print("{}", y.sum())
        return y, jnp.sin(y)

    flow = flow_of(function, X)
    (node,) = flow.tagged("y")
    assert labels(flow.uses(node.outputs[0])) == ["reduce_sum", "sin", "the outputs of the model"]
    assert "debug_print" in labels(flow.nodes) or "debug_callback" in labels(flow.nodes)


def test_where_a_value_leaves_by():
    def function(w, v, u):
        y = tag(w * v + u, "y")
        jax.debug.print("{}", u)
        return y + v

    flow = flow_of(function, X, X, X)
    assert [flow.leaves_by(value, "y") for value in flow.inputs] == [True, False, False]


def test_what_lies_in_loops_and_maps_cannot_be_followed():
    def function(x):
        _, y = jax.lax.scan(lambda carry, row: (carry, jax.jit(tag, static_argnums=1)(row, "scanned")), 0, x)
        return y + jax.vmap(lambda row: tag(row, "mapped"))(x) + tag(jax.vmap(jnp.sin)(x), "outside")

    flow = flow_of(function, X)
    assert [tuple(one) for one in flow.unreadable] == [("scanned", "scan"), ("mapped", "vmap")]
    assert not flow.tagged("scanned") and not flow.tagged("mapped") and len(flow.tagged("outside")) == 1


def test_a_tag_changes_neither_values_nor_derivatives_nor_programs():
    plain, tagged = (lambda x: jnp.sin(x).sum()), (lambda x: tag(jnp.sin(tag(x, 0)), 1).sum())
    np.testing.assert_array_equal(jax.jit(jax.grad(tagged))(X), jax.grad(plain)(X))
    np.testing.assert_array_equal(jax.vmap(tagged)(X), jax.vmap(plain)(X))
    texts = [jax.jit(function).lower(X).as_text(debug_info=False) for function in (plain, tagged)]
    assert texts[0].replace("lambda", "") == texts[1].replace("lambda", "")
