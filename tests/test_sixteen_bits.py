"""State in bfloat16, rounded at random: the same bits in both frameworks."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sf_jax
import sf_torch
from benchmarks.sixteen_bits import error as error_of_x
from parity_tests.reference import rounding as reference
from sf_jax import _rounding as in_jax
from sf_jax import torch_checkpoint
from sf_torch._step import rounding as in_torch

# Threefry2x32 with 20 rounds, from the known answers of its authors (Random123).
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]
ROWS = {"y": "param", "z": "z", "v": "exp_avg_sq", "m": "exp_avg", "x": "x"}
B16, T16 = jnp.bfloat16, torch.bfloat16


def words_of(pair):
    return tuple(int(np.asarray(word)[0]) for word in pair)


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN)
def test_the_generator_gives_the_known_answers(key, counter, expected):
    arrays = [np.array([c], np.uint32) for c in counter]
    assert words_of(reference.threefry2x32(key, tuple(arrays))) == expected
    assert words_of(in_jax.threefry2x32(key, tuple(map(jnp.asarray, arrays)))) == (
        expected
    )
    tensors = tuple(torch.tensor([c]) for c in counter)
    assert words_of(in_torch.threefry2x32(key, tensors)) == expected


def test_all_three_have_the_same_bits_for_every_array():
    seen = set()
    for leaf, step, array in [(0, 0, "y"), (3, 123456, "z"), (3, 2**31 - 1, "v")] + [
        (1, 9, array) for array in ROWS
    ]:
        shape = (3, 5)
        right = reference.random_bits(7, leaf, step, array, shape)
        ours = in_jax.random_bits(7, leaf, jnp.int32(step), array, shape)
        np.testing.assert_array_equal(ours, right)
        key = in_torch.Rounding(7, leaf, step)
        size = torch.Size(shape)
        theirs = in_torch.random_bits(key, ROWS[array], size, torch.device("cpu"))
        np.testing.assert_array_equal(theirs.numpy(), right)
        assert right.max() < 2**16
        seen.add(right.tobytes())
    assert len(seen) == 8


def test_rounding_is_right_in_the_mean_and_leaves_what_is_exact_alone():
    low, high = 1.0, 1.0 + 2.0**-7  # neighbours in bfloat16
    value = np.full(2**16, low + 0.3 * (high - low), np.float32)
    bits = np.random.default_rng(0).permutation(2**16).astype(np.uint32)
    special = np.array([0, -0.0, 1.5, np.inf, -np.inf, np.nan, 1e-40], np.float32)
    many = np.full(7, 2**16 - 1, np.uint32)
    subnormal = float(np.float32(1e-40))
    for to_bfloat16 in (
        reference.to_bfloat16,
        lambda v, b: in_jax.to_bfloat16(jnp.asarray(v), jnp.asarray(b)),
        lambda v, b: in_torch.to_bfloat16(
            torch.tensor(v), torch.tensor(b.astype(np.int32))
        ).float(),
    ):
        for sign in (1, -1):
            up = np.asarray(to_bfloat16(sign * value, bits), np.float64)
            assert set(up) == {sign * low, sign * high}
            # All 2^16 numbers of bits occur once.
            assert np.mean(up == sign * high) == pytest.approx(0.3, abs=2.0**-16)
        found = np.asarray(to_bfloat16(special, many), np.float64)
        np.testing.assert_array_equal(found[:6], special[:6])
        assert subnormal <= found[6] <= 2.0**-126


def lean_ys(y, z, next_z, c):
    """y' of all three voices, before it is rounded; β = 0.9."""
    numbers = in_torch.Numbers().averaged(c, 0.9, 0.9)
    tensors = [torch.tensor(a) for a in (y, z, next_z)]
    share = in_jax.share_of_z(0.9)
    scalars = share, share, jnp.float32(0.9 * c), jnp.float32(c)
    return [
        reference.lean_y(y, z, next_z, c, 0.9, 0.9),
        in_jax.lean_y(*map(jnp.asarray, (y, z, next_z)), in_jax.LeanNumbers(*scalars)),
        in_torch.lean_y(*tensors, numbers).numpy(),
    ]


