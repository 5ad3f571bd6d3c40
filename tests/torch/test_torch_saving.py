"""What is saved is x and can be read again; what is loaded apart finds its place."""

import copy
import datetime
import errno
import os
import pathlib
import re
import resource
import stat
import subprocess
import sys
import textwrap
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch_cases import FORMS, gradients, model_of, same, trained, values

import sf_torch
from sf_torch._files import write_whole


def adamw(params):
    return sf_torch.AdamWScheduleFree(params, lr=0.1)


def averaged(model, optimizer, steps=4):
    """Trains, and gives x by its definition: the mean of z, as lr does not change."""
    zs = []
    optimizer.train()
    for seed in range(steps):
        gradients(model, seed)
        optimizer.step()
        zs.append([optimizer.state[p]["z"].double() for p in model.parameters()])
    return [sum(z) / steps for z in zip(*zs, strict=True)]


# The model's state dict at x, whatever the names in it


def tied(model):
    model.tied = model[0]
    return model


def renaming(model):
    def rename(module, state, prefix, metadata):
        for name in list(state):
            state[f"served.{name}"] = state.pop(name)

    model.register_state_dict_post_hook(rename)
    return model


WRAPPED = {
    "plain": lambda model: model,
    "checkpoint_wrapper": lambda model: torch.nn.Sequential(
        *(checkpoint_wrapper(layer) for layer in model)
    ),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled inside": lambda model: torch.nn.Sequential(
        torch.compile(model[0], backend="eager")
    ),
    "tied": tied,
    "renaming hook": renaming,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_the_saved_model_is_the_mean_of_z_whatever_renames_it(wrap, tmp_path):
    model = wrap(torch.nn.Sequential(torch.nn.Linear(3, 4)))
    optimizer = adamw(model.parameters())
    x = averaged(model, optimizer)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert saved.keys() == model.state_dict().keys()
    of = dict(zip(map(id, model.parameters()), x, strict=True))
    for name, p in model.state_dict(keep_vars=True).items():
        torch.testing.assert_close(saved[name].double(), of[id(p)], rtol=0, atol=1e-6)


def copying(model):
    def copied(module, state, prefix, metadata):
        state["0.weight"] = state["0.weight"].clone()

    model.register_state_dict_post_hook(copied)


def dropping(model):
    def dropped(module, state, prefix, metadata):
        del state["0.weight"]

    model.register_state_dict_post_hook(dropped)


def assigned(model):
    new = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(new, assign=True)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (copying, "0.weight is copied by its state_dict"),
        (dropping, "0.weight is copied by its state_dict.., or left out"),
        (assigned, r"a parameter of shape \(4, 3\) is not the model's"),
    ],
)
def test_what_would_be_saved_at_y_is_refused_by_name(spoil, named, tmp_path):
    model = model_of()
    optimizer = trained(adamw, model)
    spoil(model)
    with pytest.raises(ValueError, match=named):
        optimizer.eval_state_dict(model)
    with pytest.raises(ValueError, match=named):
        sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert list(tmp_path.iterdir()) == []


# Model and optimizer saved and loaded by hand


def by_hand(optimizer, model, at_x):
    state = optimizer.eval_state_dict(model) if at_x else dict(model.state_dict())
    return copy.deepcopy({"model": state, "optimizer": optimizer.state_dict()})


def loaded(build, saved, order):
    model = model_of(seed=1)
    optimizer = build(model.parameters())
    for part in order:
        {"model": model, "optimizer": optimizer}[part].load_state_dict(saved[part])
    return model, optimizer


