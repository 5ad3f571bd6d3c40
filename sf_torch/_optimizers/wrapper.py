"""Schedule-Free over any torch optimizer: the base moves z with the gradients at y.

    z' = B(z - lr_k λ y)           B: whatever the base optimizer does to z
    x' = (1 - c_k) x + c_k z'
    y' = (1 - β) z' + β x'

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sf_torch import _arguments, _checks, _loaded
from sf_torch._iterates import ITERATES, NEEDED
from sf_torch._optimizer import ScheduleFree, bookkeeping
from sf_torch._optimizers.forms import Closure, Reference
from sf_torch._optimizers.growing import OF_WRAPPER, Growing
from sf_torch._step import formula
from sf_torch._step.batches import Leaf, is_master, local, wide_dtype
from sf_torch._step.dispatch import Way
from sf_torch._step.numbers import Numbers
from sf_torch._step.schedule import Group, warmed_up


class ScheduleFreeWrapper(ScheduleFree):
    r"""Schedule-Free over any optimizer of ``torch.optim``.

    .. math::

        z' &= B(z - lr_k \lambda y) \\
        x' &= (1 - c_k) x + c_k z' \\
        y' &= (1 - \beta) z' + \beta x'

    with B the base optimizer's step, from the gradients at y, and :math:`\lambda` the
    ``weight_decay_at_y``.

    Args:
      base: the optimizer that moves z, built over the model's parameters. It should
        have no momentum of its own: β takes that part. Its learning rate weighs the
        average, times the ``d`` of a group that has one (Prodigy, D-Adaptation).
        Its weight decay acts at z.
      weight_decay_at_y: λ, decoupled and times the group's learning rate, at y. It
        acts before the base's step, as in Meta's wrapper: y is that of the step's
        gradients, and a base that looks at its parameters (for a decay of its own, or
        as Prodigy does) finds the z that has decayed. x does not move by it.
      momentum: β, the weight of x in y, in [0, 1]; a number, or
        :func:`~sf_torch.growing_b1`.
      weight_lr_power: steps are weighed by the largest learning rate so far to this
        power.
      r: and by ``(k + 1) ** r``.
      warmup_steps: steps of linear warmup. The base and the averaging weight see the
        same warmed learning rate; the group's ``lr`` is its own again after the step.
        0 for a base, or a scheduler, that warms up by itself.
      store_x: keep x in the state.
      state_dtype: dtype of z and x. By default that of each parameter, float32 for
        those narrower than it. The base steps, and keeps its state, at least in
        float32 whatever this says: a bfloat16 second moment stalls.
      skip_nonfinite: leave all as it was in a step in which a gradient has a NaN or an
        infinity: y, z, moments and counters. The host looks at the gradients before it
        goes on, which a GPU is waited for.

    Groups and state are the base's own: a learning rate set in one is set in both, and
    ``state[p]`` holds z beside what the base keeps for p. While the base takes its
    step, it finds there only what is its own. ``weight_decay_at_y``, ``r`` and
    ``weight_lr_power`` are entries of each group, and may be set there.

    Raises:
      TypeError: a base that is not a torch optimizer, or ``warmup_steps`` that is not
        a whole number.
      ValueError: an argument out of its range, or a base that has an option of the
        same name as one that is kept in the groups.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> base = torch.optim.RMSprop([w], lr=0.05)
      >>> optimizer = sf_torch.ScheduleFreeWrapper(base, momentum=0.9)
      >>> optimizer.train()
      >>> for _ in range(400):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float | Growing = 0.9,
        weight_lr_power: float = 2.0,
        r: float = 0.0,
        *,
        warmup_steps: int = 0,
        store_x: bool = False,
        state_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        _arguments.check("base", base)
        options = {
            "weight_decay_at_y": weight_decay_at_y,
            "weight_lr_power": weight_lr_power,
            "r": r,
        }
        if taken := sorted(options.keys() & base.defaults.keys()):
            raise ValueError(
                f"{type(base).__name__} has options called {', '.join(taken)}, which "
                "Schedule-Free keeps in the same groups. Give them other names in the "
                "base."
            )
        self.momentum = _arguments.check("momentum", momentum, OF_WRAPPER["momentum"])
        self.warmup_steps = _arguments.check("warmup_steps", warmup_steps)
        self.base = base
        options |= bookkeeping(store_x, state_dtype, skip_nonfinite=skip_nonfinite)
        super().__init__(base.param_groups, options)
        self.param_groups, self.state = base.param_groups, base.state

    _kinds = OF_WRAPPER
    # The entries of a group that are not the base's to check; None for all.
    _checked: Sequence[str] | None = (
        "lr",
        "weight_decay_at_y",
        "weight_lr_power",
        "r",
        "refined_c",
        "store_x",
        "state_dtype",
        "skip_nonfinite",
    )

    @property
    def weight_decay_at_y(self) -> float:
        """λ of the first group; each group has its own, which may be set there."""
        return self.param_groups[0]["weight_decay_at_y"]

    def _beta(self, group: Group) -> float:
        beta = self.momentum
        return beta(group["k"]) if isinstance(beta, Growing) else beta

    def _step_size(self, group: Group) -> float:
        return group["scheduled_lr"]

    def _way(self, group: Group) -> Way:
        # The options of these names, where a group has them, are the base's.
        return Way(fuses=False, captures=False, together=True)

    def _base_numbers(self, group: Group, lr: float, k: Any) -> Numbers:
        return Numbers()  # the base has moved z

    def _leaf(self, p: Tensor, group: Group) -> Leaf:
        return {**super()._leaf(p, group), "next_z": local(self._next_zs[p])}

    @torch.compiler.disable  # the base's to compile, and each has ways of its own
    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        with self._warmed_up():
            # Before the base changes them: its step is taken with these.
            before = [(float(group["lr"]), group["k"]) for group in self.param_groups]
            self._next_zs = self._moved_by_base(loss, closure)
        try:
            with self._moving():  # as the base has
                for group, (lr, k) in zip(self.param_groups, before, strict=True):
                    group["k"] = k
                    # The d that the step found, which is the better estimate.
                    group["scheduled_lr"] = lr * float(group.get("d", 1.0))
                super()._advance(loss, closure)
        finally:
            self._next_zs = {}

    def _make_state(self) -> None:
        super()._make_state()
        groups = [dict(group) for group in self.param_groups]
        self._moved_by_base(None, None)
        for group, before in zip(self.param_groups, groups, strict=True):
            # What the base counts there too.
            group.clear()
            group.update(before)

    @contextmanager
    def _warmed_up(self) -> Iterator[None]:
        """Sets each group's lr to lr_k within the block, and restores it at the end."""
        own = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            if group["k"] + 1 < self.warmup_steps:
                lr = float(group["lr"])
                group["lr"] = warmed_up(lr, group["k"], self.warmup_steps)
        try:
            yield
        finally:
            for group, lr in zip(self.param_groups, own, strict=True):
                group["lr"] = lr

    def _moved_by_base(
        self, loss: Any, closure: Callable[[], Any] | None
    ) -> dict[Tensor, Tensor]:
        """Lets the base step; returns z' of each parameter.

        While the base steps, each parameter holds a copy of its z.
        """
        moving = [
            (p, group, self._state_of(p, group))
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        live = {p: _held(p) for p, _, _ in moving}
        for p, _, state in moving:
            _widen_state(state, p)
        calls = 0

        def closure_at_y() -> Any:
            # The base's first look is at the y of this step, which has been evaluated.
            # One that looks further (LBFGS) does so from z; gradients belong to its y.
            nonlocal calls
            calls += 1
            if calls == 1 or closure is None:
                return loss
            at = {p: _held(p) for p in live}
            for p, group, _ in moving:
                y = formula.recover_y(xs[p], at[p], group["b1"])
                _hold(p, y.to(live[p].dtype))
            with torch.enable_grad():
                value = closure()
            for p, z in at.items():
                _hold(p, z)
            return value

        xs = {}
        if closure is not None:
            xs = {p: self._new_x(p, group) for p, group, _ in moving}
        zs = {p: self._decayed_z(p, group) for p, group, _ in moving}
        with self._apart():
            try:
                for p, z in zs.items():
                    _hold(p, z)
                with self._moving():
                    self.base.step(closure_at_y if closure is not None else None)
                    return {p: _held(p) for p in live}
            finally:
                for p, value in live.items():
                    _hold(p, value)

    def _bring(self, p: Tensor, keys: tuple[str, ...]) -> dict[str, Any]:
        state = super()._bring(p, keys)
        for key, value in state.items():
            # Numbers such as torch's count of steps stay where the base has them.
            if isinstance(value, Tensor) and value.dim():
                state[key] = value.to(p.device)
        return state

    def _decayed_z(self, p: Tensor, group: Group) -> Tensor:
        """z after the wrapper's own weight decay, as a new tensor."""
        state = self.state[p]
        z = state["z"].to(_dtype_for_base(p, state["z"]), copy=True)
        if not group["weight_decay_at_y"]:
            return z
        y = p.detach()
        if is_master(state["z"], p):  # p is a rounding of y
            y = formula.recover_y(state["x"], z, group["b1"])
        # Without the d of a group, as Meta's has it.
        return z.sub_(y, alpha=float(group["lr"]) * group["weight_decay_at_y"])

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Takes z, x and y out of the state while the base steps.

        Many bases make their state where a parameter has none at all.
        """
        ours = {
            p: {key: state.pop(key) for key in ITERATES if key in state}
            for p, state in self.state.items()
        }
        try:
            yield
            for state in self.state.values():
                for key in ITERATES:
                    if key in state:
                        raise RuntimeError(
                            f"{type(self.base).__name__} keeps {key!r} in its state, "
                            "where Schedule-Free keeps its own. Give that key another "
                            "name in the base."
                        )
        finally:
            for p, iterates in ours.items():
                self.state[p].update(iterates)

    # Groups and state, which are the base's

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the base too, in the mode of those that are there."""
        if self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)
            # What the base has appended is entered below.
            param_group = self.base.param_groups.pop()
        super().add_param_group(param_group)

    def _check_group(self, group: Group, first: Group) -> None:
        _arguments.options(group, self._kinds, self._checked)
        _checks.random_rounding(group)  # which has to be refused here

    def _needed(self, group: Group) -> list[str]:
        # Switches, and what may be None, have come in with versions of torch.
        options = {k for k, v in self.base.defaults.items() if type(v) in (int, float)}
        return [*super()._needed(group), *sorted(options - {*NEEDED})]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of this optimizer or of ``schedulefree``'s wrapper.

        Raises:
          ValueError: as of every optimizer here, or options of another base; nothing
            has changed then. Of the base's own state nothing is looked at.
        """
        super().load_state_dict(state_dict)

    def _check_fits(self, state_dict: Mapping[str, Any]) -> None:
        _loaded.check_structure(self, state_dict)
        super()._check_fits(_of_keys(state_dict, lambda key: key in ITERATES))

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        super()._load(_of_keys(state_dict, lambda key: key in ITERATES))
        groups, iterates = self.param_groups, self.state
        of_base = _of_keys(state_dict, lambda key: key not in ITERATES)
        self.base.load_state_dict(of_base)
        _loaded.restore_dtypes(self.base, of_base)
        for shared, group in zip(self.base.param_groups, groups, strict=True):
            shared.update({k: group[k] for k in group if k != "params"})
        for p, state in iterates.items():
            self.base.state[p].update(state)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "momentum", "warmup_steps")
        return super().__getstate__() | {name: getattr(self, name) for name in names}


class ScheduleFreeWrapperReference(Reference, ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` with x, y and z all stored."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Any,
    ) -> None:
        # The order of the arguments is that of Meta's class of this name.
        super().__init__(
            base, weight_decay_at_y, momentum, weight_lr_power, r, **options
        )


def _of_keys(
    state_dict: Mapping[str, Any], belongs: Callable[[str], bool]
) -> dict[str, Any]:
    """The state dict with these keys alone in the states of its parameters."""
    parts = {
        index: {key: value for key, value in state.items() if belongs(key)}
        for index, state in state_dict["state"].items()
    }
    # Many bases make their state where a parameter has none at all.
    return {**state_dict, "state": {i: part for i, part in parts.items() if part}}


class ScheduleFreeWrapperClosure(Closure, ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` for ``step(closure)``, without modes to switch.

    A base that calls its closure, as LBFGS does, calls it at the y of the z that it has
    come to.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> base = torch.optim.RMSprop([w], lr=0.05)
      >>> optimizer = sf_torch.ScheduleFreeWrapperClosure(base)
      >>> def closure():
      ...     optimizer.zero_grad()
      ...     loss = w.square().sum()  # at y
      ...     loss.backward()
      ...     return loss
      >>> for _ in range(400):
      ...     loss = optimizer.step(closure)
      >>> bool(w.norm() < 0.2)  # x
      True
    """


