"""A batch of the pass, compiled for 256 chips that need not be there: `pytest -m compiled`.

Parameters and statistics are sharded over all chips, as in FSDP. On a chip, the batch needs the memory of the forward
pass of training. Apart from collectives of the size of statistics, it has those of this forward pass, which gather the
kernels.
"""

import functools
import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import EXAMPLES

import jaxbn
import jaxbn.linen

pytestmark = [pytest.mark.compiled, pytest.mark.xdist_group("TPU")]

POD = {"platform": "tpu", "topology_name": "v5e:16x16"}
PER_CHIP, FEATURES, CHANNELS = 32768, 1024, 4096
LARGE = 2**20  # bytes: more than all statistics together, less than a kernel


class Net(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(CHANNELS, use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.relu(self.norm(use_running_average=not train, dtype=jnp.bfloat16)(x))
        return x.mean(1)


@pytest.fixture(scope="module")
def measured():
    """The memory on a chip, in bytes, and the bytes that each large collective of a program carries."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        chips, hlo_cost = map(importlib.import_module, ("chips", "hlo_cost"))
        if not chips.is_installed("v5e"):
            pytest.skip("libtpu is not installed")

        def measured(program, *arguments, **options):
            with chips.quiet(), chips.uncached():
                compiled = jax.jit(program, **options).lower(*arguments).compile()
            computations = hlo_cost.parse(compiled.as_text()).computations.values()
            carried = [
                hlo_cost.size(re.sub(r"S\(\d\)", "", instruction.type))  # in on-chip memory too
                for computation in computations
                for instruction in computation.values()
                if instruction.op.removesuffix("-done") in hlo_cost.COLLECTIVES
            ]
            large = sorted(size for size in carried if size > LARGE)
            return compiled.memory_analysis().peak_memory_in_bytes, large

        with chips.quiet():
            measured.mesh = Mesh(chips.chips_of(POD), ("data",))
        yield measured
    jax.config.update("jax_disable_most_optimizations", before)


def placed(mesh, tree):
    """Shapes whose largest axis that divides by the chips is sharded over them."""

    def place(leaf):
        axes = sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis])
        divided = next((axis for axis in axes if leaf.shape[axis] % mesh.size == 0), None)
        spec = P() if divided is None else P(*[None] * divided, "data")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm])
def test_a_batch_of_the_pass_costs_a_chip_what_the_forward_pass_costs(measured, norm):
    mesh, net = measured.mesh, Net(norm)
    every_chip, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    batch = jax.ShapeDtypeStruct((PER_CHIP * mesh.size, FEATURES), jnp.bfloat16, sharding=rows)
    steps = jaxbn.linen.make_steps(net, lambda y, _: (y.mean(), {}), optax.sgd(0.1), inputs=lambda x: x)
    state = placed(mesh, jax.eval_shape(steps.init, jax.random.key(0), batch))
    acc = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=every_chip),
        jax.eval_shape(steps.start, state, batch),
    )

    forward = functools.partial(net.apply, train=True, mutable=["batch_stats"])
    memory, collectives = measured(lambda state, x: forward(state.variables, x), state, batch)
    of_pass, its_collectives = measured(steps.postproc_step, state, acc, batch, out_shardings=every_chip)
    assert of_pass <= 1.05 * memory
    assert its_collectives == collectives != []
