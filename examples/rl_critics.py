"""CrossQ: an ensemble of critics with Batch Renormalization, trained off-policy without target networks.

    python examples/rl_critics.py

This learns to bring a point mass to rest at the origin (a double integrator with a bounded force) from a replay buffer:

    critics   two critics as one module under `nn.vmap`, so every parameter and every statistic has a leading axis.
              Batch Renormalization precedes each dense layer; it is plain batch normalization in the first steps
    update    the critics run on states and next states in ONE batch, so both are normalized with the same statistics.
              Target networks are then not needed (Bhatt et al., CrossQ, 2024)
    actor     deterministic; its loss uses the running statistics of the critics
    postproc  after training, a statistics pass over the replay buffer estimates the population statistics of each
              critic. Its batches are drawn from the whole buffer, as in training. The statistics are consistent: every
              layer is normalized with population statistics. Batch Renormalization trains with running averages, so
              these are already close to the population statistics

The best linear policy solves a Riccati equation. The program prints its return and the return of the learned policy. It
also prints the error of each critic, evaluated on ONE state at a time, against the returns of the learned policy.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn
import jaxbn.linen

MEMBERS, WIDTH, BATCH, PLAYERS, HORIZON = 2, 64, 256, 16, 60
DISCOUNT, NOISE, RENORM_FROM = 0.95, 0.3, 500
WALLS = 2.0  # bound of position and velocity
CHUNK = 250  # steps of one compiled scan, and of one update of the progress bar
DYNAMICS, FORCE = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.005], [0.1]])
COSTS = np.diag([0.1, 0.01]), np.array([[0.001]])  # of position and velocity, of the force
CRITIC_OPTIMIZER, ACTOR_OPTIMIZER = optax.adam(1e-3, b1=0.5), optax.adam(5e-4, b1=0.5)


class Critic(nn.Module):
    """The value of each action in its state."""

    @nn.compact
    def __call__(self, state: jax.Array, action: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(
            jaxbn.linen.BatchRenorm, use_running_average=not train, momentum=0.99, **jaxbn.renorm_switch(RENORM_FROM)
        )
        x = norm()(jnp.concatenate([state, action], -1))
        for _ in range(2):
            x = norm()(nn.relu(nn.Dense(WIDTH)(x)))
        return nn.Dense(1)(x)[..., 0]


# The members have their own parameters and statistics and see the same rows. The output is [MEMBERS, rows].
Critics = nn.vmap(
    Critic,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    in_axes=None,
    out_axes=0,
    axis_size=MEMBERS,
)


class Actor(nn.Module):
    """The force in each state, in [-1, 1]."""

    @nn.compact
    def __call__(self, state: jax.Array) -> jax.Array:
        for _ in range(2):
            state = nn.relu(nn.Dense(WIDTH)(state))
        return jnp.tanh(nn.Dense(1)(state))


CRITICS, ACTOR = Critics(), Actor()


class Learner(NamedTuple):
    """The complete training state, a pytree of arrays."""

    critics: Any  # linen variables, including the statistics
    critics_moments: Any  # state of their optimizer
    actor: Any
    actor_moments: Any
    players: jax.Array  # f32[PLAYERS, 2]: current states
    replay: dict[str, jax.Array]
    step: jax.Array  # i32[]


def advance(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (reward, next state) of each row."""
    position, velocity = COSTS[0].diagonal()
    cost = position * state[:, 0] ** 2 + velocity * state[:, 1] ** 2 + COSTS[1].item() * action[:, 0] ** 2
    after = state @ jnp.asarray(DYNAMICS.T, jnp.float32) + action @ jnp.asarray(FORCE.T, jnp.float32)
    return -cost, jnp.clip(after, -WALLS, WALLS)


def starts(key: jax.Array, count: int) -> jax.Array:
    """Random initial positions and velocities."""
    return jax.random.uniform(key, (count, 2), minval=-1.0, maxval=1.0)


def begin(key: jax.Array, steps: int) -> Learner:
    """The initial training state, with an empty replay buffer."""
    of_critics, of_actor, of_players = jax.random.split(key, 3)
    players = starts(of_players, PLAYERS)
    critics = CRITICS.init(of_critics, players, jnp.zeros((PLAYERS, 1)), True)
    actor = ACTOR.init(of_actor, players)
    rows = steps * PLAYERS
    replay = {"state": jnp.zeros((rows, 2)), "action": jnp.zeros((rows, 1)), "reward": jnp.zeros(rows)}
    replay["next"] = jnp.zeros((rows, 2))
    moments = CRITIC_OPTIMIZER.init(critics["params"]), ACTOR_OPTIMIZER.init(actor)
    return Learner(critics, moments[0], actor, moments[1], players, replay, jnp.zeros((), jnp.int32))


