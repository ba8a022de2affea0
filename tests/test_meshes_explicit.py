"""Every method, framework and entry point on meshes of two axes, against one device.

A mesh axis is Explicit (what `jax.make_mesh` gives by default: how an array is spread is part of its type) or Auto. The
rows lie along "rows". Behind a column-parallel layer the channels lie along "channels", and statistics that come from x
with them, while the variables of the normalization may lie otherwise; behind a row-parallel layer they are whole.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROWS, SPACE, FEATURES = 16, 2, 8
KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit rows": (AxisType.Explicit, AxisType.Auto),
    "explicit channels": (AxisType.Auto, AxisType.Explicit),
}
EXPLICIT = [kind for kind, axes in KINDS.items() if AxisType.Explicit in axes]
X = (3 + 2 * np.random.default_rng(0).standard_normal((3, ROWS, SPACE, FEATURES))).astype(np.float32)
MASK = np.random.default_rng(1).random((ROWS, SPACE, 1)) > 0.3
DOMAINS = np.arange(ROWS, dtype=np.int32) % 3
WHOLE, BY_CHANNEL, BY_ROW = P(), P("channels"), P("rows")
VARIABLES = [(WHOLE, WHOLE), (BY_CHANNEL, BY_CHANNEL), (BY_ROW, WHOLE), (WHOLE, BY_CHANNEL)]  # (params, statistics)

# One case of each method; for batch norm, those with different arithmetic.
METHODS = {case.factory.__name__: case for case in reversed(CASES)}
CHOSEN = {case.name for case in METHODS.values()} | {"batch_norm autodiff"}


CASE_OF = {case.name: case for case in CASES}


def slow_but(fast, values):
    """The values as parameters; all but those of `fast` are slow."""
    return [pytest.param(value, marks=[] if value in fast else pytest.mark.slow) for value in values]


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("rows", "channels"), axis_types=KINDS[kind])


def where_of(case):
    return {"domain": DOMAINS} if case is not None and case.factory is jaxbn.domain_batch_norm else {}


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=5e-5, atol=5e-5)


def assert_same_types(after, before):
    """Shape, dtype, and on Explicit meshes the sharding, as the carry of a scan needs them."""

    def type_of(leaf):
        sharding = jax.typeof(leaf).sharding
        return leaf.shape, leaf.dtype, sharding if AxisType.Explicit in sharding.mesh.axis_types else None

    assert jax.tree.map(type_of, after) == jax.tree.map(type_of, before)


# --- Plain functions -------------------------------------------------------------------------------------------------


def plain(case):
    """(a function that calls all plain functions of a method, its arguments on one device)."""
    transform, where = case.factory(**case.arguments), where_of(case)
    params, state = transform.init(FEATURES)
    state = state._replace(mean=state.mean + 0.5, var=state.var * 1.5)

    def everything(params, state, x, mask):
        def loss(params, x, mask):
            y, after = transform.train(params, state, x, mask=mask, **where)
            return (jnp.tanh(y) ** 2).sum(), (y, after)

        found = {}
        for name, weights in (("train", None), ("masked", mask)):
            grads, (y, after) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x, weights)
            if transform.backward is not None:
                after = transform.backward(params, after, grads[0])
            found[name] = grads, y, after
        after, _ = jax.lax.scan(lambda s, _: (transform.train(params, s, x, **where)[1], None), state, None, length=2)
        moments = transform.measure(x, mask=mask, **where)
        both = jaxbn.merge(moments, transform.measure(x, **where))
        found["loop"], found["moments"] = after, (moments, both)
        found["pass"] = installed = transform.postproc(state, both)
        found["eval"] = jax.value_and_grad(lambda x: transform.eval(params, installed, x, **where).sum())(x)
        found["mix"] = jaxbn.mix(state, moments, 0.3)
        if transform.update is not None:
            found["update"] = transform.update(state, moments, samples=jnp.float32(ROWS))
        return found

    return everything, (params, state, X[0], MASK)


def spread(tree, mesh, spec):
    """Arrays [..., C] with this spec for C; counters are whole."""

    def place(leaf):
        whole = [None] * (leaf.ndim - 1)
        return jax.device_put(leaf, NamedSharding(mesh, P(*whole, *spec) if leaf.ndim else P()))

    return jax.tree.map(place, tree)


LAYOUTS = [
    (of_x, of_variables)
    for of_x in (P("rows", None, "channels"), P(("rows", "channels")), P(None, None, "channels"))
    for of_variables in VARIABLES
]


def plain_on(mesh, arguments, of_x, of_variables):
    params, state, x, mask = arguments
    specs = of_x, P(*of_x[:1])
    there = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, mask), specs, strict=True))
    variables = (spread(tree, mesh, spec) for tree, spec in zip((params, state), of_variables, strict=True))
    return *variables, *there


def assert_types_of_plain(found, params, state, x, mask):
    for name in ("train", "masked"):
        gradients, _, after = found[name]
        assert_same_types((gradients, after), ((params, x), state))
    for name in {"loop", "pass", "update"} & found.keys():
        assert_same_types(found[name], state)


# Each case in the first layout, and those with different arithmetic in each layout on each mesh with an Explicit axis:
# a mesh without one leaves no trace in the types.
TRACED = dict.fromkeys(
    [(name, "explicit", LAYOUTS[0]) for name in CASE_OF]
    + [(name, kind, layout) for name in CASE_OF if name in CHOSEN for kind in EXPLICIT for layout in LAYOUTS]
    + [(name, "auto", LAYOUTS[0]) for name in CASE_OF if name in CHOSEN]
)


@pytest.mark.parametrize("traced", slow_but([(name, "explicit", LAYOUTS[0]) for name in CHOSEN], TRACED), ids=str)
def test_plain_functions_can_be_traced(traced):
    """An Explicit mesh raises its errors while tracing, so these tests do not compile."""
    name, kind, layout = traced
    everything, arguments = plain(CASE_OF[name])
    there = plain_on(mesh_of(kind), arguments, *layout)
    for context in contextlib.nullcontext(), jax.set_mesh(mesh_of(kind)):
        with context:
            jax.make_jaxpr(lambda *there: assert_types_of_plain(everything(*there), *there))(*there)


# Batch norm on Explicit meshes in each layout, each case in the first, and each method on the other meshes.
COMPUTED = dict.fromkeys(
    [("batch_norm", "explicit", layout) for layout in LAYOUTS]
    + [(name, "explicit", LAYOUTS[0]) for name in CASE_OF]
    + [(case.name, kind, LAYOUTS[0]) for case in METHODS.values() for kind in KINDS]
)


@pytest.mark.parametrize("computed", slow_but(list(COMPUTED)[:1], COMPUTED), ids=str)
def test_plain_functions(computed):
    name, kind, layout = computed
    everything, arguments = plain(CASE_OF[name])
    there = plain_on(mesh_of(kind), arguments, *layout)
    found = jax.jit(everything)(*there)
    assert_close(found, jax.jit(everything)(*arguments))
    assert_types_of_plain(found, *there)


@pytest.mark.slow
def test_variables_and_masks_that_are_on_no_mesh():
    """Constants of the program, as in a notebook; then everything is laid where x is."""
    everything, (params, state, x, mask) = plain(METHODS["ghost_batch_norm"])
    x_there = jax.device_put(x, NamedSharding(mesh_of("explicit"), P("rows", None, "channels")))
    expected = jax.jit(everything)(params, state, x, mask)
    assert_close(jax.jit(everything)(params, state, x_there, mask), expected)


@pytest.mark.parametrize("name", slow_but(["batch_norm"], ["batch_norm", "batch_renorm", "moving_average_batch_norm"]))
def test_shard_map_over_the_rows_alone(name):
    """The rows are a named axis, and the channels stay on their Explicit axis."""
    case, mesh = CASE_OF[name], mesh_of("explicit")
    params, state = case.transform().init(FEATURES)

    def step(transform, params, state, x):
        def loss(params, x):
            y, after = transform.train(params, state, x)
            return (jnp.tanh(y) ** 2).sum(), after

        (of_params, of_x), after = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return (of_params, after), of_x

    mapped = jax.shard_map(
        functools.partial(step, case.transform(axis_name="rows")),
        mesh=mesh, in_specs=(P(), P(), P("rows")), out_specs=(P(), P("rows")), axis_names={"rows"},
    )  # fmt: skip
    x = jax.device_put(X[0], NamedSharding(mesh, P("rows", None, "channels")))
    with jax.set_mesh(mesh):
        found = jax.jit(mapped)(*spread((params, state), mesh, WHOLE), x)
    assert_close(found, jax.jit(functools.partial(step, case.transform()))(params, state, X[0]))


# --- Frameworks ------------------------------------------------------------------------------------------------------


def row_parallel(x, kernel):
    """The product of x and kernel, added up over the devices that hold the channels of x."""
    on = jax.typeof(x).sharding
    explicit = AxisType.Explicit in on.mesh.axis_types
    out = NamedSharding(on.mesh, P(on.spec[0], None, None)) if explicit else None
    return jax.lax.dot_general(x, kernel, (((2,), (0,)), ((), ())), out_sharding=out)


def layer_of(name, framework, stock):
    """The class and the fields of the layers of a case; stock ones for None."""
    return (stock, {}) if name is None else (getattr(CASE_OF[name], framework), CASE_OF[name].arguments)


class LinenNet(nn.Module):
    name_of_case: str | None

    @nn.compact
    def __call__(self, x, train):
        layer, fields = layer_of(self.name_of_case, "linen", nn.BatchNorm)
        where = where_of(CASE_OF.get(self.name_of_case))
        x = nn.Dense(FEATURES, name="by_column")(x)
        x = jnp.tanh(layer(use_running_average=not train, **fields, name="norm_0")(x, **where))
        x = row_parallel(x, self.param("by_row", nn.initializers.normal(), (FEATURES, FEATURES)))
        x = layer(use_running_average=not train, **fields, name="norm_1")(x, **where)
        return nn.Dense(3, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, name):
        rngs = nnx.Rngs(0)
        layer, fields = layer_of(name, "nnx", nnx.BatchNorm)
        self.name_of_case = name
        self.by_column = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.by_row = nnx.Param(jax.random.normal(jax.random.key(1), (FEATURES, FEATURES)) / 10)
        self.norm_0, self.norm_1 = (layer(FEATURES, **fields, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(FEATURES, 3, rngs=rngs)

    def __call__(self, x):
        where = where_of(CASE_OF.get(self.name_of_case))
        x = jnp.tanh(self.norm_0(self.by_column(x), **where))
        return self.head(self.norm_1(row_parallel(x, self.by_row[...]), **where))


class Linen:
    """A linen network; its entry points take (variables, x)."""

    package = jaxbn.linen

    def __init__(self, name):
        self.net = LinenNet(name)
        self.variables = self.net.init(jax.random.key(0), X[0], True)
        self.call = lambda variables, x: self.net.apply(variables, x, False)

    def train(self, variables, x):
        outputs, updates = self.net.apply(variables, x, True, mutable=["batch_stats"])
        return outputs, {**variables, **updates}

    def of_model(self, function):
        """A function of what the functions of the package take, as one of the variables."""
        return function

    def capture(self, **options):
        return self.package.capture_moments(self.call, **options)

    def adapt(self, **options):
        return self.package.adapt(self.call, **options)

    def freeze_first(self, variables, x):
        return self.package.freeze_layers(lambda variables, x: self.train(variables, x)[0], "norm_0")(variables, x)

    def postproc(self, variables, batches, **options):
        return self.package.postproc(self.call, variables, batches, **options)

    def diagnose(self, variables, batches):
        return self.package.diagnose(self.call, variables, batches)

    def folded(self, variables, x):
        call, folded, _ = self.package.fold(self.call, variables, x)
        return jax.jit(call)(folded, x)


class NNX:
    """An NNX network; its variables are those of the model."""

    package = jaxbn.nnx

    def __init__(self, name):
        self.graph, self.variables = nnx.split(NNXNet(name))

    def model(self, variables):
        return nnx.merge(self.graph, variables, copy=True)

    def call(self, variables, x):
        model = self.model(variables)
        model.eval()
        return model(x)

    def train(self, variables, x):
        model = self.model(variables)
        model.train()
        return model(x), nnx.state(model)

    def of_model(self, function):
        def of_variables(variables, *arguments):
            result = function(self.model(variables), *arguments)
            return nnx.state(result) if isinstance(result, nnx.Module) else result

        return of_variables

    def capture(self, **options):
        return self.of_model(self.package.capture_moments(**options))

    def adapt(self, **options):
        return self.of_model(self.package.adapt(**options))

    def freeze_first(self, variables, x):
        return self.package.freeze_layers(self.model(variables), "norm_0")(x)

    def postproc(self, variables, batches, **options):
        model, report = self.package.postproc(self.model(variables), batches, **options)
        return nnx.state(model), report

    def diagnose(self, variables, batches):
        return self.package.diagnose(self.model(variables), batches)

    def folded(self, variables, x):
        model = self.model(variables)
        model.eval()
        folded, _ = self.package.fold(model, x)
        return nnx.jit(lambda model, x: model(x))(folded, x)


def name_of(path):
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def placed(variables, mesh, of_variables):
    """A kernel by columns, one by rows; the variables of the first normalization as it is said, all else whole."""
    specs = {"by_column/kernel": P(None, "channels"), "by_column/bias": P("channels"), "by_row": P("channels", None)}

    def place(path, leaf):
        name = name_of(path)
        spec = next((spec for key, spec in specs.items() if key in name), P())
        if "norm_0" in name and leaf.ndim:
            spec = P(*[None] * (leaf.ndim - 1), *of_variables[not {"scale", "bias"} & set(name.split("/"))])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, variables)


def everything_of(framework, samples):
    """All that a model can be put through inside one jit."""

    def with_gradient(function):
        def of(variables, x):
            outputs, back = jax.vjp(lambda x: function(variables, x), x)
            return outputs, back(jax.tree.map(jnp.ones_like, outputs))

        return of

    def train(variables, x):
        def loss(variables, x):
            outputs, after = framework.train(variables, x)
            return (outputs**3).sum(), (outputs, after)

        return jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(variables, x)

    def everything(variables, x):
        found = {"train": train(variables, x)}
        functions = {
            "eval": framework.call,
            "freeze": framework.freeze_first,
            "adapt": framework.adapt(prior_count=10),
            "adapt each": framework.adapt(example_weight=0.3),
            **{mode: framework.capture(mode=mode) for mode in ("batch", "eval", "as_called")},
            "weights": framework.capture(weights=lambda x: jnp.arange(ROWS) / ROWS),
        }
        found |= {name: with_gradient(function)(variables, x) for name, function in functions.items()}
        moments = framework.capture()(variables, x)[1]
        found["install"] = framework.of_model(framework.package.install_moments)(variables, moments)
        move = framework.package.move_averages
        found["move"] = framework.of_model(lambda model: move(model, moments, samples=samples))(variables)
        return found

    return everything


every_framework = pytest.mark.parametrize("framework", [Linen, NNX], ids=["linen", "nnx"])


def framework_on(framework, kind, of_variables):
    mesh = mesh_of(kind)
    return placed(framework.variables, mesh, of_variables), jax.device_put(X[0], NamedSharding(mesh, P("rows")))


def assert_types_of_framework(found, name, variables):
    after = [found["install"]]
    if name is not None:  # a stock layer leaves its averages where the batch had them
        after += [found["train"][1][1], found["move"]]
    assert_same_types(after, [variables] * len(after))


NAMES = [None, *(case.name for case in METHODS.values())]
# On the mesh of two Explicit axes the variables lie in each way, on the others in one.
PLACES = [("explicit", place) for place in VARIABLES] + [(kind, VARIABLES[0]) for kind in KINDS if kind != "explicit"]


@every_framework
@pytest.mark.parametrize("name", slow_but(["batch_norm"], NAMES))
@pytest.mark.parametrize("kind_and_place", slow_but(PLACES[:1], PLACES), ids=str)
def test_frameworks_can_be_traced(framework, name, kind_and_place):
    kind, of_variables = kind_and_place
    if name is None and of_variables[0] == BY_ROW:  # Flax's own layer does not take a scale that lies along the rows
        of_variables = VARIABLES[0]
    framework = framework(name)
    everything = everything_of(framework, ROWS)
    there = framework_on(framework, kind, of_variables)
    jax.make_jaxpr(lambda v, x: assert_types_of_framework(everything(v, x), name, v))(*there)


@pytest.mark.slow
@every_framework
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "of_variables"), [("explicit", VARIABLES[0]), ("explicit rows", VARIABLES[2])], ids=str
)
def test_frameworks(framework, name, kind, of_variables):
    if name is None:
        of_variables = VARIABLES[0]
    framework = framework(name)
    everything = jax.jit(everything_of(framework, ROWS))
    there = framework_on(framework, kind, of_variables)
    found = everything(*there)
    assert_close(found, everything(framework.variables, X[0]))
    assert_types_of_framework(found, name, there[0])


@every_framework
@pytest.mark.parametrize("consistent", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, "explicit"),
        *(pytest.param(name, "explicit", marks=pytest.mark.slow) for name in NAMES[1:]),
        *(pytest.param(None, kind, marks=pytest.mark.slow) for kind in KINDS if kind != "explicit"),
    ],
)
def test_statistics_pass(framework, name, kind, consistent):
    """Of all batches, and what comes after it: freezing, folding, and the diagnosis before it."""
    framework = framework(name)
    variables, _ = framework_on(framework, kind, VARIABLES[0])
    batches = [jax.device_put(x, NamedSharding(mesh_of(kind), P("rows"))) for x in X]
    found, report = framework.postproc(variables, batches, consistent=consistent)
    expected, _ = framework.postproc(framework.variables, X, consistent=consistent)
    assert_close(found, expected)
    assert_same_types(found, variables)
    assert list(report.layers) == ["norm_0", "norm_1"]
    if name != "domain_batch_norm":  # no layer accepts its statistics
        folded = framework.folded(found, batches[0])
        assert_close(folded, framework.folded(expected, X[0]))
    assert_close(framework.call(found, batches[0]), framework.call(expected, X[0]))
    findings = [framework.diagnose(*given).findings for given in ((variables, batches), (framework.variables, X))]
    assert [finding.name for finding in findings[0]] == [finding.name for finding in findings[1]]
