"""Bad input, memory, and the kinds of tensors that every optimizer here takes."""

import pytest
import torch
from torch_cases import ALL, NAMED, every, gradients, same, started, step, values

import sf_torch
from sf_torch._step import batches
from sf_torch._step.rows import Scratch


def parameter(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


# Bad input: each message quotes the value and names the argument

BAD = {
    "lr": [(-0.1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)],
    "weight_decay": [(-1e-4, ValueError)],
    "eps": [(-1e-8, ValueError)],
    "warmup_steps": [(-1, ValueError), (2.5, TypeError)],
    "decay_at": [("w", ValueError)],
    "momentum": [(-0.1, ValueError), (1.2, ValueError)],
    "betas": [
        ((1.2, 0.9), ValueError),
        ((-0.1, 0.9), ValueError),
        ((0.9, 1.0), ValueError),
        ((0.9,), ValueError),
    ],
    "inner_momentum": [(1.0, ValueError), (-0.5, ValueError)],
    "state_dtype": [(torch.int32, ValueError)],
}
TAKES = {
    "SGD": {"lr", "weight_decay", "warmup_steps", "decay_at", "momentum"},
    "AdamW": BAD.keys() - {"momentum"},
    "RAdam": {"lr", "weight_decay", "eps", "betas"},
}
BAD_INPUT = [
    pytest.param(name, option, value, error, id=f"{name}-{option}={value}")
    for name in NAMED
    for option in sorted(TAKES[name.partition("ScheduleFree")[0]] | {"state_dtype"})
    for value, error in BAD[option]
]


def quoted(value):
    return str(value[0] if isinstance(value, tuple) and value[0] != 0.9 else value)


@pytest.mark.parametrize(("name", "option", "value", "error"), BAD_INPUT)
def test_bad_options_are_refused(name, option, value, error):
    with pytest.raises(error, match=option) as caught:
        NAMED[name]([parameter(2)], **{option: value})
    shown = value[-1] if value == (0.9, 1.0) else value
    assert quoted(shown) in str(caught.value)
    optimizer = NAMED[name]([parameter(2)])
    with pytest.raises(error, match=option):  # and so they are in a group of their own
        optimizer.add_param_group({"params": [parameter(2)], option: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, r"momentum must be a number in .*got 1\.5"),
        (
            {"weight_decay_at_y": -1.0},
            r"weight_decay_at_y must be a number in \[0, .*got -1\.0",
        ),
        ({"state_dtype": torch.int8}, "state_dtype must be None or a floating dtype"),
    ],
)
def test_bad_options_of_the_wrapper_are_refused(options, message):
    base = torch.optim.SGD([parameter(2)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        sf_torch.ScheduleFreeWrapper(base, **options)
    with pytest.raises(TypeError, match=r"base must be a torch optimizer, got \["):
        sf_torch.ScheduleFreeWrapper([parameter(2)])


@every
def test_sparse_gradients_are_refused_before_anything_changes(build):
    table = torch.nn.Embedding(4, 2, sparse=True)
    dense = torch.nn.Linear(2, 1)
    model = torch.nn.Sequential(dense, table)
    optimizer = started(build, model)
    before = values(model)

    def sparse():
        gradients(dense, 0)
        table.weight.grad = torch.sparse_coo_tensor(
            [[1]], torch.ones(1, 2), (4, 2), check_invariants=True
        )

    sparse()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(sparse)
    assert same(values(model), before)
    assert optimizer.param_groups[0]["k"] == 0


# Memory: bytes of state a parameter

BYTES = {  # name: (options, lean float32, bfloat16 with its float32 master)
    "SGDScheduleFree": ({}, 4, 8),
    "AdamWScheduleFree": ({}, 8, 12),
    "AdamWScheduleFree with m": ({"inner_momentum": 0.9}, 12, 16),
    "AdamWScheduleFree with x": ({"store_x": True}, 12, 12),
    "AdamWScheduleFree small": (
        {"state_dtype": torch.bfloat16, "moment_dtype": torch.bfloat16},
        4,
        4,
    ),
    "AdamWScheduleFree small z": ({"state_dtype": torch.bfloat16}, 6, 6),
    "AdamWScheduleFreePaper": ({}, 8, 12),
    "RAdamScheduleFree": ({}, 8, 12),
    "AdamWScheduleFreeReference": ({}, 16, 16),
    "SGDScheduleFreeClosure": ({}, 8, 8),
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_takes_the_bytes_that_are_promised(name, dtype):
    options, lean, master = BYTES[name]
    p = parameter(10, dtype=dtype)
    optimizer = getattr(sf_torch, name.split()[0])([p], lr=0.1, **options)
    if not name.endswith("Closure"):
        optimizer.train()
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step(lambda: None)
    arrays = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    expected = lean if dtype == torch.float32 else master
    assert sum(v.numel() * v.itemsize for v in arrays) == 10 * expected


# Kinds of tensors


@every
def test_complex_parameters_take_the_steps_of_their_real_and_imaginary_parts(build):
    z = torch.nn.Parameter(torch.tensor([1 + 2j, -3 + 0.5j]))
    parts = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    models = [torch.nn.ParameterList([z]), torch.nn.ParameterList([parts])]
    optimizers = [started(build, model) for model in models]
    for seed in range(3):
        g = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))
        if build is ALL["SGDScheduleFree"]:
            z.grad = torch.view_as_complex(g.clone())
        else:  # Adam sees |g|: with both parts equal it sees theirs times sqrt(2)
            g[:, 1] = g[:, 0]
            z.grad = torch.view_as_complex(g.clone())
        parts.grad = g
        for optimizer in optimizers:
            optimizer.step(lambda: None)
    (x,), (expected,) = (optimizer.eval_params() for optimizer in optimizers)
    assert x.dtype == torch.complex64
    assert torch.isfinite(torch.view_as_real(x)).all()
    if "SGD" in type(optimizers[0]).__name__:
        torch.testing.assert_close(torch.view_as_real(x), expected)
    if optimizers[0].training:
        optimizers[0].eval()
    assert torch.equal(z.detach(), x)


@pytest.mark.parametrize("name", ALL)
def test_layout_in_memory_changes_nothing(name):
    shape = 4, 3, 5, 5
    plain, last = (torch.nn.Conv2d(3, 4, 5) for _ in range(2))
    last.load_state_dict(plain.state_dict())
    last = last.to(memory_format=torch.channels_last)
    turned = torch.nn.Conv2d(3, 4, 5)
    turned.weight = torch.nn.Parameter(
        plain.weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    )
    turned.bias = torch.nn.Parameter(plain.bias.detach().clone())
    gap = torch.nn.Conv2d(3, 4, 5)
    gap.weight = torch.nn.Parameter(torch.empty(4, 3, 5, 10)[..., ::2])
    gap.load_state_dict(plain.state_dict())
    models = [plain, last, turned, gap]
    strides = [model.weight.stride() for model in models]
    assert len(set(strides)) == 4
    results = []
    for model in models:
        optimizer = started(ALL[name], model, steps=3)
        results.append((values(model), optimizer.eval_params()))
    for (y, x), model, stride in zip(results, models, strides, strict=True):
        assert model.weight.shape == shape
        assert model.weight.stride() == stride
        for a, b in zip((*y, *x), (*results[0][0], *results[0][1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every
def test_scalar_and_empty_leaves_train(build):
    model = torch.nn.ParameterList([parameter(), parameter(0, 3), parameter(2)])
    before = values(model)
    optimizer = started(build, model, steps=3)
    x = optimizer.eval_params()
    assert [tuple(v.shape) for v in x] == [(), (0, 3), (2,)]
    assert all(torch.isfinite(v).all() for v in (*x, *values(model)))
    assert not torch.equal(x[0], before[0])


def test_large_leaves_take_the_steps_of_their_parts(monkeypatch):
    monkeypatch.setattr(batches, "BLOCK", 2**16)
    whole = parameter(600, 250)
    assert whole.numel() > 2 * batches.BLOCK
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split(150)]
    models = [torch.nn.ParameterList([whole]), torch.nn.ParameterList(parts)]
    optimizers = [started(sf_torch.AdamWScheduleFree, model) for model in models]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        whole.grad = torch.randn(whole.shape, generator=generator)
        for part, grad in zip(parts, whole.grad.split(150), strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # The last few elements of a piece go through scalar code, which rounds its own way.
    joined = torch.cat([p.detach() for p in parts])
    torch.testing.assert_close(whole.detach(), joined, rtol=2e-7, atol=1e-7)


def test_large_leaves_forget_gradients_at_the_rate_of_b2():
    model = torch.nn.ParameterList([parameter(2**12)])
    optimizer = started(sf_torch.AdamWScheduleFree, model)
    for k in range(3000):
        model[0].grad = torch.ones(2**12) if k == 0 else torch.zeros(2**12)
        optimizer.step()
    v = optimizer.state[model[0]]["exp_avg_sq"]
    # The kernel's b2 is off by 1.3e-8, which comes to 3.9e-5.
    torch.testing.assert_close(
        v, torch.full_like(v, 0.001 * 0.999**2999), rtol=3e-6, atol=0
    )


def test_what_memory_held_before_does_not_enter(monkeypatch):
    def full_of_nan(scratch, like, size, name, dtype=None):
        return like.new_full((size,), float("nan"), dtype=dtype)

    monkeypatch.setattr(Scratch, "memory", full_of_nan)
    for name in NAMED:
        for options in ({}, {"weight_decay": 0.1}):
            # Large enough for PyTorch's one-pass kernels, and not.
            model = torch.nn.ParameterList([parameter(40_000), parameter(5)])
            optimizer = started(NAMED[name], model, steps=2, **options)
            assert all(torch.isfinite(p).all() for p in model)
            assert torch.isfinite(optimizer.eval_params()[0]).all()


def test_an_infinite_gradient_stays_with_its_parameter():
    model = torch.nn.ParameterList([parameter(batches.BLOCK), parameter(batches.BLOCK)])
    optimizer = started(sf_torch.AdamWScheduleFree, model)
    gradients(model, 0)
    model[0].grad.fill_(float("inf"))
    optimizer.step()
    assert torch.isfinite(model[1]).all()


# The wrapper over what torch.optim has

BASES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam)
}


@pytest.mark.parametrize("name", BASES)
def test_every_torch_optimizer_trains_within_the_wrapper(name):
    w = torch.nn.Parameter(torch.eye(3) + 1)
    optimizer = sf_torch.ScheduleFreeWrapper(BASES[name]([w], lr=0.05))
    optimizer.train()

    def closure():
        optimizer.zero_grad()
        loss = (w - torch.eye(3)).square().sum()
        loss.backward()
        return loss.detach()

    first = float(closure())
    losses = [float(optimizer.step(closure)) for _ in range(60)]
    optimizer.eval()
    last = float(closure())
    assert losses[0] == first
    # Their steps are small at first, or become so.
    slow = name in ("Adadelta", "Adafactor", "Adagrad")
    assert last < (first if slow else first / 4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_wrapper_over_sgd_is_schedule_free_sgd(momentum):
    models = [torch.nn.ParameterList([parameter(5)]) for _ in range(2)]
    wrapper = sf_torch.ScheduleFreeWrapper(
        torch.optim.SGD(models[0].parameters(), lr=0.1),
        momentum=momentum,
        weight_decay_at_y=0.1,
    )
    plain = sf_torch.SGDScheduleFree(
        models[1].parameters(), lr=0.1, momentum=momentum, weight_decay=0.1
    )
    for optimizer in (wrapper, plain):
        optimizer.train()
    for seed in range(20):
        for model, optimizer in zip(models, (wrapper, plain), strict=True):
            step(model, optimizer, seed)
    for a, b in zip(wrapper.eval_params(), plain.eval_params(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