def test_y_follows_z_by_whole_digits_and_is_rounded_only_where_x_moves():
    rng = np.random.default_rng(0)
    zs = (1.5 + 0.2 * rng.normal(size=(20, 200))).astype(B16).astype(np.float32)
    first = y = (1.5 + 0.1 * rng.uniform(-1, 1, 200)).astype(B16).astype(np.float32)
    for z, next_z in itertools.pairwise(zs):
        still = lean_ys(y, z, next_z, 0.0)
        moved = lean_ys(y, z, next_z, 0.01)
        for a, b in zip(still, moved, strict=True):
            np.testing.assert_array_equal(a, still[0])
            # float32 numbers, whose sums a compiler may join.
            np.testing.assert_allclose(b, moved[0], rtol=2**-22)
        y = still[0]
        assert np.all(y == y.astype(B16).astype(np.float32))  # exactly, unrounded
    back = lean_ys(y, zs[-1], zs[0], 0.0)[0]
    np.testing.assert_array_equal(back, first)


def test_digits_of_zeros_and_of_extreme_numbers():
    y = np.array([0, -0.0, 1, 1e-30, 3e38, 1e-40, 1e-3, 1], np.float32)
    share = np.array([0, 0.3, 3e38, 3e37, 1e-30, 1e-39, -0.1, 2**-8], np.float32)
    right = reference.in_digits_of(y, share)
    # A share that has fewer digits than would be dropped stays whole; halves are even.
    np.testing.assert_array_equal(right[[0, 1, 2, 3, 7]], [0, *share[1:4], 0])
    np.testing.assert_array_equal(
        in_jax.in_digits_of(*map(jnp.asarray, (y, share))), right
    )
    found = in_torch.in_digits_of(*map(torch.tensor, (y, share)))
    np.testing.assert_array_equal(found.numpy(), right)


OPTIMIZERS = {
    "sgd": (
        partial(sf_jax.schedule_free_sgd, 0.05, weight_decay=0.01),
        partial(sf_torch.SGDScheduleFree, lr=0.05, weight_decay=0.01),
        0,
    ),
    "adamw": (
        partial(sf_jax.schedule_free_adamw, 0.01, moment_dtype=B16),
        partial(sf_torch.AdamWScheduleFree, lr=0.01, moment_dtype=T16),
        1,
    ),
    "adamw_momentum_and_x": (
        partial(
            sf_jax.schedule_free_adamw,
            0.01,
            moment_dtype=B16,
            inner_momentum=0.9,
            store_x=True,
        ),
        partial(
            sf_torch.AdamWScheduleFree,
            lr=0.01,
            moment_dtype=T16,
            inner_momentum=0.9,
            store_x=True,
        ),
        3,
    ),
}
SHAPES, STEPS = ((64, 16), (32,)), 300


def start():
    """Weights too large to halve, double or change their sign within a step: optax adds
    an update in bfloat16 to y, and such an update is rounded."""
    rng = np.random.default_rng(0)
    return [(8 + 0.8 * rng.normal(size=s)).astype(jnp.bfloat16) for s in SHAPES]


def gradients():
    rng = np.random.default_rng(1)
    return [
        (0.1 + rng.normal(size=(STEPS, *shape))).astype(jnp.bfloat16)
        for shape in SHAPES
    ]


@functools.cache
def jax_step(name):
    tx = OPTIMIZERS[name][0](state_dtype=B16, rounding="stochastic", seed=5)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return tx, jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads)[0])


