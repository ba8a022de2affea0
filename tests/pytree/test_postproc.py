"""The pass, the diagnosis and freezing of models of plain functions: beyond the contract of the frameworks."""

import dataclasses
import gc
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.serving

CHANNELS, DEPTH = 3, 3
bn = jaxbn.batch_norm()


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "affine", "norm", "activation"], meta_fields=["name"])
@dataclasses.dataclass
class Block:
    """As in Equinox, a function may be a leaf of the tree."""

    kernel: jax.Array
    affine: jaxbn.NormParams
    norm: jaxbn.BatchNormState
    activation: Any
    name: str

    def __call__(self, x):
        return self.activation(bn.eval(self.affine, self.norm, x @ self.kernel))


def started():
    kernels = np.random.default_rng(1).normal(0, 1, (DEPTH, CHANNELS, CHANNELS)).astype(np.float32)
    return {"blocks": [Block(jnp.asarray(kernel), *bn.init(CHANNELS), jnp.tanh, "block") for kernel in kernels]}


def run(model, x):
    for block in model["blocks"]:
        x = block(x)
    return x


def batches():
    x = np.random.default_rng(0).normal(0.3, 1, (40, CHANNELS)).astype(np.float32)
    return [x[:16], x[16:32], x[32:]]


def served(model, x):
    """The statistics of each layer if all rows are one batch, in float64."""
    found, x = [], np.float64(x)
    for block in model["blocks"]:
        h = x @ np.float64(block.kernel)
        found.append((h.mean(0), h.var(0)))
        x = np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5))
    return found


def test_consistent_statistics():
    """Those of the network on all rows as one batch; other leaves are the ones that were given."""
    model = started()
    new, report = jaxbn.postproc(run, model, batches(), consistent=True)
    assert list(report.layers) == [f"blocks/{i}/norm" for i in range(DEPTH)]
    for block, old, (mean, var) in zip(
        new["blocks"], model["blocks"], served(model, np.concatenate(batches())), strict=True
    ):
        np.testing.assert_allclose(block.norm.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(block.norm.var, var, rtol=1e-4)
        assert block.kernel is old.kernel and block.activation is jnp.tanh and old.norm.mean[0] == 0
    np.testing.assert_array_equal(jaxbn.install_moments(new, report.old)["blocks"][1].norm.mean, 0)


def test_spread_batches_and_weights():
    model, rows = started(), np.concatenate(batches())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = lambda x: jnp.arange(len(x)) < 32
    spread, _ = jaxbn.postproc(run, model, [rows], mesh=mesh, weights=weights)
    mean, var = served(model, rows[:32])[0]
    np.testing.assert_allclose(spread["blocks"][0].norm.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread["blocks"][0].norm.var, var, rtol=1e-4)


def test_programs_do_not_outlive_the_function():
    model = started()

    def passed():
        array = jnp.ones(())
        jaxbn.postproc(lambda model, x: run(model, x + array), model, batches())
        return weakref.ref(array)

    left = passed()
    gc.collect()
    assert left() is None


def test_files_and_programs(tmp_path):
    """A frozen tree is saved and exported; a call that trains is refused, also under jit."""
    params, state = bn.init(CHANNELS)
    call = jax.jit(lambda model, x: bn.eval(*model["norm"], x) @ model["kernel"])
    model = {"norm": (params, state), "kernel": jnp.eye(CHANNELS)}
    frozen = jaxbn.freeze(*jaxbn.postproc(call, model, batches()))
    jaxbn.serving.export(tmp_path / "program", call, frozen, batches()[0])
    program = jaxbn.serving.load_program(tmp_path / "program")
    x = batches()[1][:5]
    np.testing.assert_allclose(program(x), call(frozen.variables, x), rtol=1e-6)
    assert program.info.layers == frozen.info.layers
    training = jax.jit(lambda model, x: bn.train(*model["norm"], x)[0])
    with pytest.raises(ValueError, match="'norm/1' normalizes with the statistics of the batch, as in training"):
        jaxbn.serving.export(tmp_path / "program", training, frozen, x)
    with pytest.raises(ValueError, match="'norm/1' were never estimated"):
        jaxbn.serving.export(tmp_path / "program", call, model, x)
    jaxbn.serving.save(tmp_path / "network", frozen)
    loaded = jaxbn.serving.load(tmp_path / "network", like=model)
    np.testing.assert_array_equal(call(loaded.variables, x), call(frozen.variables, x))


def test_paths():
    """Names with slashes that are written alike are written in full; a state alone has the path ''."""
    state = bn.init(1)[1]
    call = lambda states, x: [bn.eval(bn.init(1)[0], state, x) for state in jax.tree.leaves(states, is_leaf=is_state)]
    is_state = lambda node: isinstance(node, jaxbn.BatchNormState)
    names = lambda tree: list(jaxbn.capture_moments(call)(tree, jnp.ones((4, 1)))[1])
    assert names({"a/b": state, "c": state}) == ["a/b", "c"]
    assert names({"a/b": state, "a": {"b": state}}) == ["['a']['b']", "['a/b']"]
    assert names(state) == [""]


def test_errors():
    state, x = bn.init(1)[1], np.ones((4, 1), np.float32)
    call = lambda state, x: bn.eval(bn.init(1)[0], state, x)
    with pytest.raises(ValueError, match="no state of a normalization method.*in this dict.*jaxbn.linen"):
        jaxbn.postproc(call, {"params": {"mean": 1}}, [x])
    with pytest.raises(TypeError, match="Got the function 'train' instead.*order of arguments is"):
        jaxbn.postproc(state, bn.train, [x])
    with pytest.raises(TypeError, match="Pass frozen.variables"):
        jaxbn.postproc(call, jaxbn.freeze(*jaxbn.postproc(call, state, [x, 2 * x])), [x])
    with pytest.raises(ValueError, match="No batch went through a normalization layer"):
        jaxbn.postproc(lambda state, x: x, state, [x])
    with pytest.raises(ValueError, match="never estimated"):
        jaxbn.freeze(state)
    with pytest.raises(ValueError, match="is not a normalization layer"):
        jaxbn.install_moments(state, {"norm": bn.measure(x)})
