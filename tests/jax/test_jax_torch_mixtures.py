"""A model at x beside an optimizer in train mode, and the other way round, is seen."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sf_jax
import sf_torch
from sf_jax.torch_checkpoint import from_torch, to_torch

LR, STEPS = 0.3, 5
OPTIONS = {"lean": {}, "stored": {"store_x": True}}


def trained(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = sf_torch.SGDScheduleFree(model.parameters(), lr=LR, **options)
    optimizer.train()
    for step in range(STEPS):
        model.weight.grad = torch.cos(model.weight.detach() + step)
        optimizer.step()
    return model, optimizer


def in_jax(store_x=False):
    tx = sf_jax.schedule_free_sgd(LR, store_x=store_x)
    params = {"kernel": jnp.zeros((3, 2))}
    return params, tx.init(params)


def by_hand(optimizer, y):
    """What the state dict holds of y where it says so: in train mode too."""
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["y"] = y.clone()
    return saved


def mixtures(model, optimizer, tmp_path):
    y = model.weight.detach().clone()
    x = optimizer.eval_state_dict(model)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    file = torch.load(tmp_path / "run.pt", weights_only=True)
    train = optimizer.state_dict()
    with optimizer.eval_mode():
        evaluating = {**optimizer.state_dict()}
        evaluating["state"] = {
            k: {n: t.clone() for n, t in s.items()}
            for k, s in evaluating["state"].items()
        }
    return {
        "file in train mode": (file["model"], file["optimizer"]),
        "x, y kept, in train mode": (x, by_hand(optimizer, y)),
        "y, y kept, in train mode": ({"weight": y}, by_hand(optimizer, y)),
        "y, in train mode": ({"weight": y}, train),
        "x, in eval mode": (x, evaluating),
        "y, in eval mode": ({"weight": y}, evaluating),
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_x_and_y_are_told_apart(options, tmp_path):
    """Whatever the model was saved as, y and z are those of the run."""
    model, optimizer = trained(**OPTIONS[options])
    y = model.weight.detach().numpy().T.copy()
    z = optimizer.state[model.weight]["z"].numpy().T.copy()
    tested = 0
    for name, (held, saved) in mixtures(model, optimizer, tmp_path).items():
        kept = saved["state"][0].keys() & {"x", "y"}
        if not kept and name == "y, in eval mode":
            continue
        run = from_torch(held, saved, *in_jax())
        # x of float32 stored tells y to a rounding; a y that is kept, exactly.
        atol = 0 if "y" in saved["state"][0] or "y," in name else 2**-23
        np.testing.assert_allclose(
            run.params["kernel"], y, rtol=0, atol=atol, err_msg=name
        )
        np.testing.assert_array_equal(run.opt_state.z["kernel"], z, err_msg=name)
        tested += 1
    assert tested >= 5


def test_a_stored_x_tells_a_model_at_x_from_one_at_y():
    """{"model": eval_state_dict, "optimizer": state_dict}, as people write by hand."""
    model, optimizer = trained(store_x=True)
    held, saved = optimizer.eval_state_dict(model), optimizer.state_dict()
    run = from_torch(held, saved, *in_jax())
    np.testing.assert_allclose(
        run.params["kernel"], model.weight.detach().T, rtol=0, atol=2**-23
    )
    with pytest.raises(ValueError, match=r"weight is x by the .* model_holds='y'"):
        from_torch(held, saved, *in_jax(), model_holds="y")
    other = {"weight": held["weight"] + 1}
    with pytest.raises(ValueError, match="weight is neither x nor y"):
        from_torch(other, saved, *in_jax())


def test_a_y_left_over_from_another_step_is_not_believed():
    """A package that knows no y carries it along from a state of ours."""
    model, optimizer = trained()
    y = model.weight.detach().clone()
    saved = by_hand(optimizer, y - 1)
    run = from_torch({"weight": y}, saved, *in_jax())
    np.testing.assert_array_equal(run.params["kernel"], y.T)


def test_after_one_step_x_is_y_and_either_word_is_right():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = sf_torch.SGDScheduleFree(model.parameters(), lr=LR)
    optimizer.train()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    y = model.weight.detach().clone()
    for holds in ("x", "y", None):
        run = from_torch(
            {"weight": y}, by_hand(optimizer, y), *in_jax(), model_holds=holds
        )
        np.testing.assert_allclose(run.params["kernel"], y.T, rtol=0, atol=2**-23)


def test_a_run_that_leaves_in_eval_mode_keeps_its_y():
    model, optimizer = trained()
    held, saved = model.state_dict(), optimizer.state_dict()
    run = from_torch(held, saved, *in_jax())
    x, state = to_torch(run.params, run.opt_state, held, saved, model_holds="x")
    y = model.weight.detach().clone()
    other = torch.nn.Linear(3, 2, bias=False)
    there = sf_torch.SGDScheduleFree(other.parameters(), lr=LR)
    other.load_state_dict(x)
    there.load_state_dict(state)
    torch.testing.assert_close(
        other.weight.detach(), optimizer.eval_params()[0], rtol=0, atol=2**-23
    )
    there.train()
    assert torch.equal(other.weight, y)


def test_x_in_place_of_y_does_not_leave():
    model, optimizer = trained(store_x=True)
    held, saved = model.state_dict(), optimizer.state_dict()
    run = from_torch(held, saved, *in_jax(store_x=True))
    x = sf_jax.eval_params(run.opt_state, run.params)
    with pytest.raises(ValueError, match="kernel in params is not the y"):
        to_torch(x, run.opt_state, held, saved)