def _held(p: Tensor) -> Tensor:
    """The parameter's value, which :func:`_hold` of another value leaves unchanged."""
    return p.data if local(p) is p else p.detach().clone()


def _hold(p: Tensor, value: Tensor) -> None:
    """Puts a value of any dtype into the parameter; its gradient takes that dtype."""
    if local(p) is not p:
        # A distributed tensor is a shell: what counts lies in its local part.
        if p.dtype != value.dtype:
            raise RuntimeError(
                f"a sharded parameter of {p.dtype} cannot stand for z in {value.dtype} "
                "while the base steps. Shard float32 parameters with a "
                "MixedPrecisionPolicy."
            )
        p.detach().copy_(value)
        return
    if p.dtype == value.dtype:
        p.data = value
        return
    grad, p.grad = p.grad, None
    p.data = value
    p.grad = None if grad is None else grad.to(value.dtype)


def _dtype_for_base(p: Tensor, z: Tensor) -> torch.dtype:
    """The dtype of z while the base steps, and so of the state that the base makes."""
    return wide_dtype(p.dtype, z.dtype)


def _widen_state(state: dict[str, Any], p: Tensor) -> None:
    """Gives the base's state the dtype in which the base steps.

    What a base makes when it is built has the parameter's dtype, and what comes from an
    older checkpoint may have z's.
    """
    dtype = _dtype_for_base(p, state["z"])
    for key, value in state.items():
        if (
            key not in ITERATES
            and isinstance(value, Tensor)
            and value.shape == p.shape
            and value.dim()
            and value.dtype in (p.dtype, state["z"].dtype)
        ):
            state[key] = value.to(dtype)
