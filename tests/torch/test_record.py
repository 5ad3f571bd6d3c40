"""A recorded run holds what happened, costs one step's memory, survives a crash."""

import gc
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest
import schedulefree
import torch

import sf_torch
from sf_torch import read_record, record

OPTIMIZERS = {
    "adamw-meta": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, weight_decay=0.1),
    "adamw-ours": lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1, weight_decay=0.1),
    "sgd-meta": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "radam-ours": lambda p: sf_torch.RAdamScheduleFree(p, lr=0.1),
    "wrapper-meta": lambda p: schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(p, lr=0.1, momentum=0.5), momentum=0.9
    ),
    "wrapper-ours": lambda p: sf_torch.ScheduleFreeWrapper(
        torch.optim.SGD(p, lr=0.1, momentum=0.5), momentum=0.9
    ),
}


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def step(net, optimizer, k):
    optimizer.zero_grad()
    net(torch.full((4, 3), float(k % 3 + 1))).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    return grads


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def x_of(net, optimizer):
    optimizer.eval()
    x = values(net)
    optimizer.train()
    return x


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_y_and_x_of_each_step_are_recorded(name, tmp_path):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    optimizer.train()
    step(net, optimizer, 0)  # the recording begins in mid-run
    start, happened = values(net), []
    with record(optimizer, tmp_path / "run.safetensors", model=net):
        for k in range(1, 6):
            grads = step(net, optimizer, k)
            happened.append((grads, values(net)))
    x = x_of(net, optimizer)
    step(net, optimizer, 6)  # not recorded any more

    first, *frames = read_record(tmp_path / "run.safetensors")
    assert first.kind == "start"
    assert first.info["groups"][0]["k"] == 1
    assert_same(first.named("y"), start, rtol=0, atol=0)
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5]
    for frame, (grads, y) in zip(frames, happened, strict=True):
        assert_same(frame.named("grad"), grads, rtol=0, atol=0)
        assert_same(frame.named("y"), y, rtol=0, atol=0)
    assert_same(frames[-1].named("x"), x, rtol=1e-6, atol=1e-6)
    assert frames[-1].info["groups"][0]["k"] == 6


def test_y_and_x_every_so_often_gradients_always(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw-ours"](net.parameters())
    optimizer.train()
    with record(optimizer, tmp_path / "run.safetensors", every=3):
        for k in range(7):
            step(net, optimizer, k)
    _, *frames = read_record(tmp_path / "run.safetensors")
    assert [bool(frame.named("x")) for frame in frames] == [
        step % 3 == 0 for step in range(1, 8)
    ]
    assert all(frame.named("grad") for frame in frames)


@pytest.mark.parametrize("name", ["adamw-meta", "wrapper-meta", "sgd-meta"])
def test_closure_s_gradients_are_recorded(name, tmp_path):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    optimizer.train()

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3)).square().mean()
        loss.backward()
        return loss

    with record(optimizer, tmp_path / "run.safetensors", model=net):
        closure()
        wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.full_like(p, 7.0)  # not these
        assert optimizer.step(closure) > 0
    _, frame = read_record(tmp_path / "run.safetensors")
    assert_same(frame.named("grad"), wanted)


def test_evaluated_weights_are_noted_as_they_are(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw-ours"](net.parameters())
    optimizer.train()
    with record(optimizer, tmp_path / "run.safetensors", model=net) as recorder:
        step(net, optimizer, 0)
        recorder.evaluated()
    frames = list(read_record(tmp_path / "run.safetensors"))
    assert [frame.kind for frame in frames] == ["start", "step", "evaluated"]
    assert_same(frames[-1].named("x"), values(net))
    with pytest.raises(RuntimeError, match="nothing is being recorded"):
        recorder.evaluated()


def test_bfloat16_is_recorded_as_it_is(tmp_path):
    net = network().bfloat16()
    optimizer = OPTIMIZERS["adamw-ours"](net.parameters())
    optimizer.train()
    with record(optimizer, tmp_path / "run.safetensors", model=net):
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
    frame = list(read_record(tmp_path / "run.safetensors"))[-1]
    assert frame.named("y")["weight"].dtype == torch.bfloat16
    assert frame.named("grad").keys() == {"weight"}
    assert torch.equal(frame.named("x")["weight"], optimizer.state[net.weight]["x"])


def test_no_more_than_a_step_is_held(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw-ours"](net.parameters())
    optimizer.train()
    path = tmp_path / "run.safetensors"
    tensors, sizes = [], []
    with record(optimizer, path):
        for k in range(20):
            step(net, optimizer, k)
            sizes.append(path.stat().st_size)
            if k in (2, 19):  # a look at all objects there are takes a second
                gc.collect()
                held = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
                tensors.append(held)
    assert tensors[0] == tensors[1]
    assert sorted(set(sizes)) == sizes


def test_file_cut_anywhere_is_readable_up_to_its_last_whole_step(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw-ours"](net.parameters())
    optimizer.train()
    path, ends = tmp_path / "run.safetensors", []
    with record(optimizer, path):
        ends.append(path.stat().st_size)
        for k in range(3):
            step(net, optimizer, k)
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (*range(ends[0], len(whole), 97), *ends, *(e - 1 for e in ends[1:])):
        cut.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends)
        assert len(list(read_record(cut))) == complete
    damaged = bytearray(whole)
    damaged[ends[1] + 40] ^= 1
    cut.write_bytes(damaged)
    frames = read_record(cut)
    assert [next(frames).step for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="damaged in the frame after step 1"):
        next(frames)


def test_killed_run_is_readable(tmp_path):
    script = """
        import os, signal, sys, torch, sf_torch
        w = torch.nn.Parameter(torch.ones(1000))
        optimizer = sf_torch.SGDScheduleFree([w], lr=0.1)
        optimizer.train()
        with sf_torch.record(optimizer, sys.argv[1]):
            for k in range(10):
                w.grad = torch.full_like(w, k)
                optimizer.step()
                if k == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "run.safetensors"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path])
    assert done.returncode == -signal.SIGKILL
    frames = list(read_record(path))
    assert [frame.step for frame in frames] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert frames[-1].named("grad")["0.0"][0] == 6


def test_optimizer_is_itself_again_afterwards(tmp_path):
    net = network()
    for name in ("adamw-meta", "wrapper-meta"):
        optimizer = OPTIMIZERS[name](net.parameters())
        optimizer.train()
        with suppress(ZeroDivisionError), record(optimizer, tmp_path / name):
            step(net, optimizer, 0)
            raise ZeroDivisionError
        step(net, optimizer, 1)
        assert "step" not in vars(optimizer)
        assert len(list(read_record(tmp_path / name))) == 2


def test_bad_arguments_are_refused(tmp_path):
    net = network()
    optimizer = OPTIMIZERS["adamw-meta"](net.parameters())
    with pytest.raises(ValueError, match=r"every must be a whole number.*got 0"):
        record(optimizer, tmp_path / "run", every=0)
    with pytest.raises(ValueError, match=r"parameter of shape \(2, 3\) that is not"):
        record(optimizer, tmp_path / "run", model=torch.nn.Linear(1, 1))
    (tmp_path / "other").write_bytes(b"hello")
    with pytest.raises(ValueError, match="holds no run of format 2"):
        list(read_record(tmp_path / "other"))
