"""The contract of every method, in each framework. Runs over `cases.CASES`; the oracles are float64 NumPy."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from flax import nnx
from meshes import AXIS, DEVICES, NAMED, WAYS, run, spread, sum_gradients

import jaxbn

ROWS, SPACE, FEATURES = 16, 3, 4
SHAPE = (ROWS, SPACE, FEATURES)

# Batch norm is tested in every combination; another method, which runs through the same core, in a few.
SLOW_WAYS = [way for way in WAYS if way not in ("jit", "shard_map")]
FULL = [case for case in CASES if case.factory is jaxbn.batch_norm]

# They differ from other cases in the average or in the learned parameters, which the formulas cover.
ALIKE = {"domain_batch_norm shared affine"} | {
    f"batch_norm {name}"
    for name in ("momentum 0.9", "no scale", "no bias", "no average", "debiased", "cumulative", "scheduled", "horizon")
}

every_formula = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in ALIKE)) for case in CASES]
)
# All methods but one take the mean away.
every_centred_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.factory is not jaxbn.moving_average_batch_norm], ids=lambda case: case.name
)
every_batch_norm = pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)


def every_case_and(name, values, few, slow=()):
    """Each case with each of the values, or with a few of them if it is no batch norm.

    Those of `slow` are so for all but the plain batch norm.
    """

    def pair(case, value):
        marks = [pytest.mark.slow] * (case.name in ALIKE or (value in slow and case is not CASES[0]))
        return pytest.param(case, value, marks=marks, id=f"{case.name}-{getattr(value, '__name__', value)}")

    pairs = [pair(case, value) for case in CASES for value in (values if case in FULL else few)]
    return pytest.mark.parametrize(("case", name), pairs)


every_case_and_dtype = every_case_and("dtype", [jnp.float32, jnp.bfloat16], few=[jnp.bfloat16])


@pytest.fixture
def x(rng) -> np.ndarray:
    return (3 + 2 * rng.standard_normal(SHAPE)).astype(np.float32)


@pytest.fixture
def target(rng) -> np.ndarray:
    return rng.standard_normal(SHAPE).astype(np.float32) / ROWS


def started(case: Case, **changes):
    """A transform, with params and statistics that are not the initial ones."""
    transform = case.transform(**changes)
    if case not in FULL:  # one program where there would be many small ones
        transform = transform._replace(train=jax.jit(transform.train))
    params, state = transform.init(FEATURES)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape), jnp.float32), params)
    state = state._replace(mean=state.mean + 0.5, var=state.var * 1.5)
    return transform, params, state


def as_arrays(fields) -> dict[str, np.ndarray]:
    return {name: np.float64(leaf) for name, leaf in fields._asdict().items() if leaf is not None}


def rows(values: np.ndarray) -> np.ndarray:
    return np.float64(values).reshape(-1, values.shape[-1])


def assert_state(state, expected: dict[str, np.ndarray], tolerance: float) -> None:
    found = as_arrays(state)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def ragged_mask(rng) -> np.ndarray:
    """Valid positions, different in number on each of the devices, none on the third."""
    mask = rng.random((ROWS, SPACE, 1)) > 0.3
    per_device = ROWS // DEVICES
    mask[2 * per_device : 3 * per_device] = False
    mask[3 * per_device : 4 * per_device] = True
    return mask


@every_formula
def test_train_follows_the_formula_step_by_step(case, x, rng):
    transform, params, state = started(case)
    expected = as_arrays(state)
    for step in range(3):
        batch = x * (1 + step) + step
        y, state = jax.jit(transform.train)(params, state, batch)
        weights = np.ones((ROWS * SPACE, 1))
        expected_y, expected = case.train(rows(batch), weights, as_arrays(params), expected, SPACE)
        np.testing.assert_allclose(rows(y), expected_y, rtol=1e-5, atol=1e-5)
        assert_state(state, expected, 1e-5)


@every_formula
def test_eval_follows_the_formula(case, x):
    transform, params, state = started(case)
    expected = case.evaluate(rows(x), as_arrays(params), as_arrays(state))
    np.testing.assert_allclose(rows(jax.jit(transform.eval)(params, state, x)), expected, rtol=1e-5, atol=1e-5)


@every_formula
def test_postproc_installs_the_population(case, x):
    transform, _, state = started(case)

    @jax.jit
    def installed(state):
        parts = [transform.measure(part) for part in (x[:9], x[9:11], x[11:])]
        return transform.postproc(state, jaxbn.pool(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)))

    assert_state(installed(state), case.postproc(as_arrays(state), rows(x)), 1e-6)


@every_batch_norm  # central differences see through the constants of other methods
def test_gradients_are_those_of_the_formula(case, x, target):
    """Against central differences of the float64 oracle, with a mask that weighs."""
    transform, params, state = started(case)
    weights = np.abs(np.sin(np.arange(ROWS * SPACE) + 1.0)).reshape(ROWS, SPACE, 1)
    weights[:3] = 0

    def loss(x, params):
        y, _ = transform.train(params, state, x, mask=jnp.asarray(weights, jnp.float32))
        return (jnp.tanh(y) * target).sum()

    def oracle(x, params):
        y, _ = case.train(rows(x), rows(weights), params, as_arrays(state), SPACE)
        return (np.tanh(y) * rows(target)).sum()

    dx, dparams = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    exact, step = as_arrays(params), 1e-5
    for index in [(0, 0, 0), (2, 1, 3), (5, 2, 1), (15, 2, 2)]:
        nudge = np.zeros(SHAPE)
        nudge[index] = step
        slope = (oracle(x + nudge, exact) - oracle(x - nudge, exact)) / (2 * step)
        np.testing.assert_allclose(dx[index], slope, rtol=1e-4, atol=1e-6)
    for name, gradient in as_arrays(dparams).items():
        for channel in range(FEATURES):
            nudge = exact | {name: exact[name] + step * np.eye(FEATURES)[channel]}
            back = exact | {name: exact[name] - step * np.eye(FEATURES)[channel]}
            slope = (oracle(x, nudge) - oracle(x, back)) / (2 * step)
            np.testing.assert_allclose(gradient[channel], slope, rtol=1e-4, atol=1e-6)


@every_case_and_dtype
def test_state_keeps_structure_and_dtypes_and_scans(case, x, dtype):
    transform, params, state = started(case)
    batches = jnp.stack([jnp.asarray(x, dtype)] * 3)
    _, after = transform.train(params, state, batches[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    scanned, _ = jax.lax.scan(lambda s, b: transform.train(params, s, b)[::-1], state, batches)
    for batch in batches:
        _, state = transform.train(params, state, batch)
    chex.assert_trees_all_close(scanned, state, rtol=1e-6)


@every_batch_norm
def test_jit_equals_eager(case, x):
    transform, params, state = started(case)
    for function in (transform.train, transform.eval):
        chex.assert_trees_all_close(
            jax.jit(function)(params, state, x), function(params, state, x), rtol=1e-5, atol=1e-6
        )


@every_case
def test_one_trace_serves_many_steps(case, x):
    transform, params, state = started(case)
    traces = []

    @jax.jit
    def train(state, x):
        traces.append(x)
        return transform.train(params, state, x)

    for step in range(3):
        _, state = train(state, x + step)
    assert len(traces) == 1


@pytest.mark.sample(every=2)
@every_case
def test_no_gradient_flows_through_the_state(case, x):
    transform, params, state = started(case)

    def into(x, state):
        return sum(leaf.sum() for leaf in jax.tree.leaves(transform.train(params, state, x)[1]))

    def out_of(state):
        y, _ = transform.train(params, state, x, mask=jnp.zeros((1, 1, 1)))
        return (y + transform.eval(params, state, x)).sum()

    for gradient in jax.tree.leaves((jax.jit(jax.grad(into))(x, state), jax.jit(jax.grad(out_of))(state))):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.sample(every=2)
@every_case
def test_masked_batch_is_the_batch_of_valid_rows(case, x):
    transform, params, state = started(case)
    valid = np.arange(ROWS) % 3 != 0
    padded = np.where(valid[:, None, None], x, np.nan).astype(np.float32)
    y, after = transform.train(params, state, padded, mask=valid[:, None, None])
    y_subset, after_subset = transform.train(params, state, x[valid])
    np.testing.assert_allclose(y[valid], y_subset, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(after, after_subset, rtol=1e-6)


@pytest.mark.sample(every=2)
@every_case
def test_nan_in_masked_positions_harms_no_gradient(case, x, target):
    transform, params, state = started(case)
    valid = (np.arange(ROWS) % 3 != 0)[:, None, None]

    def loss(params, x):
        y, _ = transform.train(params, state, x, mask=valid)
        return jnp.where(valid, jnp.square(y - x) * target, 0).sum()  # NaN * 0 reaches the layer as NaN

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    clean, harmed = (gradients(params, jnp.where(valid, x, value)) for value in (0.0, jnp.nan))
    chex.assert_trees_all_close(harmed[0], clean[0], rtol=1e-5)
    np.testing.assert_allclose(harmed[1][valid[:, 0, 0]], clean[1][valid[:, 0, 0]], rtol=1e-4, atol=1e-6)


@every_case
def test_constant_zero_and_huge_channels_stay_finite(case, x, target):
    """Outputs, statistics and gradients."""
    transform, params, state = started(case)
    x[..., 0], x[..., 1] = 7, 0
    x[..., 2] += 1e6

    def loss(params, x):
        y, after = transform.train(params, state, x)
        return (jnp.tanh(y) * target).sum(), (y, after)

    chex.assert_tree_all_finite(jax.grad(loss, (0, 1), has_aux=True)(params, x))


@every_case
def test_state_survives_averages_over_devices_and_over_time(case, x):
    """With its dtypes, which counters of integers would not."""
    transform, params, state = started(case)
    _, after = transform.train(params, state, x)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, after)
    over_devices = jax.vmap(lambda state: jax.lax.pmean(state, AXIS), axis_name=AXIS)(both)
    over_time = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, after)
    chex.assert_trees_all_equal_dtypes(state, over_devices, over_time)
    chex.assert_trees_all_equal_shapes(state, transform.train(params, over_time, x)[1])


@every_case
def test_batch_without_a_valid_position_keeps_the_state(case, x):
    transform, params, state = started(case)
    y, after = transform.train(params, state, x, mask=np.zeros((ROWS, 1, 1), bool))
    chex.assert_trees_all_equal(after, state)
    np.testing.assert_allclose(y, transform.eval(params, state, x), rtol=1e-6, atol=1e-6)


@every_case_and("bad", [np.nan, np.inf], few=[np.inf])
def test_statistics_that_are_not_finite_stay_out_of_the_state(case, x, bad):
    transform, params, state = started(case)
    x[3, 1, 2] = bad
    y, after = transform.train(params, state, x)
    assert np.isnan(y[..., 2]).any()  # the output still shows it
    for name, leaf in as_arrays(after).items():
        assert np.isfinite(leaf).all(), name
    moved = np.array(after.mean != state.mean)
    harmed = (*(int(ids[3]) for ids in case.where(x).values()), 2)  # the channel, of the domain of that example
    assert not moved[harmed]
    if case.arguments.get("momentum", 0.99) is not None:
        moved[harmed] = True
        assert moved.all()


@pytest.mark.sample(every=5)
@every_case_and("way", WAYS, few=["jit", "shard_map"], slow=SLOW_WAYS)
def test_devices_equal_one_device(case, way, x, target, rng):
    """Outputs, statistics and gradients, with unequal masks and a shard without a valid position."""
    one, params, state = started(case)
    many = case.transform(axis_name=AXIS if way in NAMED else None)
    batch = {"x": x, "target": target, "mask": ragged_mask(rng)}

    def step(transform, way, params, batch):
        def loss(params, x):
            y, after = transform.train(params, state, x, mask=batch["mask"])
            return (jnp.tanh(y) * batch["target"]).sum(), (y, after)

        (dparams, dx), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, batch["x"])
        return (after, sum_gradients(way, dparams)), (y, dx)

    expected = jax.jit(lambda p, b: step(one, "jit", p, b))(params, batch)
    found = run(way, lambda p, b: step(many, way, p, b), params, batch)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.sample(every=4)
@every_case_and("way", [way for way in WAYS if way != "vmap"], few=["jit", "shard_map"], slow=SLOW_WAYS)
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "masked"])
def test_one_collective_forward_and_one_backward(case, masked, way, x, target, rng):
    transform = case.transform(axis_name=AXIS if way in NAMED else None)
    params, state = transform.init(FEATURES)
    batch = {"x": x, "target": target} | ({"mask": ragged_mask(rng)} if masked else {})

    def forward(params, batch):
        y, after = transform.train(params, state, batch["x"], mask=batch.get("mask"))
        return after, y

    def both(params, batch):
        def loss(params, x):
            y, after = transform.train(params, state, x, mask=batch.get("mask"))
            return (jnp.tanh(y) * batch["target"]).sum(), after

        (dparams, dx), after = jax.grad(loss, (0, 1), has_aux=True)(params, batch["x"])
        # Gradients of parameters that the user reduces are the user's collective.
        return (after, dparams if way in ("jit", "jit explicit", "shard_map") else 0), dx

    assert len(collectives(way, forward, params, batch)) == 1
    assert len(collectives(way, both, params, batch)) == 2


def collectives(way, step, params, batch) -> list[str]:
    mapped, arguments = spread(way, step, params, batch)
    text = mapped.lower(*arguments).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return re.findall(rf" ({names})(?:-start)?\(", text)


def assert_same_operations(found, expected):
    """Equal in structure, shapes and dtypes, and but for how two programs of the same operations round."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        ulp = 2.0**-7 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=ulp, atol=1e-6)


