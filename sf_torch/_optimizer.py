"""One step: of every Schedule-Free optimizer, from the gradients at y to the next y.

An optimizer is a choice for four seams, each a method: the base step
(:meth:`ScheduleFree._base_numbers`), the step size (:meth:`ScheduleFree._step_size`),
the averaging weight (:meth:`ScheduleFree._weight`) and the interpolation
(:meth:`ScheduleFree._beta`). Each sees the group's counters in a draft, which becomes
the group's own when all arrays have moved. What the arrays are, and which of them the
parameters hold, is in :mod:`sf_torch._iterates`.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sf_torch import _checks, _loaded
from sf_torch._iterates import Iterates
from sf_torch._step import formula
from sf_torch._step.batches import MISSED, Leaf, local, of_all_shards
from sf_torch._step.dispatch import Plan, Way
from sf_torch._step.finite import not_finite
from sf_torch._step.numbers import Numbers
from sf_torch._step.rows import Scratch
from sf_torch._step.schedule import (
    Group,
    enter_counters,
    has_begun,
    number,
    polynomial_weight,
    to_device,
    warmed_up,
)

Part = tuple[Any, Plan, list[Tensor]]
"""Parameters of a group: the steps they missed, their plan and their gradients."""

COMPILED = "an exception in compiled code"


class ScheduleFree(Iterates):
    """The base of the optimizers here; not an optimizer by itself."""

    # The seams, beside the interpolation _beta of the class above

    def _step_size(self, group: Group) -> float:
        """``lr_k``, which the base step and the averaging weight both see."""
        lr = number(group["lr"], keep_tensor=self._way(group).captures)
        return warmed_up(lr, group["k"], group.get("warmup_steps", 0))

    def _weight(self, group: Group, lr: float) -> float:
        """``c_k``: how much of z' enters x."""
        return polynomial_weight(group, lr, group["r"], group["weight_lr_power"])

    def _betas(self, group: Group, draft: Group, ckp1: float) -> tuple[float, float]:
        """The β with which y gives x, and that of the next y."""
        return group["b1"], self._beta(draft)

    def _base_numbers(self, group: Group, lr: float, k: Any) -> Numbers:
        """How z moves, after k steps of the parameter's own."""
        raise NotImplementedError

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
            Or after a step that has failed half-way: it names the exception.
          ValueError: a parameter of integers has a gradient; nothing has moved then.
        """
        if closure is None and self._is_asked_for_state():
            self._make_state()
            return None
        self._check_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if not self._skips():
            self._take(loss, closure)
        return loss

    # These are kept from torch.compile: they read or write what each step changes, and
    # it would compile anew for every value.

    @torch.compiler.disable
    def _check_mode(self) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "step() needs train mode: in eval mode the parameters hold x, and "
                "gradients belong to y. Call optimizer.train() before the forward "
                "pass."
            )
        self._settle(_loaded.check)
        for group in self.param_groups:
            if not has_begun(group):
                # A state that was made to be looked at. Weights may have come since.
                for p in group["params"]:
                    if "z" in self.state.get(p, ()):
                        del self.state[p]

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

    # Of a capturable optimizer: whether this step moves nothing, known to the device.
    _skip: Tensor | None = None

    @torch.compiler.disable
    def _skips(self) -> bool:
        """Whether gradients are not finite where ``skip_nonfinite`` says to look."""
        self._skip = None
        groups = self.param_groups
        looked_at = [group for group in groups if group["skip_nonfinite"]]
        if not looked_at:
            return False
        skip = not_finite([p.grad for g in looked_at for p in g["params"]])
        # A change of β is made by the host, which therefore has to know.
        if all(self._way(g).captures and self._beta(g) == g["b1"] for g in groups):
            self._skip = skip
            return False
        return bool(skip)

    @torch.compiler.disable(recursive=False)
    def _take(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        """Catches what compiled code raises, which itself could not."""
        try:
            self._advance(loss, closure)
        except BaseException as error:
            if self._spoiled == COMPILED:
                of_compiler = isinstance(error, torch._dynamo.exc.TorchDynamoException)
                # What is not compiled has not run.
                self._spoiled = (
                    None if of_compiler else f"{type(error).__name__}: {error}"
                )
            raise

    def _advance(self, loss: Any, closure: Callable[[], Any] | None) -> None:
        compiles = torch.compiler.is_compiling()
        compiled = self._prepare(loss, compiles)
        if compiles:
            for leaves, packed, kind in compiled:
                numbers = kind.unpacked(packed)
                for leaf, grad in leaves:
                    formula.step(leaf, grad, numbers)
        self._finish()

    # For each group its draft, the plans of its parameters and what ends the step of
    # each. Kept here between the two methods: compiled code looks at all that it is
    # handed, at every step.
    _steps: list[tuple[Group, Group, list[Any]]]

    @torch.compiler.disable
    def _prepare(self, loss: Any, compiles: bool) -> list[Any]:
        """Looks at all that a step takes, before anything moves.

        Returns:
          For those parameters that a compiler is to have: leaves with gradients, and
          their numbers, packed, with those that do not change.
        """
        former = self.__dict__.get("_plans", {})
        self._plans: dict[Any, Plan] = {}
        drafts = [dict(group) for group in self.param_groups]
        ways = [self._way(g)._replace(sliced=not compiles) for g in self.param_groups]
        parts = [
            self._planned(group, way, former)
            for group, way in zip(self.param_groups, ways, strict=True)
        ]
        self._measure(loss, drafts, parts)
        self._steps, compiled = [], []
        looked_at = zip(self.param_groups, ways, drafts, parts, strict=True)
        for group, way, draft, mine in looked_at:
            if way.captures:
                to_device(draft, group["params"][0].device)
            lr = draft["scheduled_lr"] = self._step_size(draft)
            ckp1 = self._weight(draft, lr)
            b1, next_b1 = self._betas(group, draft, ckp1)
            planned = []
            for missed, plan, grads in mine:
                numbers = self._base_numbers(draft, lr, draft["k"] - missed)
                numbers = numbers.averaged(ckp1, b1, next_b1)
                if self._skip is not None:
                    numbers = numbers._replace(skip=self._skip)
                if way.seed is not None:
                    numbers = numbers._replace(step=int(draft["k"]))
                # Random rounding needs each parameter's place, and v that is rounded
                # in place would not be: compilers leave out such pairs of conversions.
                eager = way.fuses or way.seed is not None or numbers.v_in_place
                if compiles and not eager:
                    packed = numbers.as_tensor(plan.leaves[0]["param"].device)
                    compiled.append((plan.to_compile(grads), packed, numbers.kind()))
                    finish = plan.finish
                else:
                    finish = partial(plan.step, numbers, grads)
                planned.append((plan, finish))
            draft["b1"], draft["k"] = next_b1, draft["k"] + 1
            self._steps.append((group, draft, planned))
        if compiled:  # which moves before _finish does
            self._spoiled = COMPILED
        return compiled

    def _measure(self, loss: Any, drafts: list[Group], parts: list[list[Part]]) -> None:
        """Enters into the drafts what the step takes from all groups together."""

    @torch.compiler.disable
    def _finish(self) -> None:
        """Moves what no compiler has moved, and makes the drafts the groups' own."""
        steps, self._steps = self._steps, []
        with self._moving():
            for group, draft, planned in steps:
                for plan, finish in planned:
                    finish()
                    # What a CUDA graph of the step reads whenever it is replayed.
                    self.__dict__.setdefault("_captured", []).extend(plan.captured())
                stay = [p for p in group["params"] if p.grad is None]
                for p, _ in self._moved(group, stay):
                    self._stay(p, group, draft)
                enter_counters(group, draft, self._skip)

    def _planned(self, group: Group, way: Way, former: dict[Any, Plan]) -> list[Part]:
        """The parameters of a group that have gradients, with plans of their step."""
        planned = []
        for missed, params in self._parts(group):
            grads = [p.grad for p in params if p.grad is not None]
            key = id(group), missed
            plan = self._plan(former.get(key), group, way, params, grads)
            if plan.lasts:
                self._plans[key] = plan
            planned.append((missed, plan, grads))
        return planned

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
            places = [] if way.seed is None else self._places(params)
            plan = Plan(params, grads, leaves, way, kind, scratch, places)
        return plan

    def _places(self, params: list[Tensor]) -> list[int]:
        """The places of parameters in the order of the groups."""
        everything = [p for group in self.param_groups for p in group["params"]]
        places = {id(p): place for place, p in enumerate(everything)}
        return [places[id(p)] for p in params]

    def _leaf(self, p: Tensor, group: Group) -> Leaf:
        state = self._state_of(p, group)
        arrays = {k: local(state[k]) for k in self._arrays(group) if k in state}
        return {"param": local(p.detach()), **arrays}

    # State before any step

    @torch.compiler.disable
    def _is_asked_for_state(self) -> bool:
        """Whether the step is one by which others look at the state of a fresh run.

        ``torch.distributed.checkpoint`` does so, to see what it is to load: with lr and
        all gradients 0, and in whichever mode. Such a step is not counted.
        """
        if any(self.state.values()):
            return False
        given = []
        for group in self.param_groups:
            lr = group["lr"]
            on_host = not isinstance(lr, Tensor) or lr.is_cpu
            if has_begun(group) or not on_host or float(lr) != 0:
                return False
            given += [p.grad for p in group["params"] if p.grad is not None]
        return bool(given) and not any(
            grad.is_sparse or bool(of_all_shards(grad.abs().sum())) for grad in given
        )

    @torch.compiler.disable
    def _make_state(self) -> None:
        """The state of every parameter with a gradient, with all that a saved one has.

        The first step makes it anew.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p, group)
                if "x" not in state:
                    state["y"] = p.detach().clone()

    # Parameters without a gradient

    def _parts(self, group: Group) -> list[tuple[Any, list[Tensor]]]:
        """The parameters with a gradient, a list for each number of missed steps."""
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
            missed += 1 if self._skip is None else ~self._skip
            state[MISSED] = missed
        next_b1 = draft["b1"]
        if next_b1 != group["b1"]:
            state = self._state_of(p, group)
            y = formula.recover_y(self._x(p, group), state["z"], next_b1)
            for kept in (p, state.get("y")):
                if kept is not None:
                    kept.copy_(y)


def bookkeeping(
    store_x: bool,
    state_dtype: torch.dtype | None,
    fused: bool | None = None,
    capturable: bool = False,
    rounding: str | None = None,
    seed: int = 0,
    skip_nonfinite: bool = False,
) -> Group:
    """The entries of a group that are not options of the algorithm.

    Without ``rounding`` the optimizer has no such option, and rounds to nearest.
    """
    at_random = {} if rounding is None else {"rounding": rounding, "seed": seed}
    return at_random | {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
        "train_mode": False,
        "store_x": store_x,
        "state_dtype": state_dtype,
        "fused": fused,
        "capturable": capturable,
        "skip_nonfinite": skip_nonfinite,
    }
