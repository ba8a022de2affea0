"""Freezing in linen and NNX: conditions, recorded information, and the table of the layers of a network."""

import functools
from typing import Any, NamedTuple

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.inference.summary import tabulate

EPSILONS = {"first": 1e-3, "second": 1e-5}
BATCHES = (3 + 2 * np.random.default_rng(0).standard_normal((2, 10, 3))).astype(np.float32)
POOLED, MEAN, MOVING = jaxbn.pooled(), jaxbn.mean_of_batches(), jaxbn.moving_average()


class LinenNet(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train, upto=2):
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.relu(norm(epsilon=1e-3, name="first")(nn.Dense(4, name="below")(x)))
        x = nn.Dense(3, name="above")(x)
        return norm(name="second", use_bias=False)(x) if upto == 2 or self.is_initializing() else x


class NNXNet(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.below, self.above = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.first, self.second = norm(4, epsilon=1e-3, rngs=rngs), norm(3, use_bias=False, rngs=rngs)

    def __call__(self, x, train, upto=2):
        x = nnx.relu(self.first(self.below(x), use_running_average=not train))
        x = self.above(x)
        return self.second(x, use_running_average=not train) if upto == 2 else x


@functools.partial(jax.jit, static_argnums=0)
def _train_linen(net, variables, x):
    return net.apply(variables, x, True, mutable=["batch_stats"])[1]


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_linen(net, variables, x):
    return net.apply(variables, x, False)


@functools.partial(nnx.jit, static_argnums=2)
def _run_nnx(model, x, train):
    return model(x, train)


class Linen:
    """The network is its variables."""

    package = jaxbn.linen

    @staticmethod
    def started(norm):
        return LinenNet(norm).init(jax.random.key(0), np.zeros((2, 3), np.float32), True)

    @staticmethod
    def train(norm, network, x):
        return network | _train_linen(LinenNet(norm), network, x)

    @staticmethod
    def estimated(norm, network, batches, upto, estimator):
        call = lambda v, x: LinenNet(norm).apply(v, x, False, upto)
        return jaxbn.linen.postproc(call, network, batches, estimator=estimator)

    @staticmethod
    def evaluate(norm, network, x):
        variables = network.variables if isinstance(network, jaxbn.Frozen) else network
        return _evaluate_linen(LinenNet(norm), variables, x)

    @staticmethod
    def leaves(network):
        flat = flax.traverse_util.flatten_dict(network, sep="/")
        return {path.split("/", 1)[1]: np.array(leaf) for path, leaf in flat.items()}

    @staticmethod
    def changed(network, path, change):
        flat = flax.traverse_util.flatten_dict(network, sep="/")
        return flax.traverse_util.unflatten_dict(
            {name: change(leaf) if name.endswith(path) else leaf for name, leaf in flat.items()}, sep="/"
        )


class NNX:
    """The network is its model."""

    package = jaxbn.nnx

    @staticmethod
    def started(norm):
        return NNXNet(norm)

    @staticmethod
    def train(norm, network, x):
        network = nnx.clone(network)
        _run_nnx(network, x, True)
        return network

    @staticmethod
    def estimated(norm, network, batches, upto, estimator):
        return jaxbn.nnx.postproc(network, batches, call=lambda model, x: model(x, False, upto), estimator=estimator)

    @staticmethod
    def evaluate(norm, network, x):
        model = jaxbn.nnx.install_frozen(NNXNet(norm), network) if isinstance(network, jaxbn.Frozen) else network
        return _run_nnx(model, x, False)

    @staticmethod
    def leaves(network):
        flat = network
        if isinstance(network, nnx.Module):
            flat = nnx.to_pure_dict(nnx.state(network))
        return {path: np.array(leaf) for path, leaf in flax.traverse_util.flatten_dict(flat, sep="/").items()}

    @staticmethod
    def changed(network, path, change):
        network = nnx.clone(network)
        layer, name = path.split("/")
        variable = getattr(getattr(network, layer), name)
        variable.set_value(change(variable[...]))
        return network


class Made(NamedTuple):
    framework: Any
    norm: Any


every_network = pytest.mark.parametrize(
    "framework, norm",
    [
        Made(Linen, nn.BatchNorm),
        Made(Linen, jaxbn.linen.BatchNorm),
        Made(NNX, nnx.BatchNorm),
        Made(NNX, jaxbn.nnx.BatchNorm),
    ],
    ids=["linen stock", "linen jaxbn", "nnx stock", "nnx jaxbn"],
)
our_networks = pytest.mark.parametrize(
    "framework, norm", [Made(Linen, jaxbn.linen.BatchNorm), Made(NNX, jaxbn.nnx.BatchNorm)], ids=["linen", "nnx"]
)


@functools.cache  # what is tested leaves them untouched
def started(framework, norm):
    return framework.started(norm)


@functools.cache
def trained(framework, norm):
    """A network after a few updates of the running averages."""
    network = started(framework, norm)
    for x in BATCHES:
        network = framework.train(norm, network, x)
    return network


@functools.cache
def estimated(framework, norm, *, begin=started, count=2, upto=2, estimator=POOLED):
    """The result of a pass over some of the batches, which reaches some of the layers."""
    return framework.estimated(norm, begin(framework, norm), BATCHES[:count], upto, estimator)


# --- The frozen network -----------------------------------------------------------------------------------------------


@pytest.mark.sample(every=2)
@every_network
def test_running_averages_are_frozen_as_they_are(framework, norm):
    network = trained(framework, norm)
    before = framework.leaves(network)
    frozen = framework.package.freeze(network)
    assert isinstance(frozen, jaxbn.Frozen) and type(frozen.variables) is dict
    chex.assert_trees_all_equal(framework.leaves(frozen.variables), before, strict=True)
    chex.assert_trees_all_equal(framework.leaves(network), before, strict=True)
    np.testing.assert_array_equal(
        framework.evaluate(norm, frozen, BATCHES[0]), framework.evaluate(norm, network, BATCHES[0])
    )
    for path, epsilon in EPSILONS.items():
        # An NNX model records the methods of its layers; the variables of linen do not.
        kind = (None, None) if framework is Linen else ("batch_norm", epsilon)
        assert frozen.info.layer(path) == jaxbn.LayerInfo(*kind, estimator="as given", rows=None)


every_estimator = pytest.mark.parametrize(
    "framework, norm, estimator",
    [
        (Linen, nn.BatchNorm, POOLED),
        (Linen, jaxbn.linen.BatchNorm, MEAN),
        (NNX, nnx.BatchNorm, MOVING),
        (NNX, jaxbn.nnx.BatchNorm, POOLED),
    ],
    ids=["linen stock pooled", "linen jaxbn mean", "nnx stock moving", "nnx jaxbn pooled"],
)


@pytest.mark.sample(every=2)
@every_estimator
def test_statistics_of_a_pass_are_frozen_with_their_information(framework, norm, estimator):
    network, report = estimated(framework, norm, estimator=estimator)
    before = framework.leaves(network)
    frozen = framework.package.freeze(network, report)
    chex.assert_trees_all_equal(framework.leaves(frozen.variables), before, strict=True)
    chex.assert_trees_all_equal(framework.leaves(network), before, strict=True)
    np.testing.assert_array_equal(
        framework.evaluate(norm, frozen, BATCHES[0]), framework.evaluate(norm, network, BATCHES[0])
    )
    expected = {path: jaxbn.LayerInfo("batch_norm", e, estimator.name, 20.0) for path, e in EPSILONS.items()}
    assert dict(frozen.info.layers) == expected
    versions = dict(frozen.info.versions)
    assert (versions["jax"], versions["flax"]) == (jax.__version__, flax.__version__)
    assert set(versions) == {"jaxbn", "jax", "flax"}


@our_networks
def test_a_frozen_network_is_a_pytree_whose_info_is_static(framework, norm):
    network, report = estimated(framework, norm)
    frozen, again = framework.package.freeze(network, report), framework.package.freeze(network, report)
    other = jaxbn.Frozen(frozen.variables, frozen.info._replace(versions=()))
    assert hash(frozen.info) == hash(again.info)
    assert jax.tree.structure(frozen) == jax.tree.structure(again) != jax.tree.structure(other)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, frozen)
    assert doubled.info == frozen.info
    traces = []

    @jax.jit
    def double(frozen):
        traces.append(frozen.info)
        return jax.tree.map(lambda leaf: 2 * leaf, frozen)

    for one in (frozen, again):
        chex.assert_trees_all_equal(double(one), doubled, strict=True)
    assert traces == [frozen.info]
    assert double(other).info == other.info != frozen.info
    shapes = jax.eval_shape(double, frozen)
    assert shapes.info == frozen.info and isinstance(jax.tree.leaves(shapes)[0], jax.ShapeDtypeStruct)


