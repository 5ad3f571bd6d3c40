"""A PyTorch run goes on in JAX, and back, as if it had never moved."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import schedulefree
import torch
from flax import nnx

import sf_jax
import sf_torch
from sf_jax.torch_checkpoint import Leaf, from_torch, guess_names, to_torch

LR, WARMUP, DECAY = 0.05, 7, 0.1
BEFORE, AFTER = 10, 20  # the move falls behind the warmup
FEW_ULPS = 8  # both work in float32; 30 steps of rounding in a few operations each


class TorchNet(torch.nn.Module):
    """One of each common layer; only its shapes and names matter here."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.conv = torch.nn.Conv2d(2, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.layer_norm = torch.nn.LayerNorm(6)
        self.fc1 = torch.nn.Linear(6, 5)
        self.fc2 = torch.nn.Linear(5, 3, bias=False)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, tokens, images):
        h = nn.Dense(5, name="fc1")(
            nn.LayerNorm(name="layer_norm")(nn.Embed(7, 6, name="embed")(tokens))
        )
        h = nn.Dense(3, use_bias=False, name="fc2")(h)
        images = nn.Conv(4, (3, 3), name="conv")(images)
        return h, nn.BatchNorm(use_running_average=False, name="norm")(images)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layer_norm = nnx.LayerNorm(6, rngs=rngs)
        self.fc1 = nnx.Linear(6, 5, rngs=rngs)
        self.fc2 = nnx.Linear(5, 3, use_bias=False, rngs=rngs)


