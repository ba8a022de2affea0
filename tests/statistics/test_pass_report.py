"""The report of a pass: its numbers against float64, its table, its dict, its picture, and the way back."""

import dataclasses
import io
import itertools
import json
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import LAYERS, LINEN, every_host, make_batches

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.statistics.standard_errors import Errors

CHANNELS = 4


def layer(moved, *, constant=0, count=2e7, batches=40, var=4.0):
    """A layer whose means were `moved` standard deviations off, in all channels alike."""
    mean, new_var = np.arange(CHANNELS, dtype=np.float32), np.full(CHANNELS, var, np.float32)
    new_var[:constant] = 0
    errors = Errors(np.full(CHANNELS, batches), np.linspace(0.1, 0.2, CHANNELS), np.linspace(1, 2, CHANNELS))
    old = mean + np.float32(moved * np.sqrt(var)), np.full(CHANNELS, var, np.float32)
    return jaxbn.LayerChange(count, *old, mean, new_var, LayerKind("batch_norm", 1e-5), True, batches, errors)


def report_of(number, **fields):
    """Layers with long names that differ in their middle; the last but one was not reached."""
    moved = np.random.default_rng(0).permutation(number) / 10
    name = "backbone/encoder/stage_{}/block_{}/BottleneckResidualBlock/normalization"
    layers = {name.format(i // 9, i): layer(moved[i], constant=i == 3) for i in range(number)}
    if number > 1:
        layers[list(layers)[-2]] = layer(0, count=0.0)
    return jaxbn.Report("pooled", 40, layers, **fields)


def rows(report):
    return [line for line in str(report).splitlines() if "..." in line and "constant" not in line]


# --- The numbers ------------------------------------------------------------------------------------------------------


@every_host
def test_the_numbers_of_a_pass(host):
    """Of the first layer, whose input does not depend on statistics; the last batch is smaller."""
    data = [batch["x"] for batch in make_batches(8)]
    data[-1] = data[-1][:5]
    net = host.net(momentum=0.9)
    if host is LINEN:
        variables = net.init(jax.random.key(0), data[0], False)
        params = variables["params"]["map_0"]
        _, report = jaxbn.linen.postproc(lambda v, x: net.apply(v, x, False), variables, data)
    else:
        params = nnx.to_pure_dict(nnx.state(net, nnx.Param))["map_0"]
        _, report = jaxbn.nnx.postproc(net, data)
    inputs = [np.float64(x) @ np.float64(params["kernel"]) + np.float64(params["bias"]) for x in data]
    n, everything = np.array([[len(x)] for x in inputs]), np.concatenate(inputs)
    mean, var = everything.mean(0), everything.var(0)
    means, squares = (
        np.stack([part(x) for x in inputs]) for part in (lambda x: x.mean(0), lambda x: ((x - mean) ** 2).mean(0))
    )
    change = report.layers[LAYERS[0]]
    for found, parts, whole in ((change.errors.mean, means, mean), (change.errors.var, squares, var)):
        expected = np.sqrt(8 / 7 * (n**2 * (parts - whole) ** 2).sum(0)) / n.sum()
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (change.count, change.batches, change.per_batch) == (7 * 16 + 5, 8, 117 / 8)
    summary = change.summary
    np.testing.assert_allclose(summary["worst_mean_shift"], (np.abs(mean) / np.sqrt(var)).max(), rtol=1e-5)
    np.testing.assert_allclose(summary["max_var_ratio"], 1 / var.min(), rtol=1e-5)
    np.testing.assert_allclose(summary["worst_mean_error"], (change.errors.mean / np.sqrt(var)).max(), rtol=1e-5)
    np.testing.assert_allclose(summary["worst_var_error"], (change.errors.var / var).max(), rtol=1e-5)
    shifts = np.maximum(np.abs(mean) / np.sqrt(var), np.abs(1 / np.sqrt(var) - 1))  # the old ones are 0 and 1
    np.testing.assert_allclose(change.moved, shifts.mean(), rtol=1e-5)


def test_one_batch_and_averages_that_forget_have_no_errors():
    net = jaxbn.linen.BatchNorm(use_running_average=True)
    x = np.array([[1.0], [3.0], [8.0]], np.float32)
    variables = net.init(jax.random.key(0), x)
    for options in ({}, {"estimator": jaxbn.moving_average()}):
        report = jaxbn.linen.postproc(net.apply, variables, [x], **options)[1]
        assert str(report).splitlines()[-1].split()[-2:] == ["-", "-"]
        assert report.layers[""].per_batch == 3


def test_constant_channels_say_nothing_of_the_others():
    """Their variance is 0, or what rounding makes of it, and nothing can be measured in it."""
    some, none = layer(0.5, constant=2), layer(0.5)
    assert some.summary == pytest.approx(none.summary)
    assert some.constant.tolist() == [True, True, False, False]
    all_of_them = layer(0.5, constant=CHANNELS)
    assert np.isnan(all_of_them.moved)
    text = str(jaxbn.Report("pooled", 9, {"a": all_of_them, "b": some, "c": none}))
    assert [line[0] for line in text.splitlines()[4:7]] == ["b", "c", "a"]
    assert text.splitlines()[7:] == ["channels that are constant, and left out above: 4 in a, 2 in b"]


# --- The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 20, 100])
def test_the_table_is_narrow_sorted_and_marked(number):
    report = report_of(number, skipped=3, sweeps=5, change=3.456e-7, stop_when=0.01)
    lines, found = str(report).splitlines(), rows(report)
    assert max(map(len, lines)) <= 100
    assert len(found) == number
    names = [row[2 * (number > 3) :][:36] for row in found]
    assert len(set(names)) == number  # whatever was left out of them
    moved = [float(row[-46:].split()[0]) for row in found if "not reached" not in row]
    assert moved == sorted(moved, reverse=True)
    assert [row.startswith("* ") for row in found] == [number > 3 and i < 3 for i in range(number)]
    assert number == 1 or "not reached" in found[-1]
    assert ("* the 3 layers that moved most" in lines) == (number > 3)
    assert len({len(row) for row in found if "not reached" not in row}) == 1


def test_numbers_stay_in_their_columns():
    for size in (1e-30, 3e-4, 1.0, 123.4, 98765.0, 1e30):
        cells = str(jaxbn.Report("pooled", 9, {"a": layer(size), "b": layer(1)})).splitlines()
        assert len(cells[4].split()) == len(cells[5].split()) == 9
        assert {len(line) - len(cells[3]) for line in cells[4:]} <= ({0} if size != 1e-30 else {0, 1})


def test_whether_it_stopped_is_said():
    assert "stopped early: no standard error was above 0.5" in str(report_of(3, stop_when=0.5, stopped=True))
    text = "not stopped early: 0.5 was wanted, and the largest standard error is 0.5"  # of a variance: 2 / 4
    assert text in str(report_of(1, stop_when=0.5))


# --- The dict ---------------------------------------------------------------------------------------------------------


def test_the_dict_is_json():
    report = report_of(5, stop_when=0.1, change=float("nan"))
    path = next(iter(report.layers))
    odd = jaxbn.LayerChange(
        9.0, np.array([1 + 2j], np.complex64), np.zeros(1, jnp.bfloat16), np.array([np.nan]), np.array([np.inf])
    )
    with np.errstate(invalid="ignore"):
        given = jaxbn.Report("pooled", 40, report.layers | {"odd": odd}, change=1e-3).to_dict()
    found = json.loads(json.dumps(given, allow_nan=False))
    assert found == given
    assert (found["estimator"], found["batches"], found["stopped"], found["change"]) == ("pooled", 40, False, 1e-3)
    one = found["layers"][path]
    assert one["new"] == {"mean": [0, 1, 2, 3], "var": [4] * 4}
    assert (one["values"], one["values_per_batch"], one["method"], one["epsilon"]) == (2e7, 5e5, "batch_norm", 1e-5)
    assert one["standard_error"]["var"] == pytest.approx([1, 4 / 3, 5 / 3, 2])
    assert one["worst_var_error"] == 0.5
    assert found["layers"]["odd"]["old"]["mean"] == [[1, 2]]
    assert found["layers"]["odd"]["new"] == {"mean": [None], "var": [None]}
    assert "mean_shift" not in found["layers"][report.not_reached[0]]


# --- The picture ------------------------------------------------------------------------------------------------------


def extent(text):
    return text.get_window_extent()


@pytest.mark.parametrize(("number", "factor"), [(1, 1.01), (4, 50), (20, 1e3), (100, 1e11)])
def test_the_picture_is_whole(number, factor):
    """Every text lies in the figure, and none lies on another; variances were off by up to so much in both ways."""
    report = report_of(number)
    old_var = np.geomspace(4 / factor, 4 * factor, CHANNELS).astype(np.float32)
    layers = {path: dataclasses.replace(change, old_var=old_var) for path, change in report.layers.items()}
    report = dataclasses.replace(report, layers=layers)
    figure = report.plot()
    figure.savefig(io.BytesIO())
    shift, ratio, error = figure.axes
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "old mean off by (new std)",
        "old variance / new variance",
        "standard error, worst channel",
    ]
    names = shift.get_yticklabels()
    assert len({name.get_text() for name in names}) == number - len(report.not_reached)
    whole = figure.bbox
    ticks = [label for axes in figure.axes for label in axes.get_xticklabels()]
    for text in [*names, *ticks, *(axes.xaxis.label for axes in figure.axes), figure._suptitle]:
        box = extent(text)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
    across = [sorted((b.y0, b.y1) for b in map(extent, names))]
    across += [sorted((b.x0, b.x1) for b in map(extent, axes.get_xticklabels())) for axes in (ratio, error)]
    for ends in across:
        assert all(start >= end for (_, end), (start, _) in itertools.pairwise(ends))


def test_layers_without_numbers_are_drawn_too():
    layers = {"a": layer(0.0, constant=CHANNELS), "b": jaxbn.LayerChange(3.0, *np.zeros((4, 2), np.float32))}
    jaxbn.Report("pooled", 1, layers).plot().savefig(io.BytesIO())


def test_drawing_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report_of(1).plot()


# --- The way back -----------------------------------------------------------------------------------------------------


@every_host
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_one_line_goes_back_to_the_last_bit(host, kind):
    """Statistics that no pass would find, one of them NaN; the second layer is not reached."""
    data = make_batches(2)
    rng = np.random.default_rng(3)
    if host is LINEN:
        net = host.net(getattr(host, kind), **({"momentum": jaxbn.cumulative()} if kind == "ours" else {}))
        before = net.init(jax.random.key(0), data[0]["x"], False)
        stats = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), before["batch_stats"])
        before = before | {"batch_stats": stats}
        before["batch_stats"][LAYERS[0]]["mean"] = before["batch_stats"][LAYERS[0]]["mean"].at[1].set(jnp.nan)
        call = jaxbn.linen.freeze_layers(net.apply, LAYERS[1])
        after, report = jaxbn.linen.postproc(lambda v, b: call(v, b["x"], False), before, data)
        back = jaxbn.linen.install_moments(after, report.old)
    else:
        before = host.net(getattr(host, kind))
        stats = nnx.state(before, nnx.BatchStat)
        nnx.update(before, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), stats))
        model = jaxbn.nnx.freeze_layers(before, LAYERS[1])
        after, report = jaxbn.nnx.postproc(model, data, call=lambda m, b: m(b["x"]))
        back = jaxbn.nnx.install_moments(after, report.old)
        before, after, back = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (before, after, back))
    assert set(report.old) == {LAYERS[0]} and report.not_reached == (LAYERS[1],)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(after, before, strict=True)
    chex.assert_trees_all_equal(back, before, strict=True)


def test_back_in_half_precision_and_in_a_stack_that_was_reached_in_part(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, axis=(0, 2), dtype=jnp.float32)(x)

    x = rng.standard_normal((3, 8, 2)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    old = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), jnp.bfloat16), variables["batch_stats"])
    before = variables | {"batch_stats": old}
    path = "BatchNorm_0"
    found = jaxbn.batch_moments(x, axis=(0, 2), mask=np.array([True, False, True])[:, None, None])
    after = jaxbn.linen.install_moments(before, {path: found})
    stats = [leaves["batch_stats"][path] for leaves in (before, after)]
    arrays = [np.asarray(stat[name]) for stat in stats for name in ("mean", "var")]
    change = jaxbn.LayerChange(16.0, *arrays, reached=np.asarray(found.count) > 0)
    report = jaxbn.Report("pooled", 1, {path: change})
    assert np.asarray(report.old[path].count).tolist() == [[1, 1], [0, 0], [1, 1]]
    chex.assert_trees_all_equal(jaxbn.linen.install_moments(after, report.old), before, strict=True)
