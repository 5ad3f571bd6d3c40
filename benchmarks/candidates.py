"""The table of what is measured. A new peer is one row.

All are AdamW with the same numbers, Schedule-Free but for the plain AdamW rows; then
come the other optimizers of sf_torch, and those that Meta's package has too.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

LR, BETAS, EPS, DECAY, WARMUP = 1e-3, (0.9, 0.999), 1e-8, 0.1, 10


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One optimizer of one package."""

    name: str
    framework: str  # "torch" or "jax"
    package: str  # what has to be installed
    # torch: params -> optimizer; jax: () -> optax transformation
    build: Callable[..., Any]
    ours: bool = False
    # jax: (state, params) -> x. torch optimizers are asked for their methods.
    eval_params: Callable[..., Any] | None = None
    first_seconds: float = 0.0  # that a first step is known to take, at the least

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


ADAM: dict[str, Any] = {"betas": BETAS, "eps": EPS}


def _torch(package: str, name: str, **options: Any) -> Callable[..., Any]:
    def build(params: Any) -> Any:
        module: Any = import_module(package)
        for part in name.split("."):
            module = getattr(module, part)
        return module(params, lr=LR, weight_decay=DECAY, **options)

    return build


def _compiled(build: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(params: Any) -> Any:
        import torch

        optimizer = build(params)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer

    return compiled


def _given_a_loss(build: Callable[..., Any]) -> Callable[..., Any]:
    def with_loss(params: Any) -> Any:
        optimizer = build(params)
        step = optimizer.step
        optimizer.step = lambda: step(lambda: 1.0)
        return optimizer

    return with_loss


def _member(name: str, package: str = "sf_torch", **options: Any) -> Candidate:
    ours = package == "sf_torch"
    short = name.replace("ScheduleFree", " ").replace("AdamW", "AdamW ").split()
    title = " ".join([package if ours else "Meta", *short])
    build = _torch(package, name, **options)
    return Candidate(title, "torch", package, build, ours=ours)


def _sf_jax() -> Any:
    import sf_jax

    return sf_jax.schedule_free_adamw(LR, WARMUP, *BETAS, EPS, weight_decay=DECAY)


def _sf_jax_flat() -> Any:
    import optax

    return optax.flatten(_sf_jax())


def _contrib() -> Any:
    from optax import contrib

    return contrib.schedule_free_adamw(LR, WARMUP, *BETAS, EPS, weight_decay=DECAY)


def _optax_adamw() -> Any:
    import optax

    return optax.adamw(LR, *BETAS, EPS, weight_decay=DECAY)


def _sf_jax_eval(state: Any, params: Any) -> Any:
    import sf_jax

    return sf_jax.eval_params(state, params)


def _contrib_eval(state: Any, params: Any) -> Any:
    from optax import contrib

    return contrib.schedule_free_eval_params(state, params)


CANDIDATES = (
    Candidate(
        "sf_torch",
        "torch",
        "sf_torch",
        _torch("sf_torch", "AdamWScheduleFree", **ADAM, warmup_steps=WARMUP),
        ours=True,
    ),
    Candidate(
        "sf_torch foreach",
        "torch",
        "sf_torch",
        _torch(
            "sf_torch", "AdamWScheduleFree", **ADAM, warmup_steps=WARMUP, foreach=True
        ),
        ours=True,
    ),
    Candidate(
        "Meta schedulefree foreach",
        "torch",
        "schedulefree",
        _torch(
            "schedulefree",
            "AdamWScheduleFree",
            **ADAM,
            warmup_steps=WARMUP,
            foreach=True,
        ),
    ),
    Candidate(
        "HeavyBall SFAdamW",
        "torch",
        "heavyball",
        _torch("heavyball", "SFAdamW", **ADAM, warmup_steps=WARMUP),
        first_seconds=20.0,  # torch.compile
    ),
    Candidate(
        "pytorch_optimizer ScheduleFreeAdamW",
        "torch",
        "pytorch_optimizer",
        _torch("pytorch_optimizer", "ScheduleFreeAdamW", **ADAM, warmup_steps=WARMUP),
    ),
    Candidate(
        "torch AdamW fused",
        "torch",
        "torch",
        _torch("torch.optim", "AdamW", **ADAM, fused=True),
    ),
    Candidate(
        "torch AdamW foreach",
        "torch",
        "torch",
        _torch("torch.optim", "AdamW", **ADAM, foreach=True),
    ),
    Candidate(
        "sf_torch compiled",
        "torch",
        "sf_torch",
        _compiled(_torch("sf_torch", "AdamWScheduleFree", **ADAM, warmup_steps=WARMUP)),
        ours=True,
        first_seconds=20.0,  # torch.compile
    ),
    _member("AdamWScheduleFreePaper", **ADAM, warmup_steps=WARMUP),
    _member("AdamWScheduleFreeAlgoPerf", **ADAM, warmup_steps=WARMUP),
    _member("AdamWScheduleFreeRefined", **ADAM, warmup_steps=WARMUP, refined_c=20.0),
    _member("RAdamScheduleFree", **ADAM),
    _member("GPAAdamW", **ADAM),
    Candidate(
        "sf_torch ScheduleFree+",
        "torch",
        "sf_torch",
        _given_a_loss(_torch("sf_torch", "AdamCScheduleFreePlus", **ADAM)),
        ours=True,
    ),
    _member("SGDScheduleFree", warmup_steps=WARMUP),
    _member("AdamWScheduleFreePaper", "schedulefree", **ADAM, warmup_steps=WARMUP),
    _member("RAdamScheduleFree", "schedulefree", **ADAM, foreach=True),
    _member("SGDScheduleFree", "schedulefree", warmup_steps=WARMUP, foreach=True),
    Candidate("sf_jax", "jax", "sf_jax", _sf_jax, True, _sf_jax_eval),
    Candidate(
        "sf_jax in optax.flatten", "jax", "sf_jax", _sf_jax_flat, True, _sf_jax_eval
    ),
    Candidate(
        "optax.contrib schedule_free_adamw",
        "jax",
        "optax",
        _contrib,
        eval_params=_contrib_eval,
    ),
    Candidate("optax adamw", "jax", "optax", _optax_adamw),
)
