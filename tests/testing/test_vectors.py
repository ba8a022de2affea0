"""The reference vectors: regenerated files are equal, and the library reproduces them in every framework."""

import contextlib
import functools
from importlib import resources

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.testing
from jaxbn._src.statistics import estimators
from jaxbn._src.testing import generate, reference, vectors

LOADED = [jaxbn.testing.load(name) for name in jaxbn.testing.names()]
METHODS = [vector for vector in LOADED if vector.state]
ESTIMATORS = [vector for vector in LOADED if not vector.state]
AXIS = "devices"

# By dtype, relative to the largest value of an array.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
every_method = pytest.mark.parametrize("vector", METHODS, ids=lambda vector: vector.name)


@contextlib.contextmanager
def precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        yield


def assert_close(found, expected, tolerance, where=""):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = tolerance * np.abs(value).max(initial=1e-30)
        np.testing.assert_allclose(found[name], value, rtol=0, atol=bound, err_msg=where + name)


# The frameworks, each as (params, state, x, mask, train, **where) -> (y, state), of dicts of arrays.


def layer(package, vector):
    """The module of a method, which has its name in camel case."""
    return getattr(package, "".join(map(str.capitalize, vector.method.split("_"))))


def core(vector, axis_name, dtype):
    transform = getattr(jaxbn, vector.method)(**vector.arguments, axis_name=axis_name)
    empty_params, empty_state = transform.init(vector.state["mean"].shape[-1])

    def call(params, state, x, mask, train, **where):
        params, state = empty_params._replace(**params), empty_state._replace(**state)
        if train:
            y, state = transform.train(params, state, x, mask=mask, **where)
        else:
            y = transform.eval(params, state, x, **where)
        return y, {name: leaf for name, leaf in state._asdict().items() if leaf is not None}

    return call


def linen(vector, axis_name, dtype):
    module = layer(jaxbn.linen, vector)(**vector.arguments, axis_name=axis_name)

    def call(params, state, x, mask, train, **where):
        variables = {"params": params, "batch_stats": state}
        y, updates = module.apply(variables, x, not train, mask=mask, mutable=["batch_stats"], **where)
        return y, updates["batch_stats"]

    return call


def nnx_module(vector, axis_name, dtype):
    module = layer(jaxbn.nnx, vector)(
        vector.state["mean"].shape[-1], **vector.arguments, axis_name=axis_name, param_dtype=dtype, rngs=nnx.Rngs(0)
    )
    graph, initial = nnx.split(module)

    def call(params, state, x, mask, train, **where):
        merged = nnx.merge(graph, initial, copy=True)
        for name, leaf in (params | state).items():
            getattr(merged, name).set_value(leaf)
        y = merged(x, not train, mask=mask, **where)
        return y, {name: getattr(merged, name).get_value() for name in state}

    return call


FRAMEWORKS = {"core": core, "linen": linen, "nnx": nnx_module}


def steps_of(calls, devices, measure):
    """The training and the evaluation of several calls at once: compiled together, so common parts compile once."""

    def spread(call, params, state, x, mask, where):
        if devices == 1:
            return call(params, state, x, mask, True, **where)
        one = lambda x, mask, where: call(params, state, x, mask, True, **where)
        return jax.vmap(one, axis_name=AXIS)(x, mask, where)

    @jax.jit
    def train(params, states, x, mask, cotangent, where):
        found = {}
        for framework, call in calls.items():
            run = lambda params, x, call=call, state=states[framework]: spread(call, params, state, x, mask, where)
            y, backward, state = jax.vjp(run, params, x, has_aux=True)
            dparams, dx = backward(cotangent)
            outputs = {"y": y, "dx": dx} | {f"d{name}": leaf for name, leaf in dparams.items()}
            found[framework] = outputs | as_outputs(measure(x, mask, where)), state
        return found

    @jax.jit
    def evaluate(params, states, x, where):
        return {
            framework: call(params, states[framework], x, None, False, **where) for framework, call in calls.items()
        }

    def step(params, states, given, dtype):
        x, mask = jnp.asarray(given.inputs["x"], dtype), given.inputs.get("mask")
        where = {name: value.astype(np.int32) for name, value in given.inputs.items() if name == "domain"}
        if given.call == "eval":
            return {
                framework: ({"y": y}, state) for framework, (y, state) in evaluate(params, states, x, where).items()
            }
        found = train(params, states, x, mask, jnp.asarray(given.inputs["cotangent"], dtype), where)
        return {framework: (outputs, of_one(state, devices)) for framework, (outputs, state) in found.items()}

    return step