@every_case_and_dtype
def test_linen_is_the_core(case, x, dtype):
    """A framework only carries variables."""
    transform, params, state = started(case)
    module = case.linen_module()
    x = jnp.asarray(x, dtype)
    variables = {
        "params": {name: leaf for name, leaf in params._asdict().items() if leaf is not None},
        "batch_stats": {name: leaf for name, leaf in state._asdict().items() if leaf is not None},
    }

    @jax.jit
    def linen(variables, x):
        y, updates = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **case.where(x))
        return y, updates["batch_stats"], module.apply(variables, x, use_running_average=True, **case.where(x))

    @jax.jit
    def core(params, state, x):
        y, after = transform.train(params, state, x)
        after = {name: leaf for name, leaf in after._asdict().items() if leaf is not None}
        return y, after, transform.eval(params, state, x)

    assert_same_operations(linen(variables, x), core(params, state, x))


@every_case_and_dtype
def test_nnx_is_the_core(case, x, dtype):
    """As linen is."""
    transform, params, state = started(case)
    module = case.nnx_module(FEATURES)
    x = jnp.asarray(x, dtype)
    for name, leaf in (state._asdict() | params._asdict()).items():
        if leaf is not None:
            getattr(module, name)[...] = leaf

    @nnx.jit
    def apply(module, x):
        evaluated = module(x, use_running_average=True, **case.where(x))
        return module(x, use_running_average=False, **case.where(x)), module.state, evaluated

    @jax.jit
    def core(params, state, x):
        return *transform.train(params, state, x), transform.eval(params, state, x)

    expected = core(params, state, x)
    found = apply(module, x)
    assert_same_operations(found, expected)
    chex.assert_trees_all_equal(module.state, found[1])


