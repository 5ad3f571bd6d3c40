"""The yardsticks: the float64 reference's trajectories, and recorded ones."""

from parity_tests import reference
from parity_tests.registry.case import Case
from parity_tests.registry.gradients import recorded
from parity_tests.runners.trajectory import SEQUENCES, Trajectory


def run_reference(case: Case, steps: int, device: str = "cpu") -> Trajectory:
    """Runs the reference. ``device`` is not used."""
    source = case.source(steps)
    groups = [(leaves, case.optimizer.reference(o)) for leaves, o in case.group_options]
    optimizer = reference.ScheduleFree(case.params, groups)
    record = []
    for k in range(steps):
        value, grads = source.numpy(optimizer.y, source.at(k))
        optimizer.step(grads, value)
        record.append((dict(optimizer.y), dict(optimizer.x), dict(optimizer.z)))
    return Trajectory.stacked(record)


def run_golden(case: Case, steps: int, device: str = "cpu") -> Trajectory:
    """Reads the trajectory from the case's golden file. ``device`` is not used."""
    file = recorded(case.recorded)
    return Trajectory(
        *({n: file[f"{name}/{n}"][:steps] for n in case.tree} for name in SEQUENCES)
    )
