"""The statistics pass for NNX, on stock and on our models, against float64 over the captured inputs."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

NORMS = [nnx.BatchNorm, jaxbn.nnx.BatchNorm]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=["stock", "jaxbn"])


class Net(nnx.Module):
    """Residual, with dropout, and layers that tell what they were given if `inputs` is a list."""

    def __init__(self, norm, rngs):
        self.convs = nnx.List([nnx.Conv(i, 4, (3, 3), use_bias=False, rngs=rngs) for i in (3, 4)])
        self.norms = nnx.List([norm(4, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x, inputs=None):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = conv(x)
            if inputs is not None:
                inputs.append(y)
            x = self.dropout(nnx.relu(norm(y))) + x[..., :1]
        return self.head(x.mean((1, 2)))


def call(model, batch):
    return nnx.view(model, deterministic=True, use_running_average=True)(batch["image"])


def started(norm=nnx.BatchNorm):
    return Net(norm, nnx.Rngs(0))


@pytest.fixture
def batches(rng):
    """Of 64, 64 and 4 rows, the last far away: PyTorch's update_bn gives 4.89 for a true mean of 0.66 on such data."""
    images = rng.standard_normal((132, 6, 6, 3)).astype(np.float32)
    images[128:] += 20
    return [{"image": part, "label": np.zeros(len(part), np.int32)} for part in np.split(images, [64, 128])]


def inputs_of_layers(batches):
    """What each layer was given in every batch, normalized with the statistics of that batch."""
    found = {"norms/0": [], "norms/1": []}
    for batch in batches:
        inputs = []
        nnx.view(started(), deterministic=True, use_running_average=False)(batch["image"], inputs)
        for path, values in zip(found, inputs, strict=True):
            found[path].append(np.float64(values).reshape(-1, 4))
    return found


def layer_of(model, path):
    return model.norms[int(path.removeprefix("norms/"))]


def values(model, *kinds):
    kind = nnx.Any(*kinds or (nnx.Param, nnx.BatchStat, nnx.RngCount))
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, kind)))


@every_norm
def test_pooled_statistics_are_those_of_all_the_data(norm, batches):
    model = started(norm)
    graph, before = nnx.graphdef(model), values(model)
    new, report = jaxbn.nnx.postproc(model, batches, call=call)
    for path, parts in inputs_of_layers(batches).items():
        everything = np.concatenate(parts)
        np.testing.assert_allclose(layer_of(new, path).mean[...], everything.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer_of(new, path).var[...], everything.var(0), rtol=1e-5)
        assert report.layers[path].count == 132 * 36
    assert (report.estimator, report.batches, report.not_reached) == ("pooled", 3, ())
    assert nnx.graphdef(model) == graph == nnx.graphdef(new)
    chex.assert_trees_all_equal(values(model), before, strict=True)
    chex.assert_trees_all_equal(values(new, nnx.Param), values(model, nnx.Param), strict=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(values(new), values(model))


@pytest.mark.slow
@every_norm
@pytest.mark.parametrize("estimator", [jaxbn.mean_of_batches(), jaxbn.moving_average(0.9)], ids=lambda e: e.name)
def test_other_estimators(norm, estimator, batches):
    new, _ = jaxbn.nnx.postproc(started(norm), batches, call=call, estimator=estimator)
    for path, parts in inputs_of_layers(batches).items():
        if estimator.name == "mean_of_batches":
            mean = np.mean([part.mean(0) for part in parts], 0)
            var = np.mean([part.var(0, ddof=1) for part in parts], 0)
        else:
            mean, std = np.zeros(4), np.ones(4)
            for part in parts:
                mean, std = 0.9 * mean + 0.1 * part.mean(0), 0.9 * std + 0.1 * part.std(0)
            var = std**2
        np.testing.assert_allclose(layer_of(new, path).mean[...], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer_of(new, path).var[...], var, rtol=1e-5)


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            y = nn.Conv(4, (3, 3), use_bias=False, name=f"convs_{number}")(x)
            x = nn.relu(self.norm(use_running_average=True, name=f"norms_{number}")(y)) + x[..., :1]
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "estimator", [jaxbn.pooled(), jaxbn.mean_of_batches(), jaxbn.moving_average()], ids=lambda e: e.name
)
@pytest.mark.parametrize(
    "linen, norm", [(nn.BatchNorm, nnx.BatchNorm), (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm)], ids=["stock", "jaxbn"]
)
def test_both_frameworks_give_the_same_statistics(linen, norm, estimator, batches):
    model = started(norm)
    new, _ = jaxbn.nnx.postproc(model, batches, call=call, estimator=estimator)
    variables = {"params": {}, "batch_stats": {}}
    for kind, filters in (("params", nnx.Param), ("batch_stats", nnx.BatchStat)):
        for name, entry in values(model, filters).items():
            named = {name: entry} if name == "head" else {f"{name}_{i}": part for i, part in entry.items()}
            variables[kind] |= named
    net = LinenNet(linen)
    expected, _ = jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"]), variables, batches, estimator=estimator)
    for number in range(2):
        found = {"mean": new.norms[number].mean[...], "var": new.norms[number].var[...]}
        chex.assert_trees_all_close(found, expected["batch_stats"][f"norms_{number}"], rtol=1e-5, atol=1e-6)


