"""The fused kernel takes the same step as the plain form, in one launch.

Without a GPU it runs in Triton's interpreter (see conftest.py), which shows that its
logic is right; its speed and its code for GPUs need one.
"""

import copy
from functools import partial

import pytest
import torch

import sf_torch
from sf_torch import _optimizer
from sf_torch._step import dispatch, fused

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not fused.works_on(torch.device(DEVICE)):
    pytest.skip("neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)

SHAPES = [(9, 5), (7,), (), (0, 3), (32, 40), (2, 3, 4, 5)]
OPTIMIZERS = {
    "sgd": partial(sf_torch.SGDScheduleFree, lr=0.5, warmup_steps=3),
    "sgd_decay_at_x": partial(
        sf_torch.SGDScheduleFree, lr=0.5, weight_decay=0.1, decay_at="x"
    ),
    "sgd_stored": partial(sf_torch.SGDScheduleFree, lr=0.5, store_x=True),
    "sgd_reference": partial(sf_torch.SGDScheduleFreeReference, lr=0.5),
    "adamw": partial(
        sf_torch.AdamWScheduleFree, lr=0.02, weight_decay=0.1, warmup_steps=3
    ),
    "adamw_momentum": partial(
        sf_torch.AdamWScheduleFree,
        lr=0.02,
        inner_momentum=0.9,
        weight_decay=0.1,
        decay_at="z",
    ),
    "adamw_beta_0": partial(sf_torch.AdamWScheduleFree, lr=0.02, betas=(0.0, 0.99)),
    "adamw_paper": partial(
        sf_torch.AdamWScheduleFreePaper, lr=0.02, inner_momentum=0.9, weight_decay=0.1
    ),
    "adamw_algoperf": partial(
        sf_torch.AdamWScheduleFreeAlgoPerf,
        lr=0.02,
        inner_momentum=0.9,
        weight_decay=0.1,
        warmup_steps=3,
    ),
    "refined": partial(
        sf_torch.AdamWScheduleFreeRefined,
        lr=0.02,
        refined_c=50.0,
        inner_momentum=0.9,
        weight_decay=0.1,
    ),
    "radam": partial(sf_torch.RAdamScheduleFree, lr=0.02, weight_decay=0.1),
    "radam_sgd": partial(sf_torch.RAdamScheduleFree, lr=0.02, silent_sgd_phase=False),
    "plus": partial(
        sf_torch.AdamCScheduleFreePlus,
        lr=0.5,
        weight_decay=1.0,
        polyak_beta=0.5,
        c_warmup=2,
        sf_beta1_anneal_steps=5,
    ),
    "plus_reference": partial(
        sf_torch.AdamCScheduleFreePlusPaper, lr=0.5, weight_decay=1.0
    ),
    "gpa": partial(sf_torch.GPAAdamW, lr=0.02, weight_decay=0.1),
    "gpa_no_momentum": partial(
        sf_torch.GPAAdamW, lr=0.02, betas=(0.0, 0.99), weight_decay=0.1
    ),
    "gpa_upstream": partial(
        sf_torch.GPAAdamW, lr=0.02, weight_decay=0.1, upstream_compatible=True
    ),
}
# ScheduleFree+ finds its step size on the host, and GPA has no such argument.
WAYS = [
    (name, way)
    for name in OPTIMIZERS
    for way in ("fused", "capturable")
    if way == "fused" or not name.startswith(("plus", "gpa"))
]


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in SHAPES]
    # One that fills its memory in another order, one that begins off alignment.
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    params[1] = torch.empty(8, dtype=dtype, device=DEVICE)[1:].copy_(params[1])
    return [torch.nn.Parameter(p) for p in params]


