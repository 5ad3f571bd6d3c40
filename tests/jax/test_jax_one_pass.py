"""The step compiled for the device at hand: what it copies, fuses and writes in place.

XLA for CPUs makes one loop for every array that is written, so the step is not one
pass there as it is on TPUs (test_tpu_compile.py); what it may cost is counted here.
For GPUs test_gpu_compile.py does; where there is one, `JAX_PLATFORMS=cuda python -m
pytest tests/jax/test_jax_one_pass.py` asks the compiler of its own driver.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_steps import FAMILY, OPTIMIZERS, OVER_OPTAX, accessed, compile_step, passes

import sf_jax

SIZE = 2**20
LEAVES = 2
SCALARS = 4096  # bytes that the numbers of a step may take

# Arrays that the loops of a lean float32 step read and write on CPUs, the copy of z
# included: v' from (v, g), z' from (z, y, g, v'), y' from (y, z', z); no y in z' where
# nothing decays at it. Momentum adds m' from (m, g), and m' for g in z'. The sums of
# ScheduleFree+ are one loop over (g, z, y) and one over g.
ON_CPU = {
    "sgd": 10,
    "adamw": 14,
    "adamw_decay_at_x": 14,
    "adamw_momentum": 16,
    "adamw_paper": 13,
    "adamw_algoperf": 14,
    "adamw_b1_schedule": 13,
    "radam": 14,
    "wrapped_rmsprop": 13,
    "plus": 21,
    "refined": 14,
    "refined_momentum": 17,
    "gpa": 16,
    "gpa_no_momentum": 13,
}

on_cpu = pytest.mark.skipif(
    "jax.default_backend() != 'cpu'", reason="about loops that write one array each"
)


def leaves(dtype=jnp.float32, count=LEAVES, size=SIZE):
    return [jax.ShapeDtypeStruct((size,), dtype)] * count


@pytest.fixture(
    scope="module",
    params=[(jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)],
    ids=["lean", "stored", "bfloat16"],
)
def dtype_and_x(request):
    return request.param


@pytest.mark.parametrize("name", OPTIMIZERS | FAMILY)
def test_a_step_reads_and_writes_no_more_than_it_must(name, dtype_and_x):
    dtype, store_x = dtype_and_x
    optimizer = (OPTIMIZERS | FAMILY)[name]
    compiled = compile_step(optimizer.make(store_x=store_x), leaves(dtype))

    half = jnp.dtype(dtype).itemsize / 4
    has_x = store_x or half < 1
    # Arrays a leaf: the parameter, z, x and the moments.
    written = 2 + has_x + optimizer.moments
    copies, fusions = passes(compiled, SIZE)
    memory = compiled.memory_analysis()
    # Everything that is written is written in place.
    in_place = (written - 1 + half) * 4 * SIZE * LEAVES
    assert memory.alias_size_in_bytes >= in_place
    if jax.default_backend() == "cpu":
        # The loop of y' looks at z after that of z' has run. With x it need not.
        assert copies == (0 if has_x else LEAVES)
        # XLA's sums on CPUs take nothing narrower than float32, so want wide gradients.
        widened = LEAVES if optimizer.sums and half < 1 else 0
        assert fusions == written * LEAVES + widened
        temporaries = (copies + widened) * 4 * SIZE + SCALARS
        most = None if has_x else ON_CPU[name]
    else:
        assert copies == 0
        assert fusions == LEAVES
        temporaries = SCALARS
        most = optimizer.arrays(has_x, half)
    assert memory.temp_size_in_bytes <= temporaries
    if most is not None:
        assert accessed(compiled, SIZE * LEAVES) <= most + 0.1


def test_every_optimizer_is_compiled_somewhere():
    made = {optimizer.make.func for optimizer in (OPTIMIZERS | FAMILY).values()}
    made |= {ours for ours, _ in OVER_OPTAX.values()}
    public = {name for name in sf_jax.__all__ if "schedule_free" in name}
    assert {sf_jax.gpa_adamw, *(getattr(sf_jax, name) for name in public)} <= made


@on_cpu
@pytest.mark.parametrize("name", OVER_OPTAX)
def test_over_a_base_of_optax_only_the_move_of_y_comes_on_top(name):
    ours, base = OVER_OPTAX[name]
    leaf = jax.ShapeDtypeStruct((64, SIZE // 64), jnp.float32)
    both = [compile_step(tx, [leaf] * LEAVES) for tx in (base, ours())]
    arrays = [accessed(compiled, SIZE * LEAVES) for compiled in both]
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in both]
    # y' from (y, z', z), and the copy of z.
    assert arrays[1] - arrays[0] <= 4 + 2 + 0.1
    assert temporaries[1] - temporaries[0] <= LEAVES * 4 * SIZE + SCALARS


@on_cpu
@pytest.mark.parametrize("store_x", [False, True], ids=["lean", "stored"])
def test_donation_in_another_order_than_returned_copies(store_x):
    """Why the documents insist on the order: XLA pairs buffers as they come."""
    tx = sf_jax.schedule_free_adamw(0.01, weight_decay=0.1, store_x=store_x)
    right = compile_step(tx, leaves())
    wrong = compile_step(tx, leaves(), returned_first="state")
    copies = passes(wrong, SIZE)[0] - passes(right, SIZE)[0]
    assert copies >= LEAVES
    assert accessed(wrong, SIZE) - accessed(right, SIZE) >= copies * 2 - 0.1


@on_cpu
def test_the_count_would_catch_another_pass():
    """A step that looks at the whole new z before it moves y needs one loop more."""
    tx = sf_jax.schedule_free_sgd(0.1)

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        largest = optax.tree.max(state.z)
        return jax.tree.map(lambda u: u / largest, updates), state

    looks_twice = optax.GradientTransformation(tx.init, update)
    once, twice = (
        accessed(compile_step(t, leaves()), SIZE * LEAVES) for t in (tx, looks_twice)
    )
    assert twice >= once + 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_flatten_computes_all_leaves_in_as_many_loops_as_one(name):
    """optax.flatten: z and the moments are one vector, moved by one loop each."""
    count, size = 12, 2**13
    optimizer = OPTIMIZERS[name]
    tx = optax.flatten(optimizer.make())
    compiled = compile_step(tx, leaves(count=count, size=size))
    _, fusions = passes(compiled, count * size)
    assert 1 <= fusions <= 1 + optimizer.moments
    # Its price: parameters and gradients as vectors too.
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries <= 2 * 4 * count * size + SCALARS
