"""Meta's state dicts in our optimizers and ours in Meta's, in the middle of a run."""

import contextlib
import copy
import io

import numpy as np
import pytest
import torch

from parity_tests.compare import tolerances
from parity_tests.compare.distance import compare
from parity_tests.registry import CASES
from parity_tests.runners import in_torch
from parity_tests.runners.trajectory import Trajectory
from parity_tests.runners.voices import run

BY_NAME = {case.name: case for case in CASES}
BEFORE, AFTER = range(60), range(60, 160)


@pytest.mark.parametrize("evaluating", [False, True], ids=["at y", "at x"])
@pytest.mark.parametrize(
    ("first", "second"), [("meta", "sf_torch"), ("sf_torch", "meta")]
)
@pytest.mark.parametrize(
    "name", ["sgd/together", "adamw/together", "radam/together", "adamw/groups"]
)
def test_a_run_goes_on_in_the_other_package(
    name: str, first: str, second: str, evaluating: bool
) -> None:
    case = BY_NAME[name]
    # Meta's optimizers print when they switch modes.
    with contextlib.redirect_stdout(io.StringIO()):
        params = in_torch.parameters(case)
        optimizer = in_torch.build(case, params, first)
        optimizer.train()
        list(in_torch.advance(case, params, optimizer, BEFORE, first))
        if evaluating:
            optimizer.eval()
        saved = copy.deepcopy(optimizer.state_dict())

        others = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
        other = in_torch.build(case, others, second)
        other.load_state_dict(saved)
        other.train()
        record = list(in_torch.advance(case, others, other, AFTER, second))

    right = run(case, "reference")
    expected = Trajectory(
        *(
            {n: leaf[AFTER.start : AFTER.stop] for n, leaf in sequence.items()}
            for sequence in (right.y, right.x or {}, right.z)
        )
    )
    distance = compare(Trajectory.stacked(record), expected, case.dtype)
    assert distance.ulps <= tolerances.EACH_OTHER[case.dtype].ulps, distance
    # Nothing is compared with itself: the run did go somewhere.
    moved = [np.ptp(z, axis=0).max(initial=0) for z in expected.z.values()]
    assert max(moved) > 1e-3
