"""Domain batch norm against its formula in float64, and against one batch norm for each domain."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import AXIS, NAMED, run, sum_gradients

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

ROWS, SPACE, CHANNELS, DOMAINS = 24, 2, 3, 4
EPSILON, MOMENTUM = 1e-5, 0.875  # exact in float32
IDS = np.arange(ROWS) % 3  # domain 3 is absent


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def data(steps, seed=0):
    """Batches with unequal shares of domains, some without a domain, and masks with real weights."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(DOMAINS, (steps, ROWS), p=[0.5, 0.3, 0.15, 0.05]).astype(np.int32)
    x = rng.standard_normal((steps, ROWS, SPACE, CHANNELS)) * (1 + ids[..., None, None]) + 7 * ids[..., None, None]
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], (steps, ROWS, SPACE, 1))
    return x.astype(np.float32), ids, weights.astype(np.float32)


def moments(x, weights):
    n = weights.sum((0, 1))
    mean = (weights * x).sum((0, 1)) / n
    return mean, (weights * (x - mean) ** 2).sum((0, 1)) / n


def oracle(x, ids, weights, scale, bias, *, cumulative=False):
    """Equations 3 to 6, step by step: outputs, final means and variances, and the number of steps of each domain."""
    x, weights = np.float64(x), np.float64(weights)
    mean, var, count = np.zeros((DOMAINS, CHANNELS)), np.ones((DOMAINS, CHANNELS)), np.zeros(DOMAINS)
    y = np.zeros_like(x)
    for step in range(len(x)):
        for k in range(DOMAINS):
            rows = ids[step] == k
            there = weights[step, rows].sum() > 0
            mu, s2 = moments(x[step, rows], weights[step, rows]) if there else (mean[k], var[k])
            y[step, rows] = scale[k] * (x[step, rows] - mu) / np.sqrt(s2 + EPSILON) + bias[k]
            if there:
                a = count[k] / (count[k] + 1) if cumulative else MOMENTUM
                mean[k], var[k], count[k] = a * mean[k] + (1 - a) * mu, a * var[k] + (1 - a) * s2, count[k] + 1
    return y, mean, var, count


def started(dtype=jnp.float32, **arguments):
    transform = jaxbn.domain_batch_norm(**{"num_domains": DOMAINS, "momentum": MOMENTUM} | arguments)
    params, state = transform.init(CHANNELS, dtype=dtype)
    params = jax.tree.map(lambda p: p + jnp.asarray(normal(*p.shape, seed=p.size), dtype) / 4, params)
    return transform, params, state


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    ("cumulative", "dtype", "tolerance"),
    [(False, "float32", 1e-5), (False, "float64", 1e-12), (True, "float32", 1e-5)],  # counts are float32
)
def test_follows_the_formula_over_more_than_a_thousand_steps(cumulative, dtype, tolerance):
    steps = 1200
    x, ids, weights = data(steps)
    with jax.enable_x64(dtype == "float64"):
        average = {"momentum": jaxbn.cumulative()} if cumulative else {}
        transform, params, state = started(dtype, **average)

        def step(state, batch):
            x, ids, weights = batch
            return transform.train(params, state, x, domain=ids, mask=weights)[::-1]

        after, y = jax.lax.scan(step, state, (jnp.asarray(x, dtype), ids, weights))
    scale, bias = np.float64(params.scale), np.float64(params.bias)
    expected, mean, var, count = oracle(x, ids, weights, scale, bias, cumulative=cumulative)
    assert (count < steps).any() and (count > 0).all()  # some domain was absent at times
    for found, wanted in ((y, expected), (after.mean, mean), (after.var, var)):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    if cumulative:
        np.testing.assert_array_equal(after.count, count)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("autodiff", [False, True], ids=["", "autodiff"])
