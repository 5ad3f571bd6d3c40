"""Schedule-Free around Muon and NorMuon, with AdamW for what is not a matrix."""

import dataclasses
from typing import Any, Self

import jax
from optax.contrib import MuonDimensionNumbers

import sf_jax
import sf_torch
from parity_tests import reference
from parity_tests.registry.optimizer import Optimizer, pick, seams, warmup
from parity_tests.registry.options import Linear, Options
from parity_tests.registry.rows import BFLOAT16, DECAY, FLOAT64, cases


@dataclasses.dataclass(frozen=True)
class Growing:
    """AMUSE's β as an option: a function of k for PyTorch and the reference."""

    b1: float
    steps: int
    rho: float

    def __call__(self, k: int) -> float:
        return reference.growing(self.b1, self.steps, self.rho)(k)


@dataclasses.dataclass(frozen=True)
class MuonOptions(Options):
    """Adds the decay of NorMuon's second moment of a row. None is plain Muon."""

    row_b2: float | None = None
    upstream_compatible: bool = False  # AMUSE's β and x as published

    def at(self, k: int) -> Self:
        """As of all options, but β stays a function where it grows."""
        now = super().at(k)
        grows = isinstance(self.b1, Growing)
        return dataclasses.replace(now, b1=self.b1) if grows else now


def _reference(o: MuonOptions) -> reference.Seams:
    base = reference.Muon(
        o.b2,
        o.eps,
        o.weight_decay,
        o.decay_at,
        o.base_momentum,
        o.nesterov,
        o.row_b2,
    )
    plain = seams(o, base, warmup(o))
    if not o.upstream_compatible:
        return plain
    assert isinstance(o.b1, Growing)
    b1 = reference.GrowingByWeight(o.b1.b1, o.b1.steps, o.b1.rho, plain.average)
    return plain._replace(b1=b1, average=b1.average, x_anew=True)


def _rows_first(params: Any) -> Any:
    """Matrices hold one output neuron's weights in a row, as in PyTorch.

    Flax and so optax have them in a column unless told.
    """
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    return jax.tree.map(lambda p: numbers if p.ndim == 2 else None, params)


def _jax(o: MuonOptions, store_x: bool) -> Any:
    b1 = o.b1
    if isinstance(b1, Growing):
        b1 = sf_jax.growing_b1(b1.b1, b1.steps, b1.rho)
    return sf_jax.schedule_free_muon(
        o.lr,
        o.warmup_steps,
        b1,
        o.b2,
        o.eps,
        o.weight_decay,
        o.weight_lr_power,
        r=o.r,
        momentum=o.base_momentum,
        row_b2=o.row_b2,
        decay_at=o.decay_at,
        store_x=store_x,
        nesterov=o.nesterov,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_rows_first,
        upstream_compatible=o.upstream_compatible,
    )


def _torch(groups: list[Any], o: Any, form: str, foreach: bool) -> Any:
    b1 = o.b1
    if isinstance(b1, Growing):
        b1 = sf_torch.growing_b1(b1.b1, b1.steps, b1.rho)
    return sf_torch.MuonScheduleFree(
        groups,
        betas=(b1, o.b2),
        upstream_compatible=o.upstream_compatible,
        momentum=o.base_momentum,
        adjust_lr_fn="match_rms_adamw",
        foreach=foreach,
        **pick(o, "eps weight_decay warmup_steps r weight_lr_power row_b2 nesterov"),
    )


OPTIMIZER = Optimizer(
    "muon",
    reference=_reference,
    jax=_jax,
    arguments=lambda o: {"lr": o.lr},
    torch=_torch,
    options=MuonOptions,
    torch_forms=("",),
    fuses=False,
    lacks={
        "sf_torch": {"nesterov": "torch's has no bias correction, which optax's has"}
    },
)

# MuonScheduleFree has the matrices in its first group, so they come first here.
_MATRICES: dict[str, Any] = {
    "tree": {"tall": (8, 5), "wide": (4, 7), "vector": (6,), "scalar": ()}
}
_NORMUON: dict[str, Any] = {"row_b2": 0.95}
# torch's AdamW multiplies by 1 - lr λ. Where that factor is rounded, its error is the
# same at every step: 12 ulps after 300 at lr = 0.0025, λ = 0.1. Here it is exact.
_EXACT_DECAY = {"lr": 2.0**-9, "weight_decay": 2.0**-3}
_AMUSE: dict[str, Any] = {
    "b1": Growing(0.6, 30, 0.8),
    "warmup_steps": 30,
    "upstream_compatible": True,
}
CASES = cases(
    OPTIMIZER,
    ("plain", {}, _MATRICES),
    ("decay", {**_EXACT_DECAY, "r": 0.5}, _MATRICES),
    ("lr_schedule", {"lr": Linear(0.0002, 0.005)}, _MATRICES),
    ("growing", {"b1": Growing(0.8, 50, 0.7)}, _MATRICES),
    ("amuse", {**_AMUSE, **_EXACT_DECAY}, _MATRICES),
    ("nesterov", {"nesterov": True}, _MATRICES),
    ("rows", _NORMUON, _MATRICES),
    ("rows_decay", {**_NORMUON, **_EXACT_DECAY}, _MATRICES),
    ("bfloat16", {**_NORMUON, **_AMUSE}, {**_MATRICES, **BFLOAT16}),
    ("float64", {**_NORMUON, **DECAY}, {**_MATRICES, **FLOAT64}),
    base_momentum=0.95,
    b2=0.95,
    # optax adds eps to the norm of m and torch takes the larger of the two: eps is so
    # small that neither shows.
    eps=1e-30,
    decay_at="z",
)
