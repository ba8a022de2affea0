"""Tests of benchmarks/timing.py: rounds, ratios with intervals, and means of ratios."""

import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_program


@pytest.fixture(scope="module")
def timing():
    """The helpers as a module."""
    return load_program("benchmarks/timing.py")


def test_ratios_are_of_one_round_and_what_hits_both_cancels(timing, rng):
    load = rng.uniform(1, 10, 30)

    assert np.allclose(timing.ratio(3 * load, 2 * load), 1.5, rtol=1e-12)


def test_a_ratio_is_the_median_and_one_bad_round_does_not_show(timing):
    over = np.array([1.0, 1.1, 0.9, 1.0, 1.0, 1.0, 50.0, 1.0, 1.0])

    value, low, high = timing.ratio(over, np.ones(9))

    assert value == 1
    assert 0.9 <= low <= 1 <= high <= 1.1


def test_a_mean_over_cases_is_geometric_and_of_medians(timing):
    cases = [np.array([1.0, 2.0, 9.0]), np.full(5, 8.0)]

    assert math.isclose(timing.geometric_mean(cases).value, 4, rel_tol=1e-12)
    low, high = timing.geometric_mean(cases)[1:]
    assert math.isclose(low, math.sqrt(8), rel_tol=1e-12) and math.isclose(high, math.sqrt(72), rel_tol=1e-12)


def test_intervals_cover_in_95_of_100_runs(timing, rng):
    """The true median of log-normal ratios is known; 100 runs of two cases and 25 rounds."""
    truth = np.exp(rng.normal(size=2))

    def covers():
        _, low, high = timing.geometric_mean([t * np.exp(0.1 * rng.normal(size=25)) for t in truth])
        return low <= np.exp(np.log(truth).mean()) <= high

    assert 88 <= sum(covers() for _ in range(100)) <= 100


def test_every_program_runs_once_in_a_round_and_the_order_turns(timing):
    order = []
    programs = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in "abc"}

    times = timing.interleave(programs, range(3))

    assert "".join(order) == "abccbaabc"
    assert list(times) == list("abc")
    assert all(t.wall.shape == t.cpu.shape == (3,) and (t.wall > 0).all() for t in times.values())


def test_short_programs_repeat_to_take_their_time(timing, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])

    def run(count):
        seconds[0] += 0.25 * count

    assert timing.repeats_for(run, 0) == 1
    assert timing.repeats_for(run, 2.5) == 10
    calls = []
    assert timing.repeat(lambda: calls.append(0) or jnp.ones(()), 3) == 1
    assert len(calls) == 3


def test_results_are_written_with_the_machine(timing, tmp_path):
    timing.write_json(tmp_path / "found.json", [{"seconds": [1.0]}])

    found = json.loads((tmp_path / "found.json").read_text())
    assert found["results"] == [{"seconds": [1.0]}]
    assert found["machine"]["device"] in timing.machine_line()
    assert {"jax", "flax"} <= set(found["machine"]["versions"])


def test_a_copy_has_a_bandwidth(timing):
    assert 1e4 < timing.copy_bandwidth(size=1 << 16) < 1e13  # on a machine that is busy, too
