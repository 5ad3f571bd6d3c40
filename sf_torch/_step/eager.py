"""The step over lists of tensors, with PyTorch's own kernels.

On a CPU PyTorch's one-pass optimizers do most of it: its Adam moves z and the moments,
its SGD moves y. Elsewhere, and in other dtypes, the ``torch._foreach`` functions do.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import BLOCK, Piece, arithmetic_dtype, is_master
from sf_torch._step.numbers import Numbers

Tensors = list[Tensor] | tuple[Tensor, ...]

CORRECTED_EVERY = 32
"""Steps after which v is rescaled to undo the rounding of b2 to float32."""

FOR_ONE_THREAD, FOR_ALL_THREADS = 2**8, 2**15
"""The least size of a tensor, in elements, at which its one-pass kernel is worth it: so
many for each further thread that the kernel wakes, and never more than the second."""


class Scratch:
    """Memory for the intermediate results of a step. On a CPU one block's is kept.

    There the operating system hands out fresh memory page by page, which takes longer
    than the arithmetic. On other devices PyTorch's allocator keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def memory(self, like: Tensor, size: int, name: str) -> Tensor:
        """``size`` elements, of the dtype and on the device of ``like``."""
        if not like.is_cpu:
            return like.new_empty(size)
        memory = self._kept.get((name, like.dtype))
        if memory is None or memory.numel() < size:
            memory = self._kept[name, like.dtype] = like.new_empty(max(size, BLOCK))
        return memory[:size]


class Spare:
    """Scratch tensors shaped like given ones; ``flat`` is their memory in a row."""

    def __init__(self, scratch: Scratch, tensors: Tensors, name: str) -> None:
        sizes = [t.numel() for t in tensors]
        self.flat = scratch.memory(tensors[0], sum(sizes), name)
        # In each tensor's own layout.
        self.tensors = [
            part if t.dim() == 1 else part.as_strided(t.shape, t.stride())
            for part, t in zip(self.flat.split(sizes), tensors, strict=True)
        ]


