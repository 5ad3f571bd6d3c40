"""The step over lists of tensors, with PyTorch's own kernels.

On a CPU a list is one tensor of memory in a row, which may be that of many small
parameters, and PyTorch's one-pass optimizers do most of the step: its Adam moves z and
the moments, its SGD moves y. Elsewhere, and in float64, the ``torch._foreach``
functions do.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sf_torch._step import batches
from sf_torch._step.batches import BLOCK, Piece, arithmetic_dtype, flat, is_master
from sf_torch._step.numbers import Numbers

Tensors = list[Tensor] | tuple[Tensor, ...]

ENDLESS = torch.tensor(float("inf"))
"""The count of steps that Adam's kernel is told: at infinity it corrects no bias, which
the numbers have corrected already."""

CORRECTED_EVERY = 32
"""Steps after which v is rescaled to undo the rounding of b2 to float32."""


class Scratch:
    """Memory for the intermediate results of a step. On a CPU one block's is kept.

    There the operating system hands out fresh memory page by page, which takes longer
    than the arithmetic. On other devices PyTorch's allocator keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def memory(self, like: Tensor, size: int, name: str) -> Tensor:
        """``size`` elements, of the dtype and on the device of ``like``."""
        if not batches.in_blocks(like):
            return like.new_empty(size)
        memory = self._kept.get((name, like.dtype))
        if memory is None or memory.numel() < size:
            memory = self._kept[name, like.dtype] = like.new_empty(max(size, BLOCK))
        return memory[:size]


class Spare:
    """Scratch memory for one array of each piece.

    ``flat`` is all of it in a row, ``parts`` has a tensor for each piece, and ``rows``
    is the list that arithmetic runs over.
    """

    def __init__(self, scratch: Scratch, likes: Tensors, name: str) -> None:
        sizes = [like.numel() for like in likes]
        self.flat = scratch.memory(likes[0], sum(sizes), name)
        # In each tensor's own layout.
        self.parts = [
            part if like.dim() == 1 else part.as_strided(like.shape, like.stride())
            for part, like in zip(self.flat.split(sizes), likes, strict=True)
        ]
        self.rows = [self.flat] if batches.in_blocks(likes[0]) else self.parts


