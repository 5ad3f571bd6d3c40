"""Every optimizer of the registry, and how each framework spells its options.

One row of :data:`OPTIMIZERS` per optimizer; the option sets they are run with are in
:mod:`parity_tests.registry`.
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
from parity_tests.registry.options import Options, function


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
    fuses: bool = True  # whether sf_torch has it in one kernel


def _seams(o: Options, base: Any, step_size: Callable[[reference.Now], float]) -> Seams:
    average = reference.PolynomialAverage(o.r, o.weight_lr_power)
    return Seams(function(o.b1), step_size, base, average)


def _warmup(o: Options) -> Callable[[reference.Now], float]:
    return reference.warmup(function(o.lr), o.warmup_steps)


def _adamw_base(o: Options, variant: str = "standard") -> reference.AdamW:
    at_x = variant == "algoperf"  # which decays there whatever decay_at says
    return reference.AdamW(
        o.b2,
        o.eps,
        o.weight_decay,
        "x" if at_x else o.decay_at,
        o.inner_momentum,
        variant,
    )


def _pick(o: Options, names: str) -> dict[str, Any]:
    return {name: getattr(o, name) for name in names.split()}


def _changed(o: Options, names: str) -> dict[str, Any]:
    """Of arguments that Meta's package lacks: named only where they are used."""
    default = Options()
    return {n: v for n, v in _pick(o, names).items() if v != getattr(default, n)}


def _sgd_arguments(o: Options) -> dict[str, Any]:
    same = _pick(o, "lr weight_decay warmup_steps r weight_lr_power")
    return {**same, "momentum": o.b1, **_changed(o, "decay_at")}


def _adamw_arguments(o: Options) -> dict[str, Any]:
    same = _pick(o, "lr eps weight_decay warmup_steps r weight_lr_power")
    return {**same, "betas": (o.b1, o.b2), **_changed(o, "decay_at inner_momentum")}


def _radam_arguments(o: Options) -> dict[str, Any]:
    same = _pick(o, "lr eps weight_decay r weight_lr_power silent_sgd_phase")
    return {**same, "betas": (o.b1, o.b2)}


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
            **_pick(o, "r weight_lr_power"),
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


def _jax_adamw(variant: str) -> Callable[[Options, bool], GradientTransformation]:
    names = "b1 b2 eps weight_decay weight_lr_power r inner_momentum decay_at"
    return lambda o, store_x: sf_jax.schedule_free_adamw(
        o.lr, o.warmup_steps, **_pick(o, names), store_x=store_x, variant=variant
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
                **_pick(o, "b1 weight_decay weight_lr_power r decay_at"),
                store_x=store_x,
            ),
            arguments=_sgd_arguments,
            torch=_class(sf_torch, "SGDScheduleFree"),
            meta=_class(schedulefree, "SGDScheduleFree"),
            optax=lambda o: contrib.schedule_free_sgd(
                o.lr,
                o.warmup_steps or None,
                **_pick(o, "b1 weight_decay weight_lr_power"),
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
                **_pick(o, "b1 b2 eps weight_decay weight_lr_power"),
            ),
        ),
        Optimizer(
            "adamw_paper",
            reference=lambda o: _seams(
                o,
                _adamw_base(o, "paper"),
                reference.paper_step_size(_warmup(o), o.b2),
            ),
            jax=_jax_adamw("paper"),
            arguments=_adamw_arguments,
            torch=_class(sf_torch, "AdamWScheduleFreePaper"),
            meta=_class(schedulefree, "AdamWScheduleFreePaper"),
            torch_forms=("",),
        ),
        Optimizer(
            "adamw_algoperf",
            reference=lambda o: _seams(
                o, _adamw_base(o, "algoperf"), reference.at_least(_warmup(o), o.eps)
            ),
            jax=_jax_adamw("algoperf"),
            arguments=_adamw_arguments,
            torch=_class(sf_torch, "AdamWScheduleFreeAlgoPerf"),
            torch_forms=("",),
        ),
        Optimizer(
            "radam",
            reference=lambda o: _seams(
                o,
                reference.RAdam(o.b2, o.eps, o.weight_decay),
                reference.rectified(function(o.lr), o.b2, o.silent_sgd_phase),
            ),
            jax=lambda o, store_x: sf_jax.schedule_free_radam(
                o.lr,
                **_pick(o, "b1 b2 eps weight_decay weight_lr_power r"),
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
                reference.warmup(function(o.lr), 0),
            ),
            jax=_jax_wrapper,
            arguments=lambda o: {"lr": o.lr, "momentum": o.base_momentum},
            torch=_wrapper(sf_torch),
            meta=_wrapper(schedulefree),
            torch_forms=("", "Reference"),
            fuses=False,
        ),
    )
}
