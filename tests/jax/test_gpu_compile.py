"""The step compiled ahead of time for NVIDIA's GPUs: one kernel a leaf, one pass.

Runs on any machine where the compiler's packages install (`make gpu`): no driver and no
device is looked for. What it asserts is read from the program that XLA made.
"""

import math
import pathlib

import jax.numpy as jnp
import optax
import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="`make gpu` brings it")

from gpu_steps import (
    ALL,
    FORMS,
    GPUS,
    LEAF,
    ONE_LEAF,
    compile_for_gpu,
    member,
    prepare,
    table,
)
from jax_steps import OVER_OPTAX, SIXTEEN_BITS

from benchmarks.trees import gpt2

TREES = {"one_leaf": ONE_LEAF, "gpt2": gpt2().shapes}
SCALARS = 0.01  # of the float32 parameters: what numbers and partial sums may add
LAUNCHES = 14  # that compute numbers; ScheduleFree+ needs the most
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md"

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("ahead_of_time")]


@pytest.fixture(scope="module", autouse=True)
def compiler():
    prepare()


def rows():
    """(gpu, tree, name, form): all, most of those with many leaves marked as slow."""
    for gpu in GPUS:
        for tree in TREES:
            for name in ALL:
                for form in FORMS:
                    # One rule moves all, and compiles alike for all three.
                    quick = tree == "one_leaf" or (gpu == GPUS[0] and form == "lean")
                    row = (gpu, tree, name, form)
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(*row, marks=marks, id="-".join(row))


def size(shapes):
    return sum(map(math.prod, shapes))


def half(form):
    """Size of a parameter, as a share of float32's."""
    return jnp.dtype(FORMS[form][0]).itemsize / 4


def most_arrays(name, form):
    return ALL[name].arrays(form != "lean", half(form)) + SCALARS


@pytest.mark.parametrize(("gpu", "tree", "name", "form"), list(rows()))
def test_a_step_is_one_kernel_a_leaf_and_one_pass_over_memory(gpu, tree, name, form):
    """But for the sums of ScheduleFree+, which are a kernel and a pass of their own."""
    shapes, optimizer = TREES[tree], ALL[name]
    program = member(name, form, gpu, shapes)
    array = 4 * size(shapes)

    assert {kernel.kind for kernel in program.over_arrays} == {"fusion"}
    assert len(program.over_arrays) <= len(shapes) * (1 + optimizer.sums)
    # The two sums of each leaf are numbers in the end.
    most = LAUNCHES + 2 * len(shapes) * optimizer.sums
    assert len(program.over_numbers) <= most
    assert program.moved <= most_arrays(name, form) * array
    assert program.temporaries <= SCALARS * array
    # Everything that is written is written in place.
    written = 1 + (form != "lean") + optimizer.moments + half(form)
    assert program.in_place >= written * array


@pytest.mark.parametrize("name", SIXTEEN_BITS)
@pytest.mark.parametrize("count", [1, 8])
def test_sixteen_bits_with_their_random_bits_are_one_kernel_too(name, count):
    """An element's place in the whole array is known on its device: nothing is sent."""
    make, arrays = SIXTEEN_BITS[name]
    program = compile_for_gpu(make(), dtype=jnp.bfloat16, count=count)
    array = 2 * LEAF / count
    assert [kernel.kind for kernel in program.over_arrays] == ["fusion"]
    kinds = {kernel.kind for kernel in program.kernels}
    assert kinds <= {"fusion", "copy", "partition-id"}
    assert program.moved <= (arrays + SCALARS) * array
    assert program.temporaries <= SCALARS * array
    assert program.in_place >= (arrays - 1) // 2 * array


@pytest.mark.parametrize("name", ALL)
def test_eight_devices_send_each_other_nothing(name):
    """But for the sums of ScheduleFree+: both of them at once."""
    program = member(name, "lean", count=8)
    sent = [k for k in program.kernels if k.kind not in ("fusion", "copy")]
    expected = [("all-reduce-start", "f32[2]{0}")] if ALL[name].sums else []
    assert [(kernel.kind, kernel.result) for kernel in sent] == expected
    assert program.moved <= most_arrays(name, "lean") * 4 * LEAF / 8
    assert program.temporaries <= SCALARS * 4 * LEAF / 8


@pytest.mark.parametrize("name", OVER_OPTAX)
def test_over_a_base_of_optax_only_y_comes_on_top(name):
    ours, base = OVER_OPTAX[name]
    shapes = ((2048, 8192),)
    array = 4 * size(shapes)
    alone, whole = (compile_for_gpu(tx, shapes) for tx in (base, ours()))
    assert whole.moved - alone.moved <= (2 + SCALARS) * array
    assert whole.temporaries - alone.temporaries <= SCALARS * array


def looks_at_all_of_z_before_y_moves(tx):
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        norms = [jnp.linalg.norm(z) for z in state.z]
        return [u / norm for u, norm in zip(updates, norms, strict=True)], state

    return optax.GradientTransformation(tx.init, update)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_limits_would_catch_a_second_pass(name):
    program = compile_for_gpu(looks_at_all_of_z_before_y_moves(ALL[name].make()))
    assert len(program.over_arrays) > 1
    assert program.moved >= (most_arrays(name, "lean") + 1) * 4 * LEAF


def test_the_document_has_the_table():
    """Which `python tests/jax/gpu_steps.py` prints."""
    assert table() in DOCUMENT.read_text()
