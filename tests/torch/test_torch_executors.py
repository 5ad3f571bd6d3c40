"""Every way of taking a step takes the step of the formula.

``sf_torch/_step/formula.py`` has the step in plain operators, one parameter at a time.
``rows.py`` is held against it here, with PyTorch's one-pass kernels and without; the
Triton kernel is held against the rows in ``test_torch_plans.py`` and
``test_torch_fused.py``; compiled steps in ``test_torch_compiled.py``.
"""

import pytest
import torch
from members import (
    MEMBERS,
    OVER_A_BASE,
    assert_same_iterates,
    build,
    iterates,
    run,
    tensors,
)

from sf_torch._step import batches, formula, rows

# In slices, alone, and in a row with others.
SHAPES = [(40, 50), (700,), (3,), (), (20, 30)]
BLOCK, SHARE = 900, 2
STEPS = 5


def trained(name, dtype, seen):
    params = [torch.nn.Parameter(t.to(dtype)) for t in tensors(SHAPES)]
    optimizer = build(name, params)
    for k in range(STEPS):
        run(optimizer, params, [k])
        for plan in optimizer._plans.values():
            seen |= {type(executor) for executor in plan.executors}
    return iterates(optimizer, params)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "many"])
def test_rows_take_the_step_of_the_formula(name, dtype, one_pass, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", BLOCK)
    monkeypatch.setattr(batches, "SHARE", SHARE)
    if not one_pass:
        monkeypatch.setattr(rows, "has_one_pass", lambda z: False)
    by_rows, by_formula = set(), set()
    ours = trained(name, dtype, by_rows)
    monkeypatch.setattr(rows, "takes", lambda leaf: False)
    truth = trained(name, dtype, by_formula)
    if name not in OVER_A_BASE:  # whose plans do not last
        assert (by_rows, by_formula) == ({rows.Rows}, {formula.Plain})
    # Some roundings a step; a bfloat16 parameter rounds to one of two neighbours.
    wide = 2**-53 if dtype == torch.float64 else 2**-24
    tolerance = dict.fromkeys(truth, 4 * STEPS * wide)
    if dtype == torch.bfloat16:
        tolerance["parameter"] = tolerance["x"] = 2**-7
    for key in truth:
        assert_same_iterates({key: ours[key]}, {key: truth[key]}, tolerance[key])


def test_one_executor_is_seen_for_each_kind_of_array():
    """Dense float32 goes in rows; what they do not take, through the formula."""
    dense = torch.nn.Parameter(torch.ones(600, 2))
    strided = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    complex_ = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = build("SGDScheduleFree", [dense, strided, complex_])
    run(optimizer, [dense], [0])
    (plan,) = optimizer._plans.values()
    assert [type(e) for e in plan.executors] == [rows.Rows]
    for p in (strided, complex_):
        optimizer.zero_grad()
        p.grad = torch.ones_like(p)
        optimizer.step()
        (plan,) = optimizer._plans.values()
        assert [type(e) for e in plan.executors] == [formula.Plain]


def test_the_state_of_small_parameters_lies_in_one_memory_and_stays_theirs():
    """Also after a step in which some had no gradient; large ones are left alone."""
    limit = batches.BLOCK // batches.SHARE
    sizes = [(3,), (4, 5), (), (0,), (limit + 1,), (2,)]
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = build("SGDScheduleFree", params, store_x=True)
    run(optimizer, params, [0])
    states = [optimizer.state[p] for p in params]
    kept = [dict(state) for state in states]
    for given in (range(6), range(0, 6, 2), range(6)):
        optimizer.zero_grad()
        run(optimizer, [params[i] for i in given], [1])
        small = [i for i in given if 0 < params[i].numel() <= limit]
        for row in ("z", "x"):
            memory = {states[i][row].untyped_storage().data_ptr() for i in small}
            assert len(memory) == 1
    assert states[4]["z"].untyped_storage().nbytes() == 4 * (limit + 1)
    for before, state in zip(kept, states, strict=True):
        assert all(before[row] is state[row] for row in ("z", "x"))
