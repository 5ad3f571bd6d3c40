"""A step is taken whole, or not at all, or the optimizer says that it is spoiled."""

import copy
import itertools

import pytest
import torch
from members import MEMBERS, build, loss_of, parameters, run, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch_cases import gradients, identical, model_of, trained

import sf_torch
from sf_torch._step import fused

SHAPES = [(3, 2), (4,)]
SAYS = r"(?s)failed half-way.*It was \w*Error.*made up.*load_checkpoint, or load_state"


class OutOfMemory(TorchDispatchMode):
    """The n-th operation within the block raises."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":  # with which torch notes when steps end
            if self.left == 0:
                raise torch.OutOfMemoryError("made up")
            self.left -= 1
        return func(*args, **(kwargs or {}))


def operations(act):
    """How many ``act`` is made of."""
    with OutOfMemory(-1) as never:
        act()
    return -1 - never.left


def held(params, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    return [[p.detach().clone() for p in params], saved]


def restore(params, optimizer, before):
    optimizer.load_state_dict(copy.deepcopy(before[1]))
    with torch.no_grad():
        for p, value in zip(params, before[0], strict=True):
            p.copy_(value)


def refuses(act):
    with pytest.raises(RuntimeError, match=SAYS):
        act()


def everything_raises_in_turn(params, optimizer, act, stride=1):
    """How many of the operations of ``act`` left nothing moved, and how many did.

    After each the run is brought back, and in the end it is as if nothing had been.
    """
    before = held(params, optimizer)
    unmoved = spoiled = 0
    for n in itertools.count(step=stride):
        try:
            with OutOfMemory(n):
                act()
            break
        except RuntimeError as error:  # as a model's load_state_dict says it
            # Not what is refused because of it: a form that restores its mode.
            assert "made up" in str(error)  # noqa: PT017
            assert "half-way" not in str(error)  # noqa: PT017
            if optimizer._spoiled is None:
                assert identical(held(params, optimizer), before), n
                unmoved += 1
            else:
                refuses(optimizer.state_dict)
                restore(params, optimizer, before)
                assert identical(held(params, optimizer), before)
                spoiled += 1
    return unmoved, spoiled


@pytest.mark.parametrize("name", MEMBERS)
def test_whichever_operation_of_a_step_raises(name):
    params = parameters(SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    set_gradients(params, 2)
    found = everything_raises_in_turn(
        params, optimizer, lambda: optimizer.step(lambda: loss_of(2)), stride=3
    )
    assert found[1]
    other = parameters(SHAPES)
    whole = build(name, other)
    run(whole, other, range(3))
    assert identical(held(params, optimizer), held(other, whole))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFreeReference"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_whichever_operation_of_a_switch_raises(name, mode):
    params = parameters(SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    if mode == "train":
        optimizer.eval()
    assert everything_raises_in_turn(params, optimizer, getattr(optimizer, mode))[1]


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_whichever_operation_of_a_load_raises(name):
    params = parameters(SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, range(2, 4))
    assert everything_raises_in_turn(
        params, optimizer, lambda: optimizer.load_state_dict(saved)
    )[1]


def test_whichever_operation_of_reading_a_checkpoint_raises(tmp_path):
    model = model_of()
    optimizer = trained(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1), model)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    wanted = held(model.parameters(), optimizer)
    gradients(model, 9)
    optimizer.step()
    assert everything_raises_in_turn(
        list(model.parameters()),
        optimizer,
        lambda: sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer),
        stride=3,
    )[1]
    assert identical(held(model.parameters(), optimizer), wanted)


@pytest.fixture
def spoiled():
    model = model_of()
    optimizer = trained(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1), model)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(5):
        optimizer.step()
    return model, optimizer


ACTS = {
    "step": lambda model, optimizer: optimizer.step(),
    "eval": lambda model, optimizer: optimizer.eval(),
    "train": lambda model, optimizer: optimizer.train(),
    "eval_mode": lambda model, optimizer: optimizer.eval_mode().__enter__(),
    "eval_params": lambda model, optimizer: optimizer.eval_params(),
    "state_dict": lambda model, optimizer: optimizer.state_dict(),
    "deepcopy": lambda model, optimizer: copy.deepcopy(optimizer),
    "save": lambda model, optimizer: sf_torch.save_checkpoint("x", model, optimizer),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_a_spoiled_optimizer_refuses_all_that_would_use_its_arrays(
    act, spoiled, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    refuses(lambda: act(*spoiled))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_brings_a_spoiled_optimizer_back(tmp_path):
    model = model_of()
    optimizer = trained(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1), model)
    sf_torch.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    before = held(model.parameters(), optimizer)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(5):
        optimizer.step()
    sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer)
    assert identical(held(model.parameters(), optimizer), before)
    optimizer.step()


def test_a_state_without_the_weights_that_belong_to_it_does_not():
    def one_by_one(params):
        return sf_torch.SGDScheduleFree(params, lr=0.1, foreach=False)

    model = model_of()
    optimizer = trained(one_by_one, model)
    saved = copy.deepcopy(optimizer.state_dict())
    n = operations(trained(one_by_one, model_of()).step)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(n - 1):
        optimizer.step()
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="belongs to other weights"):
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFreeClosure"])
def test_a_closure_that_raises_has_moved_nothing(name):
    params = parameters(SHAPES)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    before = held(params, optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert identical(held(params, optimizer), before)
    run(optimizer, params, range(2, 3))


def test_a_kernel_that_cannot_be_launched_spoils_the_optimizer(monkeypatch):
    def raises(*_, **__):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(fused, "works_on", lambda device: True)
    monkeypatch.setattr(fused, "step_kernel", None, raising=False)
    monkeypatch.setattr(fused.Kernel, "_launch", raises)
    params = parameters(SHAPES)
    optimizer = build("AdamWScheduleFree", params, fused=True)
    with pytest.raises(torch.OutOfMemoryError):
        run(optimizer, params, range(1))
    refuses(optimizer.state_dict)


@pytest.mark.slow  # the compiler's three seconds
def test_a_compiled_step_that_raises_spoils_the_optimizer():
    def backend(graph, inputs):
        def call(*_):
            raise torch.OutOfMemoryError("made up")

        return call

    params = parameters(SHAPES)
    optimizer = build("SGDScheduleFree", params)
    set_gradients(params, 0)
    with pytest.raises(torch.OutOfMemoryError):
        torch.compile(optimizer.step, backend=backend)()
    refuses(optimizer.state_dict)