@functools.cache
def linen_variables():
    """Zeros of the right structure: nothing of them may be left in the end."""
    images = jnp.zeros((1, 4, 4, 2))
    shapes = jax.eval_shape(
        LinenNet().init, jax.random.key(1), jnp.zeros(1, int), images
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def torch_net(seed=0):
    torch.manual_seed(seed)
    net = TorchNet()
    net.norm.running_mean.uniform_()
    net.norm.running_var.uniform_(1, 2)
    return net


@functools.cache
def gradients(step):
    """By PyTorch's names, of sizes between 0.01 and 10."""
    rng = np.random.default_rng([7, step])
    return {
        name: (rng.normal(size=p.shape) * 10.0 ** rng.integers(-2, 2)).astype("float32")
        for name, p in torch_net().named_parameters()
    }


def torch_steps(net, optimizer, start, stop):
    for step in range(start, stop):
        for name, p in net.named_parameters():
            p.grad = torch.tensor(gradients(step)[name]).to(p.dtype)
        optimizer.step()


@functools.cache
def jitted_step(tx):
    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def jax_steps(rows, tx, params, opt_state, start, stop):
    row_of = {row.jax: row for row in rows}
    step = jitted_step(tx)

    def in_jax(step):
        def grad(path, leaf):
            row = row_of["/".join(str(entry.key) for entry in path)]
            return row.to_jax(gradients(step)[row.torch], leaf.shape)

        return jax.tree.map_with_path(grad, params)

    for number in range(start, stop):
        params, opt_state = step(params, opt_state, in_jax(number))
    return params, opt_state


def in_torch(rows, params):
    leaves = {
        "/".join(str(entry.key) for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    shapes = {name: p.shape for name, p in torch_net().named_parameters()}
    return {
        row.torch: row.to_torch(leaves[row.jax], shapes[row.torch])
        for row in rows
        if row.torch in shapes
    }


def ulps(ours, theirs):
    """The worst distance over all leaves in units of 2^-23 max(1, max|w|)."""
    assert ours.keys() == theirs.keys()
    return max(
        np.abs(ours[name] - theirs[name]).max()
        / (2.0**-23 * max(1.0, np.abs(theirs[name]).max()))
        for name in ours
    )


def y_of(net):
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


def x_of(net, optimizer):
    optimizer.eval()
    x = y_of(net)
    optimizer.train()
    return x


def adamw(package, **options):
    return lambda params: package.AdamWScheduleFree(
        params, lr=LR, warmup_steps=WARMUP, weight_decay=DECAY, **options
    )


def sgd(package):
    return lambda params: package.SGDScheduleFree(
        params, lr=LR, warmup_steps=WARMUP, weight_decay=DECAY, momentum=0.8
    )


def radam(package):
    return lambda params: package.RAdamScheduleFree(params, lr=LR, betas=(0.9, 0.9))


def wrapper(package):
    def make(params):
        base = torch.optim.SGD(params, lr=LR, momentum=0.5)
        return package.ScheduleFreeWrapper(base, momentum=0.9)

    return make


TO_JAX = {
    "sgd": sf_jax.schedule_free_sgd(LR, WARMUP, b1=0.8, weight_decay=DECAY),
    "adamw": sf_jax.schedule_free_adamw(LR, WARMUP, weight_decay=DECAY),
    "adamw_x": sf_jax.schedule_free_adamw(LR, WARMUP, weight_decay=DECAY, store_x=True),
    "inner_momentum": sf_jax.schedule_free_adamw(
        LR, WARMUP, weight_decay=DECAY, inner_momentum=0.7
    ),
    "radam": sf_jax.schedule_free_radam(LR, b2=0.9),
    "wrapper": sf_jax.schedule_free(optax.sgd(LR, momentum=0.5), LR),
}
RUNS = {
    "sgd-meta": ("sgd", sgd(schedulefree)),
    "sgd-ours": ("sgd", sgd(sf_torch)),
    "adamw-meta": ("adamw", adamw(schedulefree)),
    "adamw-ours": ("adamw", adamw(sf_torch)),
    "adamw-ours-with-x": ("adamw_x", adamw(sf_torch, store_x=True)),
    "adamw-meta-to-stored-x": ("adamw_x", adamw(schedulefree)),
    "inner-momentum-ours": ("inner_momentum", adamw(sf_torch, inner_momentum=0.7)),
    "radam-meta": ("radam", radam(schedulefree)),
    "radam-ours": ("radam", radam(sf_torch)),
    "wrapper-meta": ("wrapper", wrapper(schedulefree)),
    "wrapper-ours": ("wrapper", wrapper(sf_torch)),
}


def started(make):
    net = torch_net()
    optimizer = make(net.parameters())
    optimizer.train()
    torch_steps(net, optimizer, 0, BEFORE)
    return net, optimizer


def ported(net, optimizer, tx, **options):
    variables = linen_variables()
    params = variables["params"]
    return from_torch(
        net.state_dict(),
        optimizer.state_dict(),
        params,
        tx.init(params),
        batch_stats=variables["batch_stats"],
        **options,
    )


def rows_of(net):
    return guess_names(net.state_dict(), *linen_variables().values())


@pytest.mark.parametrize(
    ("run", "mode"),
    [
        *((run, "train") for run in RUNS),
        *((run, "eval") for run in ("adamw-meta", "adamw-ours-with-x", "wrapper-meta")),
    ],
)
def test_run_goes_on_in_jax(run, mode):
    tx, (net, optimizer) = TO_JAX[RUNS[run][0]], started(RUNS[run][1])
    if mode == "eval":
        optimizer.eval()
    holds = {"train": "y", "eval": "x"}[mode] if run == "wrapper-meta" else None
    here = ported(net, optimizer, tx, model_holds=holds)
    optimizer.train()
    there = jax_steps(
        rows := rows_of(net), tx, here.params, here.opt_state, BEFORE, BEFORE + AFTER
    )
    torch_steps(net, optimizer, BEFORE, BEFORE + AFTER)
    assert ulps(in_torch(rows, there[0]), y_of(net)) < FEW_ULPS
    x = sf_jax.eval_params(there[1], there[0])
    assert ulps(in_torch(rows, x), x_of(net, optimizer)) < FEW_ULPS


@pytest.mark.parametrize("run", RUNS)
def test_run_comes_back_to_torch(run):
    name, make = RUNS[run]
    net, optimizer = started(make)
    holds = "y" if run == "wrapper-meta" else None
    here = ported(net, optimizer, TO_JAX[name], model_holds=holds)
    new_net = torch_net(seed=5)
    new = make(new_net.parameters())
    model_state, optimizer_state = to_torch(
        here.params,
        here.opt_state,
        new_net.state_dict(),
        new.state_dict(),
        batch_stats=here.batch_stats,
    )
    new_net.load_state_dict(model_state)
    new.load_state_dict(optimizer_state)
    new.train()
    for a, b in ((net, new_net), (x_of(net, optimizer), x_of(new_net, new))):
        a, b = (v if isinstance(v, dict) else y_of(v) for v in (a, b))
        assert ulps(a, b) <= 1
    torch.testing.assert_close(new_net.norm.running_mean, net.norm.running_mean)
    torch_steps(net, optimizer, BEFORE, BEFORE + AFTER)
    torch_steps(new_net, new, BEFORE, BEFORE + AFTER)
    assert ulps(y_of(new_net), y_of(net)) < FEW_ULPS


# Where the state lies


def sf_jax_x(run):
    return sf_jax.eval_params(run.opt_state, run.params)


COMBINATORS = {
    "chain": lambda tx: optax.chain(optax.clip(1e9), tx),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": tx},
        lambda params: {name: "ab"[name.startswith("fc")] for name in params},
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    # An injected b1 would keep x, which is then not rounded as it is in y.
    "injected": lambda tx: optax.inject_hyperparams(
        sf_jax.schedule_free_adamw, static_args=("b1",)
    )(LR, WARMUP, weight_decay=DECAY),
}


@pytest.mark.parametrize("combinator", COMBINATORS)
def test_state_is_found_inside(combinator):
    net, optimizer = started(adamw(schedulefree))
    plain = ported(net, optimizer, TO_JAX["adamw"])
    inside = ported(net, optimizer, COMBINATORS[combinator](TO_JAX["adamw"]))
    assert jax.tree.structure(inside.opt_state) == jax.tree.structure(
        COMBINATORS[combinator](TO_JAX["adamw"]).init(linen_variables()["params"])
    )
    for take in (lambda run: run.params, sf_jax_x):
        jax.tree.map(np.testing.assert_array_equal, take(inside), take(plain))
    model_state, optimizer_state = to_torch(
        inside.params,
        inside.opt_state,
        net.state_dict(),
        optimizer.state_dict(),
        batch_stats=inside.batch_stats,
    )
    for name, value in net.state_dict().items():
        assert torch.equal(model_state[name], value), name
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(optimizer_state["state"][index][key], value)
    (ours,), (theirs,) = optimizer_state["param_groups"], optimizer.param_groups
    assert ours["weight_sum"] == pytest.approx(theirs["weight_sum"], rel=1e-14)
    for key in ("k", "lr_max", "train_mode", "betas", "weight_decay"):
        assert ours[key] == theirs[key], key


def test_nnx_model_and_optimizer_take_a_run_over():
    net, optimizer = started(adamw(schedulefree))
    model = NNXNet(nnx.Rngs(0))
    mover = nnx.Optimizer(model, TO_JAX["adamw"], wrt=nnx.Param)
    run = from_torch(
        net.state_dict(),
        optimizer.state_dict(),
        nnx.state(model, nnx.Param),
        mover.opt_state,
        batch_stats=nnx.state(model, nnx.BatchStat),
    )
    nnx.update(model, run.params, run.batch_stats)
    mover.opt_state = nnx.data(run.opt_state)
    plain = ported(net, optimizer, TO_JAX["adamw"])
    np.testing.assert_array_equal(
        model.conv.kernel[...], plain.params["conv"]["kernel"]
    )
    np.testing.assert_array_equal(model.norm.var[...], plain.batch_stats["norm"]["var"])
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    updates, _ = TO_JAX["adamw"].update(
        jax.tree.map(jnp.ones_like, plain.params), plain.opt_state, plain.params
    )
    moved = optax.apply_updates(plain.params, updates)
    mover.update(model, grads)
    np.testing.assert_allclose(
        model.fc1.kernel[...], moved["fc1"]["kernel"], rtol=1e-6, atol=1e-7
    )

    back, _ = to_torch(
        nnx.state(model, nnx.Param),
        mover.opt_state,
        net.state_dict(),
        optimizer.state_dict(),
        batch_stats=nnx.state(model, nnx.BatchStat),
    )
    np.testing.assert_array_equal(back["fc1.weight"].T, model.fc1.kernel[...])


def test_arrays_go_where_the_leaves_are():
    net, optimizer = started(adamw(schedulefree))
    variables = linen_variables()
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = dict(variables["params"])
    params["conv"] = {
        "kernel": params["conv"]["kernel"],
        "bias": jax.device_put(params["conv"]["bias"], split),
    }
    run = from_torch(
        net.state_dict(),
        optimizer.state_dict(),
        params,
        TO_JAX["adamw"].init(params),
        batch_stats=variables["batch_stats"],
    )
    assert run.params["conv"]["bias"].sharding == split
    assert run.opt_state.z["conv"]["bias"].sharding == split
    np.testing.assert_array_equal(run.params["conv"]["bias"], net.conv.bias.detach())


# Groups, halves and files


def two_groups(net, **second):
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    optimizer = sf_torch.AdamWScheduleFree(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others} | second],
        lr=LR,
        warmup_steps=WARMUP,
    )
    optimizer.train()
    torch_steps(net, optimizer, 0, BEFORE)
    named = list(net.named_parameters())
    return optimizer, [
        *(name for name, p in named if p.ndim > 1),
        *(name for name, p in named if p.ndim == 1),
    ]


def test_groups_that_differ_in_decay_only_share_a_state():
    net = torch_net()
    optimizer, order = two_groups(net)
    tx = sf_jax.schedule_free_adamw(
        LR,
        WARMUP,
        weight_decay=DECAY,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    here = ported(net, optimizer, tx, param_names=order)
    rows = rows_of(net)
    there = jax_steps(rows, tx, here.params, here.opt_state, BEFORE, BEFORE + AFTER)
    torch_steps(net, optimizer, BEFORE, BEFORE + AFTER)
    assert ulps(in_torch(rows, there[0]), y_of(net)) < FEW_ULPS


def test_groups_that_differ_in_step_size_need_a_partition():
    net = torch_net()
    optimizer, order = two_groups(net, lr=LR / 2)
    with pytest.raises(ValueError, match=r"optax\.partition"):
        ported(net, optimizer, TO_JAX["adamw"], param_names=order)

    tx = optax.partition(
        {
            True: sf_jax.schedule_free_adamw(LR, WARMUP, weight_decay=DECAY),
            False: sf_jax.schedule_free_adamw(LR / 2, WARMUP),
        },
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    here = ported(net, optimizer, tx, param_names=order)
    lr_max = {label: s.inner_state.lr_max for label, s in here.opt_state[0].items()}
    assert lr_max[True] == pytest.approx(LR)
    assert lr_max[False] == pytest.approx(LR / 2)


def test_groups_without_names_are_refused():
    net = torch_net()
    optimizer, _ = two_groups(net)
    with pytest.raises(ValueError, match="2 groups and no names: pass param_names="):
        ported(net, optimizer, TO_JAX["adamw"])


@pytest.mark.parametrize("package", [schedulefree, sf_torch])
def test_bfloat16_parameters_arrive_with_their_masters(package):
    net = torch_net().bfloat16()
    optimizer = adamw(package)(net.parameters())
    optimizer.train()
    torch_steps(net, optimizer, 0, BEFORE)
    variables = linen_variables()
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables["params"])
    run = from_torch(
        net.state_dict(),
        optimizer.state_dict(),
        params,
        TO_JAX["adamw"].init(params),
        batch_stats=variables["batch_stats"],
    )
    state = optimizer.state[net.fc1.weight]
    y, z = net.fc1.weight.detach(), state["z"]
    x = state["x"] if "x" in state else y.double() + (y.double() - z.double()) / 9
    assert run.params["fc1"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        run.params["fc1"]["kernel"].astype("float32"), y.float().T
    )
    np.testing.assert_array_equal(run.opt_state.z["fc1"]["kernel"], z.float().T)
    np.testing.assert_array_equal(run.opt_state.x["fc1"]["kernel"], x.float().T)
    model_state, optimizer_state = to_torch(
        *run[:2],
        net.state_dict(),
        optimizer.state_dict(),
        batch_stats=run.batch_stats,
    )
    assert torch.equal(model_state["fc1.weight"], y)
    index = [name for name, _ in net.named_parameters()].index("fc1.weight")
    assert torch.equal(optimizer_state["state"][index]["z"], z.float())


def test_file_of_save_checkpoint_holds_x(tmp_path):
    net, optimizer = started(adamw(sf_torch))
    sf_torch.save_checkpoint(tmp_path / "run.pt", net, optimizer)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    variables = linen_variables()
    run = from_torch(
        content["model"],
        content["optimizer"],
        variables["params"],
        TO_JAX["adamw"].init(variables["params"]),
        batch_stats=variables["batch_stats"],
        model_holds="x",
    )
    assert ulps(in_torch(rows_of(net), run.params), y_of(net)) <= 1


def test_parameter_without_a_gradient_so_far_has_not_moved():
    net = torch_net()
    optimizer = adamw(schedulefree)(net.parameters())
    optimizer.train()
    net.fc1.weight.grad = torch.ones_like(net.fc1.weight)
    optimizer.step()
    others = [name for name, _ in net.named_parameters() if name != "fc1.weight"]
    run = ported(net, optimizer, TO_JAX["adamw"], unmoved=others)
    np.testing.assert_array_equal(
        run.opt_state.z["fc2"]["kernel"], net.fc2.weight.detach().T
    )
    assert not run.opt_state.base_state.nu["fc2"]["kernel"].any()
    assert run.opt_state.base_state.nu["fc1"]["kernel"].any()


def test_weight_sum_keeps_a_double_s_digits():
    net, optimizer = started(adamw(schedulefree))
    group = optimizer.param_groups[0]
    saved = group["weight_sum"] = 0.02 + 1e-11
    state = ported(net, optimizer, TO_JAX["adamw"]).opt_state
    latest = group["k"] ** group["r"] * float(np.float32(group["lr_max"])) ** 2
    ratio = float(state.weight_ratio) + float(state.weight_ratio_lo)
    assert ratio == pytest.approx(saved / latest, rel=1e-14)


def test_needs_no_torch():
    code = "import sys, sf_jax.torch_checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Names


def arrays(**shapes):
    return {name.replace("__", "."): np.zeros(shape) for name, shape in shapes.items()}


def leaves(**shapes):
    tree = {}
    for name, shape in shapes.items():
        *layers, leaf = name.split("__")
        node = tree
        for layer in layers:
            node = node.setdefault(layer, {})
        node[leaf] = np.zeros(shape)
    return tree


GUESSES = {
    "linear": (
        arrays(a__weight=(3, 2)),
        leaves(Dense_0__kernel=(2, 3)),
        [Leaf("a.weight", "Dense_0/kernel", (1, 0))],
    ),
    "convolution-1d": (
        arrays(a__weight=(5, 2, 3)),
        leaves(Conv_0__kernel=(3, 2, 5)),
        [Leaf("a.weight", "Conv_0/kernel", (2, 1, 0))],
    ),
    "convolution-3d": (
        arrays(a__weight=(5, 2, 3, 4, 6), a__bias=(5,)),
        leaves(Conv_0__kernel=(3, 4, 6, 2, 5), Conv_0__bias=(5,)),
        [
            Leaf("a.weight", "Conv_0/kernel", (2, 3, 4, 1, 0)),
            Leaf("a.bias", "Conv_0/bias"),
        ],
    ),
    "embedding": (
        arrays(a__weight=(9, 4)),
        leaves(Embed_0__embedding=(9, 4)),
        [Leaf("a.weight", "Embed_0/embedding")],
    ),
    "layer-norm": (
        arrays(a__weight=(4,), a__bias=(4,)),
        leaves(LayerNorm_0__scale=(4,), LayerNorm_0__bias=(4,)),
        [
            Leaf("a.weight", "LayerNorm_0/scale"),
            Leaf("a.bias", "LayerNorm_0/bias"),
        ],
    ),
    "own-parameter": (
        arrays(token=(1, 4)),
        leaves(token=(1, 4)),
        [Leaf("token", "token")],
    ),
    "order-by-number": (
        arrays(**{f"{i}__weight": (4, 4) for i in range(11)}),
        leaves(**{f"Dense_{i}__kernel": (4, 4) for i in range(11)}),
        [Leaf(f"{i}.weight", f"Dense_{i}/kernel", (1, 0)) for i in range(11)],
    ),
    "names-before-order": (
        arrays(out__weight=(4, 4), inner__weight=(4, 4)),
        leaves(inner__kernel=(4, 4), out__kernel=(4, 4)),
        [
            Leaf("out.weight", "out/kernel", (1, 0)),
            Leaf("inner.weight", "inner/kernel", (1, 0)),
        ],
    ),
    "numbers-from-one-are-an-order": (
        arrays(fc_1__weight=(4, 4), fc_2__weight=(4, 4)),
        leaves(fc_0__kernel=(4, 4), fc_1__kernel=(4, 4)),
        [
            Leaf("fc_1.weight", "fc_0/kernel", (1, 0)),
            Leaf("fc_2.weight", "fc_1/kernel", (1, 0)),
        ],
    ),
}


@pytest.mark.parametrize("layer", GUESSES)
def test_common_layers_are_guessed(layer):
    model, params, rows = GUESSES[layer]
    assert guess_names(model, params) == rows


def test_every_problem_stands_in_one_error():
    model = arrays(
        same__weight=(3, 2), rest__weight=(7,), a__weight=(4, 4), b__weight=(4, 4)
    )
    params = leaves(
        same__kernel=(3, 2), lost__scale=(9,), c__kernel=(4, 4), d__kernel=(4, 4)
    )
    with pytest.raises(ValueError) as error:
        guess_names(model, params)
    problems = str(error.value).splitlines()[1:-1]
    assert [line.strip() for line in problems] == [
        "ambiguous, of the same shapes: a.weight, b.weight, c/kernel, d/kernel",
        "left over: rest.weight (7,)",
        "missing: lost/scale (9,)",
        "misshapen: same.weight (3, 2) becomes (2, 3), same/kernel is (3, 2)",
    ]
    rows = guess_names(
        model,
        params,
        known=[
            Leaf("same.weight", "same/kernel"),
            Leaf("rest.weight", None),
            Leaf(None, "lost/scale"),
            Leaf("a.weight", "d/kernel", (1, 0)),
        ],
    )
    assert rows[-1] == Leaf("b.weight", "c/kernel", (1, 0))


def test_every_problem_of_the_state_stands_in_one_error():
    net, optimizer = started(adamw(sf_torch, inner_momentum=0.7))
    tx = sf_jax.schedule_free_adamw(LR, b1=0.95)
    with pytest.raises(ValueError) as error:
        ported(net, optimizer, tx)
    assert "different: β is 0.9 in PyTorch and 0.95 in JAX" in str(error.value)
    for name, _ in net.named_parameters():
        assert f"left over: exp_avg of {name}" in str(error.value)

    net, optimizer = started(adamw(sf_torch))
    net.fc1.weight.data = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"missing: exp_avg of fc1\.weight"):
        ported(net, optimizer, TO_JAX["inner_momentum"])


def test_other_order_of_parameters_is_found_by_shape():
    net = torch_net()
    optimizer = adamw(schedulefree)(list(net.parameters())[::-1])
    optimizer.train()
    torch_steps(net, optimizer, 0, 1)
    with pytest.raises(ValueError, match=r"misshapen: z \(3, 5\) of embed.weight"):
        ported(net, optimizer, TO_JAX["adamw"])
    names = [name for name, _ in net.named_parameters()][::-1]
    run = ported(net, optimizer, TO_JAX["adamw"], param_names=names)
    np.testing.assert_array_equal(
        run.opt_state.z["fc1"]["kernel"], optimizer.state[net.fc1.weight]["z"].T
    )


def test_wrapper_of_meta_must_be_told_what_the_model_holds():
    net, optimizer = started(wrapper(schedulefree))
    with pytest.raises(ValueError, match="pass model_holds="):
        ported(net, optimizer, TO_JAX["wrapper"])


def test_tied_tensors_are_one_leaf():
    net = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(7, 4), "head": torch.nn.Linear(4, 7, bias=False)}
    )
    net["head"].weight = net["embed"].weight
    optimizer = adamw(schedulefree)(net.parameters())
    optimizer.train()
    params = leaves(embed__embedding=(7, 4))
    args = net.state_dict(), optimizer.state_dict()
    run = from_torch(*args, params, TO_JAX["adamw"].init(params))
    params = jax.tree.map(lambda p: p + 1, run.params)
    back, _ = to_torch(params, run.opt_state, *args)
    assert torch.equal(back["head.weight"], net["embed"].weight + 1)


