"""States out of `pmap`, a network for each device: what differs is named, and none of them is taken for one network."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


X = np.random.default_rng(0).normal(size=(8, 4, 2)).astype(np.float32)
VARIABLES = Net().init(jax.random.key(0), X[0])
MODEL = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def stacked(tree):
    """One replica for each device."""
    return jax.pmap(lambda _: tree, axis_name="device")(jnp.zeros(8))


@pytest.fixture(scope="module")
def trained():
    """Variables and a count after a step in which no device heard of the others."""

    def step(variables, x):
        _, updates = Net().apply(variables, x, train=True, mutable=["batch_stats"])
        return variables | updates, jnp.zeros((), jnp.int32) + 1

    return jax.pmap(step, axis_name="device")(stacked(VARIABLES), X)


def test_the_statistic_that_differs_is_named(trained):
    (variables, _) = trained
    assert np.ptp(variables["batch_stats"]["BatchNorm_0"]["mean"], axis=0).max() > 0.01
    jaxbn.check_replicas(stacked(VARIABLES))
    jaxbn.check_replicas(variables["params"])
    for tree in (trained, variables, variables["batch_stats"]):
        with pytest.raises(ValueError, match="BatchNorm_0/mean' on cpu:1 differs from its copy on the device before"):
            jaxbn.check_replicas(tree)


def test_keys_are_compared_too():
    keys = jax.random.split(jax.random.key(0), 8)
    same = jax.pmap(lambda _: jax.random.key(0))(jnp.zeros(8))
    jaxbn.check_replicas({"key": same, "one": keys[0]})
    with pytest.raises(ValueError, match="'key' on cpu:1"):
        jaxbn.check_replicas({"key": jax.pmap(lambda key: key)(keys)})


def test_a_network_that_is_spread_over_the_devices_is_no_stack():
    """Though its kernel and its statistics have a row, or a channel, for each."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("data")))  # noqa: E731  a word
    rows = np.arange(8.0, dtype=np.float32)
    params = {"kernel": put(rows[:, None] + rows), "scale": put(rows)}
    spread = {"params": params, "batch_stats": {"mean": put(rows), "var": put(rows + 2)}}
    jaxbn.check_replicas(spread)
    assert jaxbn.linen.freeze(spread).variables["batch_stats"]["mean"].shape == (8,)


def apply(variables, x):
    return Net().apply(variables, x)


def frozen():
    variables, report = jaxbn.linen.postproc(apply, VARIABLES, X)
    return jaxbn.linen.freeze(variables, report)


MOMENTS = {"BatchNorm_0": jaxbn.batch_moments(jnp.ones((8, 3)))}
REFUSES = {
    "freeze": lambda variables, model, path: jaxbn.linen.freeze(variables),
    "postproc": lambda variables, model, path: jaxbn.linen.postproc(apply, variables, X),
    "install_moments": lambda variables, model, path: jaxbn.linen.install_moments(variables, MOMENTS),
    "summary": lambda variables, model, path: jaxbn.linen.summary(variables),
    "diagnose": lambda variables, model, path: jaxbn.linen.diagnose(apply, variables, X),
    "save": lambda variables, model, path: jaxbn.serving.save(path, stacked(frozen())),
    "save_sharded": lambda variables, model, path: jaxbn.serving.save_sharded(path, stacked(frozen())),
    "export": lambda variables, model, path: jaxbn.serving.export(path, apply, variables, X[0]),
    "export of Frozen": lambda variables, model, path: jaxbn.serving.export(path, apply, stacked(frozen()), X[0]),
    "nnx.freeze": lambda variables, model, path: jaxbn.nnx.freeze(model),
    "nnx.postproc": lambda variables, model, path: jaxbn.nnx.postproc(model, X),
    "nnx.install_moments": lambda variables, model, path: jaxbn.nnx.install_moments(model, {}),
    "nnx.summary": lambda variables, model, path: jaxbn.nnx.summary(model),
    "nnx.diagnose": lambda variables, model, path: jaxbn.nnx.diagnose(model, X),
    "nnx.install_frozen": lambda variables, model, path: jaxbn.nnx.install_frozen(MODEL, stacked(frozen())),
}


@pytest.mark.parametrize("name", REFUSES)
def test_what_wants_one_network_says_that_this_is_one_for_each_device(name, trained, tmp_path):
    model = nnx.merge(nnx.graphdef(MODEL), stacked(nnx.state(MODEL)))
    with pytest.raises(ValueError, match=r"leading axis, \(8,\): it is replicated. Pass one of the replicas"):
        REFUSES[name](trained[0], model, tmp_path / "file")


def test_one_of_the_replicas_is_taken(trained):
    one = jax.tree.map(lambda leaf: leaf[0], trained[0])
    assert jaxbn.linen.freeze(one).variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (3,)
    assert flax.core.unfreeze(one).keys() == VARIABLES.keys()
