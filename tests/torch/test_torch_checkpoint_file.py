"""save_checkpoint and load_checkpoint: whole, exact, and refused without damage."""

import copy
import os

import pytest
import torch
from torch_cases import forms, gradients, identical, model_of, same, trained, values

import sf_torch


def pair(build, seed=0, dtype=torch.float32, steps=4):
    model = model_of(seed).to(dtype)
    return model, trained(build, model, steps)


def everything(model, optimizer):
    return copy.deepcopy(
        [dict(model.state_dict()), optimizer.state_dict(), model.training]
    )


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(build, dtype, training, tmp_path):
    model, optimizer = pair(build, dtype=dtype)
    if not training:
        model.eval()
        optimizer.eval()
    x = optimizer.eval_params()
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    resumed = pair(build, seed=1, dtype=dtype, steps=1)
    sf_torch.load_checkpoint(tmp_path / "run.pt", *resumed)
    assert resumed[0].training is resumed[1].training is training
    assert identical(everything(*resumed), everything(model, optimizer))
    assert same(resumed[1].eval_params(), x)
    for m, o in ((model, optimizer), resumed):
        o.train()
        for seed in range(5, 9):
            gradients(m, seed)
            o.step()
    assert same(values(resumed[0]), values(model))
    assert same(resumed[1].eval_params(), optimizer.eval_params())


def test_model_in_the_file_is_x_with_its_batchnorm_buffers(tmp_path):
    model, optimizer = pair(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1))
    model(torch.randn(8, 3))
    y = values(model)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert same(values(model), y)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    served = model_of(seed=1)
    served.load_state_dict(content["model"])
    assert same(values(served), optimizer.eval_params())
    assert torch.equal(served[1].running_mean, model[1].running_mean)
    assert served[1].num_batches_tracked == 1


def test_extra_values_come_back(tmp_path):
    model, optimizer = pair(lambda p: sf_torch.SGDScheduleFree(p, lr=0.1))
    extra = {"epoch": 3, "rng": torch.get_rng_state(), "names": ["a", "b"]}
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer, **extra)
    back = sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert identical(back, extra)


def test_a_fresh_pair_can_be_saved_and_loaded_into(tmp_path):
    model = model_of()
    optimizer = sf_torch.SGDScheduleFree(model.parameters())  # eval mode, model: train
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert model.training
    assert not optimizer.training


def test_the_form_without_modes_is_saved_in_a_training_model(tmp_path):
    model = model_of()
    optimizer = sf_torch.SGDScheduleFreeClosure(model.parameters(), lr=0.1)
    optimizer.step(lambda: gradients(model, 0))
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    before = everything(model, optimizer)
    gradients(model, 1)
    optimizer.step(lambda: None)
    sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert identical(everything(model, optimizer), before)


# Written whole or not at all


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    model, optimizer = pair(lambda p: sf_torch.SGDScheduleFree(p, lr=0.1))
    sf_torch.save_checkpoint(path, model, optimizer, epoch=1)
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"extra\['epoch'\] is a builtins.function"):
        sf_torch.save_checkpoint(path, model, optimizer, epoch=lambda: 2)

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        sf_torch.save_checkpoint(path, model, optimizer, epoch=2)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


# Refused, and everything as before


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged_at(part):
    def damage(path, good):
        path.write_bytes(good[: int(len(good) * part)])

    return damage


def flipped(path, good):
    at = good.rindex(b"data/0") // 2
    path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])


def changed(key, change):
    def damage(path, good):
        content = torch.load(path, weights_only=True)
        content[key] = change(content[key])
        torch.save(content, path)

    return damage


def reshaped(model):
    return {**model, "0.bias": torch.zeros(9)}


def renamed(model):
    return {("zero.bias" if name == "0.bias" else name): model[name] for name in model}


def one_more_group(optimizer):
    groups = optimizer["param_groups"]
    return {**optimizer, "param_groups": [*groups, {**groups[0], "params": []}]}


def other_state(optimizer):
    state = {**optimizer["state"], 0: {"z": torch.zeros(9)}}
    return {**optimizer, "state": state}


REFUSALS = {
    "empty": (damaged_at(0), "damaged"),
    "a tenth": (damaged_at(0.1), "damaged"),
    "half": (damaged_at(0.5), "damaged"),
    "all but the end": (damaged_at(0.99), "damaged"),
    "other bytes": (lambda path, good: path.write_bytes(b"text\n"), "damaged"),
    "code": (lambda path, good: torch.save(Code(), path), "never run"),
    "code in extra": (changed("extra", lambda _: Code()), "never run"),
    "a list": (lambda path, good: torch.save([1], path), "not a checkpoint"),
    "a state dict": (changed("format", lambda _: None), "not a checkpoint"),
    "next format": (changed("format", lambda _: 99), "not a checkpoint"),
    "part missing": (changed("model", lambda _: None), "damaged"),
    "shape": (changed("model", reshaped), r"0.bias is \(9,\), the model's \(4,\)"),
    "name": (changed("model", renamed), "missing 0.bias; unexpected zero.bias"),
    "groups": (changed("optimizer", one_more_group), "parameter groups"),
    "state": (changed("optimizer", other_state), r"z \(9,\)"),
}


@pytest.mark.parametrize("damage", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_bad_file_is_refused_and_nothing_changes(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage, message = damage
    path = tmp_path / "run.pt"
    model, optimizer = pair(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1))
    sf_torch.save_checkpoint(path, model, optimizer)
    damage(path, path.read_bytes())
    gradients(model, 7)
    optimizer.step()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        sf_torch.load_checkpoint(path, model, optimizer)
    assert identical(everything(model, optimizer), before)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_says_so(tmp_path):
    model, optimizer = pair(lambda p: sf_torch.SGDScheduleFree(p, lr=0.1))
    with pytest.raises(FileNotFoundError):
        sf_torch.load_checkpoint(tmp_path / "none.pt", model, optimizer)


@pytest.mark.parametrize("side", ["model", "optimizer"])
def test_a_pair_in_different_modes_is_refused(side, tmp_path):
    path = tmp_path / "run.pt"
    model, optimizer = pair(lambda p: sf_torch.SGDScheduleFree(p, lr=0.1))
    sf_torch.save_checkpoint(path, model, optimizer)
    {"model": model, "optimizer": optimizer}[side].eval()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=rf"the {side}( is)? in eval mode"):
        sf_torch.load_checkpoint(path, model, optimizer)
    with pytest.raises(ValueError, match=rf"the {side}( is)? in eval mode"):
        sf_torch.save_checkpoint(tmp_path / "other.pt", model, optimizer)
    assert identical(everything(model, optimizer), before)
    assert not (tmp_path / "other.pt").exists()


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    _, optimizer = pair(lambda p: sf_torch.SGDScheduleFree(p, lr=0.1))
    with pytest.raises(ValueError, match="is not the model's"):
        sf_torch.save_checkpoint(tmp_path / "run.pt", model_of(), optimizer)
