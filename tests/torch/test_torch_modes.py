"""Train and eval mode: what the parameters hold, and what switching may not do."""

import copy
import io
import pickle

import pytest
import torch
from torch_cases import (
    FORMS,
    forms,
    gradients,
    identical,
    model_of,
    same,
    trained,
    values,
)

import sf_torch


@forms
def test_train_and_eval_do_nothing_the_second_time(build):
    model = model_of()
    optimizer = trained(build, model)
    y = values(model)
    optimizer.train()
    assert same(values(model), y)
    optimizer.eval()
    x = values(model)
    optimizer.eval()
    assert same(values(model), x)
    assert not same(x, y)
    assert optimizer.training is False


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_switches_bring_back_the_same_y_and_x(build, dtype):
    model = model_of().to(dtype)
    optimizer = trained(build, model)
    y, x = values(model), optimizer.eval_params()
    for _ in range(1000 if build is FORMS["sgd"] else 30):
        optimizer.eval()
        optimizer.train()
    assert same(values(model), y)
    assert same(optimizer.eval_params(), x)


def test_evaluation_changes_nothing_in_training():
    models = model_of(), model_of()
    optimizers = [trained(FORMS["sgd"], model) for model in models]
    for seed in range(10):
        with optimizers[0].eval_mode():
            pass
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, seed)
            optimizer.step()
    assert same(values(models[0]), values(models[1]))


@pytest.mark.parametrize("count", [1, 3])
def test_weights_written_in_eval_mode_are_taken_up(count):
    """Also where small parameters are switched together."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]
    optimizer = sf_torch.SGDScheduleFree(params, lr=1.0, momentum=0.5)
    optimizer.train()
    for w in params:
        w.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    left = [w.detach().clone() for w in params]
    optimizer.eval()
    with torch.no_grad():
        for w in params:
            w[0] = 7.0
    optimizer.train()
    for w, y in zip(params, left, strict=True):
        z = optimizer.state[w]["z"]
        assert w[0] == 0.5 * z[0] + 0.5 * 7.0
        assert w[1] == y[1]


def test_y_is_kept_in_the_same_memory_at_every_evaluation():
    """On a CPU fresh memory would come page by page."""
    model = model_of()
    optimizer = trained(FORMS["sgd"], model)
    seen = set()
    for _ in range(3):
        with optimizer.eval_mode():
            states = optimizer.state.values()
            seen.add(tuple(state["y"].data_ptr() for state in states))
    assert len(seen) == 1


def test_state_is_as_small_in_train_mode_after_evaluation():
    model = model_of()
    optimizer = trained(FORMS["sgd"], model)
    with optimizer.eval_mode():
        pass
    assert all(set(state) == {"z"} for state in optimizer.state.values())


@forms
@pytest.mark.parametrize("inner", ["eval_mode", "train_mode"])
@pytest.mark.parametrize("outer", [True, False])
def test_a_context_restores_the_mode_after_an_exception(build, inner, outer):
    model = model_of()
    optimizer = trained(build, model)
    optimizer._switch(outer)
    before = values(model)
    seen = []

    def interrupted():
        with getattr(optimizer, inner)():
            seen.append(optimizer.training)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert seen == [inner == "train_mode"]
    assert optimizer.training is outer
    assert same(values(model), before)


@forms
def test_a_step_in_eval_mode_is_refused_before_anything_changes(build):
    model = model_of()
    optimizer = trained(build, model)
    optimizer.eval()
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    calls = []
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step(lambda: calls.append(1))
    assert calls == []
    assert same(values(model), before)
    assert identical(optimizer.state_dict(), state)


@forms
def test_eval_params_and_eval_state_dict_are_x_and_leave_the_model_alone(build):
    model = model_of()
    optimizer = trained(build, model)
    y = values(model)
    x, state = optimizer.eval_params(), optimizer.eval_state_dict(model)
    assert same(values(model), y)
    for tensor in (*x, *state.values()):
        tensor.fill_(7)  # new tensors, the model's neither in train nor in eval mode
    assert same(values(model), y)
    x, state = optimizer.eval_params(), optimizer.eval_state_dict(model)
    optimizer.eval()
    assert same(values(model), x)
    assert model.state_dict().keys() == state.keys()
    assert identical(dict(model.state_dict()), state)
    assert same(optimizer.eval_params(), x)


def test_a_group_added_later_takes_the_mode_of_the_others():
    model, more = model_of(), torch.nn.Linear(2, 2)
    optimizer = trained(FORMS["sgd"], model)
    optimizer.add_param_group({"params": more.parameters()})
    assert optimizer.param_groups[1]["train_mode"] is True
    optimizer.eval()
    late = torch.nn.Linear(2, 2)
    optimizer.add_param_group({"params": late.parameters()})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False] * 3


# follow


def test_the_model_and_what_holds_it_switch_the_optimizer():
    model = model_of()
    optimizer = trained(FORMS["sgd"], model)
    sf_torch.follow(model, optimizer)
    around = torch.nn.Sequential(model)
    for switched in (model, around):
        assert switched.eval() is switched
        assert (optimizer.training, model.training) == (False, False)
        assert switched.train() is switched
        assert (optimizer.training, model.training) == (True, True)


def test_two_optimizers_follow_one_model_and_leave_one_by_one():
    model = model_of()
    first = sf_torch.SGDScheduleFree(model[0].parameters())
    second = sf_torch.AdamWScheduleFree(model[2].parameters())
    handles = [sf_torch.follow(model, o) for o in (first, second, second)]
    model.eval()
    assert (first.training, second.training) == (False, False)
    handles[0].remove()
    model.train()
    assert (first.training, second.training) == (False, True)
    handles[1].remove()
    handles[1].remove()
    model.eval()
    assert second.training
    assert "train" not in model.__dict__


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "save"])
def test_a_copy_of_a_followed_model_is_on_its_own(method):
    model = model_of()
    optimizer = trained(FORMS["sgd"], model)
    handle = sf_torch.follow(model, optimizer)
    if method == "deepcopy":
        twin = copy.deepcopy(model)
    elif method == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    twin = copy.deepcopy(twin)  # a copy of the copy as well
    twin.eval()
    assert not twin.training
    assert not twin[1].training
    assert model.training
    assert optimizer.training
    other = trained(FORMS["sgd"], twin)
    sf_torch.follow(twin, other)
    twin.eval()
    assert (optimizer.training, other.training) == (True, False)
    twin.train()
    model.eval()
    assert (optimizer.training, other.training) == (False, True)
    handle.remove()


def test_update_bn_is_that_of_x_and_restores_both_modes():
    model = model_of()
    optimizer = trained(FORMS["sgd"], model)
    y = values(model)
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(1))]
    sf_torch.update_bn(batches, model, optimizer)
    assert same(values(model), y)
    assert optimizer.training
    assert model.training
    with optimizer.eval_mode():
        expected = model[0](batches[0]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected.detach())
