"""The iterates of an optimizer: what its parameters and its state hold, and when.

The parameters hold **y** in train mode and **x** in eval mode. The state of a
parameter holds ``z``, and ``x`` where y does not determine it: for parameters
narrower than float32, whose state is the float32 master, for β near 0, and on request.
How the iterates move is in :mod:`sf_torch._optimizer`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments, _checks, _loaded
from sf_torch._step import dispatch, formula, fused
from sf_torch._step.batches import MISSED, is_master, wide_dtype
from sf_torch._step.dispatch import Way
from sf_torch._step.modes import Modes
from sf_torch._step.schedule import Group, has_begun

ITERATES = ("z", "x", "y")
"""Keys of a parameter's state that are Schedule-Free's, whatever moves z."""

NEEDED = (
    *("k", "weight_sum", "lr_max"),
    *("lr", "betas", "momentum", "mu_x", "mu_y", "eps", "weight_decay"),
)
"""Keys that all groups have that have one of this name, in files of whatever age and
of the published packages. Others were added later, and have defaults."""


LEAST_B1 = 1 / 64
"""The least β with which y and z give x: the error of a y is 1 / β as large in x."""


class Iterates(torch.optim.Optimizer):
    """The groups, modes and state of an optimizer; how it steps is added by
    :class:`~sf_torch._optimizer.ScheduleFree`."""

    # What each argument may be, for the errors and the documentation
    _kinds: Mapping[str, _arguments.Kind] = _arguments.ARGUMENTS

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        _arguments.check("params", params)
        _arguments.options(defaults, self._kinds)
        super().__init__(params, defaults)

    # What the state holds depends on these

    def _beta(self, group: Group) -> float:
        """β, the weight of x in the y that a step forms."""
        return group["betas"][0]

    def _moments(self, group: Group) -> tuple[str, ...]:
        """Keys of the arrays that the base step keeps for each parameter."""
        return ()

    def _counts_apart(self, group: Group) -> bool:
        """Whether bias is corrected by each parameter's own count of steps."""
        return bool(self._moments(group)) and not group.get("upstream_compatible")

    def _stores_x(self, group: Group) -> bool:
        """Whether x is kept even where y has it; β near 0 leaves no other way."""
        return group["store_x"] or min(group["b1"], self._beta(group)) < LEAST_B1

    # Whether the state holds y in train mode too, and not only where it is saved.
    _stores_y = False

    def _way(self, group: Group) -> Way:
        """How the group's options let its parameters move."""
        return dispatch.way(group)

    # Modes

    @property
    def training(self) -> bool:
        """Whether the parameters hold y (train mode) and not x (eval mode)."""
        return any(group["train_mode"] for group in self.param_groups)

    def train(self) -> None:
        """The parameters hold y from now on. Does nothing in train mode."""
        self._switch(True)

    def eval(self) -> None:
        """The parameters hold x from now on. Does nothing in eval mode.

        Weights that are written now are x from then on: a model's ``load_state_dict``,
        an average of models, clipped weights. Written in train mode they would be
        taken for y.
        """
        self._switch(False)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Eval mode within a with block; the former mode comes back, come what may."""
        with self._mode(False):
            yield

    @contextmanager
    def train_mode(self) -> Iterator[None]:
        """Train mode within a with block; the former mode comes back, come what may."""
        with self._mode(True):
            yield

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        before = self.training
        self._switch(training)
        try:
            yield
        finally:
            if self._spoiled is None:  # else what has spoiled it is on its way
                self._switch(before)

    @torch.compiler.disable  # of a step(closure): what fails to compile moves nothing
    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        self._settle()
        modes = self.__dict__.setdefault("_modes", Modes())
        switch = modes.to_y if training else modes.to_x
        moved = {id(g): self._moved(g, g["params"]) for g in self.param_groups}
        groups = [g for g in self.param_groups if g["train_mode"] != training]
        with self._moving():
            for group in groups:
                switch(moved[id(group)], group["b1"])
                group["train_mode"] = training

    # Arrays move in place, many in a step. What fails among them leaves some moved and
    # some not, and nothing tells which.
    _spoiled: str | None = None

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """What is raised within the block spoils the optimizer."""
        try:
            yield
        except BaseException as error:
            self._spoiled = f"{type(error).__name__}: {error}"
            raise
        self._spoiled = None

    def _refuse_spoiled(self) -> None:
        if self._spoiled is not None:
            raise RuntimeError(
                "a step, a switch of modes or a load failed half-way, so that some "
                f"arrays have moved and others have not. It was {self._spoiled}. Bring "
                "the run back: load_checkpoint, or load_state_dict of both the model "
                "and this optimizer, with what was saved before."
            )

    @torch.no_grad()
    def eval_params(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x as new tensors, in the order of the parameter groups, in either mode.

        Args:
          dtype: of the result; by default that of each parameter. ``torch.float32``
            gives x in full where the parameters are half precision.
        """
        self._settle()
        return [
            self._new_x(p, group).to(dtype or p.dtype)
            for group in self.param_groups
            for p in group["params"]
        ]

    @torch.no_grad()
    def eval_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's state dict at x, as new tensors. The model stays as it is.

        Raises:
          ValueError: a parameter of this optimizer is not in the model's state dict.
            What stands there in its place would not be x.
        """
        saved = model.state_dict(keep_vars=True)
        self._check_saved(model, saved)
        params = [p for group in self.param_groups for p in group["params"]]
        xs = dict(zip(map(id, params), self.eval_params(), strict=True))
        return {
            name: xs[id(value)]
            if id(value) in xs
            else (value.detach().clone() if isinstance(value, Tensor) else value)
            for name, value in saved.items()
        }

    def _check_saved(self, model: torch.nn.Module, saved: Mapping[str, Any]) -> None:
        """Refuses a model's state dict that lacks a parameter of this optimizer."""
        # By identity: wrappers and hooks rename, and two names may be one parameter.
        found = set(map(id, saved.values()))
        names = {id(p): name for name, p in model.named_parameters()}
        lost = [
            f"{names[id(p)]} is copied by its state_dict(), or left out"
            if id(p) in names
            else f"a parameter of shape {tuple(p.shape)} is not the model's"
            for group in self.param_groups
            for p in group["params"]
            if id(p) not in found
        ]
        if lost:
            more = f"; and {len(lost) - 4} more" if len(lost) > 4 else ""
            raise ValueError(
                "the model's state dict lacks parameters that the optimizer moves: "
                f"{'; '.join(lost[:4])}{more}. Pass the model that it was built over "
                "(several in a ModuleList), and build it after "
                "load_state_dict(assign=True). Where state_dict() makes copies, take "
                "it within `with optimizer.eval_mode():`."
            )

    def _x(self, p: Tensor, group: Group) -> Tensor:
        state = self.state.get(p)
        if not state or "z" not in state or not has_begun(group):
            return p  # has not moved yet: x, y and z are one
        self._bring(p, self._arrays(group))
        if "x" in state:
            return state["x"]
        if not group["train_mode"]:
            return p
        return formula.recover_x(p, state["z"], group["b1"])

    def _new_x(self, p: Tensor, group: Group) -> Tensor:
        x = self._x(p, group)
        is_held = x is p or x is self.state[p].get("x")
        return x.detach().clone() if is_held else x

    # State

    def _arrays(self, group: Group) -> tuple[str, ...]:
        """Keys of all arrays that a parameter's state may have."""
        return (*ITERATES, *self._moments(group))

    def _moved(
        self, group: Group, among: Sequence[Tensor]
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Those parameters that have taken a step, each with its state on its device.

        The state of others has no z, or was made before any step: their x, y and z
        are still one.
        """
        if not has_begun(group):
            return []
        moved = [p for p in among if "z" in self.state.get(p, ())]
        keys = self._arrays(group)
        return [(p, self._bring(p, keys)) for p in moved]

    def _bring(self, p: Tensor, keys: tuple[str, ...]) -> dict[str, Any]:
        """Moves the state of a parameter to the parameter's device; returns it.

        ``module.to(device)`` moves parameters and leaves their state behind.
        """
        state, device = self.state[p], p.device
        for key in keys:
            if key in state and state[key].device != device:
                state[key] = state[key].to(device)
        return state

    def _state_of(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter; arrays that it lacks are made."""
        state = self._bring(p, self._arrays(group))
        dtype = _state_dtype(p.dtype, group["state_dtype"])
        moments = self._moments(group)
        dtypes = dict.fromkeys(ITERATES, dtype) | dict.fromkeys(
            moments, _state_dtype(p.dtype, group.get("moment_dtype"))
        )
        for key in dtypes.keys() & state.keys():
            # Another package's state may have come in the parameters' own dtype.
            state[key] = _to_dtype(state[key], dtypes[key])
        begins = "z" not in state
        if begins:
            state["z"] = p.detach().to(dtype, copy=True)
            if self._counts_apart(group):
                state[MISSED] = int(group["k"])
        if "x" not in state and (self._stores_x(group) or is_master(state["z"], p)):
            # x, y and z begin as one.
            x = p if begins else self._x(p, group)
            state["x"] = x.detach().to(dtype, copy=True)
        for key in moments:
            if key not in state:
                # Moments start at zero; that of |g|² is real.
                like = state["z"].real if key == "exp_avg_sq" else state["z"]
                state[key] = _to_dtype(torch.zeros_like(like), dtypes[key])
        return state

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, in the mode of those that are there.

        Raises:
          ValueError: an option out of its range; the group is not added then.
        """
        if self.param_groups:
            param_group.setdefault("train_mode", self.training)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _checks.dtypes([p for p in group["params"] if p.requires_grad])
            self._check_group(group, self.param_groups[0])
        except Exception:
            del self.param_groups[-1]
            raise
        group.update({k: _plain(group[k]) for k in group if k != "params"})
        group.setdefault("b1", self._beta(group))

    def _check_group(self, group: Group, first: Group) -> None:
        """Refuses options; ``first`` is the first of the groups that it is one of."""
        _arguments.options(group, self._kinds)
        _checks.random_rounding(group)
        fused.check(group)

    def _needed(self, group: Group) -> list[str]:
        """Keys of a group without which a saved run could not go on as it was."""
        return [key for key in NEEDED if key in group]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # What older checkpoints, and those of other packages, do not hold.
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's entry, no option of ours
                    group.setdefault(key, value)
            group.setdefault("b1", self._beta(group))
        self._unsettled = True

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_spoiled()
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; with y, in train mode too, where x needs it.

        The model may be saved at x beside it, and loaded before or after: y says then
        what its parameters hold, and what they should.

        Raises:
          RuntimeError: a step has failed half-way.
        """
        self._refuse_spoiled()
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.update({key: _plain(value) for key, value in group.items()})
        pairs = zip(saved["param_groups"], self.param_groups, strict=True)
        for indices, group in pairs:
            if not group["train_mode"]:
                continue
            for index, p in zip(indices["params"], group["params"], strict=True):
                state = saved["state"].get(index, {})
                if "z" in state and not state.keys() & {"x", "y"}:
                    # A copy: some load in place, and the model's part may be at x.
                    saved["state"][index] = {**state, "y": p.detach().clone()}
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of this optimizer or of ``schedulefree``'s.

        Raises:
          ValueError: what no optimizer of this class could have saved: groups or
            shapes that do not fit, counters and options that the constructor would
            refuse, moments that are missing or left over. All of it is in one message,
            and nothing has changed then.
        """
        self._check_fits(state_dict)
        with self._moving():
            self._load(state_dict)

    def _check_fits(self, state_dict: Mapping[str, Any]) -> None:
        _loaded.check_fits(self, state_dict)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what has been checked."""
        # A package without modes in its groups says nothing against the present one.
        groups = [
            {"train_mode": self.training, **g} for g in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        _loaded.restore_dtypes(self, state_dict)
        _loaded.place(self.param_groups, self.state, strict=False)

    # The model may be loaded after the optimizer. What the parameters hold is therefore
    # looked at only when it first matters.
    _unsettled = False

    def _settle(self, act: Callable[..., None] = _loaded.place) -> None:
        """After loading: each parameter holds the iterate of its group's mode.

        Raises:
          RuntimeError: the loaded state is not that of the parameters, or a step has
            failed half-way.
        """
        self._refuse_spoiled()
        if not self._unsettled:
            return
        act(self.param_groups, self.state)
        self._unsettled = False
        for group in self.param_groups:
            if group["train_mode"] and not self._stores_y:
                for p in group["params"]:
                    self.state.get(p, {}).pop("y", None)


@cache
def _state_dtype(param: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    dtype = asked or wide_dtype(param)
    return torch.promote_types(dtype, torch.complex64) if param.is_complex else dtype


def _plain(value: Any) -> Any:
    """Numbers of NumPy as Python's: files with them are not read by weights_only."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value


def _to_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in dtype, which is that of its parts where value is complex or not."""
    return value.to(dtype if value.is_complex() else dtype.to_real())
