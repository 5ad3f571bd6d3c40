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


def wrapper(params):
    base = torch.optim.SGD(params, lr=LR, momentum=0.5)
    return schedulefree.ScheduleFreeWrapper(base, momentum=0.9)


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
    "wrapper-meta": ("wrapper", wrapper),
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


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("run", RUNS)
def test_run_goes_on_in_jax(run, mode):
    tx, (net, optimizer) = TO_JAX[RUNS[run][0]], started(RUNS[run][1])
    if mode == "eval":
        optimizer.eval()
    holds = {"train": "y", "eval": "x"}[mode] if "wrapper" in run else None
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
    holds = "y" if "wrapper" in run else None
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
