"""Weights of examples in a layer with a mask: the product of both applies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from layers import normal

import jaxbn.linen
import jaxbn.nnx

X = normal(8, 5, 3)
MASK = np.random.default_rng(1).uniform(0, 2, (8, 5, 1)).astype(np.float32).round(1) * (X[..., :1] > -1)
WEIGHTS = np.array([0, 1, 2, 0.5, 1, 0, 3, 1], np.float32)
PRODUCT = MASK * WEIGHTS[:, None, None]

# (mask, weights) that are worth PRODUCT, or a boolean one.
GIVEN = {
    "real, real": (MASK, WEIGHTS, PRODUCT),
    "bool, real": (MASK > 0.5, WEIGHTS, (MASK > 0.5) * WEIGHTS[:, None, None]),
    "real, bool": (MASK, WEIGHTS > 0, MASK * (WEIGHTS > 0)[:, None, None]),
    "bool, bool": (MASK > 0.5, WEIGHTS > 0, (MASK > 0.5) & (WEIGHTS > 0)[:, None, None]),
    "of a channel, real": (np.array([1, 0.5, 2], np.float32), WEIGHTS, np.array([1, 0.5, 2]) * WEIGHTS[:, None, None]),
}


class Model:
    """One layer; its mask is part of the batch."""

    def __init__(self, framework, case):
        self.case, self.package = case, getattr(jaxbn, framework)
        if framework == "linen":
            self.layer = case.linen_module(use_running_average=True)
            self.first = (self.call, self.layer.init(jax.random.key(0), X, **case.where(X)))
        else:
            self.layer = case.nnx_module(3, use_running_average=True)
            self.first = (self.layer,)
        self.framework = framework

    def call(self, network, batch):
        run = network if self.framework == "nnx" else lambda *args, **given: self.layer.apply(network, *args, **given)
        return run(batch["x"], mask=batch["mask"], **self.case.where(batch["x"]))

    def capture(self, mode, batch, weights):
        given = {"mode": mode, "weights": weights}
        if self.framework == "linen":
            return self.package.capture_moments(self.call, **given)(self.first[1], batch)
        return self.package.capture_moments(call=self.call, **given)(self.layer, batch)

    def run(self, name, batches, **given):
        call = {} if self.framework == "linen" else {"call": self.call}
        return getattr(self.package, name)(*self.first, batches, **call, **given)

    def adapt(self, batch, **given):
        if self.framework == "linen":
            return self.package.adapt(self.call, **given)(self.first[1], batch)
        return self.package.adapt(call=self.call, **given)(self.layer, batch)


@pytest.fixture(params=["linen", "nnx"])
def framework(request):
    return request.param


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", GIVEN)
def test_moments_are_those_of_the_product(name, framework):
    model = Model(framework, CASES[0])
    mask, weights, product = GIVEN[name]
    _, moments = model.capture("eval", {"x": X, "mask": mask}, lambda batch: weights)
    w, rows = np.broadcast_to(product, X.shape).reshape(-1, 3).astype(np.float64), X.reshape(-1, 3).astype(np.float64)
    mean = (w * rows).sum(0) / w.sum(0)
    np.testing.assert_allclose(moments[""].count, w.sum(0), rtol=1e-6)
    np.testing.assert_allclose(moments[""].mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments[""].m2, (w * (rows - mean) ** 2).sum(0), rtol=1e-5)


@pytest.mark.parametrize("case", [pytest.param(CASES[0], id=CASES[0].name)] + [
    pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in CASES[1:]
])  # fmt: skip
def test_every_entry_point_weighs_with_the_product(case, framework):
    """The result equals that of a model with the product as its mask and no weights."""
    model = Model(framework, case)
    apart, together = {"x": X, "mask": MASK}, {"x": X, "mask": PRODUCT}
    for mode in ("batch", "eval"):
        assert_same(model.capture(mode, apart, lambda batch: WEIGHTS), model.capture(mode, together, None))
    found, report = model.run("postproc", [apart] * 2, weights=lambda batch: WEIGHTS)
    wanted, expected = model.run("postproc", [together] * 2)
    assert report.to_dict() == expected.to_dict()
    assert_same(statistics(found), statistics(wanted))
    others = [{**batch, "x": X[::-1]} for batch in (apart, together)]
    diagnoses = (
        model.run("diagnose", [apart, others[0]], weights=lambda batch: WEIGHTS),
        model.run("diagnose", [together, others[1]]),
    )
    assert str(diagnoses[0]) == str(diagnoses[1])
    if not case.where(X):
        assert report.layers[""].count == pytest.approx(2 * PRODUCT.sum(), rel=1e-6)
        given = {"prior_count": 4.0}
        assert_same(model.adapt(apart, weights=lambda batch: WEIGHTS, **given), model.adapt(together, **given))


def statistics(network):
    return network["batch_stats"] if isinstance(network, dict) else nnx.state(network, nnx.BatchStat)


def test_examples_that_are_not_along_the_leading_axis_are_an_error(framework):
    model = Model(framework, CASES[0])
    with pytest.raises(ValueError, match="weights for 3 examples.*Leave weights out"):
        model.capture("eval", {"x": X, "mask": MASK}, lambda batch: jnp.ones(3))
