"""Tests of examples/serve.py, which folds, exports and serves, on a network with random numbers."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from programs import EXAMPLES, load_program

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serve():
    """The example as a module; it imports another example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield load_program("serve.py")


def network(serve, api):
    """A network as digits.py saves it, with random numbers."""
    rng, image = np.random.default_rng(0), np.ones((1, 8, 8, 1), np.float32)
    numbers = lambda leaf: rng.uniform(0.1, 0.2, leaf.shape).astype(np.float32)
    if api == "linen":
        shapes = jax.eval_shape(lambda: serve.DigitNet().init(jax.random.key(0), image, train=False))
        return jaxbn.linen.freeze(jax.tree.map(numbers, shapes))
    model = nnx.eval_shape(lambda: serve.NNXDigitNet(nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(numbers, nnx.state(model)))
    return jaxbn.nnx.freeze(model)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_it_folds_exports_and_compares(api, serve, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    jaxbn.serving.save("digits.jaxbn", network(serve, api))
    costs = serve.main(["--api", api, "--rounds", "10", "--no-progress"])
    out, err = capsys.readouterr()
    assert not err.strip()
    lines = out.splitlines()
    assert lines[0].startswith("10 of 10 normalization layers folded; outputs on the example differ by ")
    assert max(map(len, lines)) <= 100
    for size in serve.SIZES:
        before, after = costs[size]
        assert len(before.seconds) == len(after.seconds) == 10 and after.bytes < before.bytes
        assert re.search(rf"│ Bytes, {size} images? +│ +[\d,]+ │ +[\d,]+ │ +0\.\d{{3}} │", out)
        assert re.search(rf"│ µs, {size} images? +│ +\d+ \[\d+, \d+\] │ +\d+ \[\d+, \d+\] │ +\d\.\d\d \[", out)
    # 10 layers have mean, variance, scale and bias of their channels, and the folded ones a bias.
    channels = 5 * 16 + 5 * 32
    found = re.search(r"│ Variables +│ +([\d,]+) │ +([\d,]+) │", out)
    trained, folded = (int(number.replace(",", "")) for number in found.groups())
    assert trained - folded == 3 * channels
    assert "448 of 448 predictions equal those of the trained network" in lines[-2]
    reach, off = re.fullmatch(r"Outputs are up to ([\d.]+) and differ by at most (\S+)\.", lines[-1]).groups()
    assert float(off) <= 1e-5 * float(reach)
    assert jaxbn.serving.load_program("digits.program").inputs.shape[1:] == (8, 8, 1)


def test_medians_come_with_their_interval(serve):
    """For 100 values the interval ends at the 41st and the 61st: ranks 0.98 sqrt(n) from the middle."""
    assert serve.median(np.random.default_rng(0).permutation(100.0 + np.arange(100)), 1) == "149.5 [140.0, 160.0]"


def test_a_missing_network_is_an_error(serve, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        serve.main(["--api", "nnx"])
    assert "digits.jaxbn does not exist; create it with: python examples/digits.py --api nnx" in capsys.readouterr().err
