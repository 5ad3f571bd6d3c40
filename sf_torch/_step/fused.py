"""The whole step in one launch: a Triton kernel over all tensors that are alike.

A step at the speed of memory reads each array once and writes it once. The kernel
finds the arrays of every parameter through a table of addresses, so that thousands of
small tensors cost one launch, and reads the numbers of the step from memory, so that
nothing is compiled anew as they change. Arithmetic is in float32.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sf_torch._step.batches import Leaf, Piece, is_master, same_layout
from sf_torch._step.formula import sums
from sf_torch._step.numbers import Numbers

try:
    import triton

    from sf_torch._step.triton_kernels import TYPES, step_kernel
except ImportError:  # PyTorch's builds for CPUs come without it
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = ("param", "z", "x", "y", "exp_avg_sq", "exp_avg")  # of the table, and the sizes
BLOCK = 1024  # elements that one program moves
GRAPHS = 8  # that may be made of steps one after the other


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
        and same_layout([param, *state])
    )


def is_aligned(leaf: Leaf, grad: Tensor) -> bool:
    """Whether 16 bytes of each array may move at once."""
    starts = [tensor.data_ptr() for tensor in (*leaf.values(), grad)]
    return all(n % 16 == 0 for n in (*starts, grad.numel()))


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
    """Executor: one launch over parameters that are alike.

    The table of addresses is made once: to look at each of thousands of small tensors
    takes longer than their step. Only the gradients may lie elsewhere at every step.

    Args:
      pieces: whole parameters of one device and the same dtypes, aligned alike.
      grads: of all parameters.
    """

    def __init__(self, pieces: Sequence[Piece], grads: Sequence[Tensor]) -> None:
        self.pieces = pieces
        leaves = [piece.leaf for piece in pieces]
        param = leaves[0]["param"]
        self.device, self.param = param.device, param.dtype
        self.master = is_master(leaves[0]["z"], param)
        self.rows = [row for row in ROWS if row in leaves[0]]
        sizes = [leaf["param"].numel() for leaf in leaves]
        addresses = [leaf[row].data_ptr() for row in self.rows for leaf in leaves]
        self.table = self._there(_integers(addresses + sizes))
        self.blocks = self._there(torch.from_numpy(_blocks(sizes)))
        self.is_aligned = is_aligned(leaves[0], pieces[0].of(grads))
        self.addresses: list[int] = []
        # On the host: for addresses that CUDA graphs are to have, and those they have.
        self.staging: list[Tensor] = []
        self.staged: list[Tensor] = []
        self._stock()

    def step(self, n: Numbers, grads: Sequence[Tensor]) -> None:
        mine = [piece.of(grads) for piece in self.pieces]
        addresses = list(map(Tensor.data_ptr, mine))
        if addresses != self.addresses:
            self._take_up(addresses)
        self._launch(
            self.table,
            self.grads,
            self.blocks,
            n.as_tensor(self.device),
            len(mine),
            *(self.rows.index(row) if row in self.rows else -1 for row in ROWS),
            SIZE_ROW=len(self.rows),
            PARAM=TYPES[self.param],
            GRAD=TYPES[mine[0].dtype],
            MASTER=self.master,
            DECAY_AT=n.decay_at,
            DECAY_MOVES_X=n.decay_moves_x,
            ALIGNED=self.is_aligned and all(at % 16 == 0 for at in addresses),
        )

    def _launch(self, *arguments: Any, **constants: Any) -> None:
        """Runs the kernel with a program for each block."""
        on_gpu = self.device.type == "cuda"
        # Triton launches on the current device.
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            step_kernel[(len(self.blocks) // 2,)](
                *arguments,
                **constants,
                BLOCK=BLOCK,
                enable_fp_fusion=True,  # as in PyTorch's own kernels
            )

    def sums(
        self, grads: Sequence[Tensor], beta: float, b1: float
    ) -> list[tuple[int, Tensor]]:
        """The sums of each parameter, with its number."""
        return [(i, sums(leaf, grads[i], beta, b1)) for i, _, leaf in self.pieces]

    def captured(self) -> list[Tensor]:
        """What a CUDA graph reads of it, if one is being made."""
        if not self._is_capturing():
            return []
        return [self.table, self.grads, self.blocks, *self.staged]

    def _take_up(self, addresses: list[int]) -> None:
        """Takes new addresses of gradients."""
        there = _integers(addresses)
        if self._is_capturing():
            # From memory of the graph's own, which it copies whenever it is replayed;
            # while it is made, there is none to be had.
            if not self.staging:
                raise RuntimeError(
                    f"{GRAPHS} CUDA graphs were made of steps with gradients in other "
                    "memory, and none was taken in between. Take one step that no "
                    "graph is made of."
                )
            self.staged.append(self.staging.pop().copy_(there))
            self.grads = self.staged[-1].to(self.device, non_blocking=True)
            self.addresses = []  # on the device they are only once the graph has run
        else:
            self.grads = self._there(there)
            self.addresses = addresses
            self._stock()

    def _stock(self) -> None:
        """Host memory for as many graphs as may follow one another."""
        if len(self.staging) < GRAPHS:
            size, pinned = (GRAPHS, len(self.pieces)), self.device.type == "cuda"
            memory = torch.empty(size, dtype=torch.int64, pin_memory=pinned)
            self.staging = list(memory.unbind())

    def _there(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for the copy."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _is_capturing(self) -> bool:
        return self.table.is_cuda and torch.cuda.is_current_stream_capturing()


def _blocks(sizes: Sequence[int]) -> np.ndarray:
    """For each block the number of its tensor and where it starts there, in one row."""
    counts = -(-np.array(sizes) // BLOCK)
    which = np.repeat(np.arange(len(sizes)), counts)
    before = np.cumsum(counts) - counts
    start = (np.arange(len(which)) - before[which]) * BLOCK
    return np.stack([which, start], 1).reshape(-1)


def _integers(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))