@every_network
def test_layers_that_a_pass_did_not_reach_keep_their_running_averages(framework, norm):
    network, report = estimated(framework, norm, begin=trained, upto=1)
    info = framework.package.freeze(network, report).info
    assert info.layer("first") == jaxbn.LayerInfo("batch_norm", 1e-3, "pooled", 20.0)
    kind = (None, None) if framework is Linen else ("batch_norm", 1e-5)
    assert info.layer("second") == jaxbn.LayerInfo(*kind, estimator="as given", rows=None)


# --- Errors -----------------------------------------------------------------------------------------------------------


@every_network
def test_statistics_that_were_never_estimated_are_rejected(framework, norm):
    with pytest.raises(ValueError, match="The statistics of 'first' were never estimated"):
        framework.package.freeze(started(framework, norm))
    network, report = estimated(framework, norm, upto=1)
    for given in (report, None):
        with pytest.raises(ValueError, match="The statistics of 'second' were never estimated: .* reaches this layer"):
            framework.package.freeze(network, given)


@our_networks
def test_training_without_running_averages_estimates_no_statistics(framework, norm):
    network = trained(framework, functools.partial(norm, momentum=None))
    with pytest.raises(ValueError, match="The statistics of 'first' were never estimated"):
        framework.package.freeze(network)


