"""The whole step in one launch: a Triton kernel over all tensors of a group.

A step at the speed of memory reads each array once and writes it once. The kernel
finds the arrays of every parameter through a table of addresses, so that thousands of
small tensors cost one launch, and reads the numbers of the step from memory, so that
nothing is compiled anew as they change. Arithmetic is in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import Leaf, same_device, same_layout
from sf_torch._step.formula import Plain
from sf_torch._step.launch import ROWS, Launch, is_capturing, launches_over
from sf_torch._step.numbers import Numbers

try:
    import triton

    from sf_torch._step.triton_kernels import TYPES, step_kernel
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


def takes(leaf: Leaf, grad: Tensor) -> bool:
    """Whether the kernel can move this leaf: dtypes that it knows, in one layout."""
    param = leaf["param"]
    state = [tensor for row, tensor in leaf.items() if row != "param"]
    return (
        works_on(param.device)
        and param.dtype in DTYPES
        and grad.dtype in DTYPES
        and all(t.dtype == torch.float32 for t in state)
        and same_device([param, *state, grad])
        and same_layout([param, *state])
    )


def check(group: Mapping[str, Any]) -> None:
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


class Kernel:
    """Executor: the launches over some parameters.

    The tables of addresses are made once: to look at each of thousands of small tensors
    takes longer than their step. Only the gradients may lie elsewhere at every step.

    Args:
      leaves: by the number that each parameter goes by; the kernel takes them all.
      grads: of all parameters.
    """

    def __init__(self, leaves: Mapping[int, Leaf], grads: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self.launches: list[Launch] = []
        self.addresses: list[int] = []
        self._prepare(self._in_layout(grads))

    def _in_layout(self, grads: Sequence[Tensor]) -> list[Tensor]:
        return [
            _in_layout_of(leaf["param"], grads[i]) for i, leaf in self.leaves.items()
        ]

    def _prepare(self, grads: Sequence[Tensor]) -> None:
        self.addresses = [grad.data_ptr() for grad in grads]
        self.launches = launches_over(list(self.leaves.values()), grads)

    def step(self, n: Numbers, grads: Sequence[Tensor]) -> None:
        grads = self._in_layout(grads)
        addresses = [grad.data_ptr() for grad in grads]
        if addresses != self.addresses:
            if all(launch.take_up(addresses) for launch in self.launches):
                self.addresses = addresses
            else:
                self._prepare(grads)
        numbers: dict[torch.device, Tensor] = {}
        for launch in self.launches:
            device = launch.table.device
            if device not in numbers:
                numbers[device] = n.as_tensor(device)
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
                DECAY_AT=n.decay_at,
                DECAY_MOVES_X=n.decay_moves_x,
            )

    def sums(
        self, grads: Sequence[Tensor], beta: float, b1: float
    ) -> list[tuple[int, Tensor]]:
        return Plain(self.leaves).sums(grads, beta, b1)

    def captured(self) -> list[Launch]:
        """Its launches as they are, if a CUDA graph is being made of them."""
        return [replace(x) for x in self.launches if is_capturing(x.table)]


def _in_layout_of(param: Tensor, grad: Tensor) -> Tensor:
    if same_layout([grad, param]):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