class Lists:
    """Executor: parallel lists of tensors that are alike, in the dtype of arithmetic.

    Args:
      pieces: of one device and the same dtypes, all of whose state is in the dtype of
        arithmetic.
      one_pass: whether PyTorch's one-pass optimizers take them.
      scratch: of the optimizer.
    """

    def __init__(
        self, pieces: Sequence[Piece], one_pass: bool, scratch: Scratch
    ) -> None:
        self.pieces = pieces
        self.one_pass = one_pass
        self.scratch = scratch
        self._spares: dict[str, Spare] = {}
        first = pieces[0].leaf
        rows = {row: [piece.leaf[row] for piece in pieces] for row in first}
        self.params, self.zs, self.xs = rows["param"], rows["z"], rows.get("x")
        self.means, self.vs = rows.get("exp_avg"), rows.get("exp_avg_sq")
        self.kept_ys, self.next_zs = rows.get("y"), rows.get("next_z")
        # None: the parameters are roundings of y, which x and z give.
        self.ys = (
            None if self.xs and is_master(first["z"], first["param"]) else (self.params)
        )
        self.counts: list[Tensor] = []
        if one_pass:
            # Adam's kernel with an infinite count corrects no bias: the numbers do.
            self.counts = [torch.tensor(float("inf"))] * len(pieces)

    def step(self, n: Numbers, grads: Tensors) -> None:
        zs, ys, xs = self.zs, self.ys, self.xs
        if n.decay_moves_x:
            self._shrink(n)
        if xs is None:
            old_zs = self._spare("z").tensors
            torch._foreach_copy_(old_zs, zs)
        if self.next_zs is not None:
            torch._foreach_copy_(zs, self.next_zs)
        else:
            self._move_z([piece.of(grads) for piece in self.pieces], n)
        if xs is None:
            self._move_y(old_zs, n)
        else:
            torch._foreach_lerp_(xs, zs, n.ckp1)
            ys = self._between(n.z_in_next_y)
            torch._foreach_copy_(self.params, ys)
        if self.kept_ys is not None:
            torch._foreach_copy_(self.kept_ys, ys or self.params)

    def _move_z(self, grads: Tensors, n: Numbers) -> None:
        """z and the moments."""
        if grads[0].dtype != self.zs[0].dtype:
            narrow, grads = grads, self._spare("gradient").tensors
            torch._foreach_copy_(grads, narrow)
        decays = bool(n.decay_at) and not n.decay_moves_x
        if self.vs is not None and self.one_pass and n.root:
            self._fused_adam(grads, n, decays)
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
        if decays and lr:
            # One sum, so that z is rounded once.
            at = self._at(n)
            targets = self._spare("direction").tensors
            torch._foreach_copy_(targets, directions)
            torch._foreach_add_(targets, at, alpha=n.decay / lr)
            directions = targets
        torch._foreach_add_(self.zs, directions, alpha=-lr)

    def _fused_adam(self, grads: Tensors, n: Numbers, decays: bool) -> None:
        assert self.vs is not None
        targets = self.zs
        if decays:
            # Apart from z, so that z is rounded once, with the decay in it.
            spare = self._spare("direction")
            targets = spare.tensors
            torch._foreach_copy_(targets, self._at(n))
            spare.flat.mul_(-n.decay)
        means = self.means
        if means is None:
            # The kernel writes a first moment and reads it, if only 0 times.
            spare = self._spare("mean")
            spare.flat.zero_()
            means = spare.tensors
        torch._fused_adam_(
            targets,
            grads,
            means,
            self.vs,
            [],
            self.counts,
            lr=n.lr / n.root,
            beta1=1 - n.m_weight,
            beta2=n.b2,
            weight_decay=0.0,
            eps=n.eps / n.root,
            amsgrad=False,
            maximize=False,
        )
        if decays:
            torch._foreach_add_(self.zs, targets)
        if (n.k + 1) % CORRECTED_EVERY == 0 and _error_of(n.b2) != 1:
            torch._foreach_mul_(self.vs, _error_of(n.b2) ** CORRECTED_EVERY)

    def _move_y(self, old_zs: list[Tensor], n: Numbers) -> None:
        """Moves y in place, after z has moved. Overwrites ``old_zs``.

        y' = y + to_step z' + (to_z - to_step) z - to_z y
        """
        ys, zs = self.params, self.zs
        if self.one_pass and n.to_step:
            # SGD in one pass: z' as the gradient, y decaying, z as the momentum.
            momentum = (n.to_z - n.to_step) / n.to_step
            torch._fused_sgd_(
                ys,
                zs,
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
        ways = torch._foreach_sub(zs, old_zs)
        torch._foreach_mul_(ways, n.to_step)
        torch._foreach_sub_(old_zs, ys)
        torch._foreach_add_(ways, old_zs, alpha=n.to_z)
        torch._foreach_add_(ys, ways)

    def _shrink(self, n: Numbers) -> None:
        """Shrinks z or y by the decay, and sets x to what the two imply."""
        if n.decay_at == "z":
            if self.xs is not None:
                torch._foreach_add_(self.xs, self.zs, alpha=-n.decay * n.z_in_x)
            torch._foreach_mul_(self.zs, 1 - n.decay)
        elif self.xs is None:
            torch._foreach_mul_(self.params, 1 - n.decay)
        else:
            ys = self._between(n.z_in_y)
            torch._foreach_add_(self.xs, ys, alpha=-n.decay * (1 - n.z_in_x))

    def _at(self, n: Numbers) -> Tensors:
        """The iterate that decays: y, z or x before the step."""
        if n.decay_at == "z":
            return self.zs
        if n.decay_at == "x":
            return self.xs or torch._foreach_lerp(self.params, self.zs, n.z_in_x)
        return self.ys or self._between(n.z_in_y)

    def _between(self, z_in_y: float) -> list[Tensor]:
        """y of the present x and z, in scratch memory."""
        assert self.xs is not None
        ys = self._spare("y").tensors
        torch._foreach_copy_(ys, self.xs)
        torch._foreach_lerp_(ys, self.zs, z_in_y)
        return ys

    def _spare(self, name: str) -> Spare:
        """Scratch tensors shaped like z."""
        if not self.zs[0].is_cpu:
            return Spare(self.scratch, self.zs, name)
        if name not in self._spares:
            self._spares[name] = Spare(self.scratch, self.zs, name)
        return self._spares[name]


def takes(pieces: Sequence[Piece]) -> bool:
    """Whether lists can move these: real, with all state in the dtype of arithmetic."""
    leaf = pieces[0].leaf
    dtype = arithmetic_dtype(leaf)
    state = [tensor for row, tensor in leaf.items() if row != "param"]
    return not dtype.is_complex and all(t.dtype == dtype for t in state)


def one_pass(pieces: Sequence[Piece]) -> bool:
    """Whether PyTorch's one-pass optimizers for CPUs are the better way."""
    leaf = pieces[0].leaf
    threads = max(1, torch.get_num_threads() - 1)
    # Each wakes all threads for every tensor, which takes longer than a small step.
    worth = min(FOR_ONE_THREAD * threads, FOR_ALL_THREADS)
    return (
        leaf["z"].dtype == torch.float32
        and leaf["param"].dtype.itemsize <= 4
        and sum(p.leaf["z"].numel() for p in pieces) >= worth * len(pieces)
    )


@cache
def _error_of(b2: float) -> float:
    """b2 over the float32 next to it, which Adam's kernel multiplies v by.

    For b2 = 0.999 the two differ by 1.3e-8, and v by 1.3e-5 after the 1,000 steps that
    it remembers. One step's share is below a rounding of v; that of 32 steps is not.
    """
    return b2 / torch.tensor(b2, dtype=torch.float32).item() if b2 else 1.0