def train(make, dtype=torch.float32, steps=5, **options):
    """y and x (float32) at the end, and the optimizer."""
    params = make_params(dtype)
    optimizer = make(params, **options)
    optimizer.train()
    generator = torch.Generator().manual_seed(1)
    for k in range(steps):
        for p in params:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad.to(DEVICE, dtype)
        optimizer.step(lambda loss=1.0 + 0.1 * k: loss)
    return params, optimizer.eval_params(torch.float32), optimizer


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch."""
    seen = []

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                seen.append(options)
                return kernel[grid](*args, **options)

            return launch

    kernel = fused.step_kernel
    monkeypatch.setattr(fused, "step_kernel", Spy())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_fused_takes_the_same_steps(name, way, dtype, launches):
    make = OPTIMIZERS[name]
    y, x, _ = train(make, dtype, **{way: True})
    launched = len(launches)
    plain_y, plain_x, _ = train(make, dtype, fused=False)
    assert len(launches) == launched > 0
    # Eight roundings of float32, and for y in bfloat16 a last digit of its own, which
    # Triton's interpreter cuts off where GPUs round.
    assert_close(x, plain_x, 8 * 2**-24)
    assert_close(y, plain_y, 8 * 2**-24 if dtype == torch.float32 else 2**-7)


def test_a_changing_interpolation():
    steps = 6

    def run(fused):
        params = make_params()
        optimizer = OPTIMIZERS["adamw"](params, fused=fused)
        optimizer.train()
        for k in range(steps):
            optimizer.param_groups[0]["betas"] = (0.9 + 0.01 * k, 0.999)
            for p in params:
                p.grad = torch.cos(p.detach() + k)
            optimizer.step()
        return optimizer.eval_params()

    assert_close(run(True), run(False), 8 * 2**-24)


def test_one_launch_for_all_that_is_alike(launches):
    params = [torch.nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(50)]
    optimizer = sf_torch.AdamWScheduleFree(params, fused=True)
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(launches) == 1


@pytest.mark.parametrize("name", ["adamw", "adamw_beta_0", "sgd_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_switches_modes_and_comes_back_to_the_same_y(name, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter rounds to bfloat16 towards zero")
    y, x, optimizer = train(OPTIMIZERS[name], dtype, fused=True)
    before = [p.detach().clone() for p in y]
    optimizer.eval()
    assert_close(y, [p.to(dtype) for p in x], 2**-24)
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(y, before, strict=True))


def test_fused_forms_y_anew_where_x_was_changed():
    y, _, optimizer = train(OPTIMIZERS["adamw"], fused=True)
    before = [p.detach().clone() for p in y]
    optimizer.eval()
    with torch.no_grad():
        y[4][0] += 1
    optimizer.train()
    moved = before[4].clone()
    moved[0] += 0.9  # β, as z has stayed
    torch.testing.assert_close(y[4].detach(), moved)
    assert torch.equal(y[4][1:], before[4][1:])


def new_gradients(params, optimizer):
    """Which is what every step brings."""


def another_state_tensor(params, optimizer):
    state = optimizer.state[params[0]]
    state["z"] = state["z"].clone()


def other_memory(params, optimizer):
    params[4].data = params[4].data.clone()


def a_loaded_state(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_gradient(params, optimizer):
    params[4].grad = None


def a_gradient_off_alignment(params, optimizer):
    grad = params[4].grad
    params[4].grad = torch.empty(grad.numel() + 1, device=DEVICE)[1:].view_as(grad)
    params[4].grad.copy_(grad)


def a_gradient_in_another_layout(params, optimizer):
    params[4].grad = params[4].grad.T.contiguous().T


def no_interpolation(params, optimizer):
    optimizer.param_groups[0]["betas"] = (0.0, 0.99)


@pytest.mark.parametrize(
    ("happens", "plans"),
    [
        (new_gradients, 1),
        (another_state_tensor, 2),
        (other_memory, 2),
        (a_loaded_state, 2),
        (no_gradient, 3),  # and another one when it is back
        (a_gradient_off_alignment, 1),  # its kernel makes another launch
        (a_gradient_in_another_layout, 3),
        (no_interpolation, 2),
    ],
)
def test_a_plan_lasts_until_something_moves(happens, plans, monkeypatch):
    def run(fused):
        params = make_params()[:-1]  # the last one's gradients are copied every time
        optimizer = OPTIMIZERS["adamw"](params, fused=fused)
        optimizer.train()
        for k in range(6):
            for i, p in enumerate(params):
                p.grad = torch.cos(p.detach() + k + i)
            if k == 3:
                happens(params, optimizer)
            optimizer.step()
        return optimizer.eval_params()

    made = []
    Plan = dispatch.Plan
    monkeypatch.setattr(_optimizer, "Plan", lambda *a: made.append(1) or Plan(*a))
    x = run(True)
    assert len(made) == plans
    assert_close(x, run(False), 8 * 2**-24)


def test_nothing_is_compiled_anew_as_the_numbers_change(launches):
    train(OPTIMIZERS["adamw"], steps=6, fused=True)
    assert len({str(sorted(options.items())) for options in launches}) == 2
    assert len(launches) == 2 * 6  # aligned and not


def test_tensors_without_a_common_layout_take_the_plain_step():
    def run(fused):
        p = torch.nn.Parameter(torch.ones(4, 6, device=DEVICE)[:, ::2])
        optimizer = sf_torch.SGDScheduleFree([p], lr=0.1, fused=fused)
        optimizer.train()
        p.grad = torch.arange(12.0, device=DEVICE).reshape(3, 4).T
        optimizer.step()
        return p.detach()

    torch.testing.assert_close(run(True), run(False))


def test_gradients_are_left_as_they_were():
    params, _, _ = train(OPTIMIZERS["adamw"], steps=1, fused=True)
    generator = torch.Generator().manual_seed(1)
    for p in params:
        expected = torch.randn(p.shape, generator=generator).to(DEVICE)
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0)


def test_counters_of_a_capturable_optimizer_move_in_place():
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = sf_torch.AdamWScheduleFree([p], capturable=True)
    optimizer.train()
    seen = []
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["k"])
    assert all(k is seen[0] for k in seen)
    assert seen[0] == 3


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays_the_step():
    params = [torch.nn.Parameter(torch.ones(5, device="cuda"))]
    twin = [torch.nn.Parameter(torch.ones(5, device="cuda"))]
    optimizer = sf_torch.AdamWScheduleFree(params, capturable=True)
    plain = sf_torch.AdamWScheduleFree(twin)
    optimizer.train()
    plain.train()
    for p in params + twin:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()
    # The capture itself moves nothing.
    for _ in range(5):
        plain.step()
    assert_close(optimizer.eval_params(), plain.eval_params(), 8 * 2**-24)


@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_holds_the_backward_pass_too():
    def start(**options):
        p = torch.nn.Parameter(torch.ones(16, device="cuda"))
        optimizer = sf_torch.AdamWScheduleFree([p], **options)
        optimizer.train()
        return p, optimizer

    def step(p, optimizer):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()

    captured, plain = start(capturable=True), start()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(*captured)
    torch.cuda.current_stream().wait_stream(aside)
    captured[1].zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)  # with gradients in memory of the graph's own
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(*plain)
    assert_close(captured[1].eval_params(), plain[1].eval_params(), 8 * 2**-24)


def test_each_graph_has_memory_of_its_own_for_the_addresses_of_gradients(monkeypatch):
    """A graph reads them there at each replay, also when others were made since."""
    params = make_params()
    optimizer = OPTIMIZERS["adamw"](params, fused=True)
    optimizer.train()

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        kept.append([p.grad for p in params])  # no memory comes twice
        optimizer.step()
        (plan,) = optimizer._plans.values()
        return plan.executors

    kept = []
    step()
    monkeypatch.setattr(fused.Kernel, "_is_capturing", lambda kernel: True)
    staged = [kernel.staged[-1] for kernel in step()]
    before = [addresses.clone() for addresses in staged]
    for _ in range(fused.GRAPHS - 1):
        kernels = step()
    with pytest.raises(RuntimeError, match=r"8 CUDA graphs.*Take one step"):
        step()
    assert all(map(torch.equal, staged, before))
    read = {t.data_ptr() for t in optimizer._captured}
    assert read >= {t.data_ptr() for kernel in kernels for t in kernel.staged}


def test_a_step_after_a_graph_does_not_wait_for_its_replay(monkeypatch):
    """The addresses that the graph copies to the device are there once it has run."""
    params = make_params()
    optimizer = OPTIMIZERS["adamw"](params, fused=True)
    optimizer.train()
    for p in params:
        p.grad = torch.ones_like(p)
    with monkeypatch.context() as patch:
        patch.setattr(fused.Kernel, "_is_capturing", lambda kernel: True)
        optimizer.step()
    (plan,) = optimizer._plans.values()
    of_graph = [kernel.grads for kernel in plan.executors]
    optimizer.step()
    for kernel, captured in zip(plan.executors, of_graph, strict=True):
        assert kernel.grads is not captured
        assert torch.equal(kernel.grads.cpu(), captured.cpu())


BAD = [
    ({"fused": True, "foreach": True}, "foreach=True"),
    ({"capturable": True, "fused": False}, "fused=False"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        sf_torch.AdamWScheduleFree([torch.ones(2, device=DEVICE)], **options)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_refused_where_it_cannot_work(name, way, monkeypatch):
    make = partial(OPTIMIZERS[name], **{way: True})
    double = torch.ones(2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match=f"{way}=True needs.*float64"):
        make([double])
    monkeypatch.setattr(fused, "works_on", lambda device: False)
    with pytest.raises(ValueError, match=f"{way}=True needs.*Leave it out"):
        make([torch.ones(2, requires_grad=True)])