def raw(tree):
    """The bits of all arrays of the tree."""
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def run_in_torch(name, resumed_at=None):
    params = [
        torch.nn.Parameter(torch.tensor(w.astype(np.float32)).to(T16)) for w in start()
    ]
    build = partial(OPTIMIZERS[name][1], state_dtype=T16, rounding="stochastic", seed=5)
    optimizer = build(params)
    optimizer.train()
    grads = [torch.tensor(g.astype(np.float32)).to(T16) for g in gradients()]
    for k in range(STEPS):
        if k == resumed_at:
            saved = optimizer.state_dict()
            # The seed is the group's, whatever the new optimizer was built with.
            optimizer = OPTIMIZERS[name][1](
                params, state_dtype=T16, rounding="stochastic", seed=6
            )
            optimizer.load_state_dict(saved)
        for p, g in zip(params, grads, strict=True):
            p.grad = g[k]
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def run_in_numpy(name):
    """The lean step in float32 as its formulas stand, each array rounded at random."""
    f = np.float32
    arrays = []
    for leaf, (w, grads) in enumerate(zip(start(), gradients(), strict=True)):

        def enter(value, array, k, leaf=leaf):
            bits = reference.random_bits(5, leaf, k, array, value.shape)
            return reference.to_bfloat16(value, bits).astype(f)

        y = w.astype(f)
        z, v = y.copy(), np.zeros_like(y)
        for k in range(STEPS):
            g = grads[k].astype(f)
            if name == "sgd":
                next_z = z - (f(0.05) * g + f(0.05 * 0.01) * y)
            else:
                v = enter(v + f(1 - 0.999) * (g * g - v), "v", k)
                root = f((1 - 0.999 ** (k + 1)) ** -0.5) * np.sqrt(v) + f(1e-8)
                next_z = z - f(0.01) * (g / root)
            next_z = enter(next_z, "z", k)
            next_y = reference.lean_y(y, z, next_z, 1 / (k + 1), 0.9, 0.9)
            y, z = enter(next_y, "y", k), next_z
        arrays.append({"y": y, "z": z, "v": v})
    return arrays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_has_the_same_bits_resumed_on_eight_devices_and_elsewhere(name):
    tx, run = jax_step(name)
    params = [jnp.asarray(w) for w in start()]
    grads = [jnp.asarray(g) for g in gradients()]
    begin = (params, tx.init(params))
    whole = run(begin, grads)
    half = STEPS // 2
    resumed = run(run(begin, [g[:half] for g in grads]), [g[half:] for g in grads])
    assert raw(resumed) == raw(whole)

    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    assert mesh.size == 8

    def place(a, *spec):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    rows = jax.tree.map(lambda a: place(a, "d") if a.ndim else place(a), begin)
    assert raw(run(rows, [place(g, None, "d") for g in grads])) == raw(whole)

    ours, states = run_in_torch(name)
    again, _ = run_in_torch(name, resumed_at=half)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)
    y, state = whole
    in_numpy = None if "momentum" in name else run_in_numpy(name)
    for i, p in enumerate(ours):
        pairs = {"y": (y[i], p), "z": (state.z[i], states[i]["z"])}
        if OPTIMIZERS[name][2]:
            pairs["v"] = state.base_state.nu[i], states[i]["exp_avg_sq"]
        for key, (a, b) in pairs.items():
            theirs = b.detach().float().numpy()
            np.testing.assert_array_equal(np.asarray(a, np.float32), theirs)
            if in_numpy is not None:
                np.testing.assert_array_equal(theirs, in_numpy[i][key])
    size = sum(t.nbytes for t in states[0].values() if isinstance(t, torch.Tensor))
    arrays = 1 + OPTIMIZERS[name][2]
    assert size == 2 * arrays * ours[0].numel()
    mine = [state.z, state.x, state.base_state]
    assert sum(a.nbytes for a in jax.tree.leaves(mine)) == 2 * arrays * sum(
        w.size for w in start()
    )


def sixteen_bits_in_torch(seed=5, **options):
    """A parameter and its optimizer, in train mode."""
    p = torch.nn.Parameter(torch.tensor(start()[0].astype(np.float32)).to(T16))
    narrow = {"state_dtype": T16, "moment_dtype": T16, "rounding": "stochastic"}
    optimizer = sf_torch.AdamWScheduleFree([p], **(narrow | {"seed": seed} | options))
    optimizer.train()
    return torch.nn.ParameterList([p]), optimizer


def torch_steps(model, optimizer, first, last):
    (p,) = model
    for g in gradients()[0][first:last]:
        p.grad = torch.tensor(g.astype(np.float32)).to(p.dtype)
        optimizer.step()


def bits_of(model, optimizer):
    """The bits of y, z and v."""
    (p,) = model
    rows = optimizer.state[p]
    arrays = p.detach(), rows["z"], rows["exp_avg_sq"]
    assert all(a.dtype == T16 for a in arrays)
    return [a.view(torch.int16) for a in arrays]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_file_carries_seed_and_dtypes(mode, tmp_path):
    model, optimizer = sixteen_bits_in_torch()
    torch_steps(model, optimizer, 0, 4)
    for part in (model, optimizer):
        getattr(part, mode)()
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    # Built to round to nearest and with wide state: the file says otherwise.
    wide = {"state_dtype": None, "moment_dtype": None, "rounding": "nearest"}
    again = sixteen_bits_in_torch(seed=6, **wide)
    sf_torch.load_checkpoint(tmp_path / "run.pt", *again)
    for run in ((model, optimizer), again):
        for part in run:
            part.train()
        torch_steps(*run, 4, 8)
    assert all(map(torch.equal, bits_of(model, optimizer), bits_of(*again)))


@pytest.mark.slow
def test_orbax_carries_the_dtypes_and_the_seed_is_the_optimizer_s(tmp_path):
    tx, run = jax_step("adamw")
    params = [jnp.asarray(w) for w in start()]
    grads = [jnp.asarray(g)[:8] for g in gradients()]
    half = run((params, tx.init(params)), [g[:4] for g in grads])
    whole = run(half, [g[4:] for g in grads])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: (params, tx.init(params)))
        back = checkpointer.restore(tmp_path / "run", shapes)
    assert raw(run(back, [g[4:] for g in grads])) == raw(whole)


