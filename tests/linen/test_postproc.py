"""The statistics pass for linen, on stock and on our models, against float64 over the captured inputs."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen

NORMS = [nn.BatchNorm, jaxbn.linen.BatchNorm]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=["stock", "jaxbn"])


class Net(nn.Module):
    """Residual, with dropout, and layers that tell what they were given."""

    norm: type

    @nn.compact
    def __call__(self, x, train):
        for block in range(2):
            y = nn.Conv(4, (3, 3), use_bias=False)(x)
            self.sow("inputs", f"norm_{block}_input", y)
            y = nn.relu(self.norm(use_running_average=not train, name=f"norm_{block}")(y))
            x = nn.Dropout(0.5, deterministic=not train)(y) + x[..., :1]
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture
def batches(rng):
    """Of 64, 64 and 4 rows, the last far away: PyTorch's update_bn gives 4.89 for a true mean of 0.66 on such data."""
    images = rng.standard_normal((132, 6, 6, 3)).astype(np.float32)
    images[128:] += 20
    return [{"image": part, "label": np.zeros(len(part), np.int32)} for part in np.split(images, [64, 128])]


def started(norm):
    net = Net(norm)
    variables = net.init(jax.random.key(0), np.zeros((2, 6, 6, 3), np.float32), False)
    return net, {name: variables[name] for name in ("params", "batch_stats")}


def inputs_of_layers(net, variables, batches):
    """What each layer was given in every batch, normalized with the statistics of that batch."""
    found = {}
    for batch in batches:
        rngs = {"dropout": jax.random.key(0)}
        images = batch["image"]
        stock = Net(nn.BatchNorm)

        def rate_0(next_call, args, kwargs, context):
            return args[0] if isinstance(context.module, nn.Dropout) else next_call(*args, **kwargs)

        with nn.intercept_methods(rate_0):
            _, updates = stock.apply(variables, images, True, mutable=["inputs", "batch_stats"], rngs=rngs)
        for path, values in flax.traverse_util.flatten_dict(updates["inputs"], sep="/").items():
            found.setdefault(path.removesuffix("_input"), []).append(np.float64(values[0]).reshape(-1, 4))
    return found


