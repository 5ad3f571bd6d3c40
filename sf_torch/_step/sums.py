"""Sums over gradients and state, from which ScheduleFree+ finds its step size.

On a CPU they are taken block by block in memory that is kept, as the step is: the
intermediate results then stay in the cache, and no fresh memory is asked for.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import (
    Leaf,
    Piece,
    arithmetic_dtype,
    batched,
    flat,
    in_blocks,
    same_layout,
)
from sf_torch._step.eager import Scratch, Tensors


class Sums:
    """Sums over some parameters that have gradients.

    Args:
      params: the parameters.
      grads: their gradients, on this process.
      leaves: the arrays of each, on this process.
      scratch: of the optimizer.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Tensors,
        leaves: Sequence[Leaf],
        scratch: Scratch,
    ) -> None:
        self.lists: list[tuple[Any, _List]] = []
        dense: dict[Any, list[tuple[int, Leaf]]] = {}
        for i, (p, leaf) in enumerate(zip(params, leaves, strict=True)):
            if same_layout([*leaf.values(), grads[i]]):
                dense.setdefault(_place(p), []).append((i, leaf))
            else:
                part = _List([Piece(i, None, leaf)], False, scratch)
                self.lists.append((_place(p), part))
        for place, members in dense.items():
            # On other devices the memory of a single parameter is enough to ask for.
            together = in_blocks(members[0][1]["z"])
            for pieces in batched(members, together):
                self.lists.append((place, _List(pieces, True, scratch)))

    def rows(
        self, grads: Tensors, beta: float, b1: float, squares: bool
    ) -> list[tuple[Any, Tensor]]:
        """Rows that add up to the sums over all the parameters.

        Args:
          grads: the gradients, on this process.
          beta: the β of the step.
          b1: the β that formed y.
          squares: whether Σ|g|² is asked for.

        Returns:
          Each row with its place: a device, or the mesh and the placements of the
          distributed tensors that it is a part of. A row is β Σ g·(z - x), Σ|g| and,
          if asked for, Σ|g|², on the device.
        """
        return [
            (place, part.row(grads, beta, b1, squares)) for place, part in self.lists
        ]


def _place(p: Tensor) -> Any:
    mesh = getattr(p, "device_mesh", None)
    return p.device if mesh is None else (mesh, getattr(p, "placements", ()))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Re Σ ā b. Some devices count the elements of a product in 32 bits."""
    parts = zip(a.split(2**30), b.split(2**30), strict=True)
    return reduce(torch.add, [torch.vdot(*part).real for part in parts])


class _List:
    """Parameters of one device and the same dtypes, whose sums are taken together."""

    def __init__(self, pieces: Sequence[Piece], dense: bool, scratch: Scratch) -> None:
        self.pieces, self.scratch = pieces, scratch
        self.zs = [piece.leaf["z"] for piece in pieces]
        self.xs = [piece.leaf["x"] for piece in pieces if "x" in piece.leaf]
        self.ys = [piece.leaf["param"] for piece in pieces]
        self.dtype = arithmetic_dtype(pieces[0].leaf)
        self.copies = not dense or len(pieces) > 1
        self._kept: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def row(self, grads: Tensors, beta: float, b1: float, squares: bool) -> Tensor:
        way, parts = self._memory("direction")
        # Where x is not stored: z - y = b1 (z - x).
        for z, other, part in zip(self.zs, self.xs or self.ys, parts, strict=True):
            torch.sub(z, other, out=part)
        g = self._in_a_row([piece.of(grads) for piece in self.pieces])
        inner = (beta if self.xs else beta / b1) * _dot(g, way)
        row = [inner, torch.abs(g, out=way.real).sum()]
        if squares:
            row.append(torch.mul(g, g.conj(), out=way).real.sum())
        return torch.stack(row)

    def _in_a_row(self, grads: list[Tensor]) -> Tensor:
        if not self.copies and grads[0].dtype == self.dtype:
            return flat(grads[0])
        row, parts = self._memory("gradient")
        torch._foreach_copy_(parts, grads)
        return row

    def _memory(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Scratch memory in a row, and its parts in the layouts of z."""
        if name in self._kept:
            return self._kept[name]
        sizes = [z.numel() for z in self.zs]
        like = self.zs[0].new_empty(0, dtype=self.dtype)
        row = self.scratch.memory(like, sum(sizes), name)
        parts = [
            part.as_strided(z.shape, z.stride())
            if same_layout([z])
            else part.view(z.shape)
            for part, z in zip(row.split(sizes), self.zs, strict=True)
        ]
        if in_blocks(row):
            self._kept[name] = row, parts
        return row, parts