def test_equals_a_separate_batch_norm_for_each_domain(autodiff):
    """Compares outputs, statistics and gradients."""
    transform, params, state = started(autodiff=autodiff, activation=jax.nn.relu)
    one = jaxbn.batch_norm(momentum=MOMENTUM, autodiff=autodiff, activation=jax.nn.relu)
    x, residual = normal(ROWS, SPACE, CHANNELS) + IDS[:, None, None], normal(ROWS, SPACE, CHANNELS, seed=1)
    target = normal(ROWS, SPACE, CHANNELS, seed=2)

    def ours(params, x, residual):
        y, after = transform.train(params, state, x, domain=IDS, residual=residual)
        return (y * target).sum(), (y, after)

    def separate(params, x, residual):
        loss, y, states = 0.0, jnp.zeros_like(x), []
        for k in range(3):
            part = jax.tree.map(lambda leaf, k=k: leaf[k], (params, jaxbn.BatchNormState(*state)))
            y_k, after = one.train(*part, x[IDS == k], residual=residual[IDS == k])
            y, loss = y.at[IDS == k].set(y_k), loss + (y_k * target[IDS == k]).sum()
            states.append(after)
        return loss, (y, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    (found, (y, after)), (expected, (y_expected, states)) = (
        jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(params, x, residual) for f in (ours, separate)
    )
    np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.mean[:3], states.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.var[:3], states.var, rtol=1e-5)


def test_gradients_equal_finite_differences():
    """In float64, with absent domains and masks with real weights."""
    x, ids, weights = (part[0] for part in data(1))
    target = normal(ROWS, SPACE, CHANNELS, seed=2)
    with jax.enable_x64(True):
        transform, params, state = started("float64")

        def loss(x, params):
            return (transform.train(params, state, x, domain=ids, mask=weights)[0] * jnp.float64(target)).sum()

        dx, dparams = jax.jit(jax.grad(loss, (0, 1)))(jnp.float64(x), params)
    scale, bias = np.float64(params.scale), np.float64(params.bias)

    def exact(x, scale=scale, bias=bias):
        return (oracle(x[None], ids[None], weights[None], scale, bias)[0][0] * target).sum()

    for index in [(0, 0, 0), (5, 1, 2), (11, 0, 1), (23, 1, 1)]:
        nudge = np.zeros(x.shape)
        nudge[index] = 1e-5
        slope = (exact(x + nudge) - exact(x - nudge)) / 2e-5
        np.testing.assert_allclose(dx[index], slope, rtol=1e-6, atol=1e-8)
    for k, c in np.ndindex(DOMAINS, CHANNELS):
        nudge = np.zeros((DOMAINS, CHANNELS))
        nudge[k, c] = 1e-3  # in which the output is linear
        of_scale = exact(x, scale + nudge, bias) - exact(x, scale - nudge, bias)
        of_bias = exact(x, scale, bias + nudge) - exact(x, scale, bias - nudge)
        slopes = of_scale / 2e-3, of_bias / 2e-3
        np.testing.assert_allclose((dparams.scale[k, c], dparams.bias[k, c]), slopes, rtol=1e-8, atol=1e-9)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("share_affine", [False, True])
def test_one_domain_is_batch_norm(share_affine):
    transform, _, _ = started(num_domains=1, share_affine=share_affine)
    one = jaxbn.batch_norm(momentum=MOMENTUM)
    params, state = one.init(CHANNELS)
    x, ids = 3 + normal(ROWS, SPACE, CHANNELS), np.zeros(ROWS, np.int32)
    y, after = jax.jit(one.train)(params, state, x)
    stack = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    given = params if share_affine else stack(params)
    stacked = jaxbn.DomainBatchNormState(*stack(state))
    y_domain, after_domain = jax.jit(transform.train)(given, stacked, x, domain=ids)
    np.testing.assert_allclose(y_domain, y, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(tuple(after_domain), tuple(stack(after)), rtol=1e-6)
    evaluated = transform.eval(given, after_domain, x, domain=ids)
    np.testing.assert_allclose(evaluated, one.eval(params, after, x), rtol=1e-6, atol=1e-6)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("way", ["jit", "jit explicit", "shard_map", "vmap"])
def test_devices_with_unequal_mixes_and_masks_equal_one_device(way):
    """Rows are sorted by domain, so that most devices hold one domain only; one device holds no valid row."""
    x, ids, mask = (part[0] for part in data(1))
    ids = np.sort(ids)
    mask[3:6] = 0
    batch = {"x": x, "ids": ids, "mask": mask, "target": normal(*x.shape, seed=2)}

    def step(way, transform, params, state, batch):
        def loss(params, x):
            y, after = transform.train(params, state, x, domain=batch["ids"], mask=batch["mask"])
            return (y * batch["target"]).sum(), (y, after)

        (dparams, dx), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, batch["x"])
        return (after, sum_gradients(way, dparams)), (y, dx)

    one, params, state = started()
    many = started(axis_name=AXIS if way in NAMED else None)[0]
    expected = jax.jit(lambda b: step("jit", one, params, state, b))(batch)
    found = run(way, lambda given, b: step(way, many, *given, b), (params, state), batch)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-5, atol=1e-5)


