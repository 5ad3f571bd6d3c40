"""A fused step is the same step whether it looks at its tensors anew or not.

While nothing moves in memory, a fused optimizer goes on with what it knew at the step
before. Its first step therefore says nothing about its second: each member takes five
here, over parameters that let it keep what it knows.
"""

import pytest
import torch
from members import (
    MEMBERS,
    OVER_A_BASE,
    assert_same_iterates,
    build,
    iterates,
    parameters,
    run,
)

import sf_torch
from sf_torch._step import fused

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not fused.works_on(torch.device(DEVICE)):
    pytest.skip("neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)

# Contiguous, aligned, and nothing that the kernel leaves to the plain step.
SHAPES = [(9, 4), (8,), (32, 40)]
FUSED = [name for name in MEMBERS if name not in OVER_A_BASE]


@pytest.mark.parametrize("name", FUSED)
def test_five_fused_steps_are_five_plain_steps(name):
    def train(fused):
        params = parameters(SHAPES, DEVICE)
        optimizer = build(name, params, fused=fused)
        run(optimizer, params, range(3))  # each with gradients in fresh memory
        run(optimizer, params, range(3, 5), in_place=True)
        return iterates(optimizer, params)

    # Five roundings of float32, and what a division or a root differs by.
    assert_same_iterates(train(True), train(False), 8 * 2**-24)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("store_x", [True, False])
def test_published_gpa_decays_at_every_step(fused, store_x):
    """Without a gradient Adam stands still: z = (1 - lr λ)^k, and y stays where it is.

    x is what y and z imply, and moves a step of 1 - μ_x towards z; then y follows.
    """
    lr, weight_decay, mu_y, mu_x = 0.1, 0.5, 0.7, 0.9
    p = torch.nn.Parameter(torch.ones(8, device=DEVICE))
    optimizer = sf_torch.GPAAdamW(
        [p],
        lr=lr,
        weight_decay=weight_decay,
        mu_y=mu_y,
        mu_x=mu_x,
        store_x=store_x,
        fused=fused,
        upstream_compatible=True,
    )
    optimizer.train()
    y = z = 1.0
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        z *= 1 - lr * weight_decay
        x = mu_x * (y - (1 - mu_y) * z) / mu_y + (1 - mu_x) * z
        y = mu_y * x + (1 - mu_y) * z
        for ours, right in (
            (optimizer.state[p]["z"], z),
            (optimizer.eval_params()[0], x),
            (p.detach(), y),
        ):
            torch.testing.assert_close(ours, torch.full_like(ours, right))