@every_norm
def test_evaluation_uses_the_new_statistics(norm, batches):
    model = started(norm)
    new, _ = jaxbn.nnx.postproc(model, batches[:1], call=call)
    outputs, _ = jaxbn.nnx.capture_moments(call, mode="batch")(model, batches[0])
    np.testing.assert_allclose(call(new, batches[0]), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_norm
def test_any_iterable_will_do_and_flags_do_not_matter(norm, batches):
    expected = values(jaxbn.nnx.postproc(started(norm), batches, call=call)[0], nnx.BatchStat)
    for iterable in (tuple(batches), iter(batches), (batch for batch in batches)):
        found, _ = jaxbn.nnx.postproc(started(norm), iterable, call=call)
        chex.assert_trees_all_equal(values(found, nnx.BatchStat), expected)
    training = started(norm)
    training.train()
    frozen = lambda model, batch: nnx.view(model, deterministic=True)(batch["image"])
    found, _ = jaxbn.nnx.postproc(training, batches, call=frozen)
    chex.assert_trees_all_equal(values(found, nnx.BatchStat), expected)
    # Without a call the model is called with the batch; its dropout is on, so only the first layer agrees.
    found, _ = jaxbn.nnx.postproc(training, [batch["image"] for batch in batches])
    assert found.norms[0].use_running_average is False
    np.testing.assert_allclose(found.norms[0].var[...], expected["norms"][0]["var"], rtol=1e-6)


@every_norm
def test_a_pass_is_compiled_once_for_each_shape_of_a_batch(norm, batches):
    traces = []

    def counted(model, batch):
        traces.append(batch["image"].shape[0])
        return call(model, batch)

    for _ in range(3):  # of other models too, as their graphs are equal
        jaxbn.nnx.postproc(started(norm), batches, call=counted)
        assert traces == [64, 64, 4]  # the first to learn which moments there will be


@every_norm
def test_a_pass_without_a_call_is_compiled_once(norm, batches):
    traces = []

    class Counted(Net):
        def __call__(self, x):
            traces.append(len(x))
            return super().__call__(x)

    for _ in range(3):
        jaxbn.nnx.postproc(Counted(norm, nnx.Rngs(0)), [batch["image"] for batch in batches])
    assert traces == [64, 64, 4]


def test_state_with_a_count_keeps_it(rng):
    model, x = jaxbn.nnx.BatchNorm(3, momentum=jaxbn.cumulative(), rngs=nnx.Rngs(0)), rng.standard_normal((8, 3))
    model(x)
    new, _ = jaxbn.nnx.postproc(model, [np.float32(x)])
    assert new.count[...] == 1
    np.testing.assert_allclose(new.mean[...], x.mean(0), rtol=1e-5, atol=1e-6)


@every_norm
def test_stacked_layers(norm, rng):
    """An ensemble, whose statistics have an axis more."""
    model = nnx.vmap(lambda rngs: norm(4, rngs=rngs))(nnx.Rngs(0).split(3))
    data = rng.standard_normal((3, 20, 4)).astype(np.float32)
    run = nnx.vmap(lambda layer, x: layer(x))
    new, report = jaxbn.nnx.postproc(model, [data[:, :13], data[:, 13:]], call=run)
    np.testing.assert_allclose(new.mean[...], data.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.var[...], data.var(1), rtol=1e-5)
    assert report.layers[""].count == 20


@every_norm
def test_layers_that_are_not_reached_keep_their_statistics(norm, batches):
    model = started(norm)
    model.norms.append(norm(4, rngs=nnx.Rngs(0)))
    model.norms[2].mean[...] = jnp.full(4, 7.0)
    zipped = lambda model, batch: model.norms[0](model.convs[0](batch["image"]))
    new, report = jaxbn.nnx.postproc(model, batches, call=zipped)
    assert report.not_reached == ("norms/1", "norms/2")
    np.testing.assert_array_equal(new.norms[2].mean[...], np.full(4, 7.0))
    assert "not reached" in str(report)


def test_install_moments_is_the_end_of_ones_own_loop(batches):
    model = started(jaxbn.nnx.BatchNorm)
    measure = nnx.jit(jaxbn.nnx.capture_moments(call))
    parts = [measure(model, batch)[1] for batch in batches]
    pooled = {path: jaxbn.merge(jaxbn.merge(*(p[path] for p in parts[:2])), parts[2][path]) for path in parts[0]}
    expected, _ = jaxbn.nnx.postproc(model, batches, call=call)
    found = jaxbn.nnx.install_moments(model, pooled)
    chex.assert_trees_all_close(values(found, nnx.BatchStat), values(expected, nnx.BatchStat), rtol=1e-5, atol=1e-6)
    assert (model.norms[0].mean[...] == 0).all()


def test_installing_one_layer_leaves_the_others(rng):
    model, moments = started(), jaxbn.batch_moments(rng.standard_normal((8, 4)).astype(np.float32))
    found = jaxbn.nnx.install_moments(model, {"norms/1": moments})
    np.testing.assert_array_equal(found.norms[1].mean[...], moments.mean)
    np.testing.assert_array_equal(found.norms[0].mean[...], model.norms[0].mean[...])


def test_report_tells_how_far_the_old_statistics_were(batches):
    new, report = jaxbn.nnx.postproc(started(jaxbn.nnx.BatchNorm), batches, call=call)
    for path, change in report.layers.items():
        mean, var = (np.float64(leaf[...]) for leaf in (layer_of(new, path).mean, layer_of(new, path).var))
        np.testing.assert_allclose(change.mean_shift, np.abs(mean) / np.sqrt(var), rtol=1e-5)  # they were 0 and 1
        np.testing.assert_allclose(change.var_ratio, 1 / var, rtol=1e-5)
    lines = str(report).splitlines()
    assert lines[0] == "pooled statistics from 3 batches"
    assert [line.split()[0] for line in lines[4:6]] == ["norms/0", "norms/1"]


def test_errors_come_before_anything_is_installed(batches):
    model = started()
    before = values(model)
    bad = [{**batch, "image": batch["image"].copy()} for batch in batches]
    bad[1]["image"][3, 0, 0, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"Batch 1 \(counted from 0\) gave statistics that are not finite, first in 'norms/0'"
    ):
        jaxbn.nnx.postproc(model, bad, call=call)
    with pytest.raises(ValueError, match="There was no batch"):
        jaxbn.nnx.postproc(model, [], call=call)
    with pytest.raises(ValueError, match="no normalization layer"):
        jaxbn.nnx.postproc(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), batches)
    with pytest.raises(ValueError, match=r"No batch went through .* it has 'norms/0', 'norms/1'"):
        jaxbn.nnx.postproc(model, batches[:1], call=lambda model, batch: batch["image"].mean())

    def fails(model, batch):
        raise RuntimeError("the loader broke")

    with pytest.raises(RuntimeError, match="the loader broke"):
        jaxbn.nnx.postproc(model, batches, call=fails)
    chex.assert_trees_all_equal(values(model), before, strict=True)


def test_install_moments_refuses_what_does_not_fit(rng):
    model, moments = started(), jaxbn.batch_moments(rng.standard_normal((8, 4)).astype(np.float32))
    with pytest.raises(ValueError, match="'norm_7' is not a normalization layer; there are 'norms/0', 'norms/1'"):
        jaxbn.nnx.install_moments(model, {"norms/0": moments, "norm_7": moments})
    wrong = jax.tree.map(lambda part: part[:3], moments)
    with pytest.raises(ValueError, match=r"features \(3,\), but its statistics have \(4,\)"):
        jaxbn.nnx.install_moments(model, {"norms/0": wrong})
    assert (model.norms[0].mean[...] == 0).all()


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(progress, batches, capfd):
    jaxbn.nnx.postproc(started(), batches, call=call, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Estimating statistics" in err) == progress
