"""A pass that is killed and resumed many times, as the statistics pass guide shows: identical bits at the end."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

KILLS = 8

# The pass, saved after each batch and resumed from the file. Each batch waits for a line of input, or for its end.
PROGRAM = """
import itertools, os, sys
import flax.linen as nn
import jax, numpy as np, optax
import jaxbn.linen

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return x

path = sys.argv[1]
batches = list(np.random.default_rng(0).normal(size=(120, 16, 3)).astype(np.float32))
steps = jaxbn.linen.make_steps(Net(), lambda y, x: (y.mean(), {}), optax.sgd(0.1), inputs=lambda x: x)
state = steps.init(jax.random.key(0), batches[0])
acc, step = steps.start(state, batches[0]), jax.jit(steps.postproc_step)
if os.path.exists(path):
    with np.load(path) as saved:
        acc = jax.tree.unflatten(jax.tree.structure(acc), [saved[name] for name in saved.files])
for batch in itertools.islice(batches, int(acc.batches), None):
    sys.stdin.readline()
    acc = step(state, acc, batch)
    np.savez(path + ".new.npz", *jax.tree.leaves(acc))
    os.replace(path + ".new.npz", path)
    print("saved", flush=True)
"""


def run(path, killed=None):
    """Runs the program; kills it so many seconds after its save of the batch before the last that it may take."""
    command = [sys.executable, "-c", PROGRAM, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if killed is not None:
            batches, seconds = killed
            process.stdin.write("\n" * (batches + 1))
            process.stdin.flush()
            assert [process.stdout.readline() for _ in range(batches)] == ["saved\n"] * batches
            time.sleep(seconds)
            process.kill()
        process.communicate()
    return process.returncode


def saved(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


@pytest.mark.slow
def test_a_pass_that_is_killed_ends_with_the_bits_of_one_that_is_not(tmp_path):
    whole, interrupted = tmp_path / "whole.npz", tmp_path / "interrupted.npz"
    assert run(whole) == 0
    moments = random.Random(0)
    progress = []
    for _ in range(KILLS):
        killed = moments.randint(1, 4), moments.uniform(0, 0.004)
        assert run(interrupted, killed) == -signal.SIGKILL  # before it was done
        progress.append(max(int(leaf) for leaf in saved(interrupted) if leaf.dtype == np.int32))  # batches seen
    assert progress == sorted(progress) and 0 < progress[0] < progress[-1] < 120
    assert run(interrupted) == 0
    for found, expected in zip(saved(interrupted), saved(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
