"""A recorded run is told from one that took another path, and told why."""

import io
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
from rich.console import Console

import sf_torch
from parity_tests.cli import replay
from parity_tests.cli.main import main as command_line
from sf_torch import record

LR, WARMUP, DECAY, STEPS = 0.02, 10, 0.1, 30
SHAPES = {"kernel": (6, 5), "bias": (5,), "scalar": ()}


def parameters(dtype=torch.float32):
    rng = np.random.default_rng(0)
    return {
        name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype))
        for name, shape in SHAPES.items()
    }


def steps(optimizer, params, start=0, stop=STEPS, without=()):
    for k in range(start, stop):
        rng = np.random.default_rng([1, k])
        for name, p in params.items():
            grad = torch.tensor(rng.normal(size=SHAPES[name]), dtype=p.dtype)
            p.grad = None if (name, k) in without else grad + p.detach() / 2
        optimizer.step()


def adamw(package, params, **options):
    options = {"lr": LR, "warmup_steps": WARMUP, "weight_decay": DECAY} | options
    return package.AdamWScheduleFree(params.values(), **options)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.safetensors"


@contextmanager
def really(optimizer, **options):
    """The steps are taken with these options; the groups do not say so."""
    said = [{key: group[key] for key in options} for group in optimizer.param_groups]

    def set_to(values):
        for group, of_group in zip(optimizer.param_groups, values, strict=True):
            group.update(of_group)

    before = optimizer.register_step_pre_hook(lambda *_: set_to([options] * len(said)))
    after = optimizer.register_step_post_hook(lambda *_: set_to(said))
    yield
    before.remove()
    after.remove()


def recorded(file, optimizer, params, start=0, stop=STEPS, **options):
    optimizer.train()
    with really(optimizer, **options), record(optimizer, file):
        steps(optimizer, params, start, stop)
    return replay.replay(file)