def play(learner: Learner, key: jax.Array) -> Learner:
    """Takes one noisy step with every player and writes it into the replay buffer; restarts some players."""
    of_noise, of_starts, of_new = jax.random.split(key, 3)
    noise = NOISE * jax.random.normal(of_noise, (PLAYERS, 1))
    action = jnp.clip(ACTOR.apply(learner.actor, learner.players) + noise, -1, 1)
    reward, after = advance(learner.players, action)
    seen = {"state": learner.players, "action": action, "reward": reward, "next": after}
    replay = {
        name: jax.lax.dynamic_update_slice_in_dim(learner.replay[name], rows, learner.step * PLAYERS, 0)
        for name, rows in seen.items()
    }
    anew = jax.random.bernoulli(of_new, 1 / HORIZON, (PLAYERS, 1))
    return learner._replace(players=jnp.where(anew, starts(of_starts, PLAYERS), after), replay=replay)


def both(batch: dict[str, jax.Array], actor: Any) -> tuple[jax.Array, jax.Array]:
    """The input of the critics: states with their actions and next states with the actor's actions, in one batch."""
    actions = jnp.concatenate([batch["action"], ACTOR.apply(actor, batch["next"])])
    return jnp.concatenate([batch["state"], batch["next"]]), actions


def critic_loss(params: Any, learner: Learner, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    """Squared temporal differences, and the updated statistics."""
    variables = learner.critics | {"params": params}
    # One training call for both halves: separate calls would normalize them with different statistics.
    values, updates = CRITICS.apply(variables, *both(batch, learner.actor), True, mutable=["batch_stats"])
    now, later = jnp.split(values, 2, axis=1)
    # The minimum over the ensemble counters overestimation, as in TD3.
    target = jax.lax.stop_gradient(batch["reward"] + DISCOUNT * later.min(0))
    return jnp.square(now - target[None]).mean(1).sum(), updates


def actor_loss(actor: Any, critics: Any, state: jax.Array) -> jax.Array:
    """Minus the value of the actor's actions, computed with the running statistics."""
    return -CRITICS.apply(critics, state, ACTOR.apply(actor, state), False).mean()


def learn(learner: Learner, key: jax.Array) -> Learner:
    """Takes one step of the critics and one of the actor on rows drawn from the filled part of the buffer."""
    # `play` has already written the rows of this step, hence + 1.
    rows = jax.random.randint(key, (BATCH,), 0, (learner.step + 1) * PLAYERS)
    batch = {name: values[rows] for name, values in learner.replay.items()}
    params = learner.critics["params"]
    grads, statistics = jax.grad(critic_loss, has_aux=True)(params, learner, batch)
    updates, critics_moments = CRITIC_OPTIMIZER.update(grads, learner.critics_moments, params)
    critics = {"params": optax.apply_updates(params, updates), **statistics}
    grads = jax.grad(actor_loss)(learner.actor, critics, batch["state"])
    updates, actor_moments = ACTOR_OPTIMIZER.update(grads, learner.actor_moments, learner.actor)
    actor = optax.apply_updates(learner.actor, updates)
    return learner._replace(critics=critics, critics_moments=critics_moments, actor=actor, actor_moments=actor_moments)


@functools.partial(jax.jit, donate_argnums=0)
def run_chunk(learner: Learner, key: jax.Array) -> Learner:
    """Takes `CHUNK` steps of playing and learning."""

    def one(learner: Learner, key: jax.Array) -> tuple[Learner, None]:
        of_play, of_learn = jax.random.split(key)
        learner = learn(play(learner, of_play), of_learn)
        return learner._replace(step=learner.step + 1), None

    return jax.lax.scan(one, learner, jax.random.split(key, CHUNK))[0]


def replayed(learner: Learner, count: int, seed: int) -> list[dict[str, jax.Array]]:
    """Draws batches from the whole buffer, as training does; other batches would have other statistics."""
    draws = np.random.default_rng(seed).integers(0, len(learner.replay["reward"]), (count, BATCH))
    batches = []
    for rows in draws:
        drawn = {name: values[rows] for name, values in learner.replay.items()}
        state, action = both(drawn, learner.actor)
        batches.append({"state": state, "action": action})
    return batches


def call(variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Runs the critics; the statistics pass calls it."""
    return CRITICS.apply(variables, batch["state"], batch["action"], False)


def value_one_by_one(variables: Any, state: jax.Array, action: jax.Array) -> jax.Array:
    """The values [rows, MEMBERS], computed for one state at a time."""

    def one(state: jax.Array, action: jax.Array) -> jax.Array:
        return CRITICS.apply(variables, state[None], action[None], False)[:, 0]

    return jax.vmap(one)(state, action)


def returns(policy: Any, state: jax.Array) -> jax.Array:
    """The discounted return of a policy from each state."""

    def one(carry: Any, _: None) -> tuple[Any, None]:
        state, weight, total = carry
        reward, after = advance(state, policy(state))
        return (after, weight * DISCOUNT, total + weight * reward), None

    steps = 4 * HORIZON  # later rewards have a weight below 1e-5
    return jax.lax.scan(one, (state, jnp.ones(()), jnp.zeros(len(state))), None, steps)[0][2]


def best_linear_policy() -> np.ndarray:
    """The gain of the best linear policy for an unbounded force, from the discounted Riccati equation."""
    cost, (state_cost, force_cost) = COSTS[0], COSTS
    for _ in range(1000):
        ahead = DISCOUNT * FORCE.T @ cost
        gain = np.linalg.solve(force_cost + ahead @ FORCE, ahead @ DYNAMICS)
        # Fixed-point iteration of the Riccati equation; the discount makes it converge.
        cost = state_cost + DISCOUNT * DYNAMICS.T @ cost @ (DYNAMICS - FORCE @ gain)
    return gain


def tabulate(learner: Learner, variables: Any, seed: int) -> tuple[list[Table], dict[str, float]]:
    """Makes the tables of results; returns them, and the numbers by name."""
    # Starts that training did not see.
    state, gain = starts(jax.random.key(seed + 1000), 256), jnp.asarray(best_linear_policy(), jnp.float32)
    untrained = ACTOR.init(jax.random.key(seed), state)
    had = returns(lambda state: ACTOR.apply(learner.actor, state), state)
    by_policy = {
        "untrained": returns(lambda state: ACTOR.apply(untrained, state), state),
        "learned": had,
        "best linear (Riccati)": returns(lambda state: jnp.clip(-state @ gain.T, -1, 1), state),
    }
    policies = Table("Policy", title="Mean return of 256 starts")
    policies.add_column("Return", justify="right")
    numbers = {name: float(values.mean()) for name, values in by_policy.items()}
    for name, value in numbers.items():
        policies.add_row(name, f"{value:.3f}")

    critics = Table("Statistics", title="One state at a time: rms error of the return")
    for member in range(MEMBERS):
        critics.add_column(f"Critic {member}", justify="right")
    action = ACTOR.apply(learner.actor, state)
    for name, held in (("running averages", learner.critics), ("population (postproc)", variables)):
        errors = jnp.sqrt(jnp.square(value_one_by_one(held, state, action) - had[:, None]).mean(0))
        critics.add_row(name, *(f"{error:.3f}" for error in errors))
        numbers |= {f"{name} {member}": float(error) for member, error in enumerate(errors)}
    return [policies, critics], numbers


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the program; returns its numbers by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help=f"training steps, a multiple of {CHUNK} (4000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    args = parser.parse_args(argv)
    if args.steps < CHUNK or args.steps % CHUNK or not 0 <= args.seed < 2**31:
        parser.error(f"--steps must be a multiple of {CHUNK}, and --seed 0 or more and below 2^31")
    start, screen, console = time.perf_counter(), Console(stderr=True), Console(highlight=False)
    quiet = args.no_progress or not screen.is_terminal
    learner = begin(jax.random.key(args.seed), args.steps)
    keys = jax.random.split(jax.random.key(args.seed + 1), args.steps // CHUNK)
    for key in track(list(keys), "Training", console=screen, transient=True, disable=quiet):
        learner = jax.block_until_ready(run_chunk(learner, key))
    batches = replayed(learner, 40, args.seed)
    variables, report = jaxbn.linen.postproc(call, learner.critics, batches, consistent=True, progress=not quiet)
    tables, numbers = tabulate(learner, variables, args.seed)
    for table in tables:
        console.print(table)
    print(report)
    console.print(f"{args.steps} steps, {time.perf_counter() - start:.0f} s, compilation included.")
    return numbers


if __name__ == "__main__":
    main()
