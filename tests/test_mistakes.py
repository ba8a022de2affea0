"""Natural mistakes end in an error of ours that says what was given and what to write instead."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from flax.training.train_state import TrainState

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.framework.batches import check_batch

X = np.arange(24, dtype=np.float32).reshape(8, 3)
NET = jaxbn.linen.BatchNorm(use_running_average=True)
VARIABLES = NET.init(jax.random.key(0), X)
MODEL = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
READY, REPORT = jaxbn.linen.postproc(NET.apply, VARIABLES, [X])
FROZEN = jaxbn.linen.freeze(READY, REPORT)

LINEN = {
    "postproc": lambda v: jaxbn.linen.postproc(NET.apply, v, [X]),
    "diagnose": lambda v: jaxbn.linen.diagnose(NET.apply, v, [X, X]),
    "capture_moments": lambda v: jaxbn.linen.capture_moments(NET.apply)(v, X),
    "adapt": lambda v: jaxbn.linen.adapt(NET.apply, prior_count=2)(v, X),
    "install_moments": lambda v: jaxbn.linen.install_moments(v, {}),
    "move_averages": lambda v: jaxbn.linen.move_averages(v, {}),
    "freeze": jaxbn.linen.freeze,
    "freeze_layers": lambda v: jaxbn.linen.freeze_layers(NET.apply, "")(v, X),
    "affine_mask": lambda v: jaxbn.linen.affine_mask(v, ""),
    "fold": lambda v: jaxbn.linen.fold(NET.apply, v, X),
    "summary": jaxbn.linen.summary,
    "convert_norms": lambda v: jaxbn.linen.convert_norms(v, like=VARIABLES),
    "update_backward": lambda v: jaxbn.linen.update_backward(v, {}),
}
NO_VARIABLES = [
    (
        TrainState.create(apply_fn=NET.apply, params=VARIABLES["params"], tx=optax.sgd(0.1)),
        "Got a TrainState .* has no statistics",
    ),
    (
        jaxbn.linen.TrainState.create(
            apply_fn=NET.apply, params=VARIABLES["params"], tx=optax.sgd(0.1), batch_stats={}, kinds=()
        ),
        '"batch_stats": state.batch_stats',
    ),
    (NET, "variables that net.init"),
    (FROZEN, "Pass frozen.variables"),
    (MODEL, "use jaxbn.nnx"),
    (jaxbn.batch_norm().init(3), "use jaxbn itself, such as jaxbn.postproc"),
    (None, "Got a NoneType"),
]
NNX = {
    "postproc": lambda m: jaxbn.nnx.postproc(m, [X]),
    "diagnose": lambda m: jaxbn.nnx.diagnose(m, [X, X]),
    "capture_moments": lambda m: jaxbn.nnx.capture_moments()(m, X),
    "adapt": lambda m: jaxbn.nnx.adapt(prior_count=2)(m, X),
    "install_moments": lambda m: jaxbn.nnx.install_moments(m, {}),
    "move_averages": lambda m: jaxbn.nnx.move_averages(m, {}),
    "freeze": jaxbn.nnx.freeze,
    "freeze_layers": lambda m: jaxbn.nnx.freeze_layers(m, ""),
    "fold": lambda m: jaxbn.nnx.fold(m, X),
    "summary": jaxbn.nnx.summary,
    "convert_norms": lambda m: jaxbn.nnx.convert_norms(m, like=MODEL),
    "update_backward": lambda m: jaxbn.nnx.update_backward(m, nnx.state(MODEL, nnx.Param)),
}
NO_MODEL = [
    (VARIABLES, "Got a dict .* use jaxbn.linen"),
    ({"norm": jaxbn.batch_norm().init(3)}, "use jaxbn itself, such as jaxbn.postproc"),
    (nnx.state(MODEL), "nnx.merge"),
    (FROZEN, "install_frozen"),
    (NET, "use jaxbn.linen"),
    (jaxbn.nnx.BatchNorm, "Pass an instance"),
    (nnx.split(MODEL), "nnx.merge"),
]


@pytest.mark.parametrize("function", LINEN)
@pytest.mark.parametrize(("given", "said"), NO_VARIABLES)
def test_what_is_no_dict_of_variables(function, given, said):
    if not (function in ("fold", "summary") and given is FROZEN):  # which they take
        with pytest.raises(TypeError, match=said):
            LINEN[function](given)


@pytest.mark.parametrize("function", NNX)
@pytest.mark.parametrize(("given", "said"), NO_MODEL)
def test_what_is_no_nnx_model(function, given, said):
    said = "jaxbn.linen.summary" if function == "summary" and given is FROZEN else said
    with pytest.raises(TypeError, match=said):
        NNX[function](given)


def test_a_module_for_call_and_arguments_in_the_wrong_order():
    with pytest.raises(TypeError, match=r"a module, BatchNorm: pass .* net\.apply"):
        jaxbn.linen.postproc(NET, VARIABLES, [X])
    with pytest.raises(TypeError, match=r"The order is \(call, variables, batches\)"):
        jaxbn.linen.postproc(VARIABLES, NET.apply, [X])


class Tensor:
    """Like one of torch."""

    dtype = "torch.float32"

    def __array__(self, dtype=None, copy=None):
        return X


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": X, "name": ["a"] * 8}, r"a str at batch\['name'\]\[0\].* Leave it out"),
        ({"x": X, "name": np.array(["a"] * 8)}, r"numpy.ndarray of dtype <U1 at batch\['name'\]"),
        (X.astype(object), "of dtype object"),
        ({"x": Tensor()}, r"Tensor at batch\['x'\].* np.asarray"),
    ],
)
def test_batches_of_what_is_no_array(batch, said):
    def call(variables, batch):
        return NET.apply(variables, batch["x"] if isinstance(batch, dict) else batch)

    for run in (jaxbn.linen.postproc, jaxbn.linen.diagnose):
        with pytest.raises(TypeError, match=f"Batch 0 .*{said}"):
            run(call, VARIABLES, [batch, batch])
    with pytest.raises(TypeError, match=said):
        jaxbn.nnx.postproc(MODEL, [batch], call=lambda model, batch: model(batch["x"]))


def test_batches_of_arrays_and_numbers_are_taken():
    batch = [X, jnp.ones(2), 3, 1.5, True, np.float32(1), jax.random.key(0), jnp.bfloat16(1), None]
    check_batch({"all": batch}, 0)


@pytest.mark.parametrize("package", [jaxbn.linen, jaxbn.nnx])
def test_batches_without_rows(package):
    arguments = (NET.apply, VARIABLES) if package is jaxbn.linen else (MODEL,)
    with pytest.raises(ValueError, match="The 2 batches hold no values: they have no rows"):
        package.postproc(*arguments, [X[:0], X[:0]])
    with pytest.raises(ValueError, match="2 batches, 0 of them finite and not empty"):
        package.diagnose(*arguments, [X[:0], X[:0]])
    found = package.diagnose(*arguments, [X, X[:0], X + 1])
    assert found.layers == package.diagnose(*arguments, [X, X + 1]).layers


@pytest.mark.parametrize("estimator", [jaxbn.constant(0.9), jaxbn.cumulative(), "pooled", jaxbn.pooled, None])
def test_what_is_no_estimator(estimator):
    said = "an average for the `momentum`.*" * isinstance(estimator, jaxbn.Averaging) + "Pass jaxbn.pooled"
    for run in (
        lambda: jaxbn.linen.postproc(NET.apply, VARIABLES, [X], estimator=estimator),
        lambda: jaxbn.nnx.postproc(MODEL, [X], estimator=estimator),
        lambda: jaxbn.nnx.make_steps(MODEL, None, None, inputs=None, estimator=estimator),
        lambda: jaxbn.linen.make_steps(Trained(), None, None, inputs=None, estimator=estimator),
    ):
        with pytest.raises(TypeError, match=said):
            run()


class Trained(nn.Module):
    def __call__(self, x, train):
        return x


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_hyper_parameters_that_end_in_constants(case):
    for changes, said in [
        ({"epsilon": np.inf}, "finite"),
        ({"epsilon": 1e39}, "finite"),
        ({"epsilon": "1"}, "a number"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"epsilon=.*{said}"):
            case.factory(**case.arguments | changes)
    if isinstance(case.arguments.get("momentum", 0.9), float):
        with pytest.raises(ValueError, match="rounds to 1 in float32"):
            case.factory(**case.arguments | {"momentum": 1 - 1e-9})
        with pytest.raises(ValueError, match="rounds to 1 in float32"):
            jaxbn.constant(1 - 1e-9, debias=True)


@every_case
def test_a_mask_that_could_be_meant_for_rows_or_for_channels(case):
    transform, x = case.transform(), jnp.arange(16.0).reshape(4, 4)
    params, state = transform.init(4)
    mask = jnp.array([True, True, True, False])
    run = {"train": functools.partial(transform.train, params, state), "measure": transform.measure}
    for function in run.values():
        with pytest.raises(ValueError, match=r"fits the leading axes .* mask.reshape\(\(4, 1\)\) for the leading"):
            jax.eval_shape(function, x, mask=mask)
    by_rows = transform.measure(x, mask=mask[:, None])
    np.testing.assert_array_equal(by_rows.count.reshape(-1, 4).sum(0), 3)  # of all domains


def test_masks_that_can_mean_one_thing_only_are_taken(rng):
    bn = jaxbn.batch_norm()
    x = jnp.asarray(rng.standard_normal((4, 3, 5)), jnp.float32)
    for mask in (jnp.array(True), jnp.ones((4, 1, 1)), jnp.ones(5), jnp.ones((3, 5)), jnp.ones((4, 3, 5)), jnp.ones(1)):
        np.testing.assert_array_equal(bn.measure(x, mask=mask).count, 12)
    assert bn.measure(jnp.ones((1, 1)), mask=jnp.ones(1)).count == 1
