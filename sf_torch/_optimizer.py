"""What every Schedule-Free optimizer shares: modes, groups, state and the step.

The parameters hold **y** in train mode and **x** in eval mode. The state of a
parameter holds ``z``, and ``x`` where y does not determine it: for parameters
narrower than float32, whose state is the float32 master, for β = 0, and on request.
A subclass says how z moves.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sf_torch import _kernels
from sf_torch._averaging import next_weight
from sf_torch._kernels import Tensors

Group = dict[str, Any]
DECAY_AT = ("y", "z", "x")


@dataclass
class Leaves:
    """Parameters that take their step together, as parallel lists."""

    params: Tensors
    grads: Tensors  # in z's dtype
    ys: Tensors  # the parameters themselves, or y in z's dtype
    zs: Tensors
    xs: Tensors | None  # None: recovered from y and z
    states: list[dict[str, Tensor]]

    def at(self, name: str, b1: float) -> Tensors:
        """The sequence of this name before the step."""
        if name == "x":
            return self.xs or _kernels.recovered_x(self.ys, self.zs, b1)
        return self.ys if name == "y" else self.zs

    def state(self, key: str) -> Tensors:
        return [state[key] for state in self.states]


class ScheduleFree(torch.optim.Optimizer):
    """The base of the optimizers here; not an optimizer by itself."""

    def _beta(self, group: Group) -> float:
        """β, the weight of x in y."""
        raise NotImplementedError

    def _step_size(self, group: Group) -> float:
        raise NotImplementedError

    def _moments(self, group: Group) -> tuple[str, ...]:
        """Keys of the arrays that the base step keeps for each parameter."""
        return ()

    def _displacement(self, group: Group, leaves: Leaves, lr: float) -> Tensors:
        """u, by which z moves, as new tensors; moves the moments."""
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
        """The parameters hold x from now on. Does nothing in eval mode."""
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
        for group in self.param_groups:
            if group["train_mode"] != training:
                for p in group["params"]:
                    p.copy_(self._y(p, group) if training else self._x(p, group))
                group["train_mode"] = training

    @torch.no_grad()
    def eval_params(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x as new tensors, in the order of the parameter groups, in either mode.

        Args:
          dtype: of the result; by default that of each parameter. ``torch.float32``
            gives x in full where the parameters are half precision.
        """
        return [
            self._x(p, group).detach().to(dtype or p.dtype, copy=True)
            for group in self.param_groups
            for p in group["params"]
        ]

    @torch.no_grad()
    def eval_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's state dict at x, as new tensors. The model stays as it is."""
        params = [p for group in self.param_groups for p in group["params"]]
        xs = dict(zip(map(id, params), self.eval_params(), strict=True))
        named = dict(model.named_parameters(remove_duplicate=False))
        return {
            name: xs[id(named[name])]
            if name in named and id(named[name]) in xs
            else (value.detach().clone() if isinstance(value, Tensor) else value)
            for name, value in model.state_dict().items()
        }

    # State

    def _x(self, p: Tensor, group: Group) -> Tensor:
        state = self.state.get(p)
        if not state or "z" not in state:
            return p  # has not moved yet: x, y and z are one
        if "x" in state:
            return state["x"]
        if not group["train_mode"]:
            return p
        return _kernels.recovered_x([p], [state["z"]], group["b1"])[0]

    def _y(self, p: Tensor, group: Group) -> Tensor:
        state = self.state.get(p)
        if not state or "z" not in state:
            return p
        x = state.get("x", p)
        return _kernels.interpolated_y([x], [state["z"]], group["b1"])[0]

    def _state_of(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter, made or completed where that is needed."""
        state = self.state[p]
        dtype = group["state_dtype"] or torch.promote_types(p.dtype, torch.float32)
        if p.is_complex():
            dtype = torch.promote_types(dtype, torch.complex64)
        if "z" not in state:
            state["z"] = p.detach().to(dtype, copy=True)
        stored = group["store_x"] or self._beta(group) == 0 or p.dtype != dtype
        if stored and "x" not in state:
            state["x"] = self._x(p, group).detach().to(dtype, copy=True)
        for key in self._moments(group):
            if key not in state:
                # Moments start at zero; that of |g|² is real.
                like = state["z"].real if key == "exp_avg_sq" else state["z"]
                state[key] = torch.zeros_like(like.contiguous())
        for key, value in state.items():
            # Another package's state may have come in the parameters' own dtype.
            wanted = dtype.to_real() if value.is_floating_point() else dtype
            if value.dtype != wanted:
                state[key] = value.to(wanted)
        return state

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, in the mode of those that are there."""
        if self.param_groups:
            param_group.setdefault("train_mode", self.training)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise
        group = self.param_groups[-1]
        group.setdefault("b1", self._beta(group))

    def _check_group(self, group: Group) -> None:
        """Refuses a group's options; by then they include the defaults."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # What older checkpoints, and those of other packages, do not hold.
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group.setdefault("b1", self._beta(group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of ``schedulefree``'s.

        Raises:
          ValueError: groups or shapes that do not fit; nothing has changed then.
        """
        pairs = list(self._saved_states(state_dict))
        misfits = [
            f"parameter {index}: {key} {tuple(value.shape)} for {tuple(p.shape)}"
            for index, p, saved in pairs
            for key, value in saved.items()
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape
        ]
        if misfits:
            raise ValueError(
                "the state dict does not fit the parameters: "
                + "; ".join(misfits)
                + ". Build the optimizer over the model that it was saved with."
            )
        super().load_state_dict(state_dict)
        for _, p, saved in pairs:
            # torch casts floating state to the parameter's dtype; masters stay wide.
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)

    def _saved_states(
        self, state_dict: dict[str, Any]
    ) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        for saved, group in zip(
            state_dict["param_groups"], self.param_groups, strict=False
        ):
            for index, p in zip(saved["params"], group["params"], strict=False):
                if index in state_dict["state"]:
                    yield index, p, state_dict["state"][index]

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
        """
        return self._advance(closure)

    def _advance(self, closure: Callable[[], Any] | None) -> Any:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step() in eval mode: the parameters hold x, and gradients belong to "
                "y. Call optimizer.train() before the forward pass."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(
                        "sparse gradients are not supported: z, x and y are dense. "
                        "Build the embedding with sparse=False."
                    )
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: Group) -> None:
        lr = group["scheduled_lr"] = self._step_size(group)
        ckp1 = next_weight(group, lr)
        b1, next_b1 = group["b1"], self._beta(group)
        for leaves in self._leaves(group):
            steps = self._displacement(group, leaves, lr)
            if leaves.xs is None:
                _kernels.move_y(leaves.ys, leaves.zs, steps, ckp1, b1, next_b1)
                torch._foreach_add_(leaves.zs, steps)
            else:
                torch._foreach_add_(leaves.zs, steps)
                _kernels.move_x(leaves.xs, leaves.zs, ckp1)
                ys = _kernels.interpolated_y(leaves.xs, leaves.zs, next_b1)
                _kernels.copy(leaves.params, ys)
        group["b1"] = next_b1
        group["k"] += 1

    def _leaves(self, group: Group) -> Iterator[Leaves]:
        params = [p for p in group["params"] if p.grad is not None]
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(p.is_cuda for p in params)
        batches: dict[Any, Tensors] = {}
        for i, p in enumerate(params):
            state = self._state_of(p, group)
            alike = (p.device, p.dtype, state["z"].dtype, "x" in state)
            batches.setdefault(alike if foreach else i, []).append(p)
        for batch in batches.values():
            states: list[dict[str, Tensor]] = [self.state[p] for p in batch]
            zs = [state["z"] for state in states]
            xs = [state["x"] for state in states] if "x" in states[0] else None
            ys = [p.detach() for p in batch]
            if xs is not None and batch[0].dtype != zs[0].dtype:
                ys = _kernels.interpolated_y(xs, zs, group["b1"])
            grads = [
                p.grad.to(z.dtype)
                for p, z in zip(batch, zs, strict=True)
                if p.grad is not None
            ]
            yield Leaves(batch, grads, ys, zs, xs, states)


def decay(steps: Tensors, group: Group, leaves: Leaves, at: str | None = None) -> None:
    """Adds ``λ p`` in place, with p one of y, z, x before the step."""
    if group["weight_decay"]:
        at = at or group.get("decay_at", "y")
        torch._foreach_add_(
            steps, leaves.at(at, group["b1"]), alpha=float(group["weight_decay"])
        )


def bookkeeping(store_x: bool, state_dtype: torch.dtype | None) -> Group:
    """The entries of a group that are not options of the algorithm."""
    return {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
        "train_mode": False,
        "store_x": store_x,
        "state_dtype": state_dtype,
    }


def check_interpolation(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(
            f"{name} must lie in [0, 1], got {value}. It is the weight of x in y "
            "(usually 0.9 to 0.98)."
        )


def check_decay_rate(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must lie in [0, 1), got {value}. It is the decay rate of a "
            "moving average (usually 0.9 to 0.999)."
        )


def check_common(group: Group) -> None:
    """The options that every optimizer has."""
    for name in ("lr", "weight_decay", "eps", "warmup_steps"):
        if name in group and not group[name] >= 0:
            raise ValueError(
                f"{name} must not be negative, got {group[name]}. Give its magnitude."
            )
    warmup_steps = group.get("warmup_steps", 0)
    if not isinstance(warmup_steps, int):
        raise TypeError(
            f"warmup_steps must be an integer, got {warmup_steps}. It counts steps; "
            f"use {round(float(warmup_steps))}."
        )
    decay_at = group.get("decay_at", "y")
    if decay_at not in DECAY_AT:
        raise ValueError(f"decay_at must be one of 'y', 'z', 'x', got {decay_at!r}.")
