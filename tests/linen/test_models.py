"""Models that know nothing of jaxbn, against a float64 recomputation of what each of their layers was given."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen


class Bottleneck(nn.Module):
    """As ResNets of Flax's examples are written: the layers come in from outside, as partials."""

    filters: int
    conv: nn.Module
    norm: nn.Module
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(2 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(self.conv(2 * self.filters, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(conv(4, (3, 3))(x))), (2, 2), (2, 2))
        for i in range(2):
            x = Bottleneck(4 * 2**i, conv=conv, norm=norm, strides=1 + i)(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Siamese(nn.Module):
    """One encoder sees both inputs, and is defined in setup."""

    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.tanh])

    def __call__(self, x, train=False):
        return jnp.abs(self.encoder(x) - self.encoder(2 * x + 1)).sum(-1)


class Sequences(nn.Module):
    """Tokens of unequal lengths; the mask comes from the model."""

    @nn.compact
    def __call__(self, x, train=False):
        mask = jnp.arange(x.shape[1])[None, :, None] < (2 + jnp.arange(x.shape[0]) % 5)[:, None, None]
        for _ in range(2):
            x = nn.Conv(4, (3,), padding="CAUSAL")(x) * mask.astype(x.dtype)
            x = nn.BatchNorm(use_running_average=not train)(x, mask=mask)
        return x.sum((1, 2))


class Transposed(nn.Module):
    """Its parameters are mapped on their way in."""

    @nn.compact
    def __call__(self, x, train=False):
        def double(variables):
            return jax.tree.map(lambda leaf: 2 * leaf, variables)

        dense = nn.map_variables(
            nn.Dense, "params", double, lambda v: jax.tree.map(lambda leaf: leaf / 2, v), init=True
        )
        x = dense(4)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


MODELS = {"resnet": (ResNet, (6, 8, 8, 3)), "siamese": (Siamese, (9, 3)), "masked": (Sequences, (7, 6, 3))}
MODELS |= {"map_variables": (Transposed, (9, 3))}


def inputs_in_float64(net, variables, x):
    """{layer: [(its input, its mask) of each call]} of the model in float64, by each batch's own statistics."""
    found = {}

    def intercept(next_call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return next_call(*args, **kwargs)
        z, mask = np.asarray(args[0]), kwargs.get("mask")
        weights = np.ones(z.shape) if mask is None else np.broadcast_to(mask, z.shape)
        found.setdefault("/".join(layer.path), []).append(
            (z.reshape(-1, z.shape[-1]), weights.reshape(-1, z.shape[-1]))
        )
        mean, var = moments([found["/".join(layer.path)][-1]])
        params = layer.variables["params"]
        return (z - mean) / np.sqrt(var + layer.epsilon) * np.asarray(params["scale"]) + np.asarray(params["bias"])

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        with nn.intercept_methods(intercept):
            net.apply(wide, jnp.asarray(x, jnp.float64))
    return found


def moments(calls):
    """Mean and variance of the values of all calls together."""
    z, weights = (np.concatenate(part) for part in zip(*calls, strict=True))
    mean = (z * weights).sum(0) / weights.sum(0)
    return mean, (weights * (z - mean) ** 2).sum(0) / weights.sum(0)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet" else name for name in MODELS]
)
def test_statistics_of_models_not_written_for_jaxbn(name, rng):
    cls, shape = MODELS[name]
    net, batches = cls(), [(1 + 2 * rng.standard_normal(shape)).astype(np.float32) for _ in range(2)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = net.init(jax.random.key(0), batches[0])
        new, report = jaxbn.linen.postproc(net.apply, variables, batches)
    by_batch = [inputs_in_float64(net, variables, batch) for batch in batches]
    statistics = flax.traverse_util.flatten_dict(new["batch_stats"], sep="/")
    assert set(report.layers) == set(by_batch[0]) and not report.not_reached
    for path in report.layers:
        mean, var = moments([call for found in by_batch for call in found[path]])
        np.testing.assert_allclose(statistics[f"{path}/mean"], mean, atol=1e-5 * np.sqrt(var).max(), rtol=1e-5)
        np.testing.assert_allclose(statistics[f"{path}/var"], var, rtol=2e-5)


class Critic(nn.Module):
    """As in CrossQ: an observation and an action, two outputs."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(5)(x)))), None


class ResidualBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))), None


def part(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.mark.slow
def test_critics_of_an_ensemble_keep_their_axis(rng):
    ensemble = nn.vmap(
        Critic, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    )()
    batches = [(1 + 2 * rng.standard_normal((8, 3))).astype(np.float32) for _ in range(2)]
    variables = ensemble.init(jax.random.key(0), batches[0])
    new, report = jaxbn.linen.postproc(ensemble.apply, variables, batches)
    assert {change.count for change in report.layers.values()} == {16.0}
    for critic in range(3):
        by_batch = [inputs_in_float64(Critic(), part(variables, critic), batch) for batch in batches]
        for path in report.layers:
            mean, var = moments([call for found in by_batch for call in found[path]])
            found = part(new["batch_stats"], critic)[path]
            np.testing.assert_allclose(found["mean"], mean, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found["var"], var, rtol=2e-5)


def test_a_scanned_and_rematerialised_stack(rng):
    stack = nn.scan(
        nn.remat(ResidualBlock), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )()
    x = (1 + 2 * rng.standard_normal((16, 3))).astype(np.float32)
    variables = stack.init(jax.random.key(0), x, None)
    new, _ = jaxbn.linen.postproc(lambda v, x: stack.apply(v, x, None)[0], variables, [x])
    z = np.float64(x)
    for block in range(3):
        params = jax.tree.map(np.float64, part(variables["params"], block))
        y = z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        found = part(new["batch_stats"], block)["BatchNorm_0"]
        np.testing.assert_allclose(found["mean"], y.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["var"], y.var(0), rtol=2e-5)
        z = z + np.maximum((y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5), 0)
