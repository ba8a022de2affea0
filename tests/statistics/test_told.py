"""A diagnosis never says that all is well if the outputs differ, or if it could not judge a layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import make_case
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ALL_CLEAR = "No problem with the batch statistics was found"


class Shared(nn.Module):
    """A siamese network: one map and normalization for two inputs."""

    how: str

    @nn.compact
    def __call__(self, pair, train):
        layer, norm = nn.Dense(6, name="map"), nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")
        a, b = pair[:, 0], pair[:, 1]
        if self.how == "two calls":
            return jnp.stack([norm(layer(a)), norm(layer(b))], 1)
        if self.how == "one call":
            return norm(layer(jnp.stack([a, b], 1)))
        return jax.lax.map(lambda x: norm(layer(x)), jnp.stack([a, b])).swapaxes(0, 1)


class SharedNNX(nnx.Module):
    def __init__(self, how):
        self.how = how
        self.map, self.norm = nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    def __call__(self, pair):
        if self.how == "one call":
            return self.norm(self.map(pair))
        return jnp.stack([self.norm(self.map(pair[:, i])) for i in range(2)], 1)


def pairs_of(offset):
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((20, 32, 2, 5)).astype(np.float32)
    return pairs + np.float32([[0], [offset]])[None, None]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    ("framework", "how", "offset", "expected"),
    [
        ("linen", "two calls", 3.0, ["calls_differ"]),
        ("linen", "two calls", 0.0, []),
        ("linen", "one call", 3.0, []),
        ("linen", "a loop", 3.0, ["calls_differ"]),
        ("nnx", "two calls", 3.0, ["calls_differ"]),
        ("nnx", "two calls", 0.0, []),
        ("nnx", "one call", 3.0, []),
    ],
)
def test_calls_of_one_layer_on_different_inputs_are_told_apart(framework, how, offset, expected):
    pairs = pairs_of(offset)
    if framework == "linen":
        net = Shared(how)
        variables = Shared("one call").init(jax.random.key(0), pairs[0], False)
        call = functools.partial(net.apply, train=False)
        found = jaxbn.linen.diagnose(call, jaxbn.linen.postproc(call, variables, pairs)[0], pairs)
    else:
        model = SharedNNX(how)
        found = jaxbn.nnx.diagnose(jaxbn.nnx.postproc(model, pairs)[0], pairs)
    assert [finding.name for finding in found.findings] == expected
    assert (ALL_CLEAR in str(found)) == (not expected)
    assert found.layers["norm"].calls == (1 if how == "one call" else 2)


class Blocks(nn.Module):
    """Blocks that do not hand the flag on to all their layers, as a public RegNet."""

    told: tuple

    @nn.compact
    def __call__(self, x, train):
        for number, told in enumerate(self.told):
            x = nn.Dense(12, name=f"map_{number}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not (train and told), momentum=0.5, name=f"norm_{number}")(x))
        return x


def blocks(told, steps=20):
    """(a training call, variables after some steps, batches of 4 rows)."""
    net, x = Blocks(told), 2 + 3 * np.random.default_rng(0).standard_normal((24, 4, 6)).astype(np.float32)
    variables = net.init(jax.random.key(0), x[0], True)
    step = jax.jit(lambda v, x: v | net.apply(v, x, True, mutable=["batch_stats"])[1])
    for batch in x[:steps]:
        variables = step(variables, batch)
    return lambda v, x: net.apply(v, x, True, mutable=["batch_stats"]), variables, x


def test_layers_that_training_never_updates_are_told_in_the_call_of_training():
    call, variables, x = blocks((True, False, False))
    found = jaxbn.linen.diagnose(call, variables, x)
    never = next(finding for finding in found.findings if finding.name == "never_trains")
    assert set(never.layers) == {"norm_1", "norm_2"}
    assert "evaluates 2 of 3 layers" in never.text
    # The finding about the batch size names the layer that is sensitive to it.
    assert {layer for finding in found.findings if finding.name == "tiny_batches" for layer in finding.layers} == {
        "norm_0"
    }
    assert "unestimated" not in [finding.name for finding in found.findings]
    # As the model makes it: train and eval differ through norm_0 alone.
    evaluated = np.asarray(Blocks((True, False, False)).apply(variables, x, False))
    trained = np.stack([call(variables, batch)[0] for batch in x])
    gap = np.sqrt(((trained - evaluated) ** 2).mean() / trained.var((1, 2)).mean())
    np.testing.assert_allclose(found.output_gap, gap, rtol=1e-4)


def test_layers_that_were_never_updated_are_reported_in_a_call_of_evaluation():
    _, variables, x = blocks((True, True, False))
    net = Blocks((True, True, False))
    found = jaxbn.linen.diagnose(lambda v, x: net.apply(v, x, False), variables, x)
    unestimated = next(finding for finding in found.findings if finding.name == "unestimated")
    assert unestimated.layers == ("norm_2",)
    assert "training flag" in unestimated.advice


def test_layers_that_are_held_on_purpose_are_no_finding():
    """The statistics that they use are right: a backbone in fine-tuning."""
    call, variables, x = blocks((False, True), steps=0)
    x = x.reshape(6, 16, 6)
    variables = jaxbn.linen.postproc(lambda v, x: Blocks((False, True)).apply(v, x, False), variables, x)[0]
    assert "never_trains" not in [f.name for f in jaxbn.linen.diagnose(call, variables, x).findings]


def test_no_layer_reached():
    call, variables, batches = make_case(None, 0)
    found = jaxbn.linen.diagnose(jaxbn.linen.freeze_layers(call, ""), variables, batches)
    assert [finding.name for finding in found.findings] == ["not_reached"]
    assert ALL_CLEAR not in str(found) and "Does `call` run the model" in str(found)
    assert "Does `call` run" in str(jaxbn.nnx.diagnose(SharedNNX("one call"), pairs_of(0), call=lambda model, x: x))


def test_what_was_not_judged_is_said_instead_of_an_all_clear():
    call, variables, batches = make_case(None, 0)
    assert ALL_CLEAR in str(jaxbn.linen.diagnose(call, variables, batches))
    frozen = jaxbn.linen.freeze_layers(call, "norm_1")
    no_outputs = lambda v, x: (call(v, x), None)[1]  # noqa: E731
    no_examples = [{"x": x, "of classes": np.ones(10, np.float32)} for x in batches]
    for run, data, reason in [
        (frozen, batches, "'norm_1' was not reached"),
        (no_outputs, batches, "Whether outputs differ"),
        (lambda v, b: call(v, b["x"]), no_examples, "at random"),
    ]:
        found = jaxbn.linen.diagnose(run, variables, data)
        assert not found.findings
        assert (
            ALL_CLEAR not in str(found)
            and f"Not judged: {reason}" in str(found).replace("\n  ", "")
            or reason in str(found)
        )


def test_a_gap_that_no_layer_explains_is_a_finding():
    """Each layer is off by less than is worth telling, and there are many."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for number in range(12):
                x = nn.BatchNorm(use_running_average=True, use_bias=False, name=f"norm_{number}")(x)
            return {"same": jnp.arange(4.0) * 1e3, "out": x}

    net, x = Deep(), np.random.default_rng(0).standard_normal((10, 256, 3)).astype(np.float32)
    variables = net.init(jax.random.key(0), x[0])
    layers = {f"norm_{i}": {"mean": jnp.zeros(3) - 0.1, "var": jnp.full(3, 0.8)} for i in range(12)}
    found = jaxbn.linen.diagnose(net.apply, {**variables, "batch_stats": layers}, x)
    assert [finding.name for finding in found.findings] == ["gap"]
    assert found.output_gap > 0.5 and ALL_CLEAR not in str(found)


def test_a_layer_with_stagnating_running_averages_is_reported(rng):
    net = nn.BatchNorm(use_running_average=True)
    x = 1e5 + rng.standard_normal((5, 32, 2)).astype(np.float32)
    variables = {"batch_stats": {"mean": jnp.full(2, 1e5), "var": jnp.ones(2)}}
    params = net.init(jax.random.key(0), x[0])["params"]
    assert "Running averages stop" in str(jaxbn.linen.diagnose(net.apply, {"params": params} | variables, x))