def test_torch_checkpoint_takes_the_bits_over_and_back():
    model, optimizer = sixteen_bits_in_torch()
    torch_steps(model, optimizer, 0, 4)
    tx = sf_jax.schedule_free_adamw(state_dtype=B16, moment_dtype=B16)
    params = {"w": jnp.zeros(SHAPES[0], B16)}
    names = [torch_checkpoint.Leaf("0", "w")]
    saved = model.state_dict(), optimizer.state_dict()
    y, state = torch_checkpoint.from_torch(
        *saved, params, tx.init(params), names=names
    )[:2]
    found = y["w"], state.z["w"], state.base_state.nu["w"]
    for a, b in zip(found, bits_of(model, optimizer), strict=True):
        assert a.dtype == B16
        np.testing.assert_array_equal(np.asarray(a).view(np.int16), b.numpy())
    back = torch_checkpoint.to_torch(y, state, *saved, names=names)
    for key in ("z", "exp_avg_sq"):
        there = back[1]["state"][0][key]
        assert there.dtype == T16
        assert torch.equal(there, optimizer.state[model[0]][key])


def test_a_run_goes_on_in_float32_and_comes_back():
    """x moves by no more than the rounding of y and z; the options are the group's."""
    model, optimizer = sixteen_bits_in_torch(lr=0.01)
    torch_steps(model, optimizer, 0, 20)
    (x,) = optimizer.eval_params(torch.float32)
    narrow = {"state_dtype": T16, "moment_dtype": T16, "rounding": "stochastic"}
    wide = {"state_dtype": None, "moment_dtype": None, "rounding": "nearest"}
    saved = optimizer.state_dict()

    other = torch.nn.ParameterList([model[0].detach().float()])
    in_full = sf_torch.AdamWScheduleFree(other, lr=0.01)
    in_full.load_state_dict(saved)
    in_full.param_groups[0].update(wide)
    torch.testing.assert_close(in_full.eval_params()[0], x, rtol=2**-22, atol=0)
    torch_steps(other, in_full, 20, 25)
    state = in_full.state[other[0]]
    assert {a.dtype for a in (state["z"], state["exp_avg_sq"])} == {torch.float32}

    (x,) = in_full.eval_params()
    saved = in_full.state_dict()
    again, optimizer = sixteen_bits_in_torch(seed=9)
    again[0].data.copy_(other[0])
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(narrow)
    torch_steps(again, optimizer, 25, 26)
    torch_steps(other, in_full, 25, 26)
    assert bits_of(again, optimizer)
    (found,), (right,) = optimizer.eval_params(torch.float32), in_full.eval_params()
    assert torch.all((found - right).abs() <= 3 * 2**-8 / 0.9 * right.abs())


def test_a_run_in_jax_goes_on_in_float32_and_comes_back():
    tx, run = jax_step("adamw")
    params = [jnp.asarray(w) for w in start()]
    grads = [jnp.asarray(g)[:4] for g in gradients()]
    y, state = run((params, tx.init(params)), grads)
    in_full = sf_jax.schedule_free_adamw(0.01)

    def cast(tree, dtype):
        return jax.tree.map(lambda a: a.astype(dtype) if a.ndim else a, tree)

    wide_y, wide = cast((y, state), jnp.float32)
    x = sf_jax.eval_params(state, wide_y)
    for found, right in zip(sf_jax.eval_params(wide, wide_y), x, strict=True):
        np.testing.assert_array_equal(found, right)
    g = [g[0].astype(jnp.float32) for g in grads]
    updates, wide = in_full.update(g, wide, wide_y)
    wide_y = optax.apply_updates(wide_y, updates)
    assert {a.dtype for a in jax.tree.leaves((wide.z, wide.base_state))} == {
        jnp.dtype(jnp.float32)
    }
    right = sf_jax.eval_params(wide, wide_y)
    y, state = cast((wide_y, wide), B16)
    found = sf_jax.eval_params(state, cast(y, jnp.float32))
    for a, b in zip(found, right, strict=True):
        assert np.all(np.abs(a - b) <= 2 * 2**-8 / 0.9 * np.abs(b))


