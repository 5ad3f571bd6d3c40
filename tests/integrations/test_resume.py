"""Killed at any moment and resumed, a run is the uninterrupted run, bit for bit.

Run as a script, this file is the process that gets killed.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 120


def gradient(parameter, step):
    """Of a bowl, with noise that the step alone decides."""
    noise = np.random.default_rng([0, step]).normal(size=parameter.shape)
    return (parameter + noise).astype(np.float32)


class OrbaxRun:
    """Params and optimizer state of sf_jax in an Orbax CheckpointManager."""

    def __init__(self, directory):
        # Here and not above: a process that gets killed should start quickly.
        import jax
        import jax.numpy as jnp
        import optax
        import orbax.checkpoint as ocp

        import sf_jax

        tx = sf_jax.schedule_free_adamw(0.05, warmup_steps=10, weight_decay=0.1)
        params = {"w": jnp.ones((4, 3)), "half": jnp.ones(5, jnp.bfloat16)}
        self.state = {"params": params, "opt_state": tx.init(params)}

        @jax.jit
        def move(state, grads):
            params = state["params"]
            updates, opt_state = tx.update(grads, state["opt_state"], params)
            params = optax.apply_updates(params, updates)
            return {"params": params, "opt_state": opt_state}

        self.move, self.tree, self.args = move, jax.tree, ocp.args
        # Two are kept, so that a process can be killed while it deletes one too.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(Path(directory) / "run", options=options)

    def step(self, step):
        grads = self.tree.map(
            lambda p: gradient(np.asarray(p, np.float32), step), self.state["params"]
        )
        self.state = self.move(self.state, grads)

    def save(self, step):
        self.manager.save(step, args=self.args.StandardSave(self.state))

    def restore(self):
        """How many steps the last checkpoint has done; 0 without one."""
        latest = self.manager.latest_step()
        if latest is not None:
            target = self.args.StandardRestore(self.state)
            self.state = self.manager.restore(latest, args=target)
        return latest or 0

    def arrays(self):
        return [np.asarray(leaf) for leaf in self.tree.leaves(self.state)]

    def close(self):
        self.manager.close()


class TorchRun:
    """Model and optimizer of sf_torch in the file of save_checkpoint."""

    def __init__(self, directory):
        import torch

        import sf_torch

        self.torch, self.sf_torch = torch, sf_torch
        self.path = Path(directory) / "run.pt"
        self.model = torch.nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(1.0)
        self.optimizer = sf_torch.AdamWScheduleFree(
            self.model.parameters(), lr=0.05, warmup_steps=10, weight_decay=0.1
        )
        self.optimizer.train()

    def step(self, step):
        for parameter in self.model.parameters():
            grad = gradient(parameter.detach().numpy(), step)
            parameter.grad = self.torch.from_numpy(grad)
        self.optimizer.step()

    def save(self, step):
        self.sf_torch.save_checkpoint(self.path, self.model, self.optimizer, step=step)

    def restore(self):
        if not self.path.exists():
            return 0
        extra = self.sf_torch.load_checkpoint(self.path, self.model, self.optimizer)
        return extra["step"]

    def arrays(self):
        tensors = list(self.model.parameters())
        for state in self.optimizer.state.values():
            tensors += [state[name] for name in sorted(state)]
        tensors += [self.optimizer.param_groups[0][k] for k in ("k", "weight_sum")]
        return [self.torch.as_tensor(t).detach().clone().numpy() for t in tensors]

    def close(self):
        pass


RUNS = {"orbax": OrbaxRun, "save_checkpoint": TorchRun}


def main():
    kind, directory = sys.argv[1:]
    run = RUNS[kind](directory)
    for step in range(run.restore(), STEPS):
        run.step(step)
        # Before it saves: this is where to shoot.
        print(step + 1, flush=True)
        run.save(step + 1)
        # So that it is not through before the shot, on whatever machine.
        time.sleep(0.01)
    run.close()


def worker(kind, directory):
    return subprocess.Popen(
        [sys.executable, __file__, kind, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(
    scope="module",
    params=["save_checkpoint", pytest.param("orbax", marks=pytest.mark.slow)],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(kind, tmp_path_factory):
    """Everything that the run remembers, after each number of steps."""
    run = RUNS[kind](tmp_path_factory.mktemp(kind))
    history = [run.arrays()]
    for step in range(STEPS):
        run.step(step)
        history.append(run.arrays())
    run.close()
    return history


def check_last_checkpoint(kind, directory, uninterrupted):
    run = RUNS[kind](directory)
    step = run.restore()
    for actual, expected in zip(run.arrays(), uninterrupted[step], strict=True):
        np.testing.assert_array_equal(actual, expected)
    run.close()
    return step


@pytest.mark.parametrize(
    "kills", [2, pytest.param(10, marks=pytest.mark.slow)], ids=["twice", "ten_times"]
)
def test_killed_and_resumed_is_uninterrupted(kind, kills, uninterrupted, tmp_path):
    random = np.random.default_rng(kills)
    reached = 0
    for _ in range(kills):
        process = worker(kind, tmp_path)
        shot_at = reached + int(random.integers(1, 5))
        for line in process.stdout:
            if int(line) >= shot_at:
                break
        # In the middle of a save, or of the next step.
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -9
        process.stdout.close()
        reached = check_last_checkpoint(kind, tmp_path, uninterrupted)
        assert reached <= STEPS - 1

    process = worker(kind, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert check_last_checkpoint(kind, tmp_path, uninterrupted) == STEPS


def test_a_wrong_resume_would_be_noticed(kind, uninterrupted, tmp_path):
    """One step too many after the checkpoint, and the arrays differ."""
    run = RUNS[kind](tmp_path)
    run.step(0)
    run.save(2)
    run.close()
    with pytest.raises(AssertionError, match="not equal"):
        check_last_checkpoint(kind, tmp_path, uninterrupted)


if __name__ == "__main__":
    main()