def measure_of(vector):
    """(x, mask, where) -> moments of what all devices hold."""
    if vector.method != "domain_batch_norm":
        return lambda x, mask, where: jaxbn.batch_moments(x, mask=mask)
    measure = jaxbn.domain_batch_norm(**vector.arguments).measure

    def whole(values):
        return values if values is None or vector.devices == 1 else values.reshape(-1, *values.shape[2:])

    return lambda x, mask, where: measure(whole(x), mask=whole(mask), domain=whole(where["domain"]))


def as_outputs(moments):
    return {"count": moments.count, "mean": moments.mean, "var": moments.var}


def of_one(states, devices):
    """The state of the first device, which is that of all."""
    if devices == 1:
        return states
    for leaf in jax.tree.leaves(states):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], states)


def check(calls, vector, dtype):
    """Runs the calls through a vector, each with its own states, and compares all that comes out."""
    step = steps_of(calls, vector.devices, measure_of(vector))
    params, state = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (vector.params, vector.state))
    states = dict.fromkeys(calls, state)
    for i, given in enumerate(vector.steps):
        for framework, (outputs, state) in step(params, states, given, dtype).items():
            where = f"{framework}, step {i}, "
            assert outputs["y"].dtype == dtype
            assert_close(outputs, {name: given.outputs[name] for name in outputs}, TOLERANCE[dtype], where)
            assert_close(state, given.state, TOLERANCE[dtype], where)
            states[framework] = state


@pytest.mark.sample(every=4)
@every_dtype
@every_method
def test_every_host_gives_the_numbers_of_the_vector(vector, dtype):
    with precision(dtype):
        calls = {
            name: framework(vector, AXIS if vector.devices > 1 else None, dtype)
            for name, framework in FRAMEWORKS.items()
        }
        check(calls, vector, dtype)


@every_dtype
@pytest.mark.parametrize("vector", ESTIMATORS, ids=lambda vector: vector.name)
def test_estimators_give_the_numbers_of_the_vector(vector, dtype):
    estimator = getattr(jaxbn, vector.method)(**vector.arguments)
    *updates, finalize = vector.steps
    assert {step.call for step in updates} == {"update"} and finalize.call == "finalize"

    @jax.jit
    def run(batches):
        moments = [{"layer": jaxbn.batch_moments(x)} for x in batches]
        acc = functools.reduce(estimator.update, moments, estimator.init(moments[0]))
        return [as_outputs(found["layer"]) for found in (*moments, estimator.finalize(acc))]

    with precision(dtype):
        *moments, population = run([jnp.asarray(step.inputs["x"], dtype) for step in updates])
    for found, step in zip(moments, updates, strict=True):
        assert_close(found, step.outputs, TOLERANCE[dtype])
    assert_close({name: population[name] for name in finalize.outputs}, finalize.outputs, TOLERANCE[dtype])


PLAIN = [vector for vector in METHODS if not any("mask" in step.inputs for step in vector.steps)]


