"""What the layers cost once they are compiled, for devices that need not be there: `pytest -m compiled`.

The bounds are those of JAX 0.10.2 and are to be met by what comes after it. The cost of Flax's layers and of no norm is
pinned too: where another version of JAX moves them, the bounds that are in bytes have to be looked at again.
"""

import contextlib
import functools

import jax
import pytest
from programs import EXAMPLES, load_program

pytestmark = pytest.mark.compiled

# `pytest -n 2 --dist loadgroup` compiles for both at the same time, and each program once.
on_gpu, on_tpu = pytest.mark.xdist_group("GPU"), pytest.mark.xdist_group("TPU")

GB = 1e9
H100_NORMS = ["jaxbn", "jaxbn-nnx", "fused", "fused-nnx"]


@pytest.fixture(scope="module")
def cost():
    """The cost of a program, compiled as for users; each program compiles once."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        benchmark = load_program("benchmarks/compiled_cost.py")
        yield functools.cache(functools.partial(compile_once, benchmark))
    jax.config.update("jax_disable_most_optimizations", before)


def compile_once(benchmark, device, what, norm, dtype="bfloat16", batch=None):
    if not benchmark.chips.is_installed(device):
        pytest.skip(f"{benchmark.DEVICES[device].package} is not installed")
    batch = batch or benchmark.WHAT[what].batch or benchmark.DEVICES[device].batch
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # which Flax's layers need, as the next
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if device != "h100":  # where all of ResNet-50 takes minutes
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(benchmark, "STAGES", (2, 1, 1, 1))
        return benchmark.cost_of(benchmark.Group(device, what, dtype, batch), norm)


@pytest.fixture
def h100(cost):
    return functools.partial(cost, "h100")


@pytest.fixture
def step(h100):
    """The cost of a ResNet-50 training step on an H100, by default with 256 bfloat16 images."""
    return functools.partial(h100, "train")


N = 256 * 28 * 28 * 128 * 2  # bytes of the input of the layer
CHANNELS = 0.05 * N  # room for all that is of the size of a channel, or of an example


@pytest.mark.parametrize(("what", "flax", "most"), [("layer", 9, 8), ("layer-relu", 10, 8), ("layer-residual", 12, 11)])
@on_gpu
def test_a_layer_on_a_gpu(h100, what, flax, most):
    ours = h100(what, "jaxbn" if what == "layer" else "fused")

    assert h100(what, "flax").moved == pytest.approx(flax * N, abs=CHANNELS)
    assert ours.moved <= most * N + CHANNELS
    assert ours.temporary <= CHANNELS


@pytest.mark.parametrize("what", ["layer", "layer-relu", "layer-residual"])
@on_gpu
def test_both_frameworks_cost_the_same(h100, what):
    for form in ["jaxbn"] if what == "layer" else ["jaxbn", "fused"]:
        assert h100(what, form) == h100(what, f"{form}-nnx")


@on_gpu
def test_what_is_compared_with(step):
    pinned = {"none": (69.43, 10.41, 444), "flax": (101.58, 11.24, 1015), "flax-safe": (112.99, 11.24, 1275)}

    for norm, (moved, temporary, kernels) in pinned.items():
        cost = step(norm)
        assert cost.moved == pytest.approx(moved * GB, rel=1e-3)
        assert cost.temporary == pytest.approx(temporary * GB, rel=1e-3)
        assert cost.kernels == kernels


@on_gpu
def test_the_drop_in_layer_costs_no_more_than_flax_in_a_training_step(step):
    ours, flax = step("jaxbn"), step("flax")

    assert ours.moved <= flax.moved
    assert ours.temporary <= flax.temporary + 1e5  # arrays of the size of a channel, 16 kB of 11 GB
    assert ours.kernels <= 1.1 * flax.kernels


# At most so many GB due to the norm, where Flax's layer has 32.15, 8.73 and 60.3.
@pytest.mark.parametrize(
    ("dtype", "batch", "most"), [("bfloat16", 256, 23.0), ("bfloat16", 64, 6.7), ("float32", 256, 47.0)]
)
@on_gpu
def test_the_fused_layer_in_a_training_step(step, dtype, batch, most):
    assert step("fused", dtype, batch).moved - step("none", dtype, batch).moved <= most * GB


@on_gpu
def test_the_fused_layer_needs_no_memory_of_its_own(step):
    assert step("fused").temporary <= 10.5 * GB


# Recomputation costs memory traffic, but with these policies less than Flax's layer without recomputation.
@pytest.mark.parametrize(
    ("norm", "moved", "temporary"),
    [("fused-outputs", 94.5, 8.8), ("fused-inputs", 101.58, 7.2), ("fused-inner", 101.58, 5.3)],
)
@on_gpu
def test_what_is_not_kept_for_the_backward_pass(step, norm, moved, temporary):
    assert step(norm).temporary <= temporary * GB
    assert step(norm).moved <= moved * GB


@on_gpu
def test_evaluation_costs_no_more_than_with_flax(h100):
    flax = h100("eval", "flax")

    assert flax.moved == pytest.approx(6.08 * GB, rel=2e-3)
    assert h100("eval", "fused").moved <= flax.moved


@pytest.mark.parametrize("norm", ["flax-fold", "fused-fold"])
@on_gpu
def test_a_folded_network_costs_what_one_without_norms_costs(h100, norm):
    flax, bare, folded = h100("eval", "flax"), h100("eval", "none"), h100("eval", norm)

    assert folded.moved <= 0.67 * flax.moved
    assert folded.moved <= 1.005 * bare.moved


LAYERS = ["layer", "layer-relu", "layer-residual"]


def forms(what):
    return ["jaxbn", "jaxbn-nnx"] if what == "layer" else H100_NORMS


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize("device", ["v5e", "v5e-2x4"])
@on_tpu
def test_a_layer_on_a_tpu_moves_no_more_than_flax(cost, device, what):
    for form in forms(what):
        assert cost(device, what, form).moved <= cost(device, what, "flax").moved + CHANNELS, form


# On a TPU the sums of Flax's fast variance are added to the convolution that makes x, and so are our exact sums.
@pytest.mark.parametrize("norm", ["jaxbn", "fused"])
@on_tpu
def test_a_training_step_on_a_tpu_costs_less_than_with_another_safe_variance(cost, norm):
    ours, fast, safe = (cost("v5e", "train", name) for name in (norm, "flax", "flax-safe"))

    assert ours.accessed < safe.accessed
    assert ours.accessed <= 1.02 * fast.accessed
    # The exact sums of each image are merged after the convolution, so arrays of their size are alive: 0.03 % more.
    assert ours.temporary <= fast.temporary + 2**20


@pytest.mark.parametrize("what", LAYERS)
@on_tpu
def test_a_layer_on_several_chips_communicates_once_forward_and_once_backward(cost, what):
    for form in forms(what):
        assert sum(cost("v5e-2x4", what, form).collectives.values()) == 2, form
    assert sum(cost("v5e-2x4", what, "none").collectives.values()) == 0
    assert sum(cost("v5e-2x4", what, "flax").collectives.values()) == 2
    assert sum(cost("v5e-2x4", what, "flax-safe").collectives.values()) > 2