OTHERS = {
    "radam": (
        partial(sf_jax.schedule_free_radam, 0.01, weight_decay=0.01),
        partial(sf_torch.RAdamScheduleFree, lr=0.01, weight_decay=0.01),
    ),
    "gpa": (
        partial(sf_jax.gpa_adamw, 0.01, weight_decay=0.01),
        partial(sf_torch.GPAAdamW, lr=0.01, weight_decay=0.01),
    ),
    "refined": (
        partial(sf_jax.schedule_free_adamw, 0.01, average=sf_jax.refined_average(50.0)),
        partial(sf_torch.AdamWScheduleFreeRefined, lr=0.01, refined_c=50.0),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_members_that_step_like_adamw_round_alike_too(name):
    ours, theirs = OTHERS[name]
    w, grads = start()[0], gradients()[0][:20]
    tx = ours(state_dtype=B16, moment_dtype=B16, rounding="stochastic", seed=3)
    y, state = jnp.asarray(w), tx.init(jnp.asarray(w))
    p = torch.nn.Parameter(torch.tensor(w.astype(np.float32)).to(T16))
    options = {"state_dtype": T16, "moment_dtype": T16, "rounding": "stochastic"}
    optimizer = theirs([p], **options, seed=3)
    optimizer.train()
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(jnp.asarray(g), state, y)
        y = optax.apply_updates(y, updates)
        p.grad = torch.tensor(g.astype(np.float32)).to(T16)
        optimizer.step()
    rows = optimizer.state[p]
    for a, b in (
        (y, p.detach()),
        (state.z, rows["z"]),
        (state.base_state.nu, rows["exp_avg_sq"]),
    ):
        assert a.dtype == B16
        np.testing.assert_array_equal(np.asarray(a, np.float32), b.float().numpy())
    assert not np.array_equal(np.asarray(y), w)


def test_the_error_stays_near_that_of_float32():
    """The ratios that docs/precision.md tells; rounded to nearest it is above 30."""
    narrow = {"state_dtype": B16, "moment_dtype": B16, "rounding": "stochastic"}
    truth = [error_of_x(s, jnp.float32) for s in range(2)]
    for dtype, options, most in (
        (jnp.float32, narrow, 1.15),
        (B16, narrow | {"store_x": True}, 1.35),
        (B16, narrow, 1.3),
    ):
        error = [error_of_x(s, dtype, **options) for s in range(2)]
        assert np.mean(error) <= most * np.mean(truth)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        (
            {"rounding": "stochastic"},
            ValueError,
            "is to bfloat16, got state_dtype=None",
        ),
        ({"seed": -1}, ValueError, r"seed must be a whole number in \[0, 4294967295\]"),
        ({"seed": 0.5}, TypeError, r"seed must be a whole number in \[0, 4294967295\]"),
    ],
)
def test_what_cannot_be_is_refused_by_both(options, error, match):
    for ours in (sf_jax.schedule_free_sgd, sf_jax.schedule_free_adamw):
        with pytest.raises(error, match=match):
            ours(**options)
    for theirs in (sf_torch.SGDScheduleFree, sf_torch.AdamWScheduleFree):
        with pytest.raises(error, match=match):
            theirs([torch.nn.Parameter(torch.ones(2))], **options)


def test_decay_as_published_and_other_members_are_refused():
    """The one rounds to nearest on its way, the others have no such option."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    match = "upstream_compatible does not go with rounding"
    options = {"rounding": "stochastic", "upstream_compatible": True}
    with pytest.raises(ValueError, match=match):
        sf_jax.gpa_adamw(state_dtype=B16, **options)
    with pytest.raises(ValueError, match=match):
        sf_torch.GPAAdamW([p], state_dtype=T16, **options)
    with pytest.raises(ValueError, match="an option of SGD, AdamW, RAdam and GPA"):
        sf_torch.MuonScheduleFree([{"params": [p], "rounding": "stochastic"}])


def test_a_compiled_step_rounds_like_the_eager_one():
    """It calls the plain formula, since the random bits go by a parameter's place."""
    eager, compiled = sixteen_bits_in_torch(), sixteen_bits_in_torch()
    compiled[1].step = torch.compile(compiled[1].step, backend="eager")
    for run in (eager, compiled):
        torch_steps(*run, 0, 3)
    assert all(map(torch.equal, bits_of(*eager), bits_of(*compiled)))


def test_kernels_that_round_to_nearest_are_refused():
    options = {"state_dtype": T16, "rounding": "stochastic"}
    for option in ("fused", "capturable"):
        with pytest.raises(ValueError, match=f"{option}=True"):
            sf_torch.AdamWScheduleFree(
                [torch.nn.Parameter(torch.ones(2))], **options, **{option: True}
            )
