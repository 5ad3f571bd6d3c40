"""What a kernel needs to know of the tensors that it runs over, in device memory.

Tables of addresses, so that one launch serves any number of tensors, and of blocks, one
for each program of the launch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sf_torch._step.batches import is_master

BLOCK = 1024  # elements that one program moves
ROWS = ("param", "z", "x", "y", "exp_avg_sq", "exp_avg")  # of the table


@dataclass
class Launch:
    """Parameters that are alike, and where on their device the kernel finds them."""

    members: list[int]  # their places among those it was made of
    rows: list[str]
    param: torch.dtype
    grad: torch.dtype
    master: bool
    aligned: bool
    table: Tensor  # addresses by row and member; the sizes are the last row
    grads: Tensor  # addresses
    blocks: Tensor
    staging: Tensor  # on the host, for addresses that a CUDA graph is to have

    def run(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Runs a kernel with a program for each block."""
        on_gpu = self.table.is_cuda
        # Triton launches on the current device.
        with torch.cuda.device(self.table.device) if on_gpu else nullcontext():
            kernel[(len(self.blocks) // 2,)](
                *arguments,
                **constants,
                ALIGNED=self.aligned,
                BLOCK=BLOCK,
                enable_fp_fusion=True,  # as in PyTorch's own kernels
            )

    def take_up(self, grads: Sequence[int]) -> bool:
        """Takes new addresses of gradients; False if they need another kernel."""
        mine = [grads[i] for i in self.members]
        if self.aligned and any(address % 16 for address in mine):
            return False
        addresses = _integers(mine)
        if is_capturing(self.table):
            # From memory that stays: the graph copies it whenever it is replayed, and
            # while it is made, there is none to be had.
            self.staging.copy_(addresses)
            self.grads = self.staging.to(self.table.device, non_blocking=True)
        else:
            self.grads = on_device(addresses, self.table.device)
        return True


def launches_over(
    arrays: Sequence[dict[str, Tensor]], grads: Sequence[Tensor]
) -> list[Launch]:
    """Launches over parameters, each given as its arrays by row name.

    Args:
      arrays: of each parameter.
      grads: of each parameter.
    """
    batches: dict[Any, list[int]] = {}
    for i, each in enumerate(arrays):
        param = each["param"]
        if param.numel():
            tensors = [*each.values(), grads[i]]
            starts = [t.data_ptr() for t in tensors]
            aligned = all(n % 16 == 0 for n in (*starts, param.numel()))
            alike = (aligned, param.device, *each, *(t.dtype for t in tensors))
            batches.setdefault(alike, []).append(i)
    launches = []
    for (aligned, device, *_), members in batches.items():
        first = arrays[members[0]]
        rows = [row for row in ROWS if row in first]
        sizes = [arrays[i]["param"].numel() for i in members]
        table = [arrays[i][row].data_ptr() for row in rows for i in members]
        at = _integers([grads[i].data_ptr() for i in members])
        launches.append(
            Launch(
                members,
                rows,
                first["param"].dtype,
                grads[members[0]].dtype,
                is_master(first["z"], first["param"]),
                aligned,
                on_device(_integers(table + sizes), device),
                on_device(at, device),
                on_device(torch.from_numpy(_blocks(sizes)), device),
                at.pin_memory() if device.type == "cuda" else at,
            )
        )
    return launches


def _blocks(sizes: Sequence[int]) -> np.ndarray:
    """For each block the number of its tensor and where it starts there, in one row."""
    counts = -(-np.array(sizes) // BLOCK)
    which = np.repeat(np.arange(len(sizes)), counts)
    before = np.cumsum(counts) - counts
    start = (np.arange(len(which)) - before[which]) * BLOCK
    return np.stack([which, start], 1).reshape(-1)


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being made."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _integers(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int64))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of a tensor of the host, without waiting for the copy."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
