"""The fused form of every member: modes there and back, and memory that moves.

What is new here over steps that follow each other undisturbed: a switch of modes is a
kernel too, and a plan that no longer fits is made anew in the middle of a run.
"""

import pytest
import torch
from members import (
    MEMBERS,
    OVER_A_BASE,
    assert_same_iterates,
    build,
    iterates,
    parameters,
    run,
)

from sf_torch._step import fused

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not fused.works_on(torch.device(DEVICE)):
    pytest.skip("neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)

SHAPES = [(9, 4), (7,)]  # aligned, and not
FUSED = [name for name in MEMBERS if name not in OVER_A_BASE]
MODAL = [name for name in FUSED if "Closure" not in name]
CLOSE = 8 * 2**-24  # a rounding for each step, and what a division or root differs by


def moves_parameter(optimizer, params):
    params[0].data = params[0].data.clone()


def moves_state(optimizer, params):
    state = optimizer.state[params[0]]
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            state[key] = value.clone()


def lacks_a_gradient(optimizer, params):
    params[0].grad = None


@pytest.mark.parametrize("happens", [moves_parameter, moves_state, lacks_a_gradient])
@pytest.mark.parametrize("name", FUSED)
def test_steps_go_on_right_after_memory_has_moved(name, happens):
    def train(fused):
        params = parameters(SHAPES, DEVICE)
        optimizer = build(name, params, fused=fused)

        def disturbed(closure):
            happens(optimizer, params)
            optimizer.step(closure)

        run(optimizer, params, range(2))
        run(optimizer, params, [2], take=disturbed)
        run(optimizer, params, [3])
        return iterates(optimizer, params)

    assert_same_iterates(train(True), train(False), CLOSE)


@pytest.mark.parametrize("name", MODAL)
def test_a_fused_switch_shows_x_and_comes_back_to_the_same_y(name):
    params = parameters(SHAPES, DEVICE)
    optimizer = build(name, params, fused=True)
    run(optimizer, params, range(2))
    before, held = iterates(optimizer, params), {}
    before["parameter"] = [y.clone() for y in before["parameter"]]
    optimizer.eval()
    held["parameter"] = [p.detach() for p in params]
    assert_same_iterates(held, {"parameter": before["x"]}, CLOSE)
    optimizer.train()
    # Where the state has x, y is made of x and z again, and that by another program.
    within = CLOSE if "x" in optimizer.state[params[0]] else 0
    assert_same_iterates(iterates(optimizer, params), before, within)


@pytest.mark.parametrize("name", MODAL)
def test_a_visit_to_x_leaves_no_trace_in_the_steps_after_it(name):
    def train(visits):
        params = parameters(SHAPES, DEVICE)
        optimizer = build(name, params, fused=True)
        run(optimizer, params, range(2))
        if visits:
            optimizer.eval()
            optimizer.train()
        run(optimizer, params, [2])
        return iterates(optimizer, params), "x" in optimizer.state[params[0]]

    disturbed, has_x = train(visits=True)
    undisturbed, _ = train(visits=False)
    assert_same_iterates(disturbed, undisturbed, CLOSE if has_x else 0)