ORDERS = [("model", "optimizer"), ("optimizer", "model")]


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(build, torch.float32) for build in FORMS.values()]
    + [(FORMS["sgd"], torch.bfloat16)],
    ids=[*FORMS, "sgd, master"],
)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("at_x", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_run_loaded_by_hand_goes_on_from_y(build, dtype, order, at_x, training):
    model = model_of().to(dtype)
    optimizer = trained(build, model)
    saved = copy.deepcopy({"model": dict(model.state_dict())})  # y
    x = optimizer.eval_params()
    if at_x:
        saved["model"] = optimizer.eval_state_dict(model)
    optimizer._switch(training)
    saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
    twin = model_of(seed=1).to(dtype)
    resumed = build(twin.parameters())
    for part in order:
        {"model": twin, "optimizer": resumed}[part].load_state_dict(saved[part])
    assert same(resumed.eval_params(), x)
    for m, o in ((model, optimizer), (twin, resumed)):
        o.train()
        for seed in range(5, 9):
            gradients(m, seed)
            o.step()
    assert same(values(twin), values(model))
    assert same(resumed.eval_params(), optimizer.eval_params())
    states = [[set(o.state[p]) for p in o.state] for o in (optimizer, resumed)]
    assert states[0] == states[1]


def test_a_step_from_x_is_refused_before_anything_changes():
    model = model_of()
    optimizer = trained(adamw, model)
    saved = by_hand(optimizer, model, at_x=True)
    twin, resumed = loaded(adamw, saved, ("optimizer", "model"))
    gradients(twin, 5)
    before = copy.deepcopy([values(twin), resumed.param_groups[0]["k"]])
    with pytest.raises(RuntimeError, match=r"parameters hold x.*optimizer\.train\(\)"):
        resumed.step()
    assert same(values(twin), before[0])
    assert resumed.param_groups[0]["k"] == before[1]
    resumed.train()
    assert same(values(twin), values(model))
    resumed.step()


@pytest.mark.parametrize("act", ["train", "eval", "step", "eval_params"])
def test_a_state_of_other_weights_is_refused(act):
    model = model_of()
    optimizer = trained(adamw, model)
    saved = by_hand(optimizer, model, at_x=True)
    with torch.no_grad():
        saved["model"]["2.bias"] += 0.01
    twin, resumed = loaded(adamw, saved, ("optimizer", "model"))
    gradients(twin, 5)
    with pytest.raises(RuntimeError, match=r"0\.5 of shape \(1,\)"):
        getattr(resumed, act)()


def test_weights_of_ones_own_are_taken_up_in_eval_mode_after_loading():
    model = model_of()
    optimizer = trained(adamw, model)
    saved = by_hand(optimizer, model, at_x=False)
    twin, resumed = loaded(adamw, saved, ("model", "optimizer"))
    resumed.eval()
    with torch.no_grad():
        twin[2].bias.fill_(3.0)
    resumed.train()
    z = resumed.state[twin[2].bias]["z"]
    torch.testing.assert_close(twin[2].bias.detach(), 0.1 * z + 0.9 * 3.0)


def test_the_state_is_lean_again_and_the_state_dict_is_a_copy():
    model = model_of()
    optimizer = trained(adamw, model)
    y = optimizer.state_dict()["state"][0]["y"]
    first = next(model.parameters())
    assert torch.equal(y, first)
    assert y.data_ptr() != first.data_ptr()  # a checkpoint may be loaded in place
    assert not {"x", "y"} & set(optimizer.state[first])


def test_a_state_without_y_is_taken_at_its_word():
    # As of Meta's package.
    model = model_of()
    optimizer = trained(adamw, model)
    saved = by_hand(optimizer, model, at_x=False)
    for state in saved["optimizer"]["state"].values():
        del state["y"]
    _, resumed = loaded(adamw, saved, ("model", "optimizer"))
    assert same(resumed.eval_params(), optimizer.eval_params())


# What could not be read is not written


class Odd(str):
    pass


UNREADABLE = {
    "ndarray": (np.ones(2), "['it'] is a numpy.ndarray"),
    "path": (pathlib.Path("a"), "['it'] is a pathlib"),
    "datetime": (datetime.datetime(2024, 1, 2), "['it'] is a datetime.datetime"),
    "numpy's date": (np.datetime64("2024-01-02"), "['it'] is a numpy.datetime64"),
    "deep inside": ([{"a": (1, {2: np.ones(1)})}], "['it'][0]['a'][1][2] is a"),
    "key": ({np.int64(1): 2}, "['it'][np.int64(1)] is a numpy.int64"),
    "a class": (Odd("a"), "['it'] is a test_torch_saving.Odd"),
    "in a set": ({pathlib.Path("a")}, "['it'] is a builtins.set"),
}


@pytest.mark.parametrize(("value", "named"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_could_not_be_read_again_is_refused_by_name(value, named, tmp_path):
    model = model_of()
    optimizer = trained(adamw, model)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    old = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"extra{named}")):
        sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer, it=value)
    assert (tmp_path / "run.pt").read_bytes() == old


def test_containers_without_an_end_are_refused(tmp_path):
    model = model_of()
    optimizer = trained(adamw, model)
    cycle, deep = [], []
    cycle.append(cycle)
    for _ in range(10_000):
        deep = [deep]
    for endless in (cycle, deep):
        with pytest.raises(ValueError, match="contains itself, or lies more than 100"):
            sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer, it=endless)