STANDARD = np.array([[-1.0, 1.0], [1.0, -1.0]], np.float32)  # mean 0 and variance 1, exactly


@pytest.mark.parametrize("framework", [Linen, NNX], ids=["linen", "nnx"])
def test_statistics_of_a_pass_may_equal_the_initial_values(framework):
    """The model itself is a layer."""
    if framework is Linen:
        net = jaxbn.linen.BatchNorm(use_running_average=True)
        network, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), STANDARD), [STANDARD])
    else:
        network, report = jaxbn.nnx.postproc(jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)), [STANDARD])
    frozen = framework.package.freeze(network, report)
    assert frozen.info.layer("") == jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 2.0)
    with pytest.raises(ValueError, match="The statistics of the model itself were never estimated"):
        framework.package.freeze(network)


@every_network
@pytest.mark.parametrize("leaf, value", [("mean", np.nan), ("mean", -np.inf), ("var", np.nan), ("var", np.inf)])
def test_statistics_that_are_not_finite_are_refused(framework, norm, leaf, value):
    network = framework.changed(trained(framework, norm), f"second/{leaf}", lambda a: a.at[1].set(value))
    with pytest.raises(ValueError, match="The statistics of 'second' are not finite, or a variance is negative"):
        framework.package.freeze(network)


@every_network
def test_a_negative_variance_is_rejected_and_zero_is_not(framework, norm):
    network = trained(framework, norm)
    with pytest.raises(ValueError, match="'first' are not finite, or a variance is negative"):
        framework.package.freeze(framework.changed(network, "first/var", lambda a: a.at[0].set(-1e-30)))
    framework.package.freeze(framework.changed(network, "first/var", lambda a: a.at[0].set(0)))


@every_network
def test_a_report_about_other_statistics_is_rejected(framework, norm):
    old = trained(framework, norm)
    new, report = estimated(framework, norm, begin=trained)
    _, other = estimated(framework, norm, begin=trained, count=1)
    one_bit = framework.changed(new, "second/mean", lambda a: a.at[2].set(jnp.nextafter(a[2], 99)))
    for network, given, layer in ((old, report, "first"), (new, other, "first"), (one_bit, report, "second")):
        with pytest.raises(ValueError, match=f"statistics of '{layer}' are not those that the report is about"):
            framework.package.freeze(network, given)
    one_layer = jaxbn.Report("pooled", 3, {"first": report.layers["first"]})
    with pytest.raises(ValueError, match=r"about the layers \['first'\], but the variables hold \['first', 'second'\]"):
        framework.package.freeze(new, one_layer)


# --- The table --------------------------------------------------------------------------------------------------------

COLUMNS = ["layer", "channels", "learns", "method", "epsilon", "statistics", "rows"]


def table(text):
    """Returns the title and the cells of the rows, after a check of their alignment."""
    title, head, *rows = text.splitlines()
    starts = [head.index(name) for name in COLUMNS]
    ends = [start + len(name) for start, name in zip(starts, COLUMNS, strict=True)]
    assert head.split() == COLUMNS
    found = []
    for row in rows:
        row = row.ljust(len(head))
        cells = [row[: ends[1]].rsplit(maxsplit=1)[0].rstrip(), row[: ends[1]].split()[-1]]  # the second, to the right
        cells += [row[start:end].rstrip() for start, end in zip(starts[2:6], [*starts[3:6], ends[5]], strict=True)]
        cells[-1] = row[starts[5] :].rsplit(maxsplit=1)[0].rstrip()
        cells.append(row[starts[5] :].split()[-1])
        assert row[ends[1] - 1] != " " and row[ends[6] - 1] != " " and len(row) == len(head)
        assert all(row[start - 2 : start] == "  " and row[start] != " " for start in starts[2:6])
        found.append(cells)
    assert all(line == line.rstrip() and len(line) <= 120 for line in text.splitlines())
    return title, found


