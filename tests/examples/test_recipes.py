"""Tests of the recipes: each one runs, and its results are checked against float64 NumPy."""

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "shared")
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch):
    """Recipes import `shared` from their folder, and optax needs standard dtype promotion."""
    monkeypatch.syspath_prepend(str(FOLDER))
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def shared():
    return importlib.import_module("shared")


@pytest.fixture
def data(shared):
    """256 digits in four batches."""
    return shared.take(shared.load()[0], slice(0, 256))


@pytest.fixture
def variables(shared, data):
    """The variables of a network in which every variable differs from its initial value."""
    rng = np.random.default_rng(3)
    variables = shared.NET.init(jax.random.key(0), data["x"][:2], train=False)
    return jax.tree.map(lambda v: v + jnp.asarray(rng.uniform(0.05, 0.2, v.shape), v.dtype), variables)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a recipe in an empty folder; returns its result and the numbers of each printed line."""

    def run(recipe, **options):
        monkeypatch.chdir(tmp_path)
        found = importlib.import_module(recipe).main(**options)
        out, err = capsys.readouterr()
        assert not err and max(map(len, out.splitlines())) <= 100
        return found, [[float(n) for n in re.findall(r"(?<!\w)-?\d+\.\d+", line)] for line in out.splitlines()]

    return run


@pytest.fixture
def watch(monkeypatch):
    """Records arguments and result of each call of a recipe's function."""

    def watch(recipe, name):
        module, calls = importlib.import_module(recipe), []
        function = getattr(module, name)

        def watched(*args):
            calls.append((args, function(*args)))
            return calls[-1][1]

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def flat(tree):
    return {key: np.float64(leaf) for key, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def moved(before, after):
    """The paths of the leaves that differ in any bit."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


def population(params, batches):
    """The statistics of both layers in float64: batches are normalized separately, and their moments are pooled."""
    inputs, p = {"BatchNorm_0": [], "BatchNorm_1": []}, flat(params)
    for batch in batches:
        x = np.float64(batch["x"])
        for i, layer in enumerate(inputs):
            x = x @ p[f"Dense_{i}/kernel"] + p[f"Dense_{i}/bias"]
            inputs[layer].append(x)
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * p[f"{layer}/scale"] + p[f"{layer}/bias"]
            x = np.maximum(x, 0)
    rows = {layer: np.concatenate(parts) for layer, parts in inputs.items()}
    return {layer: {"mean": values.mean(0), "var": values.var(0)} for layer, values in rows.items()}


def assert_statistics(batch_stats, expected):
    expected = flat(expected)
    assert flat(batch_stats).keys() == expected.keys()
    for path, value in flat(batch_stats).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_averaged_weights_have_the_statistics_of_the_weights_that_are_evaluated(run, shared, data, monkeypatch):
    recipe = importlib.import_module("averaged_weights")
    averages = recipe.averages(data, 2)
    states = list(shared.train(shared.SGD, data, 2))
    *_, free = shared.train(recipe.SCHEDULE_FREE, data, 2)

    params = [flat(state.params) for state in states]
    ema = params[0]
    for after in params:
        ema = {path: 0.95 * ema[path] + 0.05 * after[path] for path in ema}
    beta, z, y = 0.9, flat(free.opt_state.z), flat(free.params)  # y = beta x + (1 - beta) z, and x is evaluated
    expected = {
        "SWA": {path: np.mean([after[path] for after in params[4:]], 0) for path in ema},
        "EMA": ema,
        "schedule-free": {path: (y[path] - (1 - beta) * z[path]) / beta for path in y},
    }
    assert averages.keys() == expected.keys()
    for name, (averaged, batch_stats) in averages.items():
        for path, value in flat(averaged).items():
            np.testing.assert_allclose(value, expected[name][path], rtol=1e-4, atol=1e-5, err_msg=f"{name} {path}")
        found, _ = recipe.with_own_statistics(averaged, batch_stats, data)
        own = population(averaged, shared.in_batches(data))
        assert_statistics(found["batch_stats"], own)
        last = free if name == "schedule-free" else states[-1]
        others = population(last.params, shared.in_batches(data))
        assert np.abs(own["BatchNorm_0"]["mean"] - others["BatchNorm_0"]["mean"]).max() > 1e-3

    monkeypatch.setattr(recipe, "averages", lambda data, epochs: averages)
    found, printed = run("averaged_weights")
    assert [row[:2] for row in printed[1:]] == [[round(a, 3) for a in pair] for pair in found.values()]


@pytest.fixture
def merged_weights(shared, monkeypatch):
    """The recipe with the small network of the other recipes."""
    recipe = importlib.import_module("merged_weights")
    monkeypatch.setattr(recipe, "NET", shared.NET)
    monkeypatch.setattr(recipe, "predict", shared.predict)
    return recipe


@pytest.mark.slow
def test_merged_weights_match_hidden_units_and_have_the_statistics_of_the_average(merged_weights, shared, data):
    a, b = ({**shared.NET.init(jax.random.key(seed), data["x"], train=False)} for seed in (0, 1))
    orders = [np.random.default_rng(0).permutation(width) for width in shared.NET.widths]
    shuffled = merged_weights.permute(a, orders)
    assert moved(a["params"], shuffled["params"]) >= {f"Dense_{i}/kernel" for i in range(3)}
    np.testing.assert_allclose(shared.predict(shuffled, data), shared.predict(a, data), rtol=1e-4, atol=1e-5)
    back = merged_weights.permute(shuffled, merged_weights.match(a, shuffled, data))
    # Units that are always 0 may be swapped; the average of both networks is the same function all the same.
    np.testing.assert_allclose(
        shared.predict(merged_weights.merge(a, back, 0.5), data), shared.predict(a, data), rtol=1e-4, atol=1e-5
    )

    average = {path: 0.75 * value + 0.25 * flat(b)[path] for path, value in flat(a).items()}
    merged = merged_weights.merge(a, b, 0.25)
    for path, value in flat(merged).items():
        np.testing.assert_allclose(value, average[path], rtol=1e-5, atol=1e-6, err_msg=path)
    repaired, _ = merged_weights.repair(merged, data)
    assert_statistics(repaired["batch_stats"], population(merged["params"], shared.in_batches(data)))


@pytest.mark.slow
def test_merged_weights_fail_with_averaged_statistics_and_work_with_their_own(run):
    found, printed = run("merged_weights")
    assert [row[1:3] for row in printed[1:]] == [[round(value, 3) for value in pair] for pair in found.values()]
    (averaged, own), ends = found[0.5], (found[0.0][1], found[1.0][1])
    assert averaged < own - 0.05 and own > min(ends) - 0.02


@pytest.mark.parametrize(
    ("name", "change", "amount"), [("pruned_weights", "prune", 0.9), ("quantized_weights", "with_quantized_kernels", 2)]
)
def test_compressed_weights_get_their_own_statistics(name, change, amount, shared, data, variables):
    recipe = importlib.import_module(name)
    params = getattr(recipe, change)(variables["params"], amount)
    assert moved(variables["params"], params) == {f"Dense_{i}/kernel" for i in range(3)}
    for path in moved(variables["params"], params):
        before, after = flat(variables["params"])[path], flat(params)[path]
        if name == "pruned_weights":
            assert (after == 0).mean() == pytest.approx(amount, abs=0.01)
            assert np.abs(before[after == 0]).max() <= np.abs(after[after != 0]).min()
        else:
            most = np.abs(before).max()
            np.testing.assert_allclose(after, np.round(before / most) * most, rtol=1e-6)
    recalibrated, _ = recipe.recalibrate(variables | {"params": params}, data)
    assert_statistics(recalibrated["batch_stats"], population(params, shared.in_batches(data)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "amount"), [("pruned_weights", 0.9), ("quantized_weights", 2)])
def test_compressed_weights_work_better_with_their_own_statistics(name, amount, run):
    found, printed = run(name)
    assert [row[-3:-1] for row in printed[1:]] == [[round(value, 3) for value in pair] for pair in found.values()]
    before, after = found[amount]
    assert after > before + 0.2


@pytest.mark.slow
def test_another_domain_is_seen_with_its_own_statistics(run, shared, data, variables):
    adapt = importlib.import_module("another_domain").adapt
    batches = shared.in_batches(shared.another_camera(data))
    adapted = adapt(variables, batches)

    assert_statistics(adapted["batch_stats"], population(variables["params"], batches))
    assert not moved(variables["params"], adapted["params"])

    found, printed = run("another_domain")
    at_home, elsewhere, with_statistics = found.values()
    assert with_statistics - elsewhere > (at_home - elsewhere) / 2 > 0.1  # most of what the other camera costs
    assert [number for (number,) in printed] == [round(value, 3) for value in found.values()]


@pytest.mark.slow
def test_estimates_before_an_evaluation_leave_the_training_as_it_is(run, shared, data):
    recipe = importlib.import_module("estimate_before_evaluation")
    _, held_out = shared.load()

    def end(evaluate):
        for state in shared.train(shared.SGD, data, 1, net=recipe.NET):
            evaluate(state)
        return state.params, state.batch_stats, state.opt_state

    evaluated = end(lambda state: recipe.evaluate(state, data, held_out))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (evaluated, end(lambda state: None)))))

    found, printed = run("estimate_before_evaluation", epochs=4)
    assert len(found) == 2
    assert all(estimated > running for running, estimated in found)
    assert [row for row in printed if row] == [[round(value, 3) for value in row] for row in found]


def test_fine_tuning_holds_what_is_frozen(run, watch):
    calls = watch("fine_tuning", "run")
    found, _ = run("fine_tuning")

    (*_, before, batches), frozen = calls[0]
    assert all(len(set(batch["y"])) == 1 for batch in batches)
    assert moved(before, frozen) == {f"params/Dense_{i}/{name}" for i in (1, 2) for name in ("kernel", "bias")}
    (*_, before, _), free = calls[1]
    assert moved(before, free) == set(flat(before))

    at_first, with_statistics, frozen, free = found.values()
    assert at_first < free < frozen and abs(frozen - with_statistics) < (with_statistics - at_first) / 4


def variables_of(model):
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {"/".join(map(str, path)): np.array(v[...]) for path, v in nnx.to_flat_state(state)}


def test_fine_tuning_in_nnx_holds_what_is_frozen(shared, data):
    recipe = importlib.import_module("fine_tuning")
    model = shared.NNXNet(nnx.Rngs(0))
    before = variables_of(model)
    after = variables_of(recipe.fine_tune_nnx(model, recipe.one_class_each(data)[:6]))

    layers = {"denses/0", "denses/1", "head"}
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        f"{layer}/{name}" for layer in layers for name in ("kernel", "bias")
    }


def test_the_teacher_of_eman_averages_every_leaf(run, shared, data):
    follow = importlib.import_module("eman").follow
    students = [
        {"params": state.params, "batch_stats": state.batch_stats} for state in shared.train(shared.SGD, data, 1)
    ]
    teacher, expected = students[0], flat(students[0])
    for student in students:
        teacher = follow(teacher, student, 0.9)
        expected = {path: 0.9 * expected[path] + 0.1 * value for path, value in flat(student).items()}

    assert {path.split("/")[0] for path in expected} == {"params", "batch_stats"}
    for path, value in flat(teacher).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
        assert not np.array_equal(value, flat(students[0])[path])

    found, printed = run("eman")
    student, *teachers = found.values()
    assert all(student - 0.1 < teacher <= 1 for teacher in teachers)
    assert [number for (number,) in printed] == [round(value, 3) for value in found.values()]


def test_the_teacher_of_eman_in_nnx_averages_every_leaf(shared, data):
    teacher, student = shared.NNXNet(nnx.Rngs(0)), shared.NNXNet(nnx.Rngs(1))
    student(data["x"])
    before, target = variables_of(teacher), variables_of(student)
    importlib.import_module("eman").follow_nnx(teacher, student, 0.9)

    for path, value in variables_of(teacher).items():
        np.testing.assert_allclose(value, 0.9 * before[path] + 0.1 * target[path], rtol=1e-5, atol=1e-7, err_msg=path)
    assert all(np.array_equal(value, target[path]) for path, value in variables_of(student).items())


def entropy_in_numpy(logits):
    logits = np.float64(logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1).mean()


AFFINE = {f"BatchNorm_{i}/{name}" for i in (0, 1) for name in ("scale", "bias")}


def test_tent_moves_scale_and_bias_alone_and_the_entropy_falls(run, data, watch):
    calls = watch("tent", "make_tent")
    found, printed = run("tent", passes=2)
    training, batch, tent = found.values()
    assert min(batch, tent) - training > (1 - training) / 2
    _, (_, before), (_, after) = printed[1:]
    assert after < before

    ((variables, *_), (opt_state, step)), *_ = calls
    params, entropies = variables["params"], []
    for _ in range(5):
        before = params
        params, opt_state, logits = step(params, opt_state, data)
        entropies.append(entropy_in_numpy(logits))

    assert moved(variables["params"], params) == AFFINE
    assert (np.diff(entropies) < 0).all()
    np.testing.assert_allclose(logits, predict_by_hand(before, data), rtol=1e-4, atol=1e-4)


def predict_by_hand(params, batch):
    """The logits in float64 with batch statistics."""
    x, p, own = np.float64(batch["x"]), flat(params), population(params, [batch])
    for i, statistics in enumerate(own.values()):
        x = x @ p[f"Dense_{i}/kernel"] + p[f"Dense_{i}/bias"]
        x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
        x = np.maximum(x * p[f"BatchNorm_{i}/scale"] + p[f"BatchNorm_{i}/bias"], 0)
    return x @ p["Dense_2/kernel"] + p["Dense_2/bias"]


def test_tent_in_nnx_moves_scale_and_bias_alone_and_the_entropy_falls(shared, data):
    model = shared.NNXNet(nnx.Rngs(0))
    before = variables_of(model)
    step = importlib.import_module("tent").make_tent_nnx(model)
    entropies = [entropy_in_numpy(step(data)) for _ in range(5)]

    after = variables_of(model)
    assert {path for path in before if not np.array_equal(before[path], after[path])} == {
        f"norms/{i}/{name}" for i in (0, 1) for name in ("scale", "bias")
    }
    assert (np.diff(entropies) < 0).all()


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_tent_follows_the_gradient_of_tent_by_hand(framework, shared, variables, data, monkeypatch):
    """The step is the gradient of the entropy with batch statistics, which depend on earlier parameters."""
    monkeypatch.setattr(optax, "adam", optax.sgd)  # whose step is the gradient
    tent, before = importlib.import_module("tent"), flat(variables["params"])
    data = shared.take(data, slice(0, 32))
    if framework == "linen":
        opt_state, step = tent.make_tent(variables, 1.0)
        after = flat(step(variables["params"], opt_state, data)[0])
    else:
        model = shared.NNXNet(nnx.Rngs(0))
        for i, layer in enumerate([*model.denses, model.head]):
            layer.kernel[...], layer.bias[...] = (before[f"Dense_{i}/{name}"] for name in ("kernel", "bias"))
        for i, norm in enumerate(model.norms):
            norm.scale[...], norm.bias[...] = (before[f"BatchNorm_{i}/{name}"] for name in ("scale", "bias"))
        tent.make_tent_nnx(model, 1.0)(data)
        after = {
            f"BatchNorm_{i}/{k}": getattr(norm, k)[...] for i, norm in enumerate(model.norms) for k in ("scale", "bias")
        }

    def entropy(nudged):
        return entropy_in_numpy(predict_by_hand(traverse_util.unflatten_dict(nudged, sep="/"), data))

    for path in sorted(AFFINE):
        nudges = 1e-5 * np.eye(before[path].size)
        slopes = [
            (entropy(before | {path: before[path] + n}) - entropy(before | {path: before[path] - n})) for n in nudges
        ]
        step = np.float64(before[path]) - after[path]
        np.testing.assert_allclose(step, np.array(slopes) / 2e-5, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.fixture
def epoch(shared):
    """The training batches, in the order of an epoch."""
    return [np.float64(batch["x"]) for batch in shared.in_batches(shared.load()[0])]


def assert_first_layer(state, kernel, bias, epoch):
    """The statistics of the first layer, over all rows."""
    rows = np.concatenate(epoch) @ np.float64(kernel) + np.float64(bias)
    np.testing.assert_allclose(state.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.var, rows.var(0), rtol=1e-4)


@pytest.mark.slow
def test_plain_functions(run, epoch):
    (model, accuracy), _ = run("plain_functions", epochs=1)
    params, states = model
    assert_first_layer(states["norm_0"], params["kernels"][0], 0, epoch)
    inputs, (scale, bias) = [], map(np.float64, params["affine"][0])
    for x in epoch:
        h = x @ np.float64(params["kernels"][0])
        h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * scale + bias
        inputs.append(np.maximum(h, 0) @ np.float64(params["kernels"][1]))
    np.testing.assert_allclose(states["norm_1"].mean, np.concatenate(inputs).mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(states["norm_1"].var, np.concatenate(inputs).var(0), rtol=1e-4)
    assert accuracy["statistics pass"] > 0.9


def test_equinox_modules(run, epoch):
    pytest.importorskip("equinox")
    (net, (stateful, state), accuracy), _ = run("equinox_modules", epochs=1)
    assert_first_layer(net.norm, net.first.weight.T, net.first.bias, epoch)
    assert_first_layer(state.get(stateful.norm), stateful.first.weight.T, stateful.first.bias, epoch)
    assert accuracy["statistics pass"] > 0.9


def test_haiku_transforms(run, epoch):
    pytest.importorskip("haiku")
    ((params, state), accuracy), _ = run("haiku_transforms", epochs=1)
    assert_first_layer(state["batch_norm"]["norm"], params["linear"]["w"], 0, epoch)
    assert accuracy["statistics pass"] > 0.9


@pytest.mark.slow
def test_weight_decay_pulls_scales_to_one_and_leaves_biases_alone(run, variables):
    params, rate, learning_rate = variables["params"], 0.3, 0.5
    optimizer = importlib.import_module("weight_decay").make_optimizer(variables, rate, optax.sgd(learning_rate))
    grads = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    found = flat(optax.apply_updates(params, updates))

    for path, p in flat(params).items():
        target = {"scale": 1.0, "kernel": 0.0, "bias": p}[path.rsplit("/")[-1]]
        expected = p - learning_rate * (np.sin(7 * p) + rate * (p - target))
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)

    means, printed = run("weight_decay", epochs=2)
    assert means["all towards zero"] < means["none"]
    assert abs(means["scales towards one"] - 1) < abs(means["all towards zero"] - 1)
    assert [row[-2] for row in printed[1:]] == [round(mean, 3) for mean in means.values()]


@pytest.mark.slow
def test_input_distributions_are_those_of_every_layer_and_step(run, shared, data, tmp_path, monkeypatch):
    recipe = importlib.import_module("input_distributions")
    net = shared.Net()
    states = list(shared.train(shared.SGD, data, 1))
    recorded = recipe.record(net, states, data)
    for step, state in enumerate(states):
        for layer, expected in population(state.params, [data]).items():
            np.testing.assert_allclose(recorded[layer].mean[step], expected["mean"], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(recorded[layer].std[step], np.sqrt(expected["var"]), rtol=1e-4)

    monkeypatch.setattr(recipe, "WIDTHS", net.widths)
    found, printed = run("input_distributions", epochs=1)
    assert found.keys() == {"normalized", "plain"}
    for layers, row in zip(found.values(), printed[1:], strict=False):
        ends = [layer.std[step].mean() for layer in layers.values() for step in (0, -1)]
        np.testing.assert_allclose(row, ends, atol=0.005)
    height, width, _ = matplotlib.image.imread(tmp_path / "input_distributions.png").shape
    assert width == 1210 and height == 616


def test_plain_networks_do_nothing_but_scale_and_shift(shared, data):
    """In training too, the network equals its dense layers, up to the factor 1 / sqrt(1 + epsilon)."""
    net = shared.Net(normalize=False)
    variables = net.init(jax.random.key(0), data["x"][:2], train=False)
    p, x = flat(variables["params"]), np.float64(data["x"])
    for i in (0, 1):
        x = np.maximum(x @ p[f"Dense_{i}/kernel"] + p[f"Dense_{i}/bias"], 0)
    logits, updates = net.apply(variables, data["x"], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, x @ p["Dense_2/kernel"] + p["Dense_2/bias"], rtol=1e-4, atol=1e-4)
    assert not moved(variables["batch_stats"], updates["batch_stats"])


def test_the_readme_lists_every_recipe_and_they_say_how_to_run_them():
    assert sorted(re.findall(r"\(examples/recipes/(\w+)\.py\)", README)) == RECIPES
    for recipe in RECIPES:
        assert f"    python examples/recipes/{recipe}.py\n" in (FOLDER / f"{recipe}.py").read_text()
