"""Accelerate, the real one, on a tiny model."""

import pytest
import torch
from torch_cases import same, values
from trainer_runs import (
    BUILDS,
    CLIP,
    INPUTS,
    TARGETS,
    bare_loop,
    builds,
    close,
    network,
    together,
)

from sf_torch.accelerate import tell_losses

pytestmark = together


@builds
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_passes_modes_on(build, accumulate, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate
    )
    net = network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(INPUTS, TARGETS), batch_size=4 // accumulate
    )
    model, optimizer, loader = accelerator.prepare(net, build(net.parameters()), loader)
    if build is BUILDS["plus"]:
        tell_losses(accelerator, optimizer)
    for epoch in range(3):
        optimizer.train()
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 1:
            accelerator.save_state(tmp_path)  # in train mode, with y
            saved = values(net)
        optimizer.eval()
    x, y = bare_loop(build, epochs=3)
    for a, b in zip(values(net), x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    optimizer.train()
    for a, b in zip(values(net), y, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    accelerator.load_state(tmp_path)
    assert optimizer.optimizer.training
    assert same(values(net), saved)


def clipped_run(batch_size, accumulate):
    """x after two epochs of an Accelerate loop as people write it."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate
    )
    net = network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(INPUTS, TARGETS), batch_size=batch_size
    )
    plus = BUILDS["plus"](net.parameters())
    model, optimizer, loader = accelerator.prepare(net, plus, loader)
    tell_losses(accelerator, optimizer)
    optimizer.train()
    for _ in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return plus.eval_params()


def test_accelerate_tells_plus_the_loss_of_accumulated_clipped_batches():
    x, _ = bare_loop(BUILDS["plus"], epochs=2, clip=CLIP)
    close(clipped_run(2, accumulate=2), x)


def test_accelerate_tells_losses_to_those_that_take_them():
    with pytest.raises(TypeError, match="AdamWScheduleFree takes no loss"):
        tell_losses(None, BUILDS["adamw"](network().parameters()))
