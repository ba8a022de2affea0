"""The stop rule of the pass: when it stops, how many batches it reads, and when it blocks."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from nets import LINEN, NNX, assert_same_statistics, every_framework, statistics_of

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._src.statistics import sweep

ROWS = 16
CHECKS = [8, 12, 18, 27, 41, 62, 93, 140]


def endless(kind="normal", seed=0):
    """Batches of three channels of independent values."""
    rng = np.random.default_rng(seed)
    while True:
        x = 5 + 2 * rng.standard_normal((ROWS, 3)).astype(np.float32)
        if kind == "a constant channel":
            x[:, 1] = 7.3
        yield x


def layer_alone(framework, batches, **options):
    """A single normalization, so that its input is known."""
    if framework is NNX:
        return jaxbn.nnx.postproc(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), batches, **options)
    net = jaxbn.linen.BatchNorm(use_running_average=True)
    return jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), np.ones((2, 3))), batches, **options)


@every_framework
@pytest.mark.parametrize("kind", ["normal", "a constant channel"])
def test_an_endless_source_ends_near_the_number_of_values_that_is_needed(framework, kind):
    """The variance of N normal values is known to sqrt(2 / N): 0.05 takes 800, which are 50 batches."""
    source = endless(kind)
    _, report = layer_alone(framework, source, stop_when=0.05)
    assert report.batches in (41, 62, 93)  # the errors themselves are known to 10 %, and the largest of three decides
    assert report.stopped
    errors = report.layers[""].relative_errors
    assert max(part.max() for part in errors) <= 0.05
    assert "stopped early: no standard error was above 0.05" in str(report)
    following = next(itertools.islice(endless(kind), report.batches, None))
    np.testing.assert_array_equal(next(source), following)  # none was lost


def test_the_mean_decides_where_batches_differ_in_it():
    """Batch means of std 1 and values of std 1: the error of the mean is 1 / sqrt(2 B), so 0.1 takes 50 batches."""
    rng = np.random.default_rng(0)
    batches = (rng.normal(rng.normal(size=(1, 3)), 1, (200, 3)).astype(np.float32) for _ in itertools.count())
    _, report = layer_alone(LINEN, batches, stop_when=0.1)
    mean, var = (part.max() for part in report.layers[""].relative_errors)
    assert report.batches in (41, 62, 93, 140) and max(mean, var) <= 0.1


def test_only_decisions_block_and_they_are_rare(monkeypatch):
    asked = []

    def never(state, **_):
        asked.append(int(state.batches))
        return False

    monkeypatch.setattr(sweep, "is_certain", never)
    layer_alone(LINEN, itertools.islice(endless(), 100), stop_when=1e-3)
    assert asked == CHECKS[:7]
    asked.clear()
    layer_alone(LINEN, itertools.islice(endless(), 100))
    assert not asked


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_batches_that_end_before_it_are_all_read(count):
    data = list(itertools.islice(endless(), count))
    found, report = layer_alone(LINEN, data, stop_when=1e-3)
    expected, _ = layer_alone(LINEN, data)
    np.testing.assert_array_equal(found["batch_stats"]["var"], expected["batch_stats"]["var"])
    assert (report.batches, report.stopped) == (count, False)
    assert "not stopped early: stop_when=0.001, and the largest standard error is " in str(report)


@pytest.mark.sample(every=2)
@every_framework
def test_consistent_statistics_of_the_batches_up_to_the_stop(framework):
    net, read = framework.net(framework.stock), []

    def batches():
        for i, batch in enumerate(endless()):
            read.append(i)
            yield batch

    if framework is LINEN:
        variables = net.init(jax.random.key(0), np.ones((2, 3), np.float32), False)
        call = lambda v, x: net.apply(v, x, False)
        run = lambda batches, **options: jaxbn.linen.postproc(call, variables, batches, consistent=True, **options)
    else:
        run = lambda batches, **options: jaxbn.nnx.postproc(net, batches, consistent=True, **options)
    found, report = run(batches, stop_when=0.3)
    assert report.stopped and report.stages == 2
    assert read == [*range(report.batches)]
    expected, _ = run(list(itertools.islice(endless(), report.batches)))
    assert_same_statistics(statistics_of(found), statistics_of(expected), 1e-6)


def test_a_batch_that_is_not_finite_is_an_error_at_the_next_decision():
    """And not after all batches, which may be endless; a skipped batch has no influence."""
    bad = np.full((ROWS, 3), np.nan, np.float32)
    source = endless()
    with pytest.raises(ValueError, match=r"Batch 0 \(counted from 0\)"):
        layer_alone(LINEN, itertools.chain([bad], source), stop_when=1e-3)
    np.testing.assert_array_equal(next(source), next(itertools.islice(endless(), 7, None)))
    _, report = layer_alone(LINEN, itertools.chain([bad], source), stop_when=0.05, skip_nonfinite=True)
    assert (report.skipped, report.layers[""].batches) == (1, report.batches - 1)


def test_the_bar_ends_with_the_pass(capfd):
    source = endless()
    layer_alone(LINEN, source, stop_when=0.2, progress=True)
    assert "Estimating statistics" in capfd.readouterr().err
    next(source)


@pytest.mark.parametrize("estimator", [jaxbn.mean_of_batches(), jaxbn.pooled(unbiased=True)], ids=["means", "pooled"])
def test_other_estimators_with_equal_weights(estimator):
    _, report = layer_alone(LINEN, endless(), stop_when=0.1, estimator=estimator)
    assert report.stopped and report.batches in CHECKS


@every_framework
def test_estimators_without_errors_are_refused_before_the_first_batch(framework):
    source = endless()
    with pytest.raises(
        ValueError, match=r"stop_when needs standard errors, and moving_average\(0.9\) has none: its last"
    ):
        layer_alone(framework, source, stop_when=0.1, estimator=jaxbn.moving_average())
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"stop_when={bound} must be positive"):
            layer_alone(framework, source, stop_when=bound)
    np.testing.assert_array_equal(next(source), next(endless()))


@every_framework
@pytest.mark.parametrize("good", [0, 130])
def test_an_endless_source_of_nan_is_an_error(framework, good):
    """A network that diverged, before the pass or, for all that the pass can know, in the middle of it."""
    source = itertools.chain(itertools.islice(endless(), good), itertools.repeat(np.full((ROWS, 3), np.nan)))
    with pytest.raises(ValueError, match="The last 100 batches.* 100 of them gave NaN"):
        layer_alone(framework, source, stop_when=1e-9, skip_nonfinite=True)


@every_framework
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_an_endless_source_that_no_layer_counts_is_an_error(framework, weight):
    """Weights of 0; with weights of 1 the same source only stops late."""
    source = itertools.islice(endless(), None if weight == 0 else 150)
    options = {"stop_when": 1e-9, "weights": lambda batch: jax.numpy.full(len(batch), weight)}
    if weight:
        assert layer_alone(framework, source, **options)[1].batches == 150
    else:
        with pytest.raises(ValueError, match="The last 100 batches.* 0 of them gave NaN"):
            layer_alone(framework, source, **options)
