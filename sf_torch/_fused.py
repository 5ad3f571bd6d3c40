"""The whole step in one launch: a Triton kernel over all tensors of a group.

A step at the speed of memory reads each array once and writes it once. The kernel
finds the arrays of every parameter through a table of addresses, so that thousands of
small tensors cost one launch, and reads the numbers of the step from memory, so that
nothing is compiled anew as they change. The formulas are those of
:mod:`sf_torch._kernels`; arithmetic is in float32.

Parameters that share device, dtypes and the kinds of their state share a launch. What
the launches need is kept in a :class:`Plan` for as long as nothing moves in memory: to
look at each of thousands of small tensors takes longer than the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from operator import attrgetter, is_, not_
from typing import Any

import torch
from torch import Tensor

from sf_torch._averaging import Group
from sf_torch._kernels import BaseStep, Scalars, lean_coefficients
from sf_torch._launch import ROWS, Launch, is_capturing, launches_over, on_device
from sf_torch._leaves import MISSED, Leaf, local, same_device, same_layout

try:
    import triton

    from sf_torch._triton import TYPES, step_kernel, switch_kernel
except ImportError:  # PyTorch's builds for CPUs come without it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def works_on(device: torch.device) -> bool:
    """Whether the kernel runs there: CUDA, or Triton's interpreter on the CPU."""
    if triton is None:
        return False
    return device.type == "cuda" or (
        device.type == "cpu" and triton.knobs.runtime.interpret
    )


def takes(leaf: Leaf) -> bool:
    """Whether the kernel can move this leaf: dtypes that it knows, in one layout."""
    tensors = [leaf.param, *leaf.state.values()]
    return (
        works_on(leaf.param.device)
        and leaf.param.dtype in DTYPES
        and leaf.grad.dtype in DTYPES
        and all(t.dtype == torch.float32 for t in leaf.state.values())
        and same_device(tensors)
        and same_layout(tensors)
    )


def check(group: Group) -> None:
    """Refuses ``fused`` and ``capturable`` where they cannot work."""
    if not (group["fused"] or group["capturable"]):
        return
    option = "fused" if group["fused"] else "capturable"
    if group["foreach"] or (group["capturable"] and group["fused"] is False):
        raise ValueError(
            f"{option}=True does not go with foreach={group['foreach']}, "
            f"fused={group['fused']}. Leave the latter two out."
        )
    for p in [p for p in group["params"] if p.requires_grad]:
        if not works_on(p.device) or p.dtype not in DTYPES:
            raise ValueError(
                f"{option}=True needs parameters in float32, bfloat16 or float16 on "
                f"CUDA, and Triton; got {p.dtype} on {p.device}. Leave it out."
            )


def refuse_others(leaves: Sequence[Leaf]) -> None:
    """With ``capturable`` there is no other way to step."""
    if leaves:
        raise RuntimeError(
            f"capturable=True needs dense parameters and float32 state, got a "
            f"parameter of strides {leaves[0].param.stride()}. Make it contiguous, or "
            "leave capturable out."
        )


