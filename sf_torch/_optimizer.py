"""What every Schedule-Free optimizer shares: modes, groups, state and the step.

The parameters hold **y** in train mode and **x** in eval mode. The state of a
parameter holds ``z``, and ``x`` where y does not determine it: for parameters
narrower than float32, whose state is the float32 master, for β = 0, and on request.

An optimizer is a choice for four seams, each a method: the base step
(:meth:`ScheduleFree._base_numbers`), the step size (:meth:`ScheduleFree._step_size`),
the averaging weight (:meth:`ScheduleFree._weight`) and the interpolation
(:meth:`ScheduleFree._beta`). Each sees the group's counters in a draft, which becomes
the group's own when all arrays have moved.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sf_torch import _checks, _loaded
from sf_torch._step import dispatch, formula, fused
from sf_torch._step.batches import MISSED, Leaf, is_master, local, wide_dtype
from sf_torch._step.dispatch import Plan, Way
from sf_torch._step.eager import Scratch
from sf_torch._step.modes import Modes
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import (
    Group,
    enter_counters,
    number,
    polynomial_weight,
    to_device,
    warmed_up,
)

ITERATES = ("z", "x", "y")
"""Keys of a parameter's state that are Schedule-Free's, whatever moves z."""


class ScheduleFree(torch.optim.Optimizer):
    """The base of the optimizers here; not an optimizer by itself."""

    # The four seams

    def _beta(self, group: Group) -> float:
        """β, the weight of x in the y that this step forms."""
        return group["betas"][0]

    def _step_size(self, group: Group) -> float:
        """``lr_k``, which the base step and the averaging weight both see."""
        lr = number(group["lr"], keep_tensor=self._way(group).captures)
        return warmed_up(lr, group["k"], group.get("warmup_steps", 0))

    def _weight(self, group: Group, lr: float) -> float:
        """``c_k``: how much of z' enters x."""
        return polynomial_weight(group, lr, group["r"], group["weight_lr_power"])

    # Whether the state holds y in train mode too, and not only where it is saved.
    _stores_y = False

    def _moments(self, group: Group) -> tuple[str, ...]:
        """Keys of the arrays that the base step keeps for each parameter."""
        return ()

    def _base_numbers(self, group: Group, lr: float, k: Any) -> Numbers:
        """How z moves, after k steps of the parameter's own."""
        raise NotImplementedError

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
            self._switch(before)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        self._settle()
        modes = self.__dict__.setdefault("_modes", Modes())
        switch = modes.to_y if training else modes.to_x
        moved = {id(group): self._moved(group) for group in self.param_groups}
        for group in self.param_groups:
            if group["train_mode"] != training:
                fuses = self._way(group).fuses
                switch(moved[id(group)], group["b1"], fuses)
                group["train_mode"] = training

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
        if not state or "z" not in state:
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
        """Keys of the arrays in a parameter's state that the step reads and writes."""
        return (*ITERATES, *self._moments(group))

    def _moved(self, group: Group) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The parameters that have moved, each with its state on its own device.

        Without z a parameter has not moved yet: its x, y and z are one.
        """
        moved = [p for p in group["params"] if "z" in self.state.get(p, ())]
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
        """The state of a parameter, made or completed where that is needed."""
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

    def _stores_x(self, group: Group) -> bool:
        """Whether x is kept even where y has it in full; β = 0 leaves no other way."""
        return group["store_x"] or 0 in (group["b1"], self._beta(group))

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
            self._check_group(group)
        except Exception:
            del self.param_groups[-1]
            raise
        group.setdefault("b1", self._beta(group))

    def _check_group(self, group: Group) -> None:
        _checks.options(group)
        fused.check(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # What older checkpoints, and those of other packages, do not hold.
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's entry, no option of ours
                    group.setdefault(key, value)
            group.setdefault("b1", self._beta(group))
        self._unsettled = True

    def state_dict(self) -> dict[str, Any]:
        """As of every torch optimizer; with y, in train mode too, where x needs it.

        The model may be saved at x beside it, and loaded before or after: y says then
        what its parameters hold, and what they should.
        """
        saved = super().state_dict()
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
          ValueError: groups or shapes that do not fit, or the state of an optimizer
            that is not Schedule-Free or does not count its steps in its groups;
            nothing has changed then.
        """
        for index, _, saved in saved_states(self, state_dict):
            if saved and "z" not in saved:
                raise ValueError(
                    f"the state of parameter {index} has {', '.join(saved)} and no z: "
                    "it is not that of a Schedule-Free optimizer. Load the model "
                    "alone, and let the optimizer begin at its weights."
                )
        misfits = [
            f"parameter {index}: {key} {tuple(value.shape)} for {tuple(p.shape)}"
            for index, p, saved in saved_states(self, state_dict)
            for key, value in saved.items()
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape
        ]
        if misfits:
            raise ValueError(
                "the state dict does not fit the parameters: "
                + "; ".join(misfits)
                + ". Build the optimizer over the model that it was saved with."
            )
        for group in state_dict["param_groups"]:
            states = [state_dict["state"].get(index, {}) for index in group["params"]]
            if "k" not in group and any("z" in state for state in states):
                raise ValueError(
                    "a group of the state dict has no k, the number of steps taken, "
                    f"only {sorted(group)}. It is of another package, such as GPAAdamW "
                    "of facebookresearch/optimizers: set k, weight_sum, lr_max, "
                    "train_mode and the options in its groups by the names used here."
                )
        # A package without modes in its groups says nothing against the present one.
        groups = [
            {"train_mode": self.training, **g} for g in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        restore_dtypes(self, state_dict)
        _loaded.place(self.param_groups, self.state, strict=False)

    # The model may be loaded after the optimizer, so that what the parameters hold is
    # looked at when it matters first.
    _unsettled = False

    def _settle(self, act: Callable[..., None] = _loaded.place) -> None:
        """After loading: each parameter holds the iterate of its group's mode.

        Raises:
          RuntimeError: the loaded state is not that of the parameters.
        """
        if not self._unsettled:
            return
        act(self.param_groups, self.state)
        self._unsettled = False
        for group in self.param_groups:
            if group["train_mode"] and not self._stores_y:
                for p in group["params"]:
                    self.state.get(p, {}).pop("y", None)

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients at y.

        Args:
          closure: evaluates the loss at y and its gradients; called once.

        Returns:
          What closure returned, else None.

        Raises:
          RuntimeError: in eval mode, or for sparse gradients; nothing has moved then.
          ValueError: a parameter of integers has a gradient; the same.
        """
        self._check_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._advance(loss, closure)
        return loss

    # What torch.compile may not look into reads or writes what each step changes.

    @torch.compiler.disable
    def _check_mode(self) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step() needs train mode: in eval mode the parameters hold x, and "
                "gradients belong to y. Call optimizer.train() before the forward "
                "pass."
            )
        self._settle(_loaded.check)

    @torch.compiler.disable
    def _check_gradients(self) -> None:
        for group in self.param_groups:
            _checks.dtypes([p for p in group["params"] if p.grad is not None])
            for grad in [p.grad for p in group["params"]]:
                if grad is not None and grad.is_sparse:
                    raise RuntimeError(
                        "sparse gradients are not supported: z, x and y are dense. "
                        "Build the embedding with sparse=False."
                    )

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        compiles = torch.compiler.is_compiling()
        steps, compiled = self._prepare(loss, compiles)
        if compiles:
            for leaves, grads, numbers in compiled:
                for leaf, grad in zip(leaves, grads, strict=True):
                    formula.step(leaf, grad, numbers)
        self._finish(steps)

    @torch.compiler.disable
    def _prepare(self, loss: Any, compiles: bool) -> tuple[list[Any], list[Any]]:
        """What a step takes, once all of it has been looked at; nothing has moved.

        Returns:
          For each group its draft and (plan, numbers, gradients) of its parameters;
          and (leaves, gradients, numbers) of those that a compiler is to have.
        """
        former, self._plans = self.__dict__.get("_plans", {}), {}
        drafts = [dict(group) for group in self.param_groups]
        self._measure(loss, drafts)
        steps, compiled = [], []
        for group, draft in zip(self.param_groups, drafts, strict=True):
            way = self._way(group)
            if way.captures:
                to_device(draft, group["params"][0].device)
            lr = draft["scheduled_lr"] = self._step_size(draft)
            ckp1 = self._weight(draft, lr)
            b1, next_b1 = group["b1"], self._beta(draft)
            planned = []
            for missed, params in self._parts(group):
                numbers = self._base_numbers(draft, lr, draft["k"] - missed)
                numbers = numbers.averaged(ckp1, b1, next_b1)
                grads = [p.grad for p in params if p.grad is not None]
                if compiles and not way.fuses:
                    leaves = [self._leaf(p, group) for p in params]
                    there = numbers.as_tensors(leaves[0]["param"].device)
                    compiled.append((leaves, list(map(local, grads)), there))
                else:
                    key = id(group), missed
                    plan = self._plan(former.get(key), group, way, params, grads)
                    if plan.lasts:
                        self._plans[key] = plan
                    planned.append((plan, numbers, grads))
            draft["b1"], draft["k"] = next_b1, draft["k"] + 1
            steps.append((group, draft, planned))
        return steps, compiled

    def _measure(self, loss: Any, drafts: list[Group]) -> None:
        """Enters into the drafts what a step depends on beyond each group."""

    @torch.compiler.disable
    def _finish(self, steps: list[Any]) -> None:
        """Takes what is left of a step, and makes the drafts the groups' own."""
        for group, draft, planned in steps:
            for plan, numbers, grads in planned:
                plan.step(numbers, grads)
                # What a CUDA graph of the step reads whenever it is replayed.
                self.__dict__.setdefault("_captured", []).extend(plan.captured())
            for p, _ in self._moved(group):
                if p.grad is None:
                    self._stay(p, group, draft)
            enter_counters(group, draft)

    def _plan(
        self,
        plan: Plan | None,
        group: Group,
        way: Way,
        params: list[Tensor],
        grads: list[Tensor],
    ) -> Plan:
        """The plan of the step before where it is still right, else a new one."""
        # What decides on the arrays that a parameter has, and on how they move.
        dtypes = group["state_dtype"], group.get("moment_dtype")
        kind = (way, dtypes, self._stores_x(group), self._arrays(group))
        if plan is None or not plan.fits(params, grads, self.state, kind):
            leaves = [self._leaf(p, group) for p in params]
            scratch = self.__dict__.setdefault("_scratch", Scratch())
            plan = Plan(params, grads, leaves, way, kind, scratch)
        return plan

    def _way(self, group: Group) -> Way:
        """How the group's options let its parameters move."""
        return dispatch.way(group)

    def _leaf(self, p: Tensor, group: Group) -> Leaf:
        state = self._state_of(p, group)
        arrays = {k: local(state[k]) for k in self._arrays(group) if k in state}
        return {"param": local(p.detach()), **arrays}

    # Parameters without a gradient

    def _counts_apart(self, group: Group) -> bool:
        """Whether bias is corrected by each parameter's own count of steps."""
        return bool(self._moments(group)) and not group.get("upstream_compatible")

    def _parts(self, group: Group) -> list[tuple[Any, list[Tensor]]]:
        """The parameters with a gradient, apart by how many steps they have missed."""
        given = [p for p in group["params"] if p.grad is not None]
        if not self._counts_apart(group):
            return [(0, given)] if given else []
        parts: dict[Any, list[Tensor]] = {}
        for p in given:
            state = self.state.get(p) or {}
            missed = state.get(MISSED, 0) if "z" in state else int(group["k"])
            parts.setdefault(missed, []).append(p)
        return list(parts.items())

    def _stay(self, p: Tensor, group: Group, draft: Group) -> None:
        """Ends a step that the parameter did not take: x and z stay.

        The step is counted as missed, and y moves to where the next β has it.
        """
        state = self.state[p]
        if self._counts_apart(group):
            missed = state.get(MISSED, 0)
            if self._way(group).captures and not isinstance(missed, Tensor):
                missed = torch.full_like(draft["k"], missed)
            # In place on the device, as k is: a CUDA graph of the step moves both.
            missed += 1
            state[MISSED] = missed
        next_b1 = draft["b1"]
        if next_b1 != group["b1"]:
            state = self._state_of(p, group)
            y = formula.recover_y(self._x(p, group), state["z"], next_b1)
            for kept in (p, state.get("y")):
                if kept is not None:
                    kept.copy_(y)


def saved_states(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Index, parameter and saved state of each parameter that has one."""
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
    for saved, group in pairs:
        for index, p in zip(saved["params"], group["params"], strict=False):
            if index in state_dict["state"]:
                yield index, p, state_dict["state"][index]


def restore_dtypes(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> None:
    """Undoes torch's cast of loaded state to the parameters' dtype."""
    for _, p, saved in saved_states(optimizer, state_dict):
        for key, value in saved.items():
            if (
                isinstance(value, Tensor)
                and value.dtype != optimizer.state[p][key].dtype
            ):
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)


@cache
def _state_dtype(param: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    dtype = asked or wide_dtype(param)
    return torch.promote_types(dtype, torch.complex64) if param.is_complex else dtype


def _to_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in dtype, which is that of its parts where value is complex or not."""
    return value.to(dtype if value.is_complex() else dtype.to_real())


def bookkeeping(
    store_x: bool,
    state_dtype: torch.dtype | None,
    fused: bool | None = None,
    capturable: bool = False,
) -> Group:
    """The entries of a group that are not options of the algorithm."""
    return {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
        "train_mode": False,
        "store_x": store_x,
        "state_dtype": state_dtype,
        "fused": fused,
        "capturable": capturable,
    }