@pytest.mark.sample(every=3)
@every_case
def test_vmap_is_a_loop(case, x):
    transform, params, state = started(case)
    ensemble = jnp.stack([x, 2 * x + 1, x - 5])
    y, after = jax.vmap(transform.train, in_axes=(None, None, 0))(params, state, ensemble)
    for member, batch in enumerate(ensemble):
        found = jax.tree.map(lambda leaf, member=member: leaf[member], (y, after))
        chex.assert_trees_all_close(found, transform.train(params, state, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.sample(every=3)
@every_case
def test_remat_changes_no_number(case, x, target):
    transform, params, state = started(case)

    def loss(train):
        def value(params, x):
            y, after = train(params, state, x)
            return (jnp.tanh(y) * target).sum(), after

        return jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, x)

    chex.assert_trees_all_close(loss(jax.checkpoint(transform.train)), loss(transform.train), rtol=1e-5, atol=1e-6)


@every_batch_norm
def test_output_is_invariant_to_the_scale_of_the_weights_before(case, x, rng):
    """Dense(c W) and Dense(W) give the same output, and the gradient of W shrinks by c (Ioffe & Szegedy, 3.3)."""
    transform, params, state = started(case)
    kernel = rng.standard_normal((FEATURES, FEATURES)).astype(np.float32)

    def loss(kernel):
        y, _ = transform.train(params, state, 5 * (x @ kernel))  # large, so that epsilon does not show
        return jnp.tanh(y).sum(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(kernel)
    (_, y_scaled), gradient_scaled = jax.value_and_grad(loss, has_aux=True)(8 * kernel)
    np.testing.assert_allclose(y_scaled, y, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(8 * gradient_scaled, gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max())


@every_centred_case
def test_bias_before_has_no_gradient(case, x, target):
    transform, params, state = started(case)

    def loss(bias, shift_of_output):
        y, _ = transform.train(params, state, x + bias)
        return (jnp.tanh(y + shift_of_output) * target).sum()

    before, behind = jax.grad(loss, (0, 1))(jnp.zeros((1, 1, FEATURES)), jnp.zeros((1, 1, FEATURES)))
    assert np.abs(behind).min() > 1e-3  # a bias behind the layer has one
    np.testing.assert_allclose(before, np.zeros_like(before), atol=1e-6)