def test_an_absent_domain_keeps_its_state_bit_for_bit():
    transform, params, state = started(momentum=jaxbn.cumulative())
    state = jax.tree.map(lambda leaf: leaf + 3, state)
    _, after = jax.jit(transform.train)(params, state, normal(ROWS, CHANNELS), domain=IDS)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf: leaf[3], s) for s in (after, state)))
    assert all((new[:3] != old[:3]).all() for new, old in zip(after, state, strict=True))


def test_an_invalid_id_changes_no_statistics_and_gives_nan():
    transform, params, state = started()
    transform = transform._replace(train=jax.jit(transform.train), eval=jax.jit(transform.eval))
    x = normal(ROWS, CHANNELS)
    for bad in (-1, DOMAINS, 2**31 - 1):
        ids = np.where(np.arange(ROWS) == 5, bad, IDS).astype(np.int32)
        y, after = transform.train(params, state, x, domain=ids)
        without = np.arange(ROWS) != 5
        y_without, after_without = transform.train(params, state, x[without], domain=IDS[without])
        evaluated = transform.eval(params, state, x, domain=ids)
        assert np.isnan(y[5]).all() and np.isnan(evaluated[5]).all()
        np.testing.assert_allclose(y[without], y_without, rtol=1e-5, atol=1e-6)
        assert np.isfinite(evaluated[without]).all()
        chex.assert_trees_all_close(after, after_without, rtol=1e-6)


def test_nan_in_one_domain_does_not_affect_the_others():
    transform, params, state = started()
    x = normal(ROWS, SPACE, CHANNELS)
    harmed = x.copy()
    harmed[IDS == 1] = np.nan

    def loss(params, x):
        y, after = transform.train(params, state, x, domain=IDS)
        return jnp.where(IDS[:, None, None] == 1, 0, y**3).sum(), after

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (found, after), (expected, clean) = (step(params, given) for given in (harmed, x))
    np.testing.assert_array_equal(found[1][IDS != 1], expected[1][IDS != 1])
    np.testing.assert_array_equal(after.mean[jnp.array([0, 2])], clean.mean[jnp.array([0, 2])])
    np.testing.assert_array_equal(after.mean[1], state.mean[1])


def test_domains_of_very_different_means_keep_their_digits():
    """One domain has mean 1e4 and std 1e-2; a common shift would lose all digits of the others."""
    rng = np.random.default_rng(0)
    x = (0.01 * rng.standard_normal((512, CHANNELS)) + np.where(np.arange(512) % 2, 1e4, -3.0)[:, None]).astype("f4")
    transform, _, state = started(num_domains=2)
    found = transform.measure(x, domain=np.arange(512) % 2)
    for k in range(2):
        np.testing.assert_allclose(found.var[k], np.float64(x[k::2]).var(0), rtol=1e-5)


@pytest.mark.slow
def test_the_cost_of_a_step_hardly_depends_on_the_number_of_domains():
    """For images of 32 by 32; measured in the compiled program, relative to D = 2."""
    x, ids = np.zeros((16, 32, 32, 8), np.float32), np.zeros(16, np.int32)

    def cost(num_domains):
        transform = jaxbn.domain_batch_norm(num_domains=num_domains)
        params, state = transform.init(8)

        def loss(params, x):
            y, after = transform.train(params, state, 2 * x, domain=ids)
            return jnp.square(y).sum(), after

        compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(params, x).compile()
        return compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes

    (two, two_held), (eight, eight_held) = cost(2), cost(8)
    assert eight < 1.3 * two and eight_held < 1.3 * two_held


