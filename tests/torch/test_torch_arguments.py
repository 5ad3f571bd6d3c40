"""Every argument of every optimizer, given what it can and what it cannot mean.

Each value is refused by an error that names the argument and quotes the value, before
anything has changed, or it works: three steps in float32 give, but for rounding, what
the same arguments give in float64 with x stored.
"""

import functools
import inspect
import math
import random
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import sf_torch
from sf_torch import _arguments
from sf_torch._iterates import Iterates
from sf_torch.bases import Muon

NAN, INF = float("nan"), float("inf")
NUMBERS = [
    *(NAN, INF, -INF, -1, -1e-9, -0.5, 0, 0.0, 1e-300, 1e-60, 1e-30, 1e-3, 0.25, 0.5),
    *(1 - 2**-53, 1, 1.0, 1.5, 2, 2.5, 3, 100.0, 1e12, 1e31, 1e300, 10**12),
    *(10**400, 10**5000, -(10**400), 2**31, 2**32, 2**64, Fraction(1, 2)),
    *(np.float32(0.5), np.float64(0.5), np.float64("nan"), np.float16(2), np.int64(3)),
]
TENSORS = [
    *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(2), torch.tensor(NAN)),
    *(torch.tensor(-0.5), torch.tensor(1j), torch.tensor(True), torch.ones(2)),
    *(np.array(0.5), np.ones(3)),
]
PAIRS = [
    *((), (0.9,), (0.5, 0.5), [0.5, 0.9], (0.5, 1.0), (1.0, 0.5), (0.0, 0.0)),
    *((NAN, 0.9), (0.9, NAN), ("0.9", 0.9), (None, 0.9), (True, 0.9), (0.5, INF)),
    *((-0.1, 0.9), (0.9, -0.1), (1e-30, 0.9), (np.float32(0.5), np.float64(0.5))),
    *((sf_torch.growing_b1(0.0, 2), 0.9), (sf_torch.growing_b1(0.5, 2), 0.9)),
    *((1, 2, 3), (0.5, 0.5, 0.5), (3.4445, -4.775, 2.0315), (1e30, 1e30, 1e30)),
]
OTHERS = [
    *(None, True, False, np.bool_(True), "", "no", "0.5", "y", "z", "x", "w", "nan"),
    *("nearest", "stochastic", "standard", "original", "match_rms_adamw", "float32"),
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8),
    *(torch.float8_e4m3fn, torch.complex64, np.float32, float, int, 1j, b"y"),
    *(Decimal("0.5"), {}, set(), object(), len, torch.nn.Linear),
    *(lambda k: 0.5, lambda k: NAN, lambda k: None, sf_torch.growing_b1(0.0, 2)),
]
VALUES = [*NUMBERS, *TENSORS, *PAIRS, *OTHERS]

CLASSES = {
    name: value
    for name, value in {**vars(sf_torch), "Muon": Muon}.items()
    if isinstance(value, type) and (issubclass(value, Iterates) or value is Muon)
}
NOT_OPTIONS = {"self", "params", "base"}
REST = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def arguments(cls):
    """The names of all that a class takes, also through its ``**options``."""
    names = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {p.name for p in parameters if p.kind not in REST}
            if not any(p.kind == p.VAR_KEYWORD for p in parameters):
                break
    return sorted(names - NOT_OPTIONS)


CASES = [(name, option) for name, cls in CLASSES.items() for option in arguments(cls)]


def start(dtype=torch.float32):
    matrix = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]], dtype=dtype)
    values = (
        [matrix] if dtype is None else [matrix, torch.tensor([2.0, -1.0]).to(dtype)]
    )
    return [torch.nn.Parameter(value) for value in values]


def build(name, params, **options):
    cls = CLASSES[name]
    if cls is Muon:
        params = [p for p in params if p.ndim == 2]
    if "Refined" in name:
        options = {"refined_c": 4.0, **options}
    if name.startswith("ScheduleFreeWrapper"):
        params = torch.optim.SGD(params, lr=0.25)
    return cls(params, **options)


def run(name, dtype=torch.float32, **options):
    """What the parameters, x and z are after three steps."""
    params = start(dtype)
    optimizer = build(name, params, **options)
    if hasattr(optimizer, "train") and "Closure" not in name:
        optimizer.train()
    for k in range(3):
        for p in params:
            p.grad = p.detach() * 0.5 + (0.25 if k else -0.125)
        optimizer.step(lambda k=k: 2.0 + k)
    if CLASSES[name] is Muon:
        return optimizer, params[:1]
    zs = [optimizer.state[p]["z"] for p in params]
    return optimizer, [*params, *optimizer.eval_params(), *zs]


