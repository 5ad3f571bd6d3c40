"""Every optimizer of the registry, and how each framework spells its options.

One row of :data:`OPTIMIZERS` per optimizer; the option sets they are run with are in
:mod:`parity_tests.cases`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
import schedulefree
import torch
from optax import GradientTransformation, contrib

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.reference import Seams


@dataclasses.dataclass(frozen=True)
class Linear:
    """A schedule from ``start`` to ``end``, for Python ints and JAX counts alike."""

    start: float
    end: float
    steps: int = 300

    def __call__(self, k: Any) -> Any:
        return self.start + (self.end - self.start) * k / self.steps


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters in one neutral spelling; an optimizer reads what it has."""

    lr: float | Linear = 0.0025
    warmup_steps: int = 0
    b1: float | Linear = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_at: str = "y"
    weight_lr_power: float = 2.0
    r: float = 0.0
    inner_momentum: float = 0.0
    silent_sgd_phase: bool = True
    base_momentum: float = 0.0  # of what ScheduleFreeWrapper wraps

    def at(self, k: int) -> "Options":
        """The values at step k: as PyTorch has them, where schedules set numbers."""
        return dataclasses.replace(
            self, lr=_function(self.lr)(k), b1=_function(self.b1)(k)
        )


def _function(value: float | Linear) -> Callable[[int], float]:
    return value if callable(value) else lambda k: value


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How each framework builds it.

    ``torch`` and ``meta`` take parameter groups; their arguments per group are what
    ``arguments`` says. A form is "", "Reference" or "Closure".
    """

    name: str
    reference: Callable[[Options], Seams]
    jax: Callable[[Options, bool], GradientTransformation]  # options, store_x
    arguments: Callable[[Options], dict[str, Any]]
    torch: Callable[..., Any] | None = None  # groups, options, form, foreach
    meta: Callable[..., Any] | None = None  # the same
    optax: Callable[[Options], GradientTransformation] | None = None
    torch_forms: tuple[str, ...] = ("", "Reference", "Closure")


def _seams(o: Options, base: Any, step_size: Callable[[reference.Now], float]) -> Seams:
    average = reference.PolynomialAverage(o.r, o.weight_lr_power)
    return Seams(_function(o.b1), step_size, base, average)


def _warmup(o: Options) -> Callable[[reference.Now], float]:
    return reference.warmup(_function(o.lr), o.warmup_steps)


def _adamw_base(o: Options, **variant: str) -> reference.AdamW:
    return reference.AdamW(
        o.b2, o.eps, o.weight_decay, o.decay_at, o.inner_momentum, **variant
    )


def _optional(o: Options) -> dict[str, Any]:
    """Arguments that Meta's package lacks; named only where they are used."""
    return {
        name: getattr(o, name)
        for name in ("decay_at", "inner_momentum")
        if getattr(o, name) != getattr(Options(), name)
    }


def _sgd_arguments(o: Options) -> dict[str, Any]:
    return {
        "lr": o.lr,
        "momentum": o.b1,
        "weight_decay": o.weight_decay,
        "warmup_steps": o.warmup_steps,
        "r": o.r,
        "weight_lr_power": o.weight_lr_power,
        **_optional(o),
    }


def _radam_arguments(o: Options) -> dict[str, Any]:
    return {
        "lr": o.lr,
        "betas": (o.b1, o.b2),
        "eps": o.eps,
        "weight_decay": o.weight_decay,
        "r": o.r,
        "weight_lr_power": o.weight_lr_power,
        "silent_sgd_phase": o.silent_sgd_phase,
    }


def _adamw_arguments(o: Options) -> dict[str, Any]:
    arguments = {**_radam_arguments(o), "warmup_steps": o.warmup_steps, **_optional(o)}
    del arguments["silent_sgd_phase"]
    return arguments