def test_averages_are_updated_once_for_several_micro_batches():
    transform, params, state = started()
    x = normal(ROWS, SPACE, CHANNELS)
    parts = [transform.measure(part, domain=ids) for part, ids in ((x[:7], IDS[:7]), (x[7:], IDS[7:]))]
    moved = transform.update(state, jaxbn.merge(*parts))
    chex.assert_trees_all_close(moved, transform.train(params, state, x, domain=IDS)[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "given", "error", "message"),
    [
        (normal(6, 3), {}, ValueError, "needs domain=, the ids of the examples"),
        (normal(6, 3), {"domain": 1}, ValueError, r"jnp.full\(\(6,\), domain\)"),
        (normal(6, 3), {"domain": IDS[:5]}, ValueError, "one id for each example"),
        (normal(6, 3), {"domain": IDS[:6] / 2}, TypeError, "integers"),
        (normal(3), {"domain": IDS[:3]}, ValueError, "leading axis"),
        (normal(6, 4), {"domain": IDS[:6]}, ValueError, "features"),
        (normal(6, 3), {"domain": IDS[:6], "residual": normal(3)}, ValueError, "shape of the input"),
    ],
)
def test_invalid_input_raises(x, given, error, message):
    transform, params, state = started()
    for call in (transform.train, transform.eval):
        with pytest.raises(error, match=message):
            call(params, state, x, **given)


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="num_domains=0"):
        jaxbn.domain_batch_norm(num_domains=0)
    with pytest.raises(TypeError):
        jaxbn.domain_batch_norm(num_domains=2.5)
    _, params, state = started()
    for call in ("train", "eval"):
        with pytest.raises(ValueError, match="a row for each of num_domains=2"):
            getattr(started(num_domains=2)[0], call)(params, state, normal(6, 3), domain=IDS[:6])


# --- The layers -------------------------------------------------------------------------------------------------------


class Linen(nn.Module):
    norm: type[nn.Module] = jaxbn.linen.DomainBatchNorm
    fields: tuple[tuple[str, object], ...] = (("num_domains", 3),)

    @nn.compact
    def __call__(self, x, train, **where):
        x = nn.Dense(4, name="dense")(x)
        x = self.norm(use_running_average=not train, name="first", **dict(self.fields))(x, **where)
        x = nn.Dense(5, name="top")(nn.relu(x))
        return self.norm(use_running_average=not train, name="second", **dict(self.fields))(x, **where)


class Nnx(nnx.Module):
    def __init__(self, norm=jaxbn.nnx.DomainBatchNorm, **fields):
        rngs = nnx.Rngs(0)
        self.dense, self.top = nnx.Linear(CHANNELS, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)
        self.first, self.second = norm(4, **fields, rngs=rngs), norm(5, **fields, rngs=rngs)

    def __call__(self, x, train=True, **where):
        x = nnx.relu(self.first(self.dense(x), not train, **where))
        return self.second(self.top(x), not train, **where)


def linen_call(variables, batch):
    return Linen().apply(variables, batch["x"], False, domain=batch["domain"])


def nnx_call(model, batch):
    return model(batch["x"], domain=batch["domain"])


def batches_of_domains():
    x, ids = normal(60, CHANNELS), np.random.default_rng(1).choice(3, 60, p=[0.6, 0.3, 0.1]).astype(np.int32)
    x = x * (1 + ids[:, None]) + ids[:, None]
    return x, ids, [{"x": x[i:j], "domain": ids[i:j]} for i, j in ((0, 30), (30, 47), (47, 60))]