class Lists:
    """Executor: pieces that are alike, in the dtype of arithmetic.

    On a CPU the state of several pieces is moved into one memory, so that thousands of
    small parameters take their step as one tensor. Parameters and gradients stay where
    they are: they are copied there and back.

    Args:
      pieces: of one device and the same dtypes, all of whose state is in the dtype of
        arithmetic.
      scratch: of the optimizer.
    """

    def __init__(self, pieces: Sequence[Piece], scratch: Scratch) -> None:
        self.pieces, self.scratch = pieces, scratch
        self._spares: dict[str, Spare] = {}
        first = pieces[0].leaf
        parts = {row: [piece.leaf[row] for piece in pieces] for row in first}
        self.params, self.z_parts = parts.pop("param"), parts["z"]
        self.next_zs = parts.pop("next_z", None)
        self.in_a_row = batches.in_blocks(first["z"])
        # Whether the parameters are roundings of y, which x and z give.
        self.master = is_master(first["z"], first["param"])
        rows = {
            row: [joined(tensors)] if self.in_a_row else tensors
            for row, tensors in parts.items()
        }
        self.zs, self.xs, self.kept_ys = rows["z"], rows.get("x"), rows.get("y")
        self.means, self.vs = rows.get("exp_avg"), rows.get("exp_avg_sq")
        self.one_pass = self.in_a_row and first["z"].dtype == torch.float32

    def step(self, n: Numbers, grads: Tensors) -> None:
        zs, xs = self.zs, self.xs
        # What x is stored beside is looked at only where the decay asks for it.
        ys = self._ys(n) if xs is None else []
        if n.decay_moves_x:
            self._shrink(ys, n)
        old_zs = self._copy("z", zs) if xs is None else []
        if self.next_zs is not None:
            torch._foreach_copy_(self.z_parts, self.next_zs)
        else:
            grads = [piece.of(grads) for piece in self.pieces]
            self._move_z(self._rows("gradient", grads), ys, n)
        if xs is None:
            self._move_y(ys, old_zs, n)
        else:
            torch._foreach_lerp_(xs, zs, n.ckp1)
            ys = self._between(n.z_in_next_y)
        if "y" in self._spares:
            torch._foreach_copy_(self.params, self._spare("y").parts)
        if self.kept_ys is not None:
            torch._foreach_copy_(self.kept_ys, ys)
        if not self.in_a_row:
            self._spares.clear()

    def sums(self, grads: Tensors, beta: float, b1: float) -> list[tuple[int, Tensor]]:
        """Rows as of ``formula.sums``, each with the number of a parameter in it."""
        given = self._rows("gradient", [piece.of(grads) for piece in self.pieces])
        others = self.xs or self._rows("y", self.params)
        ways, rows = self._spare("direction").rows, []
        for g, z, other, way in zip(given, self.zs, others, ways, strict=True):
            inner = torch.sub(z, other, out=way).mul_(g).sum()
            inner = (beta if self.xs else beta / b1) * inner
            row = torch.stack([inner, torch.abs(g, out=way).sum()])
            rows.append((self.pieces[0].member, row))
        if not self.in_a_row:
            self._spares.clear()
        return rows

    def _move_z(self, grads: Tensors, ys: Tensors, n: Numbers) -> None:
        """z and the moments."""
        at = None
        if n.decay_at and not n.decay_moves_x:
            at = self._at(ys, n)
        if self.vs is not None and self.one_pass and n.root:
            self._fused_adam(grads, at, n)
            return
        directions, lr = grads, n.lr
        if self.means is not None:
            torch._foreach_lerp_(self.means, grads, n.m_weight)
            directions = self.means
        if self.vs is not None:
            squares = torch._foreach_mul(grads, grads)
            torch._foreach_lerp_(self.vs, squares, n.v_weight)
            if n.root:
                roots = torch._foreach_sqrt(self.vs)
                torch._foreach_add_(roots, n.eps / n.root)
                directions, lr = torch._foreach_div(directions, roots), lr / n.root
        if at is not None and lr:
            # One sum, so that z is rounded once.
            directions = self._copy("direction", directions)
            torch._foreach_add_(directions, at, alpha=n.decay / lr)
        torch._foreach_add_(self.zs, directions, alpha=-lr)

    def _fused_adam(self, grads: Tensors, at: Tensors | None, n: Numbers) -> None:
        assert self.vs is not None
        targets, means = self.zs, self.means
        if at is not None:
            # Apart from z, so that z is rounded once, with the decay in it.
            targets = self._spare("direction").rows
            torch._foreach_zero_(targets)
            torch._foreach_add_(targets, at, alpha=-n.decay)
        if means is None:
            # The kernel writes a first moment and reads it, if only 0 times.
            means = self._spare("mean").rows
            torch._foreach_zero_(means)
        torch._fused_adam_(
            targets,
            grads,
            means,
            self.vs,
            [],
            [ENDLESS] * len(grads),
            lr=n.lr / n.root,
            beta1=1 - n.m_weight,
            beta2=n.b2,
            weight_decay=0.0,
            eps=n.eps / n.root,
            amsgrad=False,
            maximize=False,
        )
        if at is not None:
            torch._foreach_add_(self.zs, targets)
        if (n.k + 1) % CORRECTED_EVERY == 0 and _error_of(n.b2) != 1:
            torch._foreach_mul_(self.vs, _error_of(n.b2) ** CORRECTED_EVERY)

    def _move_y(self, ys: Tensors, old_zs: Tensors, n: Numbers) -> None:
        """Moves y in place, after z has moved. Overwrites ``old_zs``.

        y' = y + to_step z' + (to_z - to_step) z - to_z y
        """
        if self.one_pass and n.to_step:
            # SGD in one pass: z' as the gradient, y decaying, z as the momentum.
            momentum = (n.to_z - n.to_step) / n.to_step
            torch._fused_sgd_(
                ys,
                self.zs,
                old_zs if momentum else [],
                weight_decay=-n.to_z / n.to_step,
                momentum=momentum,
                lr=-n.to_step,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
        ways = torch._foreach_sub(self.zs, old_zs)
        torch._foreach_mul_(ways, n.to_step)
        torch._foreach_sub_(old_zs, ys)
        torch._foreach_add_(ways, old_zs, alpha=n.to_z)
        torch._foreach_add_(ys, ways)

    def _shrink(self, ys: Tensors, n: Numbers) -> None:
        """Shrinks z or y by the decay, and sets x to what the two imply."""
        if n.decay_at == "z":
            if self.xs is not None:
                torch._foreach_add_(self.xs, self.zs, alpha=-n.decay * n.z_in_x)
            torch._foreach_mul_(self.zs, 1 - n.decay)
        elif self.xs is None:
            torch._foreach_mul_(ys, 1 - n.decay)
        else:
            ys = self._between(n.z_in_y)
            torch._foreach_add_(self.xs, ys, alpha=-n.decay * (1 - n.z_in_x))

    def _at(self, ys: Tensors, n: Numbers) -> Tensors:
        """The iterate that decays: y, z or x before the step."""
        if n.decay_at == "z":
            return self.zs
        if n.decay_at == "x":
            return self.xs or torch._foreach_lerp(ys, self.zs, n.z_in_x)
        return ys or self._ys(n)

    def _ys(self, n: Numbers) -> Tensors:
        """y before the step."""
        if self.master:
            return self._between(n.z_in_y)
        return self._rows("y", self.params)

    def _between(self, z_in_y: float) -> Tensors:
        """y of the present x and z, in scratch memory."""
        assert self.xs is not None
        ys = self._copy("y", self.xs)
        torch._foreach_lerp_(ys, self.zs, z_in_y)
        return ys

    def _rows(self, name: str, tensors: Tensors) -> Tensors:
        """One tensor of each piece, as arithmetic takes them: in place if it can."""
        if tensors[0].dtype == self.zs[0].dtype:
            if not self.in_a_row:
                return tensors
            if len(tensors) == 1:
                return [flat(tensors[0])]
        spare = self._spare(name)
        torch._foreach_copy_(spare.parts, tensors)
        return spare.rows

    def _copy(self, name: str, rows: Tensors) -> Tensors:
        copy = self._spare(name).rows
        torch._foreach_copy_(copy, rows)
        return copy

    def _spare(self, name: str) -> Spare:
        if name not in self._spares:
            self._spares[name] = Spare(self.scratch, self.z_parts, name)
        return self._spares[name]


def joined(tensors: Tensors) -> Tensor:
    """The memory of dense tensors in a row. They are moved there if they lie apart."""
    first, sizes = tensors[0], [t.numel() for t in tensors]
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor, size in zip(tensors, sizes, strict=True):
        apart = tensor.untyped_storage().data_ptr() != memory
        if apart or tensor.data_ptr() != end:
            break
        end += size * tensor.itemsize
    else:
        return first.as_strided((sum(sizes),), (1,))
    row = torch.cat([flat(tensor) for tensor in tensors])
    for tensor, part in zip(tensors, row.split(sizes), strict=True):
        at = part.storage_offset()
        tensor.data = part.as_strided(tensor.shape, tensor.stride(), at)
    return row


def takes(pieces: Sequence[Piece]) -> bool:
    """Whether lists can move these: real, with all state in the dtype of arithmetic."""
    leaf = pieces[0].leaf
    dtype = arithmetic_dtype(leaf)
    state = [tensor for row, tensor in leaf.items() if row != "param"]
    return not dtype.is_complex and all(t.dtype == dtype for t in state)


@cache
def _error_of(b2: float) -> float:
    """b2 over the float32 next to it, which Adam's kernel multiplies v by.

    For b2 = 0.999 the two differ by 1.3e-8, and v by 1.3e-5 after the 1,000 steps that
    it remembers. One step's share is below a rounding of v; that of 32 steps is not.
    """
    return b2 / torch.tensor(b2, dtype=torch.float32).item() if b2 else 1.0