@pytest.mark.parametrize("vector", [v for v in PLAIN if v.method == "batch_norm"], ids=lambda vector: vector.name)
def test_flax_gives_the_numbers_of_the_vectors_without_masks(vector):
    """In float64, where the variance of Flax is safe too."""
    module = nn.BatchNorm(**vector.arguments, use_fast_variance=False, param_dtype=jnp.float64)

    def call(params, state, x, mask, train, **where):
        variables = {"params": params, "batch_stats": state}
        y, updates = module.apply(variables, x, use_running_average=not train, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    with precision("float64"), jax.numpy_dtype_promotion("standard"):
        check({"flax": call}, vector, "float64")


@pytest.mark.parametrize("name", generate.VECTORS)
def test_made_anew_a_file_is_the_same_to_the_last_digit(name):
    file = resources.files("jaxbn._src.testing") / "data" / f"{name}.json"
    assert vectors.dumps(generate.VECTORS[name]()) == file.read_text()


def test_every_method_and_estimator_has_vectors():
    """A new method writes its formulas into `jaxbn.testing.reference`, and a function into `jaxbn.testing.generate`."""
    assert {vector.method for vector in METHODS} == {case.factory.__name__ for case in CASES}
    public = {name for name, value in vars(estimators).items() if getattr(value, "__module__", "") == "jaxbn"}
    assert {vector.method for vector in ESTIMATORS} == public - {"Averaging", "Estimator", "Moments"}


def test_there_is_no_other_file():
    assert jaxbn.testing.names() == tuple(sorted(generate.VECTORS))


@pytest.mark.parametrize("vector", LOADED, ids=lambda vector: vector.name)
def test_what_is_read_writes_the_same_file(vector):
    assert vectors.dumps(vector) == vectors.dumps(generate.VECTORS[vector.name]())
    assert vector.name.startswith(vector.method) and vector.about.endswith(".")


@pytest.mark.parametrize("vector", LOADED, ids=lambda vector: vector.name)
def test_what_goes_in_is_exact_in_float32(vector):
    for arrays in (vector.params, vector.state, *(step.inputs for step in vector.steps)):
        for array in arrays.values():
            assert array.dtype in (np.float64, bool, np.int64)
            np.testing.assert_array_equal(array.astype(np.float32), array)


def test_an_unknown_vector_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="There is no vector 'layer_norm'; there are batch_norm, "):
        jaxbn.testing.load("layer_norm")


# The reference itself, against differences of its own outputs and against NumPy.


def constants_of(vector, state, moments):
    """R and d of Batch Renormalization, in which a step does not differentiate; 1 and 0 for batch norm."""
    if vector.method != "batch_renorm":
        return 1.0, 0.0
    given = {name: vector.arguments[name] for name in ("epsilon", "r_max", "d_max")}
    return reference.renorm_constants(state, moments, **given)


