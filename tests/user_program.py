"""A user's program in both packages, as a strict type checker should like it.

`tests/test_typing.py` has it checked and runs it. :func:`~typing.assert_type` holds the
checker to the types that a user relies on. What is ignored is a lack of types in Flax
or PyTorch.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx
from flax.training.train_state import TrainState

import sf_jax
import sf_jax.flax
import sf_torch
from sf_jax import torch_checkpoint

STEPS = 2


# JAX


def train_arrays() -> jax.Array:
    def not_the_bias(params: optax.Params) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        sf_jax.schedule_free_adamw(
            optax.constant_schedule(0.1),
            warmup_steps=2,
            b1=sf_jax.growing_b1(0.9, steps=10),
            weight_decay=0.1,
            mask=not_the_bias,
            average=sf_jax.refined_average(20.0),
            state_dtype=jnp.float32,
        ),
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    sf_jax.check_optimizer(tx, params)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: optax.OptState) -> tuple[Any, optax.OptState]:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    x = sf_jax.eval_params(state, params)
    y = sf_jax.train_params(state, x)
    return jnp.abs(y["kernel"] - params["kernel"]).max()


def an_average_of_my_own(
    count: jax.Array, lr: jax.Array, b1: jax.typing.ArrayLike, ckp1: jax.Array
) -> jax.Array:
    return jnp.maximum(ckp1, 0.01)


def every_other_optimizer() -> list[optax.GradientTransformationExtraArgs]:
    return [
        sf_jax.schedule_free(optax.sgd(0.1), 0.1),
        sf_jax.schedule_free_sgd(0.1, average=an_average_of_my_own),
        sf_jax.schedule_free_radam(0.1, average=sf_jax.exponential_average(0.99)),
        sf_jax.schedule_free_plus(),
        sf_jax.schedule_free_muon(0.1),
        sf_jax.schedule_free_prodigy(),
        sf_jax.gpa_adamw(0.1, mu_x=0.99),
    ]


def own_state(params: optax.Params) -> jax.Array:
    state = sf_jax.schedule_free_sgd(0.1, store_x=True).init(params)
    assert isinstance(state, sf_jax.ScheduleFreeState)
    sf_jax.check_params(state, params)
    assert_type(state.count, jax.Array)
    return state.b1


class Net(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.Dense(1)(inputs)


def train_linen() -> dict[str, Any]:
    net, inputs = Net(), jnp.ones((3, 2))
    state = TrainState.create(  # type: ignore[no-untyped-call]  # Flax's
        apply_fn=net.apply,
        params=net.init(jax.random.key(0), inputs)["params"],
        tx=sf_jax.schedule_free_sgd(0.1),
    )
    variables = sf_jax.flax.eval_variables(state)
    assert_type(variables, dict[str, Any])
    return variables


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(2, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> Any:  # as Flax's layers
        return self.norm(self.layer(inputs))


def train_nnx() -> Model:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sf_jax.schedule_free_adamw(0.1), wrt=nnx.Param)
    batches = [jnp.ones((3, 2)), jnp.zeros((3, 2))]
    at_x = sf_jax.flax.eval_model(optimizer, model, batches)
    assert_type(at_x, Model)
    return at_x


# PyTorch


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(STEPS):
        yield torch.ones(3, 2), torch.ones(3)


def train_module(folder: str) -> dict[str, Any]:
    model = torch.nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight], "weight_decay": 0.1},
        {"params": [model.bias]},
    ]
    optimizer = sf_torch.AdamWScheduleFree(
        groups,
        lr=torch.tensor(0.1),
        betas=(0.95, 0.99),
        warmup_steps=2,
        state_dtype=torch.float32,
    )
    follower = sf_torch.follow(model, optimizer)
    model.train()
    path = os.path.join(folder, "run.record")
    with sf_torch.record(optimizer, path, model=model) as recorder:
        for inputs, targets in batches():
            optimizer.zero_grad()
            loss = (model(inputs).squeeze(1) - targets).square().mean()
            loss.backward()
            optimizer.step()
        with optimizer.eval_mode():
            recorder.evaluated()
    assert_type(recorder, sf_torch.Recorder)
    for frame in sf_torch.read_record(path):
        assert_type(frame.named("grad"), dict[str, torch.Tensor])

    model.eval()
    assert_type(optimizer.training, bool)
    assert_type(optimizer.eval_params(), list[torch.Tensor])
    assert_type(optimizer.eval_state_dict(model), dict[str, Any])
    sf_torch.update_bn(batches(), model, optimizer)
    sf_torch.check_modes(optimizer)
    sf_torch.save_checkpoint(f"{folder}/run.pt", model, optimizer, epoch=1)
    extra = sf_torch.load_checkpoint(f"{folder}/run.pt", model, optimizer)
    assert_type(extra, dict[str, Any])
    follower.remove()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert isinstance(scheduler.optimizer, torch.optim.Optimizer)
    return extra


def step_with_closures() -> None:
    w = torch.nn.Parameter(torch.ones(2))

    def closure() -> torch.Tensor:
        loss = w.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch's
        return loss

    optimizers: list[torch.optim.Optimizer] = [
        sf_torch.SGDScheduleFreeClosure([w], lr=0.1),
        sf_torch.AdamWScheduleFreeClosure([w], lr=0.1),
    ]
    for optimizer in optimizers:
        optimizer.zero_grad()
        optimizer.step(lambda: float(closure().detach()))
    plus = sf_torch.AdamCScheduleFreePlus([w])
    plus.train()
    plus.step_func(function_value=sf_torch.mean_loss(closure().detach()))
    wrapper = sf_torch.ScheduleFreeWrapper(torch.optim.RMSprop([w], lr=0.1))
    with wrapper.train_mode():
        wrapper.step(closure)
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    growing = sf_torch.growing_b1(0.9, steps=10)
    sf_torch.MuonScheduleFree([w, matrix], lr=0.1, betas=(growing, 0.99))
    sf_torch.GPAAdamW([("w", w)], mu_x=0.99)


# From PyTorch to JAX


def move() -> Any:
    model = torch.nn.Linear(2, 1)
    optimizer = sf_torch.SGDScheduleFree(model.named_parameters(), lr=0.1)
    params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
    state = sf_jax.schedule_free_sgd(0.1).init(params)
    names = torch_checkpoint.guess_names(model.state_dict(), params)
    assert_type(names, list[torch_checkpoint.Leaf])
    run = torch_checkpoint.from_torch(
        model.state_dict(), optimizer.state_dict(), params, state, names=names
    )
    assert_type(run, torch_checkpoint.JaxRun)
    back, _ = torch_checkpoint.to_torch(
        run.params, run.opt_state, model.state_dict(), optimizer.state_dict()
    )
    model.load_state_dict(back)
    return run.params


def main() -> None:
    assert train_arrays() < 1e-5
    assert len(every_other_optimizer()) == 7
    assert own_state(jnp.ones(2)) > 0
    assert "params" in train_linen()
    assert train_nnx().norm.use_running_average is not None
    with tempfile.TemporaryDirectory() as folder:
        assert train_module(folder) == {"epoch": 1}
    step_with_closures()
    assert set(move()) == {"kernel", "bias"}


if __name__ == "__main__":
    main()