def test_what_can_be_read_comes_back_and_numpy_s_scalars_as_numbers(tmp_path):
    model = model_of()
    optimizer = trained(adamw, model)
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    state = torch.nn.BatchNorm1d(2).state_dict()
    extra = {
        "loss": np.float32(0.5),
        "step": np.int64(7),
        "done": np.bool_(True),
        "nested": [np.float64(0.1), (1, {"a": {2}}), None, b"a", 1j],
        "dtype": torch.bfloat16,
        "ema": state,
    }
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer, **extra)
    back = sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert (back["loss"], back["step"], back["done"]) == (0.5, 7, True)
    assert [type(back[key]) for key in ("loss", "step", "done")] == [float, int, bool]
    assert back["nested"] == [0.1, (1, {"a": {2}}), None, b"a", 1j]
    assert back["dtype"] is torch.bfloat16
    assert type(back["ema"]) is OrderedDict
    assert back["ema"]._metadata == state._metadata
    assert optimizer.param_groups[0]["lr"] == 0.25


# Where the file goes


@pytest.fixture
def pair():
    model = model_of()
    return model, trained(adamw, model)


def test_a_new_file_has_the_mode_that_the_umask_leaves(pair, tmp_path):
    before = os.umask(0o027)
    try:
        sf_torch.save_checkpoint(tmp_path / "run.pt", *pair)
        with sf_torch.record(pair[1], tmp_path / "run.safetensors"):
            pass
    finally:
        os.umask(before)
    for name in ("run.pt", "run.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_an_existing_file_keeps_its_mode(pair, tmp_path):
    path = tmp_path / "run.pt"
    path.touch()
    path.chmod(0o604)
    sf_torch.save_checkpoint(path, *pair)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    sf_torch.load_checkpoint(path, *pair)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(exists, pair, tmp_path):
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "run.pt", tmp_path / "latest.pt"
    link.symlink_to("disk/run.pt")
    if exists:
        file.touch()
    sf_torch.save_checkpoint(link, *pair)
    assert link.is_symlink()
    sf_torch.load_checkpoint(file, *pair)
    assert [entry.name for entry in file.parent.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("save", ["checkpoint", "record"])
def test_a_path_that_can_be_no_file_is_refused(save, pair, tmp_path):
    def write(path):
        if save == "checkpoint":
            sf_torch.save_checkpoint(path, *pair)
        else:
            with sf_torch.record(pair[1], path):
                pass

    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        write(tmp_path / "absent" / "run.pt")
    with pytest.raises(IsADirectoryError, match="Name a file in it"):
        write(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "loop")
    with pytest.raises(OSError, match="name too long"):
        write(tmp_path / ("n" * 256))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a device or a pipe"):
        write(tmp_path / "pipe")
    assert {entry.name for entry in tmp_path.iterdir()} == {"loop", "pipe"}


@pytest.mark.parametrize("letter", ["n", "λ"])
def test_a_name_as_long_as_names_can_be_is_written(letter, pair, tmp_path):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    sf_torch.save_checkpoint(path, *pair)
    sf_torch.load_checkpoint(path, *pair)


def test_the_folder_is_on_the_disk_too(pair, tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_mode), sync(fd))
    )
    sf_torch.save_checkpoint(tmp_path / "run.pt", *pair)
    assert [stat.S_ISDIR(mode) for mode in synced] == [False, True]


def test_a_full_disk_is_named_and_the_old_file_stays(pair, tmp_path):
    path = tmp_path / "run.pt"
    sf_torch.save_checkpoint(path, *pair)
    old = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, before[1]))
    try:
        with pytest.raises(
            OSError, match=f"{path} was not written.*File too large"
        ) as e:
            sf_torch.save_checkpoint(path, *pair)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert e.value.errno == errno.EFBIG
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


def test_an_earlier_error_of_the_system_is_not_blamed(tmp_path):
    def write(file):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        try:
            raise OSError(errno.ENOSPC, "of another file")
        except OSError:
            write_whole(tmp_path / "run.pt", write)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    path = tmp_path / "run.pt"
    script = """
        import os, signal, sys
        from sf_torch._files import write_whole
        def write(file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(sys.argv[1], write)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=False)
    (left,) = tmp_path.iterdir()

    def write_while_another_writes(file):
        assert not left.exists()
        write_whole(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"first")

    write_whole(path, write_while_another_writes)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
