"""Reads a run that ``sf_torch.record`` wrote, as options of the registry."""

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from parity_tests.reference import Leaves
from parity_tests.registry import OPTIMIZERS
from parity_tests.registry.options import Options
from sf_torch import read_record
from sf_torch._record import Frame

# By the PyTorch class without its form, the name of the optimizer in the registry.
_CLASSES = {row.replays: name for name, row in OPTIMIZERS.items() if row.replays}
# Keys of a parameter group that are fields of Options.
_SAME_NAMES = (
    "warmup_steps",
    "eps",
    "weight_decay",
    "weight_lr_power",
    "r",
    "inner_momentum",
    "silent_sgd_phase",
    "decay_at",
    "refined_c",
    "mu_x",
)
# Of parameters and gradients.
_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


@dataclasses.dataclass(frozen=True)
class Changing:
    """A schedule of the recorded values of an option that changed during the run."""

    first: int  # the step of the first value
    values: tuple[float, ...]

    def __call__(self, k: Any) -> Any:
        at = k - self.first
        if isinstance(k, int):
            return self.values[min(max(at, 0), len(self.values) - 1)]
        return jnp.asarray(self.values)[at]


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter group: its leaves, its optimizer and its options."""

    names: tuple[str, ...]
    optimizer: str
    options: Options
    z_dtype: str = "float32"  # of the state
    counts_apart: bool = False  # whether bias is corrected by each leaf's own count


class Run:
    """A recorded run: its initial state, and its steps, read from the file when needed.

    Raises:
      ValueError: an optimizer or options that the reference does not cover, or frames
        that do not fit each other.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with refusing(path):
            self._read(path)

    def _read(self, path: str | os.PathLike[str]) -> None:
        start, *rest = _checked(path)
        steps = [frame for frame in rest if frame.kind == "step"]
        if not steps:
            raise ValueError(f"{path} holds no step. Record at least one.")
        self.steps = len(steps)
        self.has_evaluated = len(rest) > len(steps)
        self.optimizer = start.info["optimizer"]
        first = next(iter(read_record(path)))
        self.start = {name: _numpy(y) for name, y in first.named("y").items()}
        self.is_double = any(y.dtype == np.float64 for y in self.start.values())
        self.start_x = {name: _numpy(x) for name, x in first.named("x").items()}
        self.state = {
            key: {n: _numpy(t) for n, t in first.named(f"state.{key}").items()}
            for key in ("z", "exp_avg_sq", "exp_avg", "momentum_buffer")
        }
        self.saved_groups = start.info["groups"]
        missed = start.info.get("missed", {})
        self.missed = {name: int(count) for name, count in missed.items()}
        counts = {group.get("k", 0) for group in self.saved_groups}
        if len(counts) > 1:
            raise ValueError(
                f"the groups begin at different steps {sorted(counts)}. Record a run "
                "whose groups have stepped together."
            )
        self.k = int(counts.pop())
        self.changes = _changes(steps)
        self.groups = [
            self._group(i, start.info, [frame.info["groups"] for frame in steps])
            for i in range(len(self.saved_groups))
        ]

    def set(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Puts settings in place of recorded options, in all groups.

        Returns:
          The settings that differ from what was recorded, with the recorded value; a
          tuple of values where groups differ from each other.

        Raises:
          ValueError: a setting that the optimizer does not have.
        """
        names = [field.name for field in dataclasses.fields(Options)]
        if unknown := sorted(settings.keys() - set(names)):
            raise ValueError(
                f"there is no setting {', '.join(unknown)}. There are "
                f"{', '.join(names)}."
            )
        differing = {}
        for name, value in settings.items():
            recorded = tuple(getattr(group.options, name) for group in self.groups)
            if any(each != value for each in recorded):
                same = len(set(recorded)) == 1
                differing[name] = recorded[0] if same else recorded
        self.groups = [
            dataclasses.replace(
                group, options=dataclasses.replace(group.options, **settings)
            )
            for group in self.groups
        ]
        return differing

    def _group(self, i: int, info: Mapping[str, Any], steps: list[Any]) -> Group:
        saved = steps[0][i]
        name = info["optimizer"].rpartition(".")[2]
        form = name.removesuffix("Reference").removesuffix("Closure")
        if form not in _CLASSES:
            raise ValueError(
                f"{name} has no reference to replay it with. These have: "
                f"{', '.join(_CLASSES)}."
            )

        def option(key: str) -> Any:
            values = tuple(groups[i][key] for groups in steps)
            return values[0] if len(set(values)) == 1 else Changing(self.k, values)

        if saved.get("rounding") == "stochastic":
            raise ValueError(
                'the run was rounded at random (rounding="stochastic"), and a replay '
                'rounds to nearest. Record a run with rounding="nearest".'
            )
        options: dict[str, Any] = {"lr": option("lr"), "b1": option("b1")}
        options |= {key: saved[key] for key in _SAME_NAMES if key in saved}
        if "betas" in saved:
            options["b2"] = saved["betas"][1]
        if "mu_x" in saved:  # GPA, whose β is μ_y
            options["inner_momentum"] = saved["betas"][0]
            if saved["upstream_compatible"]:
                raise ValueError(
                    "GPA with upstream_compatible=True has no reference to replay it "
                    "with: its decay moves x. Without that option it has."
                )
        if saved.get("decay_at_z"):  # as Meta's Reference form says it
            options["decay_at"] = "z"
        if form == "ScheduleFreeWrapper":
            options = self._wrapped(info, saved, options)
        for key, value in options.items():
            numbers = value.values if isinstance(value, Changing) else (value,)
            odd = [n for n in numbers if isinstance(n, float) and not math.isfinite(n)]
            if odd:
                raise ValueError(
                    f"{self.path} has {key}={odd[0]}. Record a finite one."
                )
        z_dtype = steps[-1][i]["z_dtype"] or "float32"
        names = tuple(saved["params"])
        # Meta's package has no such option, and one count for a group.
        counts_apart = not saved.get("upstream_compatible", True)
        kind: Any = OPTIMIZERS[_CLASSES[form]].options  # a dataclass
        return Group(names, _CLASSES[form], kind(**options), z_dtype, counts_apart)

    def _wrapped(
        self, info: Mapping[str, Any], saved: Mapping[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        not_covered = [
            key
            for key in ("weight_decay", "dampening", "nesterov", "maximize")
            if saved.get(key)
        ]
        if info["base"] != "torch.optim.sgd.SGD" or not_covered:
            raise ValueError(
                f"the wrapper over {info['base']} {not_covered or ''} has no reference "
                "to replay it with. Over plain torch.optim.SGD it has."
            )
        # Ours has them in its groups, Meta's beside them.
        wrapper = {**info["options"], **saved}
        return options | {
            "base_momentum": saved["momentum"],
            "weight_decay": wrapper["weight_decay_at_y"],
            "weight_lr_power": wrapper["weight_lr_power"],
            "r": wrapper["r"],
        }

    def frames(self) -> Iterator[tuple[str, int, Leaves, Leaves, Leaves]]:
        """Yields (kind, step, gradients, y, x) of every frame after the first."""
        for frame in read_record(self.path):
            if frame.kind != "start":
                grads, y, x = (
                    {name: _numpy(t) for name, t in frame.named(prefix).items()}
                    for prefix in ("grad", "y", "x")
                )
                yield frame.kind, frame.step, grads, y, x


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a ValueError of what a file raises whose entries are of another kind."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
    ) as error:
        raise ValueError(
            f"{path} cannot be replayed: {type(error).__name__}: {error}. "
            "Record the run again."
        ) from error


def _checked(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """The frames without their tensors, of which each is looked at first.

    Raises:
      ValueError: names, shapes, dtypes or counts do not fit those of the first frame,
        or a gradient or what the run begins with is not finite.
    """
    start = None
    for frame in read_record(path):
        if start is None:
            shapes = {key: leaf.to("meta") for key, leaf in frame.tensors.items()}
            start = frame._replace(tensors=shapes)
        with refusing(path):
            try:
                _check(frame, start)
            except ValueError as error:
                raise ValueError(f"{path}: {error}, at step {frame.step}") from error
            # One list of names for all frames, which are as many as the steps.
            for group, first in zip(
                frame.info["groups"], start.info["groups"], strict=True
            ):
                group["params"] = first["params"]
        yield frame._replace(tensors={})


def _check(frame: Frame, start: Frame) -> None:
    groups, first = frame.info["groups"], start.info["groups"]
    y = start.named("y")
    if sorted(name for group in first for name in group["params"]) != sorted(y):
        raise ValueError("the names of the groups are not those of y")
    if [group["params"] for group in groups] != [group["params"] for group in first]:
        raise ValueError("the parameters are not those of the first frame")
    for key, leaf in frame.tensors.items():
        prefix, _, name = key.partition(".")
        if prefix == "state":
            name = name.partition(".")[2]
        if name not in y or prefix not in ("grad", "y", "x", "state"):
            raise ValueError(f"{key[:80]!r} is of no parameter")
        if leaf.shape != y[name].shape or (
            leaf.dtype not in _DTYPES and prefix != "state"
        ):
            raise ValueError(
                f"{key[:80]!r} is {leaf.dtype} of shape {tuple(leaf.shape)}, and its "
                f"parameter {y[name].dtype} of shape {tuple(y[name].shape)}"
            )
        if prefix == "y" and leaf.dtype != y[name].dtype:
            raise ValueError(f"{key[:80]!r} is {leaf.dtype}, and was {y[name].dtype}")
        if (prefix == "grad" or frame.kind == "start") and not leaf.isfinite().all():
            skipped = any(group.get("skip_nonfinite") for group in groups)
            raise ValueError(
                f"{key[:80]!r} is not finite"
                + " (skip_nonfinite=True skips such a step, and a replay does not)"
                * skipped
            )
    for prefix in ("y", "x"):
        leaves = frame.named(prefix)
        if leaves and leaves.keys() != y.keys():
            raise ValueError(f"{prefix} is there for some parameters only")
    for group, began in zip(groups, first, strict=True):
        k = began.get("k", 0) + frame.step
        if group.get("k", 0) != k:
            raise ValueError(f"a group counts {group.get('k', 0)} steps, not {k}")


def _changes(steps: list[Any]) -> list[str]:
    """Options that changed during the run, and that JAX takes one value of."""
    found = []
    for before, after in itertools.pairwise(steps):
        for old, new in zip(before.info["groups"], after.info["groups"], strict=True):
            found += [
                f"{key} became {new[key]} at step {after.step}, and was {old[key]}"
                for key in _SAME_NAMES
                if old.get(key) != new.get(key)
            ]
    return found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()