@pytest.mark.parametrize(
    ("leaf", "torch_shape", "jax_shape"),
    [
        (Leaf("a", "b", (2, 3, 1, 0), split=(5, 3, 2, 4)), (5, 24), (24, 5)),
        (Leaf("a", "b", (2, 0, 1), split=(2, 3, 4)), (6, 4), (4, 2, 3)),
        (Leaf("a", "b", (2, 3, 0, 1), flip=(0, 1)), (5, 3, 2, 2), (2, 2, 5, 3)),
        (Leaf("a", "b"), (), ()),
    ],
    ids=["flattened-image", "heads", "transposed-convolution", "scalar"],
)
def test_layouts_go_there_and_back(leaf, torch_shape, jax_shape):
    array = np.random.default_rng(0).normal(size=torch_shape)
    there = leaf.to_jax(array, jax_shape)
    assert there.shape == jax_shape
    np.testing.assert_array_equal(leaf.to_torch(there, torch_shape), array)


def test_flattened_image_meets_the_same_weights():
    images = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(60, 7, bias=False)
    leaf = Leaf("weight", "kernel", (2, 3, 1, 0), split=(7, 3, 4, 5))
    kernel = leaf.to_jax(linear.weight.detach().numpy(), (60, 7))
    channels_last = images.permute(0, 2, 3, 1).flatten(1).numpy()
    np.testing.assert_allclose(
        channels_last @ kernel, linear(images.flatten(1)).detach(), rtol=1e-4, atol=1e-6
    )