def population(x, ids, dense, top):
    """The exact statistics of each domain in both layers; the second layer sees the first with fixed statistics."""
    first = np.float64(x) @ np.float64(dense[0]) + np.float64(dense[1])
    mean, var = (np.stack([f(first[ids == k], 0) for k in range(3)]) for f in (np.mean, np.var))
    z = np.maximum((first - mean[ids]) / np.sqrt(var[ids] + EPSILON), 0)
    second = z @ np.float64(top[0]) + np.float64(top[1])
    return (mean, var), tuple(np.stack([f(second[ids == k], 0) for k in range(3)]) for f in (np.mean, np.var))


@functools.cache
def linen_started():
    return jax.jit(functools.partial(Linen().init, train=False))(jax.random.key(0), normal(4, CHANNELS), domain=IDS[:4])


@functools.cache
def linen_pass():
    return jaxbn.linen.postproc(linen_call, linen_started(), batches_of_domains()[2], consistent=True)


@functools.cache
def nnx_pass():
    return jaxbn.nnx.postproc(Nnx(num_domains=3), batches_of_domains()[2], call=nnx_call, consistent=True)


def test_postproc_is_exact_in_each_domain_in_linen(tmp_path):
    x, ids, batches = batches_of_domains()
    variables, report = linen_pass()
    dense, top = ([variables["params"][name][leaf] for leaf in ("kernel", "bias")] for name in ("dense", "top"))
    for name, (mean, var) in zip(("first", "second"), population(x, ids, dense, top), strict=True):
        np.testing.assert_allclose(variables["batch_stats"][name]["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variables["batch_stats"][name]["var"], var, rtol=1e-5)
    assert "first" in str(report) and report.layers["first"].new_mean.shape == (3, 4)

    frozen = jaxbn.linen.freeze(variables, report)
    assert frozen.info.layer("second").method == "domain_batch_norm"
    assert "domain_batch_norm" in jaxbn.linen.summary(frozen)
    jaxbn.serving.save(tmp_path / "net", frozen)
    loaded = jaxbn.serving.load(tmp_path / "net", like=variables)
    np.testing.assert_array_equal(linen_call(loaded.variables, batches[0]), linen_call(variables, batches[0]))


@pytest.mark.slow
def test_postproc_is_exact_in_each_domain_in_nnx():
    x, ids, _ = batches_of_domains()
    model, report = nnx_pass()
    layers = [(layer.kernel[...], layer.bias[...]) for layer in (model.dense, model.top)]
    for layer, (mean, var) in zip((model.first, model.second), population(x, ids, *layers), strict=True):
        np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.var[...], var, rtol=1e-5)
    frozen = jaxbn.nnx.freeze(model, report)
    assert "domain_batch_norm" in jaxbn.nnx.summary(frozen)


def test_a_pass_over_one_domain_does_not_change_the_others():
    x, ids, _ = batches_of_domains()
    variables = linen_started()
    batch = {"x": x[ids == 1], "domain": ids[ids == 1]}
    new, report = jaxbn.linen.postproc(linen_call, variables, [batch])
    mean = new["batch_stats"]["first"]["mean"]
    assert (mean[jnp.array([0, 2])] == 0).all() and (mean[1] != 0).all()
    with pytest.raises(ValueError, match="were never estimated"):
        jaxbn.linen.freeze(new, report)


@pytest.mark.slow
def test_weights_of_examples_reach_their_domains():
    x, ids, _ = batches_of_domains()
    variables = linen_started()
    keep = np.arange(60) % 4 > 0
    capture = jaxbn.linen.capture_moments(linen_call, weights=lambda batch: batch["keep"])
    _, found = capture(variables, {"x": x, "domain": ids, "keep": keep})
    _, expected = jaxbn.linen.capture_moments(linen_call)(variables, {"x": x[keep], "domain": ids[keep]})
    chex.assert_trees_all_close(found["first"], expected["first"], rtol=1e-5, atol=1e-5)


def test_frozen_layers_normalize_each_domain_with_its_statistics():
    _, _, batches = batches_of_domains()
    variables, _ = linen_pass()
    expected = linen_call(variables, batches[0])
    training = lambda v, b: Linen().apply(v, b["x"], True, domain=b["domain"], mutable=["batch_stats"])
    frozen = jaxbn.linen.freeze_layers(training, "")
    np.testing.assert_array_equal(frozen(variables, batches[0])[0], expected)


@pytest.mark.slow
def test_frozen_layers_of_nnx_normalize_each_domain_with_its_statistics():
    _, _, batches = batches_of_domains()
    model, _ = nnx_pass()
    fixed = jaxbn.nnx.freeze_layers(model, "")
    expected = model(batches[0]["x"], False, domain=batches[0]["domain"])
    np.testing.assert_array_equal(nnx_call(fixed, batches[0]), expected)


@pytest.mark.slow
def test_diagnose_covers_all_domains():
    x, ids, batches = batches_of_domains()
    variables, _ = linen_pass()
    assert set(jaxbn.linen.diagnose(linen_call, variables, batches).layers) == {"first", "second"}


@pytest.mark.slow
@pytest.mark.parametrize("share_affine", [False, True])
def test_starts_from_a_trained_batch_norm(share_affine):
    """Every domain starts with a copy, and evaluates like the batch norm."""
    x, ids, _ = batches_of_domains()
    old = Linen(nn.BatchNorm, ())
    given = old.init(jax.random.key(0), x, True)
    _, updates = old.apply(given, x, True, mutable=["batch_stats"])
    new = Linen(fields=(("num_domains", 3), ("share_affine", share_affine)))
    like = new.init(jax.random.key(1), x, True, domain=ids)
    variables = jaxbn.linen.convert_norms({**given, **updates}, like=like)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, like)
    expected = old.apply({**given, **updates}, x, False)
    np.testing.assert_allclose(new.apply(variables, x, False, domain=ids), expected, rtol=1e-5, atol=1e-6)

    trained = Nnx(nnx.BatchNorm)
    trained(x)
    like = Nnx(num_domains=3, share_affine=share_affine)
    converted = jaxbn.nnx.convert_norms(trained, like)
    np.testing.assert_allclose(converted(x, False, domain=ids), trained(x, False), rtol=1e-5, atol=1e-6)
    assert float(like.first.mean[...].sum()) == 0


