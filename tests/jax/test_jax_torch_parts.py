"""One PyTorch tensor that is several JAX leaves: nn.MultiheadAttention and Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sf_jax
import sf_torch
from sf_jax.torch_checkpoint import Leaf, from_torch, to_torch

WIDTH, HEADS = 8, 2
EACH = WIDTH // HEADS
ROWS = [
    *(
        row
        for i, name in enumerate(("query", "key", "value"))
        for row in (
            Leaf(
                "in_proj_weight",
                f"{name}/kernel",
                part=(i, 3),
                split=(HEADS, EACH, WIDTH),
                axes=(2, 0, 1),
            ),
            Leaf("in_proj_bias", f"{name}/bias", part=(i, 3), split=(HEADS, EACH)),
        )
    ),
    Leaf("out_proj.weight", "out/kernel", split=(WIDTH, HEADS, EACH), axes=(1, 2, 0)),
    Leaf("out_proj.bias", "out/bias"),
]
STEP = {"lr": 0.05, "warmup_steps": 3}


def run():
    torch.manual_seed(0)
    model = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    optimizer = sf_torch.AdamWScheduleFree(model.parameters(), **STEP)
    optimizer.train()
    inputs = torch.randn(2, 5, WIDTH)
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs, inputs, inputs)[0].square().sum().backward()
        optimizer.step()
    net = nn.MultiHeadDotProductAttention(HEADS)
    params = net.init(jax.random.key(0), inputs.numpy())["params"]
    tx = sf_jax.schedule_free_adamw(STEP["lr"], STEP["warmup_steps"])
    return model, optimizer, net, params, tx, inputs


def test_attention_goes_over_in_the_middle_of_a_run_and_comes_back():
    model, optimizer, net, params, tx, inputs = run()
    saved = model.state_dict(), optimizer.state_dict()
    params, state, _ = from_torch(*saved, params, tx.init(params), names=ROWS)

    # The same function of the same inputs, at y and at x.
    y = net.apply({"params": params}, inputs.numpy())
    np.testing.assert_allclose(
        y, model(inputs, inputs, inputs)[0].detach().numpy(), atol=2e-6
    )
    x = net.apply({"params": sf_jax.eval_params(state, params)}, inputs.numpy())
    with optimizer.eval_mode(), torch.no_grad():
        theirs = model(inputs, inputs, inputs)[0].numpy()
    np.testing.assert_allclose(x, theirs, atol=2e-6)

    # Back, every tensor of the model and of the state is what it was.
    back_model, back = to_torch(params, state, *saved, names=ROWS)
    for name, tensor in saved[0].items():
        torch.testing.assert_close(back_model[name], tensor, rtol=0, atol=0)
    for index, arrays in saved[1]["state"].items():
        for key in ("z", "exp_avg_sq"):
            there = back["state"][index][key]
            torch.testing.assert_close(there, arrays[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([r for r in ROWS if r.jax != "key/bias"], "missing: key/bias"),
        ([r for r in ROWS if r.jax != "key/bias"], "not in whole parts: in_proj_bias"),
        (
            [Leaf(r.torch, r.jax, r.axes, r.split) for r in ROWS],
            "not in whole parts: in_proj_weight",
        ),
        (
            [Leaf(r.torch, r.jax, r.axes, r.split, part=(0, 5)) for r in ROWS[:1]]
            + ROWS[1:],
            "cannot be laid out",
        ),
    ],
)
def test_parts_that_do_not_make_up_the_tensor_are_refused(rows, said):
    model, optimizer, _, params, tx, _ = run()
    with pytest.raises(ValueError, match=said):
        from_torch(
            model.state_dict(),
            optimizer.state_dict(),
            params,
            tx.init(params),
            names=rows,
        )


def test_a_row_says_its_part():
    row = Leaf("w", "key/kernel", part=(1, 3))
    assert str(row) == "w -> key/kernel, part (1, 3)"
    halves = np.arange(6.0).reshape(3, 2)
    assert row.to_jax(halves, (1, 2)).tolist() == [[2.0, 3.0]]
    assert row.to_torch(jnp.array([[2.0, 3.0]]), (3, 2)).tolist() == [[2.0, 3.0]]