class Plan:
    """The launches that step some parameters, now and in steps to come.

    Args:
      params: those that have a gradient.
      leaves: theirs; the kernel must take them all.
      options: of their group: what else decides which arrays they have.
    """

    def __init__(
        self, params: Sequence[Tensor], leaves: Sequence[Leaf], options: Any
    ) -> None:
        grads = [_in_layout_of(leaf.param, leaf.grad) for leaf in leaves]
        arrays = [{"param": leaf.param, **leaf.state} for leaf in leaves]
        self.launches = launches_over(arrays, grads)
        self.params, self.options = params, options
        self.rows = tuple(leaves[0].state)
        self.copies = [
            copy
            for copy, leaf in zip(grads, leaves, strict=True)
            if copy is not leaf.grad
        ]
        # For one step only, where the kernel sees a copy.
        self.lasts = not self.copies and all(
            tuple(leaf.state) == self.rows for leaf in leaves
        )
        self.sharded = any(local(p) is not p for p in params)
        if self.lasts:
            self.addresses = [_addresses([a[r] for a in arrays]) for r in arrays[0]]
            self.grads = _addresses(grads)
            self.kinds = _kinds(grads)

    def renew(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[Tensor, Any],
        options: Any,
    ) -> bool:
        """Takes up the gradients of one more step; whether it is good for that."""
        if (
            options != self.options
            or len(params) != len(self.params)
            or not all(map(is_, params, self.params))
        ):
            return False
        states = [state[p] for p in params]
        if any(len(s) - (MISSED in s) != len(self.rows) for s in states):
            return False
        try:
            tensors = [params, *([s[row] for s in states] for row in self.rows)]
        except KeyError:
            return False
        if self.sharded:
            tensors = [list(map(local, row)) for row in tensors]
            grads = list(map(local, grads))
        if [_addresses(row) for row in tensors] != self.addresses:
            return False
        if _kinds(grads) != self.kinds:
            return False
        before, self.grads = self.grads, _addresses(grads)
        return self.grads == before or all(
            launch.take_up(self.grads) for launch in self.launches
        )

    def captured(self) -> list[Launch]:
        """Its launches as they are, if a CUDA graph is being made of them."""
        return [replace(x) for x in self.launches if is_capturing(x.table)]

    def step(self, base: BaseStep, scalars: Scalars) -> None:
        """Moves y, z, x and the moments of all in place."""
        numbers: dict[torch.device, Tensor] = {}
        for launch in self.launches:
            device = launch.table.device
            if device not in numbers:
                numbers[device] = numbers_of(base, scalars, device)
            launch.run(
                step_kernel,
                launch.table,
                launch.grads,
                launch.blocks,
                numbers[device],
                len(launch.members),
                *(launch.rows.index(r) if r in launch.rows else -1 for r in ROWS),
                SIZE_ROW=len(launch.rows),
                PARAM=TYPES[launch.param],
                GRAD=TYPES[launch.grad],
                MASTER=launch.master,
                DECAY_AT=_decay_at(base),
            )


def _kinds(grads: Sequence[Tensor]) -> list[Any]:
    """Dtypes, and strides where they say more than that all are contiguous."""
    dtypes = list(map(attrgetter("dtype"), grads))
    if all(map(Tensor.is_contiguous, grads)):
        return dtypes
    return [*dtypes, *map(Tensor.stride, grads)]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    if same_layout([grad, param]):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def switch(
    lean: Sequence[Sequence[Tensor]], b1: float, to_x: bool
) -> list[Sequence[Tensor]]:
    """Exchanges y for x in each (param, z, kept y), or x for y.

    Returns those that the kernel cannot take.
    """
    taken = [_switches(tensors) for tensors in lean]
    arrays = [
        dict(zip(("param", "z", "y"), tensors, strict=True))
        for tensors in compress(lean, taken)
    ]
    for launch in launches_over(arrays):
        launch.run(
            switch_kernel,
            launch.table,
            launch.blocks,
            len(launch.members),
            1 - 1 / b1,
            1 - b1,
            TO_X=to_x,
        )
    return list(compress(lean, map(not_, taken)))


def _switches(tensors: Sequence[Tensor]) -> bool:
    return (
        works_on(tensors[0].device)
        and all(t.dtype == torch.float32 for t in tensors)
        and same_device(tensors)
        and same_layout(tensors)
    )


def _decay_at(base: BaseStep) -> str:
    weight_decay = base.weight_decay
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    return base.decay_at if decays else ""


def numbers_of(base: BaseStep, scalars: Scalars, device: torch.device) -> Tensor:
    """What the kernel reads by position; in float64, which no step size overflows."""
    to_z, to_step = lean_coefficients(scalars)
    b2 = 0.0 if base.b2 is None else base.b2
    numbers = [
        base.lr,
        base.weight_decay,
        1 - b2,
        base.correction,
        base.positive_eps(),
        base.divides,
        1 - base.inner_momentum,
        base.momentum_correction,
        to_z,
        to_step,
        scalars.ckp1,
        1 - scalars.b1,
        1 - scalars.next_b1,
        1 - 1 / scalars.b1 if scalars.b1 else 0.0,
    ]
    if any(isinstance(number, Tensor) for number in numbers):
        # Filled there: a CUDA graph takes no copies from the host.
        return torch.stack(
            [
                n.to(device, torch.float64)
                if isinstance(n, Tensor)
                else torch.full((), n, dtype=torch.float64, device=device)
                for n in numbers
            ]
        )
    return on_device(torch.tensor(numbers, dtype=torch.float64), device)
