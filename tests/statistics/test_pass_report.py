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
from nets import LAYERS, LINEN, every_framework, make_batches

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.display import tables
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.statistics.layer_change import Way
from jaxbn._src.statistics.standard_errors import Errors

CHANNELS = 4


def layer(moved, *, constant=0, count=2e7, batches=40, var=4.0, way=None):
    """A layer whose means were `moved` standard deviations off, in all channels alike."""
    mean, new_var = np.arange(CHANNELS, dtype=np.float32), np.full(CHANNELS, var, np.float32)
    new_var[:constant] = 0
    errors = Errors(np.full(CHANNELS, batches), np.linspace(0.1, 0.2, CHANNELS), np.linspace(1, 2, CHANNELS))
    old = mean + np.float32(moved * np.sqrt(var)), np.full(CHANNELS, var, np.float32)
    return jaxbn.LayerChange(count, *old, mean, new_var, LayerKind("batch_norm", 1e-5), True, batches, errors, way)


def report_of(number, way=None, **fields):
    """Layers with long names that differ in their middle; the last but one was not reached."""
    moved = np.random.default_rng(0).permutation(number) / 10
    name = "backbone/encoder/stage_{}/block_{}/BottleneckResidualBlock/normalization"
    layers = {name.format(i // 9, i): layer(moved[i], constant=i == 3, way=way) for i in range(number)}
    if number > 1:
        layers[list(layers)[-2]] = layer(0, count=0.0)
    return jaxbn.Report("pooled", 40, layers, **fields)


def rows(report):
    """The rows of the table, which an empty line ends."""
    table = str(report).split("\n\n")[0].splitlines()
    return [line for line in table if ("..." in line or "block_" in line) and "'" not in line]


# --- The numbers ------------------------------------------------------------------------------------------------------


@every_framework
def test_the_numbers_of_a_pass(framework):
    """In the first layer, since its input does not depend on statistics; the last batch is smaller."""
    data = [batch["x"] for batch in make_batches(8)]
    data[-1] = data[-1][:5]
    net = framework.net(momentum=0.9)
    if framework is LINEN:
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
    np.testing.assert_allclose(change.shift, shifts.mean(), rtol=1e-5)


def test_one_batch_and_averages_that_forget_have_no_errors():
    net = jaxbn.linen.BatchNorm(use_running_average=True)
    x = np.array([[1.0], [3.0], [8.0]], np.float32)
    variables = net.init(jax.random.key(0), x)
    for options in ({}, {"estimator": jaxbn.moving_average()}):
        report = jaxbn.linen.postproc(net.apply, variables, [x], **options)[1]
        assert str(report).split("\n\n")[0].splitlines()[-1].split()[-2:] == ["-", "-"]
        assert report.layers[""].per_batch == 3


def test_constant_channels_do_not_affect_the_others():
    """Their variance is 0 up to rounding, so distances relative to it are undefined."""
    some, none = layer(0.5, constant=2), layer(0.5)
    assert some.summary == pytest.approx(none.summary)
    assert some.constant.tolist() == [True, True, False, False]
    all_of_them = layer(0.5, constant=CHANNELS)
    assert np.isnan(all_of_them.shift)
    text = str(jaxbn.Report("pooled", 9, {"a": all_of_them, "b": some, "c": none}))
    assert text.splitlines()[4].split() == ["a", "2.0e7", *"------"]
    assert [line.split()[1:] for line in text.splitlines()[5:7]] == [text.splitlines()[5].split()[1:]] * 2
    assert text.splitlines()[7:9] == ["constant channels, which are left out above: 4 in 'a', 2 in 'b'", ""]


# --- The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("number", [1, 3, 20, 100])
def test_the_table_fits_keeps_the_order_of_the_layers_and_marks_those_that_changed_most(number, width, monkeypatch):
    monkeypatch.setattr(tables, "WIDTH", width)
    report = report_of(number, Way(2, 5, 3.456e-7), skipped=3, stages=2, stop_when=0.01)
    lines, found = str(report).splitlines(), rows(report)
    assert max(map(len, lines)) <= width
    assert len(found) == number
    cells = [row.removeprefix("* ").strip().rsplit(maxsplit=7) for row in found]
    assert len({name for name, *_ in cells}) == number  # whatever was left out of them
    moved = [change.shift if change.count else -1 for change in report.layers.values()]
    assert [-1 if shift == "-" else float(shift) for _, _, shift, *_ in cells] == pytest.approx(moved, rel=1e-2)
    most = sorted(range(number), key=lambda i: -moved[i])[:3] if number > 3 else []
    assert [i for i, row in enumerate(found) if row.startswith("* ")] == sorted(most)
    assert number == 1 or found[-2].split()[-7:] == ["-"] * 7
    assert ("* the 3 layers that changed most" in lines) == (number > 3)
    assert len({len(row) for row in found}) == 1


def test_layers_are_in_the_order_in_which_data_meets_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("zeta", "alpha", "unused")[: 3 if self.is_initializing() else 2]:
                x = nn.BatchNorm(use_running_average=True, name=name)(x) + 1
            return x

    x, key = np.random.default_rng(0).normal(size=(3, 8, 2)).astype(np.float32), jax.random.key(0)
    variables = jax.tree.map(lambda leaf: leaf + 0.5, Net().init(key, x[0]))
    new, report = jaxbn.linen.postproc(Net().apply, variables, x)
    found = jaxbn.linen.diagnose(Net().apply, new, x)
    frozen = jaxbn.linen.freeze(new, report)
    shows = report, found, jaxbn.linen.summary(variables, Net().apply, x[0]), jaxbn.linen.summary(frozen)
    for shown in shows:
        lines = [line.split() for line in str(shown).splitlines() if line]
        assert [line[0] for line in lines if line[0] in ("alpha", "unused", "zeta")] == ["zeta", "alpha", "unused"]


def test_numbers_stay_in_their_columns():
    for size in (1e-30, 3e-4, 1.0, 123.4, 98765.0, 1e30):
        lines = str(jaxbn.Report("pooled", 9, {"a": layer(size), "b": layer(1)})).splitlines()
        assert len(lines[4].split()) == len(lines[5].split()) == 8
        assert len({len(line) for line in lines[3:6]}) <= 2


def test_no_colors_whatever_the_environment_says(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "30", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    text = str(report_of(20))
    assert text.isascii() and text.replace("\n", "").isprintable()
    assert 70 < max(map(len, text.splitlines())) <= 80


def test_reprs_are_short():
    report = report_of(100)
    assert repr(report) == "<Report: pooled statistics of 100 layers from 40 batches>"
    assert repr(next(iter(report.layers.values()))).startswith("<LayerChange: 4 channels, 20000000 values, mean shift")


def test_whether_it_stopped_is_said():
    assert "stopped early: no standard error was above 0.5" in str(report_of(3, stop_when=0.5, stopped=True))
    text = "no standard error of the first stage was above 0.1; the largest of all is 0.5"
    assert text in str(report_of(3, stop_when=0.1, stopped=True, stages=2))
    text = "not stopped early: stop_when=0.5, and the largest standard error is 0.5"  # of a variance: 2 / 4
    assert text in str(report_of(1, stop_when=0.5))


# --- The dict ---------------------------------------------------------------------------------------------------------


def test_the_dict_is_json():
    report = report_of(5, Way(1, 2, 1e-3), stop_when=0.1)
    path = next(iter(report.layers))
    odd = jaxbn.LayerChange(
        9.0, np.array([1 + 2j], np.complex64), np.zeros(1, jnp.bfloat16), np.array([np.nan]), np.array([np.inf])
    )
    with np.errstate(invalid="ignore"):
        given = jaxbn.Report("pooled", 40, report.layers | {"odd": odd}, stages=1).to_dict()
    found = json.loads(json.dumps(given, allow_nan=False))
    assert found == given
    assert (found["estimator"], found["batches"], found["stopped"], found["change"]) == ("pooled", 40, False, 1e-3)
    assert (found["stages"], found["sweeps"]) == (1, 2)
    assert found["layers"][path]["way"] == {"stage": 1, "sweeps": 2, "last_change": 1e-3}
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


@pytest.mark.sample(every=2)
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
        "|old mean - new mean| (std)",
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


@every_framework
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_one_line_goes_back_to_the_last_bit(framework, kind):
    """Statistics that no pass would find, one of them NaN; the second layer is not reached."""
    data = make_batches(2)
    rng = np.random.default_rng(3)
    if framework is LINEN:
        net = framework.net(getattr(framework, kind), **({"momentum": jaxbn.cumulative()} if kind == "ours" else {}))
        before = net.init(jax.random.key(0), data[0]["x"], False)
        stats = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), before["batch_stats"])
        before = before | {"batch_stats": stats}
        before["batch_stats"][LAYERS[0]]["mean"] = before["batch_stats"][LAYERS[0]]["mean"].at[1].set(jnp.nan)
        call = jaxbn.linen.freeze_layers(net.apply, LAYERS[1])
        after, report = jaxbn.linen.postproc(lambda v, b: call(v, b["x"], False), before, data)
        back = jaxbn.linen.install_moments(after, report.old)
    else:
        before = framework.net(getattr(framework, kind))
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
