"""Tests of examples/rl_critics.py: the known optimum, the learned policy, and the statistics of each critic."""

import jax
import numpy as np
import pytest
import scipy.linalg
from programs import in_standard_promotion, load_program

import jaxbn.linen


@pytest.fixture(scope="module")
def example():
    """The program with optimizers that work under strict dtype promotion."""
    module = load_program("rl_critics.py")
    for name in ("CRITIC_OPTIMIZER", "ACTOR_OPTIMIZER"):
        setattr(module, name, in_standard_promotion(getattr(module, name)))
    return module


def test_the_best_linear_policy_is_that_of_scipy(example):
    a, b = (example.DISCOUNT**0.5 * part for part in (example.DYNAMICS, example.FORCE))
    cost = scipy.linalg.solve_discrete_are(a, b, *example.COSTS)
    gain = np.linalg.solve(example.COSTS[1] + b.T @ cost @ b, b.T @ cost @ a)
    np.testing.assert_allclose(example.best_linear_policy(), gain, rtol=1e-9)


@pytest.mark.slow
def test_each_member_has_statistics_of_its_own(example):
    learner = example.begin(jax.random.key(0), example.CHUNK)
    learner = example.run_chunk(learner, jax.random.key(1))
    batches = example.replayed(learner, 8, seed=0)
    variables, _ = jaxbn.linen.postproc(example.call, learner.critics, batches, consistent=True)
    x = np.concatenate([np.concatenate([b["state"], b["action"]], 1) for b in batches]).astype(np.float64)
    norms, denses = (
        {name: jax.tree.map(np.float64, leaf) for name, leaf in tree.items()}
        for tree in (variables["batch_stats"], variables["params"])
    )
    for member in range(example.MEMBERS):
        values = x
        for layer in range(3):
            stored = {name: leaf[member] for name, leaf in norms[f"BatchRenorm_{layer}"].items()}
            np.testing.assert_allclose(stored["mean"], values.mean(0), rtol=1e-4, atol=1e-5 * values.std())
            np.testing.assert_allclose(stored["var"], values.var(0), rtol=1e-4, atol=1e-7)
            affine = {name: leaf[member] for name, leaf in denses[f"BatchRenorm_{layer}"].items()}
            values = (values - stored["mean"]) / np.sqrt(stored["var"] + 1e-3) * affine["scale"] + affine["bias"]
            dense = {name: leaf[member] for name, leaf in denses[f"Dense_{layer}"].items()}
            values = values @ dense["kernel"] + dense["bias"]
            values = np.maximum(values, 0)


@pytest.mark.slow
def test_it_learns_and_critics_know_single_states(example, capsys):
    """In one of three runs, of which the others are made only where the training loop, which is chaotic, went wrong."""
    runs = (example.main(["--no-progress", "--seed", str(seed)]) for seed in range(3))
    numbers = next(numbers for numbers in runs if numbers["learned"] > 2 * numbers["best linear (Riccati)"])
    assert not capsys.readouterr().err.strip()
    assert numbers["best linear (Riccati)"] >= numbers["learned"] - 0.01
    assert numbers["learned"] > numbers["untrained"]
    assert 2 * numbers["best linear (Riccati)"] > numbers["untrained"]
    errors = [value for name, value in numbers.items() if name.startswith(("running", "population"))]
    assert len(errors) == 2 * example.MEMBERS and max(errors) < abs(numbers["untrained"]) / 2