FAITHFUL = {
    "adamw-meta": lambda p: adamw(schedulefree, p),
    "adamw-ours": lambda p: adamw(sf_torch, p, decay_at="z", inner_momentum=0.5),
    "paper-meta": lambda p: schedulefree.AdamWScheduleFreePaper(
        p.values(), lr=LR, warmup_steps=WARMUP, weight_decay=DECAY
    ),
    "sgd-meta": lambda p: schedulefree.SGDScheduleFree(
        p.values(), lr=LR, warmup_steps=WARMUP, weight_decay=DECAY, r=1.0
    ),
    "radam-meta": lambda p: schedulefree.RAdamScheduleFree(p.values(), lr=LR),
    "gpa-ours": lambda p: sf_torch.GPAAdamW(
        p.values(), lr=LR, mu_x=0.95, warmup_steps=WARMUP, weight_decay=DECAY
    ),
    "refined-ours": lambda p: sf_torch.AdamWScheduleFreeRefined(
        p.values(), lr=LR, refined_c=5.0, warmup_steps=WARMUP, weight_decay=DECAY
    ),
    "wrapper-ours": lambda p: sf_torch.ScheduleFreeWrapper(
        torch.optim.SGD(p.values(), lr=LR, momentum=0.5), momentum=0.8
    ),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_faithful_run_is_within_tolerance_from_its_start_and_from_halfway(name, file):
    params = parameters()
    optimizer = FAITHFUL[name](params)
    verdict = recorded(file, optimizer, params)
    assert verdict.ok, verdict
    assert verdict.steps == STEPS
    assert not verdict.hypotheses
    verdict = recorded(file, optimizer, params, STEPS, 2 * STEPS)
    assert verdict.ok, verdict


def test_wrapper_of_meta_is_within_tolerance(file):
    params = parameters()
    del params["scalar"]  # on which Meta's wrapper fails
    base = torch.optim.SGD(params.values(), lr=LR)
    optimizer = schedulefree.ScheduleFreeWrapper(base, momentum=0.8)
    optimizer.train()
    with record(optimizer, file):
        steps(optimizer, params)
    assert replay.replay(file).ok


@pytest.mark.parametrize("upstream_compatible", [True, False])
def test_groups_schedules_and_missing_gradients_are_followed(file, upstream_compatible):
    params = parameters()
    optimizer = sf_torch.AdamWScheduleFree(
        [
            {"params": [params["kernel"]], "weight_decay": DECAY},
            {"params": [params["bias"], params["scalar"]], "lr": 2 * LR},
        ],
        lr=LR,
        upstream_compatible=upstream_compatible,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    optimizer.train()
    with record(optimizer, file, every=3):
        for k in range(STEPS):
            steps(optimizer, params, k, k + 1, without={("bias", 7), ("kernel", 0)})
            schedule.step()
    verdict = replay.replay(file)
    assert verdict.reference.ok, verdict
    if upstream_compatible:
        assert verdict.ok, verdict
    else:  # JAX has no count for each leaf
        assert "each parameter's own count" in (verdict.reason or "")


def test_bfloat16_parameters_over_a_float32_state_are_within_tolerance(file):
    params = parameters(torch.bfloat16)
    params["scalar"] = parameters()["scalar"]  # one in full
    optimizer = adamw(sf_torch, params)
    assert recorded(file, optimizer, params).ok
    assert recorded(file, optimizer, params, STEPS, 2 * STEPS).ok


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "warmup-shorter": ({"warmup_steps": WARMUP - 1}, "warmup takes one step less"),
    "warmup-longer": ({"warmup_steps": WARMUP + 1}, "warmup takes one step more"),
    "decay-at-z": ({"decay_at": "z"}, "weight decay is taken at z"),
    "decay-at-x": ({"decay_at": "x"}, "weight decay is taken at x"),
    "no-decay": ({"weight_decay": 0.0}, "there is no weight decay"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_likely_reason_is_found(name, file):
    options, reason = DIFFERENT[name]
    params = parameters()
    package = schedulefree if "decay_at" not in options else sf_torch
    verdict = recorded(file, adamw(package, params), params, **options)
    assert not verdict.ok
    assert reason in (verdict.reason or "")


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (lambda k: k / (k + 1), "lr · k / warmup_steps, which begins at 0"),
        (lambda k: (k + 2) / (k + 1), "one step ahead"),
    ],
    ids=["behind", "ahead"],
)
def test_shifted_warmup_is_named(factor, reason, file):
    params = parameters()
    optimizer = adamw(schedulefree, params)
    group = optimizer.param_groups[0]

    def shift(*_):
        if group["k"] + 1 < WARMUP:
            group["lr"] = LR * factor(group["k"])
        elif group["k"] + 1 == WARMUP and factor(0) == 0:
            group["lr"] = LR * (WARMUP - 1) / WARMUP

    optimizer.register_step_pre_hook(shift)
    optimizer.register_step_post_hook(lambda *_: group.update(lr=LR))
    verdict = recorded(file, optimizer, params)
    assert not verdict.ok
    assert verdict.reference.parted.startswith("step 1,")
    assert "the warmup is shifted" in (verdict.reason or "")
    assert reason in (verdict.reason or "")


def test_paper_style_bias_correction_is_named(file):
    class AdamWScheduleFree(schedulefree.AdamWScheduleFreePaper):
        pass

    params = parameters()
    optimizer = AdamWScheduleFree(params.values(), lr=LR, weight_decay=DECAY)
    verdict = recorded(file, optimizer, params)
    assert not verdict.ok
    assert "bias correction is the paper's" in (verdict.reason or "")


def test_evaluation_at_y_is_named(file):
    params = parameters()
    optimizer = adamw(schedulefree, params)
    optimizer.train()
    with record(optimizer, file) as recorder:
        steps(optimizer, params)
        recorder.evaluated()  # without optimizer.eval()
    verdict = replay.replay(file)
    assert not verdict.ok
    assert verdict.reference.parted.startswith(f"step {STEPS}, weights evaluated")
    assert "evaluated at y" in (verdict.reason or "")

    optimizer = adamw(schedulefree, params := parameters())
    optimizer.train()
    with record(optimizer, file) as recorder:
        steps(optimizer, params)
        optimizer.eval()
        recorder.evaluated()
    assert replay.replay(file).ok


@pytest.mark.parametrize("package", [schedulefree, sf_torch])
def test_bfloat16_state_is_named(package, file):
    if package is schedulefree:
        params = parameters(torch.bfloat16)
        optimizer = adamw(package, params)
    else:
        params = parameters()
        optimizer = adamw(package, params, state_dtype=torch.bfloat16)
    verdict = recorded(file, optimizer, params)
    assert not verdict.ok
    assert "the state is bfloat16" in (verdict.reason or "")


def test_unknown_reason_is_not_made_up(file):
    params = parameters()
    verdict = recorded(file, adamw(schedulefree, params), params, lr=1.3 * LR)
    assert not verdict.ok
    assert verdict.reason is None


def test_exit_code_and_text(file):
    params = parameters()
    console = Console(record=True, width=160, file=io.StringIO())
    recorded(file, adamw(schedulefree, params), params)
    assert replay.main(file, console) == 0
    assert "the one that JAX and the reference take" in console.export_text()
    params = parameters()
    recorded(file, adamw(schedulefree, params), params, warmup_steps=WARMUP - 1)
    assert replay.main(file, console) == 1
    text = console.export_text()
    assert "Likely reason: the warmup takes one step less than recorded." in text
    assert "step 1, " in text


def test_what_has_no_reference_is_refused(file):
    params = parameters()
    base = torch.optim.RMSprop(params.values(), lr=LR)
    optimizer = sf_torch.ScheduleFreeWrapper(base)
    optimizer.train()
    with record(optimizer, file):
        steps(optimizer, params, 0, 1)
    with pytest.raises(ValueError, match=r"over torch\.optim\.rmsprop\.RMSprop"):
        replay.replay(file)
    assert replay.main(file) == 2


def test_gpa_with_the_published_decay_is_refused(file):
    params = parameters()
    optimizer = sf_torch.GPAAdamW(params.values(), lr=LR, upstream_compatible=True)
    with pytest.raises(ValueError, match="GPA with upstream_compatible=True"):
        recorded(file, optimizer, params, 0, 1)


def test_command_line_takes_a_file(file, capsys):
    params = parameters()
    recorded(file, adamw(schedulefree, params), params)
    assert command_line(["replay", str(file)]) == 0
    assert "the one that JAX and the reference take" in capsys.readouterr().out
