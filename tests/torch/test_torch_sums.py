"""The sums of ScheduleFree+ over whatever arrays there are, against their formulas."""

import math

import pytest
import torch

import sf_torch
from sf_torch._step import batches

STEPS = 3
# Several that share a block, an empty one, and one that is taken in slices.
SHAPES = [(3, 5), (7,), (), (0, 4), (2, 70)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
OPTIONS = {
    "x recovered": {},
    "x stored": {"store_x": True},
    "narrow state": {"state_dtype": torch.bfloat16},
    "growing β": {"sf_beta1_anneal_steps": 4, "sf_beta1_max": 0.99},
}
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


def drawn(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def sums(optimizer, params):
    """``Σ β g·(z - x)``, the size of its terms, and ``Σ|g|``, in float64."""
    (group,) = optimizer.param_groups
    beta, inner, size, norm = optimizer._beta(group), 0.0, 0.0, 0.0
    for p in params:
        g, state = p.grad.to(torch.complex128), optimizer.state.get(p, {})
        norm += g.abs().sum().item()
        if state:
            z, y = (t.detach().to(torch.complex128) for t in (state["z"], p))
            way = z - state["x"] if "x" in state else (z - y) / group["b1"]
            inner += beta * (g.conj() * way).real.sum().item()
            size += beta * (g * way).abs().sum().item()
    return inner, size, norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums_are_those_of_the_formulas(dtype, options, layout, monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", 32)
    laid_out = LAYOUTS[layout]
    params = [
        torch.nn.Parameter(laid_out(drawn(shape, dtype, seed)))
        for seed, shape in enumerate(SHAPES)
    ]
    optimizer = sf_torch.AdamCScheduleFreePlus(params, **OPTIONS[options])
    optimizer.train()
    (group,) = optimizer.param_groups
    for k in range(STEPS):
        for seed, p in enumerate(params):
            # Of another layout than the parameter's in the last step.
            g = drawn(p.shape, dtype, 100 * k + seed)
            p.grad = g if k == STEPS - 1 else laid_out(g)
        inner, size, norm = sums(optimizer, params)
        optimizer.step_func(3.0)
        tolerance = 2**-7 if options == "narrow state" else 1e-6
        if k:  # before the first step there is no z
            assert abs(group["ip_term"] - inner) <= tolerance * size
        assert group["grad_l1_ema"] == pytest.approx(
            math.sqrt(math.pi / 2) * norm, rel=1e-6
        )
    assert size > 0


def test_the_sums_ask_for_no_fresh_memory():
    """On a CPU it would come page by page, which takes longer than the arithmetic."""
    p = torch.nn.Parameter(torch.ones(2 * batches.BLOCK))
    optimizer = sf_torch.AdamCScheduleFreePlus([p])
    optimizer.train()
    p.grad = torch.ones_like(p)
    optimizer.step_func(1.0)
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as seen:
        optimizer.step_func(1.0)
    allocated = [e.cpu_memory_usage for e in seen.key_averages()]
    assert max(allocated) < batches.BLOCK