def refusal(call):
    try:
        return call(), None
    except (TypeError, ValueError) as error:
        return None, str(error)


def shown(value):
    try:
        return " ".join(repr(value).split())[:97]
    except ValueError:
        return f"an integer of {value.bit_length()} bits"


def names_it(message, option, value):
    quotes = shown(value) in message or str(value) in message
    return quotes and re.search(rf"\b{option}\b", message)


def is_plain(value):
    """Whether torch.load(weights_only=True) reads it."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return type(value) in (float, int, bool, str, type(None), torch.dtype, torch.Tensor)


def assert_works(name, option, value):
    stored = {} if CLASSES[name] is Muon else {"store_x": True}
    given = {option: value}
    # What the kernel moves is float32.
    given_wide = {} if option in ("fused", "capturable") else given
    dtype = torch.float64 if given_wide else torch.float32
    _, right = run(name, dtype, **{**stored, **given_wide})
    largest = max(float(r.detach().abs().max()) for r in right)
    assert math.isfinite(largest), f"{name}({option}={shown(value)})"
    if largest > 1e15:  # then a float32 may have no room for what is squared on the way
        return
    optimizer, held = run(name, **given)
    for group in optimizer.param_groups:
        odd = {k: v for k, v in group.items() if k != "params" and not is_plain(v)}
        assert not odd, f"{name}({option}={shown(value)}) keeps {odd}"
    coarse = isinstance(value, torch.dtype) or "Muon" in name or "Prodigy" in name
    for ours, theirs in zip(held, right, strict=True):
        torch.testing.assert_close(
            ours.detach().double(),
            theirs.detach().double(),
            rtol=0,
            atol=max(1.0, largest) * (2**-5 if coarse else 2**-18),
            msg=lambda m: f"{name}({option}={shown(value)}): {m}",
        )


def fuzz(name, option, values):
    """Returns how many values were refused and how many work."""
    refused = works = 0
    takes_group = build(name, start())
    in_groups = option in takes_group.param_groups[0] and name != "MuonScheduleFree"
    if (checked := getattr(takes_group, "_checked", None)) is not None:
        in_groups &= option in checked  # the others are the base's
    if (name, option) == ("ProdigyScheduleFree", "lr"):
        in_groups = False  # a scheduler may set 0, which prodigyopt does not begin with
    for value in values:
        made, message = refusal(
            lambda value=value: build(name, start(), **{option: value})
        )
        if made is None:
            refused += 1
            assert names_it(message, option, value), (
                f"{option}={shown(value)}: {message}"
            )
            if in_groups:  # a group of its own takes the same check
                before = len(takes_group.param_groups)
                group = {"params": start()[:1], option: value}
                add = functools.partial(takes_group.add_param_group, group)
                assert names_it(refusal(add)[1] or "", option, value)
                assert len(takes_group.param_groups) == before
        else:
            works += 1
            assert_works(name, option, value)
    return refused, works


@pytest.mark.parametrize("name", CLASSES)
def test_an_argument_is_refused_by_name_or_works(name):
    rng = random.Random(name)
    refused = works = 0
    for option in arguments(CLASSES[name]):
        more = fuzz(name, option, rng.sample(VALUES, 4))
        refused, works = refused + more[0], works + more[1]
    assert min(refused, works) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_value_of_an_argument_is_refused_by_name_or_works(name):
    for option in arguments(CLASSES[name]):
        refused, works = fuzz(name, option, VALUES)
        assert min(refused, works) > 0, f"{option}: {refused} refused, {works} work"


@pytest.mark.parametrize("option", ["b1", "steps", "rho"])
def test_an_argument_of_growing_b1_is_refused_by_name_or_works(option):
    works = 0
    for value in VALUES:
        made, message = refusal(
            functools.partial(sf_torch.growing_b1, **{option: value})
        )
        if made is None:
            assert names_it(message, option, value)
        else:
            works += 1
            betas = [made(k) for k in (0, 1, 5, 10**6)]
            assert betas == sorted(betas)
            assert 0 <= betas[0] <= betas[-1] <= 1
    assert 0 < works < len(VALUES)


def test_every_argument_is_in_the_table():
    for name, option in CASES:
        assert option in CLASSES[name]._kinds


@pytest.mark.parametrize("value", [None, 3, "ab", torch.ones(2), [], ["w"], [3], {}])
@pytest.mark.parametrize("name", ["SGDScheduleFree", "MuonScheduleFree", "Muon"])
def test_what_are_no_parameters_is_refused(name, value):
    with pytest.raises((TypeError, ValueError), match="param"):
        CLASSES[name](value)


ONCE_ACCEPTED = {  # and then wrong or NaN
    "r": (NAN, "1", 10**16),
    "weight_lr_power": (NAN, "2"),
    "eps": (True,),
    "betas": ((False, 0.9), (0.9, "0.9"), (NAN, 0.9)),
    "warmup_steps": (10**12,),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in ONCE_ACCEPTED.items() for value in values],
)
def test_what_was_once_accepted_is_refused(option, value):
    with pytest.raises((TypeError, ValueError), match=f"^{option} must be .*got "):
        sf_torch.AdamWScheduleFree(start(), **{option: value})


def test_options_of_the_wrapper_that_were_once_accepted_are_refused():
    for option, value in (("store_x", "no"), ("r", "1"), ("weight_lr_power", NAN)):
        with pytest.raises((TypeError, ValueError), match=f"^{option} must be"):
            build("ScheduleFreeWrapper", start(), **{option: value})
    for value in (0, -1, NAN):
        with pytest.raises(ValueError, match=r"^estim_lr0 must be"):
            sf_torch.ProdigyScheduleFree(start(), estim_lr0=value)


def test_a_loss_floor_is_refused_by_name_at_the_step_where_it_is_none():
    def floor(k):
        return NAN if k else 0.0

    params = start()
    optimizer = sf_torch.AdamCScheduleFreePlus(params, loss_floor=floor)
    for step in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        if step:
            with pytest.raises(ValueError, match=r"^loss_floor must be .*got nan"):
                optimizer.step(lambda: 1.0)
            assert all(map(torch.equal, params, before))
        else:
            optimizer.train()
            optimizer.step(lambda: 1.0)


def test_numbers_of_numpy_become_pythons_in_groups():
    params = start()
    groups = [{"params": [p], "lr": np.float32(0.5)} for p in params]
    optimizer = sf_torch.SGDScheduleFree(groups, weight_decay=np.float64(0.25))
    for group in optimizer.param_groups:
        assert (type(group["lr"]), type(group["weight_decay"])) == (float, float)


@pytest.mark.parametrize("momentum", [1e-30, 0.01])
def test_x_is_kept_where_beta_is_near_0(momentum):
    """y is z there, to the last bit, and x the mean of all z."""
    _, held = run("SGDScheduleFree", momentum=momentum, lr=0.5)
    _, right = run("SGDScheduleFree", torch.float64, momentum=momentum, lr=0.5)
    for ours, theirs in zip(held, right, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach())


def test_weights_that_fall_without_end_leave_a_sum_that_can_be_saved():
    optimizer, _ = run("SGDScheduleFree", lr=0.5, r=-1e12)
    assert 0 < optimizer.param_groups[0]["weight_sum"] < INF
    optimizer.load_state_dict(optimizer.state_dict())


def test_the_page_says_how_many_cases_there_are():
    page = Path(sf_torch.__file__).parents[1] / "docs" / "reliability.md"
    expected = (
        f"{len(CASES) * len(VALUES):,} cases in PyTorch ({len(CLASSES)} classes, "
        f"{len(CASES)} arguments, {len(VALUES)} values)"
    )
    assert expected in " ".join(page.read_text().split())


def test_the_page_has_every_argument_and_its_range():
    own: dict[str, _arguments.Kind] = {}
    for name, cls in CLASSES.items():
        for option in arguments(cls):
            kind = cls._kinds[option]
            if kind is not _arguments.ARGUMENTS[option]:
                own[f"`{option}` of `{name}`"] = kind
    named = {f"`{option}`": kind for option, kind in _arguments.ARGUMENTS.items()}
    rows = [f"| {name} | {kind.accepts} |" for name, kind in {**named, **own}.items()]
    page = Path(sf_torch.__file__).parents[1] / "docs" / "reference" / "arguments.md"
    section = page.read_text().partition("## PyTorch\n")[2].partition("## ")[0]
    table = "\n".join(rows)
    assert table in section, f"write this into {page}:\n{table}"