def test_the_error_names_the_variable_that_does_not_fit():
    trained, like = Nnx(nnx.BatchNorm), Nnx(num_domains=3, use_bias=False)
    with pytest.raises(ValueError, match="'first/bias', 'second/bias' of the model"):
        jaxbn.nnx.convert_norms(trained, like)
    with pytest.raises(ValueError, match=r"'first/bias' of `like` has no counterpart"):
        jaxbn.nnx.convert_norms(Nnx(nnx.BatchNorm, use_bias=False), Nnx(num_domains=3))
    with pytest.raises(ValueError, match=r"'first/bias' is \(3, 4\) in the variables and \(4,\)"):
        jaxbn.nnx.convert_norms(Nnx(num_domains=3), trained)


def test_factory_and_layers_have_the_same_arguments_and_defaults():
    defaults = {name: p.default for name, p in inspect.signature(jaxbn.domain_batch_norm).parameters.items()}
    linen = inspect.signature(jaxbn.linen.DomainBatchNorm).parameters
    own = inspect.signature(jaxbn.nnx.DomainBatchNorm.__init__).parameters
    shared = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
    assert {name: linen[name].default for name in defaults} == defaults
    assert {name: (own if name in own else shared)[name].default for name in defaults} == defaults
    stock = list(inspect.signature(nn.BatchNorm).parameters)[:-2]  # but for parent and name
    assert list(linen)[: len(stock)] == stock
    layers = [jaxbn.linen.DomainBatchNorm(num_domains=2) for _ in range(2)]
    assert layers[0] == layers[1] and hash(layers[0]) == hash(layers[1])
    graphs = [nnx.graphdef(jaxbn.nnx.DomainBatchNorm(3, num_domains=2, rngs=nnx.Rngs(0))) for _ in range(2)]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("layer", [jaxbn.linen.BatchNorm(use_running_average=False)], ids=["batch_norm"])
def test_other_layers_take_no_domain(layer):
    with pytest.raises(ValueError, match="The call was given domain=, and the method of this layer does not take it"):
        layer.init(jax.random.key(0), normal(6, 3), domain=IDS[:6])