def where_of_rows(step):
    """The domain of each row, where examples have one."""
    ids = step.inputs.get("domain")
    return {} if ids is None else {"domain": np.repeat(ids.ravel(), step.inputs["x"][..., 0].size // ids.size)}


# Not that of moving average batch normalization: its gradient is of a joint batch, against which its own tests compare.
DERIVATIVES = [vector for vector in METHODS if vector.method != "moving_average_batch_norm"]


@pytest.mark.parametrize("vector", DERIVATIVES, ids=lambda vector: vector.name)
def test_derivatives_of_the_reference_are_differences_of_its_outputs(vector):
    """Of a sum of outputs weighted by the cotangent, to the square of the step; with r and d as constants."""
    state, formulas = vector.state, reference.batch_norm(epsilon=vector.arguments["epsilon"])
    if vector.method == "ghost_batch_norm":
        formulas = reference.ghost_batch_norm(**vector.arguments)
    if vector.method == "domain_batch_norm":
        formulas = reference.domain_batch_norm(**vector.arguments)
    for step in (step for step in vector.steps if step.call == "train"):
        x, cotangent = rows(step.inputs["x"]), rows(step.inputs["cotangent"])
        weights = rows(np.broadcast_to(np.float64(step.inputs.get("mask", 1)), step.inputs["x"].shape))
        r, d = constants_of(vector, state, reference.moments(x, weights))
        where = where_of_rows(step)

        def loss(x, params, state=state, weights=weights, cotangent=cotangent, r=r, d=d, where=where):
            scale, bias = params.get("scale", 1.0), params.get("bias", 0.0)
            corrected = {"scale": scale * r, "bias": scale * d + bias}
            return (formulas.train(corrected, state, x, weights, **where).y * cotangent).sum()

        np.testing.assert_allclose(loss(x, vector.params), (rows(step.outputs["y"]) * cotangent).sum(), rtol=1e-11)
        size = 1e-5 * x.std(0).max().clip(1e-2)
        for index in np.ndindex(*x.shape):
            if x[:, index[1]].std() < 1e-6:
                continue  # constant channels bend within any step that shows in float64
            nudge = np.zeros_like(x)
            nudge[index] = size
            slope = (loss(x + nudge, vector.params) - loss(x - nudge, vector.params)) / (2 * size)
            expected = rows(step.outputs["dx"])[index]
            np.testing.assert_allclose(expected, slope, rtol=1e-4, atol=1e-4 * np.abs(step.outputs["dx"]).max())
        for name, value in vector.params.items():
            for channel in np.ndindex(value.shape):
                nudge = np.zeros(value.shape)
                nudge[channel] = 1e-3  # in which the outputs are linear
                up, down = (vector.params | {name: value + sign * nudge} for sign in (1, -1))
                slope = (loss(x, up) - loss(x, down)) / 2e-3
                np.testing.assert_allclose(step.outputs[f"d{name}"][channel], slope, rtol=1e-9, atol=1e-9)
        state = step.state


def test_bounds_of_batch_renorm_clip_some_channels_and_not_others():
    vector = jaxbn.testing.load("batch_renorm")
    clipped, state = [], vector.state
    for step in vector.steps[:3]:
        found = constants_of(vector, state, reference.moments(step.inputs["x"], np.ones_like(step.inputs["x"])))
        r_max, d_max = (vector.arguments[name] for name in ("r_max", "d_max"))
        clipped.append([np.isin(found[0], (r_max, 1 / r_max)), np.isin(found[1], (d_max, -d_max))])
        state = step.state
    share = np.mean(clipped, (0, 2))
    assert (0.1 < share).all() and (share < 0.9).all(), share


def test_unbounded_batch_renorm_trains_with_the_outputs_of_evaluation():
    vector = jaxbn.testing.load("batch_renorm_unbounded")
    state = vector.state
    for step in vector.steps:
        x_hat = (step.inputs["x"] - state["mean"]) / np.sqrt(state["var"] + vector.arguments["epsilon"])
        y = vector.params["scale"] * x_hat + vector.params["bias"]
        np.testing.assert_allclose(step.outputs["y"], y, rtol=1e-12, atol=1e-12)
        state = step.state


def rows(x):
    return x.reshape(-1, x.shape[-1])


def test_moments_of_the_reference_are_those_of_numpy(rng):
    x, w = rng.standard_normal((9, 3)), rng.integers(0, 4, (9, 3)).astype(float)
    found = reference.moments(x, w)
    repeated = [np.repeat(x[:, c], w[:, c].astype(int)) for c in range(3)]
    np.testing.assert_array_equal(found.count, [len(r) for r in repeated])
    np.testing.assert_allclose(found.mean, [r.mean() for r in repeated], rtol=1e-14)
    np.testing.assert_allclose(found.var, [r.var() for r in repeated], rtol=1e-14)


def test_pooled_vectors_are_the_moments_of_all_rows():
    for name, ddof in (("pooled", 0), ("pooled_unbiased", 1)):
        *updates, finalize = jaxbn.testing.load(name).steps
        values = np.concatenate([step.inputs["x"] for step in updates])
        np.testing.assert_allclose(finalize.outputs["mean"], values.mean(0), rtol=1e-14)
        np.testing.assert_allclose(finalize.outputs["var"], values.var(0, ddof=ddof), rtol=1e-14)


def test_the_program_writes_one_file_for_each_vector(tmp_path, monkeypatch, capsys):
    made = {name: generate.VECTORS[name] for name in ("pooled", "mean_of_batches")}
    monkeypatch.setattr(generate, "VECTORS", made)
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "generate.py"))
    (tmp_path / "data").mkdir()
    generate.main()
    assert capsys.readouterr().out == f"2 vectors in {tmp_path / 'data'}\n"
    assert {file.name for file in (tmp_path / "data").iterdir()} == {f"{name}.json" for name in made}
    assert (tmp_path / "data" / "pooled.json").read_text() == vectors.dumps(made["pooled"]())
