"""Diagnosis: the numbers against NumPy, no finding without a fault, and each fault found."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from faults import FAULTS, functions, make_case
from flax import nnx
from nets import LINEN, every_framework, started
from scipy import stats

import jaxbn
import jaxbn.linen
import jaxbn.nnx

WITHOUT, WITH = 200, 100


def named(fault, seed):
    found = jaxbn.linen.diagnose(*make_case(fault, seed), progress=False)
    return [finding.name for finding in found.findings]


def test_networks_without_a_fault_have_no_findings():
    assert [seed for seed in range(2) if named(None, seed)] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault):
    assert [named(fault, seed)[:1] for seed in range(2)] == [[fault]] * 2


@pytest.mark.slow
def test_at_most_5_percent_of_networks_without_a_fault_have_findings():
    assert sum(bool(named(None, 1000 + seed)) for seed in range(WITHOUT)) <= 0.05 * WITHOUT


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_at_least_95_percent_of_the_faults_are_found(fault):
    assert sum(named(fault, 1000 + seed)[:1] == [fault] for seed in range(WITH)) >= 0.95 * WITH


def test_values_of_one_image_do_not_count_as_independent():
    """The means of batches of images of random brightness vary more than those of as many independent pixels."""
    call, variables, batches = make_case(None, 1)
    layer = jaxbn.linen.diagnose(call, variables, batches).layers["norm_0"]
    assert layer.ratio < 2
    pixels = nn.Conv(16, (3, 3)).apply({"params": variables["params"]["map_0"]}, batches)
    within = pixels.var((1, 2, 3)).mean(0) / pixels[0, ..., 0].size
    assert (pixels.mean((1, 2, 3)).var(0) / within).mean() > 5


@pytest.mark.sample(every=3)
@every_framework
@pytest.mark.parametrize("masked", [False, True], ids=["", "weighted"])
def test_numbers_are_those_of_numpy(framework, masked, rng):
    """For the first layer, whose input does not depend on statistics; a weight of 0 is like removing an example."""
    net = framework.net(framework.stock)
    moving = started(framework, net)
    rows = (1 + 2 * rng.standard_normal((12, 9, 3)) + rng.standard_normal((12, 1, 1))).astype(np.float32)
    batches = [{"x": x, "w": np.arange(9) < 9 - 2 * masked} for x in rows]
    options = {"r_max": 1.2, "d_max": 0.4, "weights": (lambda batch: batch["w"]) if masked else None}
    if framework is LINEN:
        params = moving["params"]
        found = jaxbn.linen.diagnose(lambda v, batch: net.apply(v, batch["x"], False), moving, batches, **options)
    else:
        params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
        found = jaxbn.nnx.diagnose(net, batches, call=lambda model, batch: model(batch["x"]), **options)
    kernel, bias = (np.float64(params["map_0"][name]) for name in ("kernel", "bias"))
    z = (np.float64(rows) @ kernel + bias)[:, : 9 - 2 * masked]
    count, (mean, sigma) = z.shape[1], (z.mean((0, 1)), np.sqrt(z.var((0, 1)) + 1e-5))
    d, r = (z.mean(1) - mean) / sigma, np.sqrt(z.var(1) + 1e-5) / sigma
    ratios = stats.f_oneway(*z, axis=0)
    layer = found.layers["norm_0"]
    expected = {
        "channels": 4,
        "values": count,
        "examples": count,
        "d_quantiles": np.quantile(d, (0.05, 0.5, 0.95)),
        "r_quantiles": np.quantile(r, (0.05, 0.5, 0.95)),
        "d_bound": np.quantile(np.abs(d), 0.95),
        "r_bound": np.quantile(np.maximum(r, 1 / r), 0.95),
        "outside": ((np.abs(d) > 0.4) | (r > 1.2) | (r < 1 / 1.2)).mean(),
        "noise": np.sqrt((z.var(1, ddof=1).mean(0) / count / sigma**2).mean()),
        "ratio": ratios.statistic.mean(),
        "p_value": 2 * min(stats.f.sf(ratios.statistic.mean(), 11, 12 * (count - 1)), 4 * ratios.pvalue.min()),
        "off": np.sqrt(((sigma / np.sqrt(1 + 1e-5) - 1) ** 2 + mean**2 / (1 + 1e-5)).mean()),
        "dead": 0,
        "exploding": 0,
        "huge_mean": (np.abs(mean) / sigma).max(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(layer, name), value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_the_p_value_is_uniform_or_above_where_examples_are_independent(rng):
    """With heavy tails, and with channels that depend on each other."""
    call, variables = functions(False)[2], make_case("unestimated", 0)[1]
    p_values = []
    for _ in range(60):
        rows = rng.standard_t(4, (12, 8, 12)).astype(np.float32)
        layers = jaxbn.linen.diagnose(call, variables, rows).layers
        p_values.append([layer.p_value for layer in layers.values()])
    for level in (0.05, 0.2, 0.5):
        assert (np.array(p_values) < level).mean(0).max() <= level + 3 * np.sqrt(level * (1 - level) / 60)


def test_examples_that_a_layer_receives_twice_do_not_count_twice(rng):
    class Net(nn.Module):
        twice: bool

        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True)
            return norm(x) + norm(2 * x + 1) if self.twice else norm(x)

    x = rng.standard_normal((30, 16, 3)).astype(np.float32)
    variables = Net(True).init(jax.random.key(0), x[0])
    twice, once = (jaxbn.linen.diagnose(Net(t).apply, variables, x).layers["BatchNorm_0"] for t in (True, False))
    assert twice.examples == once.examples == 16
    assert twice.p_value >= once.p_value


def test_the_gap_of_outputs(rng):
    net = nn.BatchNorm(use_running_average=True)
    x = rng.standard_normal((4, 16, 2)).astype(np.float32) * 3 + 1
    variables = net.init(jax.random.key(0), x[0])
    trained = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    evaluated = x / np.sqrt(1 + 1e-5)
    found = jaxbn.linen.diagnose(net.apply, variables, x)
    np.testing.assert_allclose(
        found.output_gap, np.sqrt(((trained - evaluated) ** 2).mean() / trained.var()), rtol=1e-4
    )


def test_batches_with_nan_are_a_finding_and_are_ignored_otherwise():
    call, variables, batches = make_case(None, 0)
    spoilt = np.array(batches)
    spoilt[3, 0, 0] = np.nan
    found = jaxbn.linen.diagnose(call, variables, spoilt)
    without = jaxbn.linen.diagnose(call, variables, np.delete(batches, 3, 0))
    assert found.findings[0].name == "nonfinite"
    assert "batch 3" in found.findings[0].text
    assert found.findings[0].layers == ("norm_0",)
    assert found.layers == without.layers


def test_parameters_that_are_nan_after_the_last_layer_are_a_finding():
    call, variables, batches = make_case(None, 0)
    head = jax.tree.map(lambda leaf: leaf * np.nan, variables["params"]["Dense_0"])
    found = jaxbn.linen.diagnose(call, variables | {"params": variables["params"] | {"Dense_0": head}}, batches)
    assert [finding.name for finding in found.findings] == ["nonfinite"]
    assert "not finite, only in the outputs" in str(found).replace("\n  ", "")
    assert found.layers == jaxbn.linen.diagnose(call, variables, batches).layers


def test_too_few_batches_and_invalid_bounds_are_rejected():
    call, variables, batches = make_case("unestimated", 0)
    for few in ([], batches[:1]):
        with pytest.raises(ValueError, match="compares batches"):
            jaxbn.linen.diagnose(call, variables, few)
    for bounds in ({"r_max": 0.5}, {"d_max": -1.0}, {"r_max": np.nan}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            jaxbn.linen.diagnose(call, variables, batches, **bounds)


def test_layers_that_are_not_reached_or_not_of_examples():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train, all_of_it=False):
            tokens = nn.BatchNorm(use_running_average=not train)(x.reshape(-1, x.shape[-1]))
            unused = nn.BatchNorm(use_running_average=not train)
            return unused(tokens) if all_of_it else tokens

    net, x = Net(), jax.random.normal(jax.random.key(0), (4, 6, 5, 3))
    variables = net.init(jax.random.key(0), x[0], True, True)
    found = jaxbn.linen.diagnose(lambda v, x: net.apply(v, x, False), variables, x)
    tokens, unused = found.layers["BatchNorm_0"], found.layers["BatchNorm_1"]
    assert np.isnan([tokens.ratio, tokens.p_value, tokens.examples]).all()  # 30 rows of 6 examples
    assert tokens.values == 30
    np.testing.assert_allclose(tokens.noise, np.std(x.mean((1, 2)), 0).mean(), rtol=0.2)  # as it is seen
    assert not unused.reached
    assert ["BatchNorm_1", *"-------"] in [line.split() for line in str(found).splitlines()]


def test_text_dict_and_picture_of_small_and_large_networks(tmp_path):
    call, variables, batches = make_case("non_iid", 0)
    found = jaxbn.linen.diagnose(call, variables, batches)
    layers = {f"Stage_{i}/Block_{i}/Inner_0/BatchNorm_{i}": found.layers["norm_0"] for i in range(100)}
    many = dataclasses.replace(found, layers=layers)
    assert repr(many) == "<Diagnosis: 100 layers in 20 batches; non_iid>"
    for diagnosis in (found, many):
        assert max(map(len, str(diagnosis).splitlines())) <= 80
        back = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
        assert back["findings"][0]["name"] == "non_iid"
        assert len(back["layers"]) == len(diagnosis.layers)
        figure = diagnosis.plot()
        assert [len(axes.get_yticklabels()) for axes in figure.axes[:1]] == [len(diagnosis.layers)]
        assert all("std" in axes.get_xlabel() for axes in figure.axes)
        figure.savefig(tmp_path / "diagnosis.png")


@pytest.mark.sample(every=2)
@every_framework
def test_batches_that_do_not_say_which_axis_is_that_of_the_examples(framework, rng):
    """Numbers that need the examples are NaN if all batches lack them; the others are as usual."""
    net = framework.net(framework.stock)
    moving = started(framework, net)
    rows = rng.standard_normal((4, 8, 3)).astype(np.float32)

    def diagnose(weights):
        batches = [{"x": x, "of classes": np.ones(n, np.float32)} for x, n in zip(rows, weights, strict=True)]
        if framework is LINEN:
            return jaxbn.linen.diagnose(lambda v, batch: net.apply(v, batch["x"], False), moving, batches)
        return jaxbn.nnx.diagnose(net, batches, call=lambda model, batch: model(batch["x"]))

    known, partly, unknown = (diagnose(n).layers["norm_0"] for n in ([8] * 4, [8, 8, 5, 8], [5] * 4))
    assert np.isnan([unknown.examples, unknown.ratio, unknown.p_value, unknown.excess]).all()
    assert known.examples == partly.examples == 8
    for name in ("values", "d_quantiles", "r_quantiles", "outside", "off", "dead", "huge_mean"):
        assert getattr(known, name) == getattr(partly, name) == getattr(unknown, name), name


def test_running_statistics_with_which_the_network_overflows(rng):
    """They are a finding; numbers that need an evaluation with them are NaN, without a warning."""
    call, variables, batches = make_case(None, 0)
    stats = jax.tree.map(lambda leaf: leaf, variables["batch_stats"])
    stats["norm_0"]["var"] = stats["norm_0"]["var"] * 0 - 1e-5  # the root of variance + epsilon is 0
    found = jaxbn.linen.diagnose(call, variables | {"batch_stats": stats}, batches)
    assert {"shifted", "nonfinite"} <= {finding.name for finding in found.findings}
    assert np.isnan(found.layers["norm_2"].p_value)


def test_calls_and_models_are_compiled_once():
    traces = []
    net = nn.BatchNorm(use_running_average=True)

    def call(variables, x):
        traces.append(None)
        return net.apply(variables, x)

    x = jax.random.normal(jax.random.key(0), (3, 8, 2))
    variables = net.init(jax.random.key(0), x[0])
    jaxbn.linen.diagnose(call, variables, x)
    once = len(traces)
    jaxbn.linen.diagnose(call, variables, x + 1)
    assert len(traces) == once