@every_norm
def test_pooled_statistics_are_those_of_all_the_data(norm, batches):
    net, variables = started(norm)
    before = jax.tree.map(np.copy, variables)
    new, report = jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"], False), variables, batches)
    for path, values in inputs_of_layers(net, variables, batches).items():
        everything = np.concatenate(values)
        np.testing.assert_allclose(new["batch_stats"][path]["mean"], everything.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(new["batch_stats"][path]["var"], everything.var(0), rtol=1e-5)
        assert report.layers[path].count == 132 * 36
    chex.assert_trees_all_equal(variables, before)
    chex.assert_trees_all_equal(new["params"], variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    assert (report.estimator, report.batches, report.not_reached) == ("pooled", 3, ())


@pytest.mark.slow
@every_norm
@pytest.mark.parametrize("estimator", [jaxbn.mean_of_batches(), jaxbn.moving_average(0.9)], ids=lambda e: e.name)
def test_other_estimators(norm, estimator, batches):
    net, variables = started(norm)
    new, _ = jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"], False), variables, batches, estimator=estimator)
    for path, values in inputs_of_layers(net, variables, batches).items():
        if estimator.name == "mean_of_batches":
            var = np.mean([part.var(0, ddof=1) for part in values], 0)
        else:
            std = np.ones(4)
            for part in values:
                std = 0.9 * std + 0.1 * part.std(0)
            var = std**2
        np.testing.assert_allclose(new["batch_stats"][path]["var"], var, rtol=1e-5)


@every_norm
def test_evaluation_uses_the_new_statistics(norm, batches):
    net, variables = started(norm)
    new, _ = jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"], False), variables, batches[:1])
    evaluated = net.apply(new, batches[0]["image"], False)
    captured = jaxbn.linen.capture_moments(lambda v, b: net.apply(v, b["image"], False), mode="batch")
    np.testing.assert_allclose(evaluated, captured(variables, batches[0])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.sample(every=2)
@every_norm
def test_any_iterable_will_do_and_flags_do_not_matter(norm, batches):
    net, variables = started(norm)
    evaluating = lambda v, b: net.apply(v, b["image"], False)
    training = lambda v, b: net.apply(v, b["image"], True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    expected, _ = jaxbn.linen.postproc(evaluating, variables, batches)
    for iterable in (tuple(batches), iter(batches), (batch for batch in batches)):
        chex.assert_trees_all_equal(jaxbn.linen.postproc(evaluating, variables, iterable)[0], expected)
    frozen, _ = jaxbn.linen.postproc(evaluating, flax.core.freeze(variables), batches)
    chex.assert_trees_all_equal(frozen, expected)
    first, _ = jaxbn.linen.postproc(training, variables, batches)  # dropout is on, so only the first layer agrees
    chex.assert_trees_all_close(first["batch_stats"]["norm_0"], expected["batch_stats"]["norm_0"], rtol=1e-6, atol=1e-6)


def test_a_pass_is_compiled_once_for_each_shape_of_a_batch(batches):
    net, variables = started(nn.BatchNorm)
    traces = []

    def call(v, b):
        traces.append(b["image"].shape)
        return net.apply(v, b["image"], False)

    for _ in range(3):
        jaxbn.linen.postproc(call, variables, batches)
    # Once to learn which moments there will be (of each pass), and once for each of the two shapes.
    compiled = [shape for shape in traces if shape == (4, 6, 6, 3)]
    assert len(compiled) == 1


def test_state_with_a_count_keeps_it(rng):
    net = jaxbn.linen.BatchNorm(use_running_average=True, momentum=jaxbn.cumulative())
    x = rng.standard_normal((8, 3)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    new, _ = jaxbn.linen.postproc(net.apply, variables, [x])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    np.testing.assert_allclose(new["batch_stats"]["mean"], x.mean(0), rtol=1e-5, atol=1e-6)


def test_install_moments_is_the_end_of_ones_own_loop(batches):
    net, variables = started(jaxbn.linen.BatchNorm)
    call = lambda v, b: net.apply(v, b["image"], False)
    measure = jax.jit(jaxbn.linen.capture_moments(call))
    parts = [measure(variables, batch)[1] for batch in batches]
    pooled = {path: jaxbn.merge(jaxbn.merge(*(p[path] for p in parts[:2])), parts[2][path]) for path in parts[0]}
    expected, _ = jaxbn.linen.postproc(call, variables, batches)
    chex.assert_trees_all_close(jaxbn.linen.install_moments(variables, pooled), expected, rtol=1e-5, atol=1e-6)


def test_report_tells_how_far_the_old_statistics_were(batches):
    net, variables = started(jaxbn.linen.BatchNorm)
    new, report = jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"], False), variables, batches)
    for path, change in report.layers.items():
        mean, var = (np.float64(new["batch_stats"][path][name]) for name in ("mean", "var"))
        np.testing.assert_allclose(change.mean_shift, np.abs(mean) / np.sqrt(var), rtol=1e-5)  # they were 0 and 1
        np.testing.assert_allclose(change.var_ratio, 1 / var, rtol=1e-5)
    lines = str(report).splitlines()
    assert lines[0] == "pooled statistics from 3 batches"
    assert [line.split()[0] for line in lines[4:6]] == ["norm_0", "norm_1"]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert max(map(len, lines)) <= 80


def test_errors_come_before_anything_is_installed(batches):
    net, variables = started(nn.BatchNorm)
    call = lambda v, b: net.apply(v, b["image"], False)
    before = jax.tree.map(np.copy, variables)
    batches[1]["image"][3, 0, 0, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"Batch 1 \(counted from 0\) gave statistics that are not finite, first in 'norm_0'"
    ):
        jaxbn.linen.postproc(call, variables, batches)
    with pytest.raises(ValueError, match="There was no batch"):
        jaxbn.linen.postproc(call, variables, [])
    used_up = iter(batches[:1])
    next(used_up)
    with pytest.raises(ValueError, match="An iterator can be read only once"):
        jaxbn.linen.postproc(call, variables, used_up)
    with pytest.raises(ValueError, match="no statistics of a normalization layer"):
        jaxbn.linen.postproc(call, {"params": variables["params"]}, batches)
    with pytest.raises(ValueError, match="No batch went through a normalization layer"):
        jaxbn.linen.postproc(lambda v, b: b["image"].mean(), variables, batches[:1])

    def fails(variables, batch):
        raise RuntimeError("the loader broke")

    with pytest.raises(RuntimeError, match="the loader broke"):
        jaxbn.linen.postproc(fails, variables, batches)
    chex.assert_trees_all_equal(variables, before)


def test_install_moments_refuses_what_does_not_fit(rng):
    _, variables = started(nn.BatchNorm)
    moments = jaxbn.batch_moments(rng.standard_normal((8, 4)).astype(np.float32))
    with pytest.raises(ValueError, match="'norm_7' is not a normalization layer; there are 'norm_0', 'norm_1'"):
        jaxbn.linen.install_moments(variables, {"norm_7": moments})
    wrong = jax.tree.map(lambda part: part[:3], moments)
    with pytest.raises(ValueError, match=r"features \(3,\), but its statistics have \(4,\)"):
        jaxbn.linen.install_moments(variables, {"norm_0": wrong})


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_bar(progress, batches, capfd):
    net, variables = started(nn.BatchNorm)
    jaxbn.linen.postproc(lambda v, b: net.apply(v, b["image"], False), variables, batches, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Estimating statistics" in err) == bool(progress)  # None: this is no terminal


def test_many_batches_are_bounded_in_flight(rng):
    """More batches than may be under way at once, of data that the sum of rows would lose."""
    net = nn.BatchNorm(use_running_average=True)
    data = (100 + rng.standard_normal((40, 8, 3))).astype(np.float32)
    variables = net.init(jax.random.key(0), data[0])
    new, report = jaxbn.linen.postproc(net.apply, variables, data)
    assert report.batches == 40
    exact = np.float64(data).reshape(-1, 3)
    np.testing.assert_allclose(new["batch_stats"]["var"], exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], exact.mean(0), rtol=1e-6)
    assert jnp.result_type(new["batch_stats"]["mean"]) == jnp.float32