def _class(module: Any, name: str) -> Callable[..., Any]:
    def build(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
        return getattr(module, name + form)(groups, foreach=foreach)

    return build


def _meta_adamw(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
    if o.decay_at == "z":  # which only the Reference form has
        groups = [{k: v for k, v in g.items() if k != "decay_at"} for g in groups]
        return schedulefree.AdamWScheduleFreeReference(
            groups, decay_at_z=True, foreach=foreach
        )
    return schedulefree.AdamWScheduleFree(groups, foreach=foreach)


def _wrapper(module: Any) -> Callable[..., Any]:
    def build(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
        return getattr(module, "ScheduleFreeWrapper" + form)(
            torch.optim.SGD(groups, foreach=foreach),
            momentum=o.b1,
            weight_decay_at_y=o.weight_decay,
            r=o.r,
            weight_lr_power=o.weight_lr_power,
        )

    return build


def _jax_wrapper(o: Options, store_x: bool) -> GradientTransformation:
    base = optax.sgd(o.lr, o.base_momentum or None)
    if o.weight_decay:
        # At y, which the rule gives as params, and after the momentum.
        decay = optax.add_decayed_weights(o.weight_decay)
        trace = optax.trace(o.base_momentum) if o.base_momentum else optax.identity()
        base = optax.chain(trace, decay, optax.scale_by_learning_rate(o.lr))
    return sf_jax.schedule_free(
        base, o.lr, o.b1, o.weight_lr_power, r=o.r, store_x=store_x
    )


def _jax_adamw(variant: str) -> Callable[[Options, bool], Any]:
    return lambda o, store_x: sf_jax.schedule_free_adamw(
        o.lr,
        o.warmup_steps,
        o.b1,
        o.b2,
        o.eps,
        o.weight_decay,
        o.weight_lr_power,
        r=o.r,
        inner_momentum=o.inner_momentum,
        decay_at=o.decay_at,
        store_x=store_x,
        variant=variant,
    )


OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(
            "sgd",
            reference=lambda o: _seams(
                o, reference.SGD(o.weight_decay, o.decay_at), _warmup(o)
            ),
            jax=lambda o, store_x: sf_jax.schedule_free_sgd(
                o.lr,
                o.warmup_steps,
                o.b1,
                o.weight_decay,
                o.weight_lr_power,
                r=o.r,
                decay_at=o.decay_at,
                store_x=store_x,
            ),
            arguments=_sgd_arguments,
            torch=_class(sf_torch, "SGDScheduleFree"),
            meta=_class(schedulefree, "SGDScheduleFree"),
            optax=lambda o: contrib.schedule_free_sgd(
                o.lr, o.warmup_steps or None, o.b1, o.weight_decay, o.weight_lr_power
            ),
        ),
        Optimizer(
            "adamw",
            reference=lambda o: _seams(o, _adamw_base(o), _warmup(o)),
            jax=_jax_adamw("standard"),
            arguments=_adamw_arguments,
            torch=_class(sf_torch, "AdamWScheduleFree"),
            meta=_meta_adamw,
            optax=lambda o: contrib.schedule_free_adamw(
                o.lr,
                o.warmup_steps or None,
                o.b1,
                o.b2,
                o.eps,
                o.weight_decay,
                o.weight_lr_power,
            ),
        ),
        Optimizer(
            "adamw_paper",
            reference=lambda o: _seams(
                o,
                _adamw_base(o, variant="paper"),
                reference.paper_step_size(_warmup(o), o.b2),
            ),
            jax=_jax_adamw("paper"),
            arguments=_adamw_arguments,
            torch=_class(sf_torch, "AdamWScheduleFreePaper"),
            meta=_class(schedulefree, "AdamWScheduleFreePaper"),
            torch_forms=("",),
        ),
        Optimizer(
            "adamw_algoperf",  # decays at x whatever decay_at says
            reference=lambda o: _seams(
                o,
                _adamw_base(dataclasses.replace(o, decay_at="x"), variant="algoperf"),
                reference.at_least(_warmup(o), o.eps),
            ),
            jax=_jax_adamw("algoperf"),
            arguments=_adamw_arguments,
        ),
        Optimizer(
            "radam",
            reference=lambda o: _seams(
                o,
                reference.RAdam(o.b2, o.eps, o.weight_decay),
                reference.rectified(_function(o.lr), o.b2, o.silent_sgd_phase),
            ),
            jax=lambda o, store_x: sf_jax.schedule_free_radam(
                o.lr,
                o.b1,
                o.b2,
                o.eps,
                o.weight_decay,
                o.weight_lr_power,
                r=o.r,
                silent_sgd_phase=o.silent_sgd_phase,
                store_x=store_x,
            ),
            arguments=_radam_arguments,
            torch=_class(sf_torch, "RAdamScheduleFree"),
            meta=_class(schedulefree, "RAdamScheduleFree"),
        ),
        Optimizer(
            "wrapper",  # over SGD, with or without momentum
            reference=lambda o: _seams(
                o,
                reference.SGD(o.weight_decay, momentum=o.base_momentum),
                reference.warmup(_function(o.lr), 0),
            ),
            jax=_jax_wrapper,
            arguments=lambda o: {"lr": o.lr, "momentum": o.base_momentum},
            torch=_wrapper(sf_torch),
            meta=_wrapper(schedulefree),
            torch_forms=("", "Reference"),
        ),
    )
}