@every_network
def test_table_of_a_network(framework, norm):
    kinds = [["-", "-"]] * 2 if framework is Linen else [["batch_norm", "0.001"], ["batch_norm", "1e-05"]]
    learns = [["first", "4", "scale, bias"], ["second", "3", "scale"]]
    initial, after = started(framework, norm), trained(framework, norm)
    for network, statistics in (
        (initial, "initial values"),
        (after, "as given"),
        (framework.package.freeze(after), None),
    ):
        title, rows = table(framework.package.summary(network))
        assert title == "2 normalization layers, 7 channels"
        assert rows == [[*learns[i], *kinds[i], statistics or "as given", "-"] for i in range(2)]


@every_estimator
def test_table_of_a_frozen_network(framework, norm, estimator):
    network, report = estimated(framework, norm, estimator=estimator)
    title, rows = table(framework.package.summary(framework.package.freeze(network, report)))
    assert title == "2 normalization layers, 7 channels"
    assert rows == [
        ["first", "4", "scale, bias", "batch_norm", "0.001", estimator.name, "20"],
        ["second", "3", "scale", "batch_norm", "1e-05", estimator.name, "20"],
    ]


def test_table_of_one_layer_that_is_the_model_itself():
    net = jaxbn.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    title, rows = table(jaxbn.linen.summary(net.init(jax.random.key(0), STANDARD[:, :1])))
    assert title == "1 normalization layer, 1 channel"
    assert rows == [["(the model)", "1", "-", "-", "-", "initial values", "-"]]


def test_table_of_the_longest_entries_is_wider_than_80_rather_than_cut():
    path = "/".join(f"Stage_{i}" for i in range(9))
    states = {p: jaxbn.BatchNormState(np.zeros((12, 4096)), np.ones((12, 4096))) for p in (path, "x")}
    layers = tuple((p, jaxbn.LayerInfo("batch_renorm", 1.5e-05, "running averages", 1.28e9)) for p in states)
    text = tabulate(states, [f"{path}/scale", f"{path}/bias"], info=jaxbn.Info(layers, ()))
    title, rows = table(text)
    assert title == "2 normalization layers, 98304 channels"
    rest = ["batch_renorm", "1.5e-05", "running averages", "1280000000"]
    assert rows == [["..." + path[-13:], "49152", "scale, bias", *rest], ["x", "49152", "-", *rest]]
    assert max(map(len, text.splitlines())) == 92


def test_layers_are_listed_by_number_and_boxes_are_unboxed():
    """Boxes as made by nn.with_partitioning."""
    stats = {f"BatchNorm_{i}": {"mean": jnp.zeros(2), "var": jnp.ones(2)} for i in (10, 2, 0)}
    params = {f"BatchNorm_{i}": {"bias": jnp.zeros(2)} for i in (10, 2)}
    variables = {"params": params, "batch_stats": stats}
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=("model",)), variables)
    text = jaxbn.linen.summary(variables)
    assert [row[0] for row in table(text)[1]] == ["BatchNorm_0", "BatchNorm_2", "BatchNorm_10"]
    assert [row[2] for row in table(text)[1]] == ["-", "bias", "bias"]
    assert text == jaxbn.linen.summary(boxed) == jaxbn.linen.summary(flax.core.freeze(variables))


def test_a_model_without_normalization_is_an_error():
    with pytest.raises(ValueError, match="no statistics of a normalization layer"):
        jaxbn.linen.summary({"params": {}})
    with pytest.raises(ValueError, match="no normalization layer"):
        jaxbn.nnx.summary(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_a_frozen_network_shows_itself_in_a_few_lines():
    layer = jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 20.0)
    layers = tuple((f"norm_{i}", layer._replace(rows=float(i))) for i in range(53))
    info = jaxbn.Info(
        (*layers, ("last", jaxbn.LayerInfo(None, None, "as given", None))), (("jaxbn", "0.1"), ("jax", "0.10"))
    )
    frozen = jaxbn.Frozen({"a": np.zeros((1000, 1000), np.float32), "b": [np.zeros(3, jnp.bfloat16), None]}, info)
    assert repr(frozen).splitlines() == [
        "<Frozen: 2 arrays, 1,000,003 values, 4,000,006 bytes",
        "  53 layers: batch_norm, epsilon 1e-05, statistics: pooled",
        "  1 layer: unknown method, epsilon unknown, statistics: as given",
        "  jaxbn 0.1, jax 0.10>",
    ]
    shapes = jax.eval_shape(lambda: frozen)
    assert repr(shapes) == repr(frozen) == repr(jax.tree.map(lambda leaf: leaf, frozen))
    assert "<Frozen: 0 arrays" in repr(jax.tree.map(lambda leaf: object(), frozen))
