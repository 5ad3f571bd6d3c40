"""``torch.compile(optimizer.step)`` takes the step that ``optimizer.step`` takes.

Tensors of 10, 5,000 and 1,000,000 elements: the small ones share a row, and the large
one, which eager steps take in slices, is whole in compiled ones. Most tests stop before
Inductor, which needs a C++ compiler and takes up to a minute a program; the slow ones
go through it.
"""

import contextlib
import copy
import shutil

import pytest
import torch
from members import (
    MEMBERS,
    assert_same_iterates,
    build,
    iterates,
    loss_of,
    parameters,
    run,
    set_gradients,
)
from torch._dynamo.exc import BackendCompilerFailed
from torch_cases import identical

pytestmark = [
    # torch.optim's own profiling hook, which the compiler leaves out.
    pytest.mark.filterwarnings("ignore:Profiler function"),
    # Inductor imports the deprecated torch.jit of its own package.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
with_inductor = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler, g++"
)

SHAPES = [(10,), (50, 100), (1000, 1000)]
STEPS = 3
# Compiled code rounds a product and a sum at once where eager code rounds both.
TOLERANCE = STEPS * 4 * 2**-24


def assert_compiled_is_eager(name, backend):
    torch.compiler.reset()
    results = []
    for compiles in (True, False):
        params = parameters(SHAPES)
        optimizer = build(name, params)
        take = torch.compile(optimizer.step, backend=backend) if compiles else None
        run(optimizer, params, range(STEPS), take)
        assert optimizer.param_groups[0]["k"] == STEPS
        results.append(iterates(optimizer, params))
    assert_same_iterates(*results, TOLERANCE)


# Of these, seconds each; all of them together are slow.
QUICK = ("SGDScheduleFree", "AdamWScheduleFree/momentum", "GPAAdamW/upstream")
every = pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in MEMBERS
    ],
)


@every
def test_a_compiled_step_is_the_eager_step(name):
    # AOTAutograd's backend: traces with tensors that have no memory, as Inductor does.
    assert_compiled_is_eager(name, "aot_eager")


@pytest.mark.slow  # up to a minute each, most of it the C++ compiler's
@with_inductor
@pytest.mark.parametrize("name", MEMBERS)
def test_a_step_compiled_by_inductor_is_the_eager_step(name):
    assert_compiled_is_eager(name, "inductor")


def test_a_step_is_compiled_after_eager_ones_and_before_others():
    """Both lay the state of small parameters in a row, and move it there."""
    results = []
    for compiled in ((), (0, 1), (2, 3)):
        torch.compiler.reset()
        params = parameters([(10,), (), (3, 4), (5,)])
        optimizer = build("AdamWScheduleFree", params)
        take = torch.compile(optimizer.step, backend="aot_eager")
        for k in range(5):
            run(optimizer, params, [k], take if k in compiled else None)
            z = [optimizer.state[p]["z"].untyped_storage().data_ptr() for p in params]
            assert len(set(z)) == 1
        results.append(iterates(optimizer, params))
    for result in results[1:]:
        assert_same_iterates(result, results[0], TOLERANCE)


def refuses(graph, inputs):
    raise NotImplementedError("a compiler that compiles nothing")


@every
def test_a_step_that_cannot_be_compiled_leaves_everything_as_it_was(name):
    torch.compiler.reset()
    params = parameters(SHAPES[:2])
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    set_gradients(params, 2)
    held = [p.detach().clone() for p in params]
    saved = copy.deepcopy(optimizer.state_dict())
    take = torch.compile(optimizer.step, backend=refuses)
    with contextlib.suppress(BackendCompilerFailed):
        take(lambda: loss_of(2))
    if optimizer.param_groups[0]["k"] == 2:
        assert identical(optimizer.state_dict(), saved)
        assert identical([p.detach() for p in params], held)
    else:  # a step of which there was nothing to compile
        assert optimizer.param_groups[0]["k"] == 3
        assert not identical([p.detach() for p in params], held)


def test_a_v_that_is_rounded_in_place_is_left_to_eager_code():
    """Inductor leaves out conversions to bfloat16 and back, which round it."""
    torch.compiler.reset()
    compiled = []

    def keeps(graph, inputs):
        compiled.extend(inputs)
        return graph.forward

    results = []
    for compiles in (True, False):
        params = parameters(SHAPES[:1])
        optimizer = build(
            "AdamWScheduleFreeAlgoPerf", params, moment_dtype=torch.bfloat16
        )
        take = torch.compile(optimizer.step, backend=keeps) if compiles else None
        run(optimizer, params, range(STEPS), take)
        results.append(iterates(optimizer, params))
    assert compiled == []
    assert_same_iterates(*results, 0)


def test_compiled_code_is_handed_the_arrays_and_one_tensor_of_numbers():
    """It looks at each thing that it is handed at every step, which takes time: those
    of small parameters are one."""
    torch.compiler.reset()
    handed = []

    def keeps(graph, inputs):
        handed.append(len(inputs))
        return graph.forward

    params = parameters(SHAPES)
    optimizer = build("AdamWScheduleFree", params)
    run(optimizer, params, range(2), torch.compile(optimizer.step, backend=keeps))
    arrays = len(["the small ones", "large"]) * len(["y", "z", "v", "gradient"])
    assert sum(handed) == arrays + 1
