"""Objects of DeepSpeed's shape, which forward to the optimizer, under Accelerate.

DeepSpeed itself needs its own launcher. Its objects hold the optimizer as ``optimizer``
and forward groups, state and ``step()``, but neither ``train()`` nor ``eval()``;
Accelerate's look for the two at most one object further in.
"""

import pytest
import torch
from torch_cases import same, values
from trainer_runs import BUILDS, INPUTS, TARGETS, bare_loop, network, together

import sf_torch

pytestmark = together


class Forwarding:
    """As DeepSpeed's optimizers: no torch optimizer, and no modes."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


def accelerated(optimizer):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.Accelerator(cpu=True)
    return accelerate.optimizer.AcceleratedOptimizer(optimizer, device_placement=False)


DEPTHS = {
    "one object": lambda ours: accelerated(Forwarding(ours)),
    "two objects": lambda ours: accelerated(Forwarding(Forwarding(ours))),
}
depths = pytest.mark.parametrize("wrap", DEPTHS.values(), ids=DEPTHS)


@depths
@pytest.mark.parametrize("name", ["adamw", "wrapper"])
def test_a_model_that_is_followed_is_evaluated_at_x(name, wrap):
    build = BUILDS[name]
    net = network()
    optimizer = wrap(build(net.parameters()))
    sf_torch.follow(net, optimizer)
    for _ in range(2):
        net.train()
        for inputs, targets in zip(INPUTS.split(4), TARGETS.split(4), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(inputs), targets).backward()
            optimizer.step()
        y = values(net)
        net.eval()
    expected_x, expected_y = bare_loop(build, epochs=2)
    assert same(values(net), expected_x)
    assert same(y, expected_y)
    assert not same(expected_x, expected_y)


@depths
def test_checkpoints_and_statistics_reach_the_optimizer(wrap, tmp_path):
    net = torch.nn.Sequential(network(), torch.nn.BatchNorm1d(1))
    ours = BUILDS["adamw"](net.parameters())
    optimizer = wrap(ours)
    ours.train()
    net(INPUTS).square().sum().backward()
    optimizer.step()
    sf_torch.check_modes(optimizer)
    sf_torch.update_bn([INPUTS], net, optimizer)
    sf_torch.save_checkpoint(tmp_path / "run.pt", net, optimizer)
    y = values(net)
    ours.eval()
    net.eval()
    x = values(net)
    mean = net[0](INPUTS).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    assert same(torch.load(tmp_path / "run.pt")["model"].values(), [*x, *net.buffers()])
    sf_torch.load_checkpoint(tmp_path / "run.pt", net, optimizer)
    assert ours.training
    assert same(values(net), y)


@depths
def test_the_callback_of_the_trainer_reaches_it(wrap):
    pytest.importorskip("transformers", reason="needs transformers")
    from sf_torch.transformers import ScheduleFreeCallback

    net = network()
    ours = BUILDS["adamw"](net.parameters())
    callback, given = ScheduleFreeCallback(), {"optimizer": wrap(ours), "model": net}
    callback.on_train_begin(None, None, None, **given)
    callback.on_step_begin(None, None, None, **given)
    assert ours.training
    net.state_dict()
    assert not ours.training
    callback.on_step_begin(None, None, None, **given)
    callback.on_train_end(None, None, None, **given)
    assert not ours.training


def test_what_is_not_inside_is_missed():
    net = network()
    with pytest.raises(TypeError, match="inside Forwarding around SGD"):
        sf_torch.unwrapped(Forwarding(torch.optim.SGD(net.parameters())))


def test_copies_of_the_parameters_are_no_parameters_of_the_model():
    """DeepSpeed's ZeRO and float16 optimizers move copies of their own."""
    net = network()
    masters = [p.detach().clone().requires_grad_() for p in net.parameters()]
    with pytest.raises(ValueError, match="none of the 4 parameters of Sequential"):
        sf_torch.follow(net, Forwarding(BUILDS["adamw"](masters)))
