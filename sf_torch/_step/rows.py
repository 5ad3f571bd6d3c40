"""The step over arrays in a row, block by block, with PyTorch's own kernels.

The state of many small parameters lies in a row in one memory, so that all of them step
as one tensor; a large parameter steps in slices. On CPUs PyTorch's one-pass optimizers
do most of it: its Adam moves z and the moments, its SGD moves y. A compiler is handed
the same rows, and makes its own code of the formula.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import (
    Leaf,
    Piece,
    arithmetic_dtype,
    block_size,
    flat,
    is_master,
    same_layout,
)
from sf_torch._step.numbers import Numbers

ENDLESS = torch.tensor(float("inf"))
"""The count of steps that Adam's kernel is told: at infinity it corrects no bias, which
the numbers have corrected already."""

CORRECTED_EVERY = 32
"""Steps after which v is rescaled to undo the rounding of b2 to float32."""


class Scratch:
    """Memory for the intermediate results of a block, kept from step to step.

    The operating system hands out fresh memory page by page, which takes longer than
    the arithmetic.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def memory(
        self, like: Tensor, size: int, name: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        """``size`` elements on the device of ``like``, by default of its dtype."""
        key = name, like.device, dtype or like.dtype
        memory = self._kept.get(key)
        if memory is None or memory.numel() < size:
            room = max(size, block_size(like))
            memory = self._kept[key] = like.new_empty(room, dtype=dtype)
        return memory[:size]


def takes(leaf: Leaf) -> bool:
    """Whether rows can move this: dense and real, with all state in the dtype of
    arithmetic."""
    dtype = arithmetic_dtype(leaf)
    state = [tensor for row, tensor in leaf.items() if row != "param"]
    return (
        not dtype.is_complex
        and all(t.dtype == dtype for t in state)
        and same_layout(list(leaf.values()))
    )


def has_one_pass(z: Tensor) -> bool:
    """Whether PyTorch's one-pass optimizers are there for this z."""
    return z.is_cpu and z.dtype == torch.float32


class Rows:
    """Executor: pieces that are alike, as one.

    Their state is moved into one memory. Parameters and gradients stay where they are:
    those of several pieces are copied into a row and back.

    Args:
      pieces: of one device and the same dtypes.
      scratch: of the optimizer.
    """

    def __init__(self, pieces: Sequence[Piece], scratch: Scratch) -> None:
        self.pieces, self.scratch = pieces, scratch
        arrays = {row: [piece.leaf[row] for piece in pieces] for row in pieces[0].leaf}
        self.params, self.next_zs = arrays.pop("param"), arrays.pop("next_z", None)
        self.z_parts = arrays["z"]
        self.state = {row: joined(tensors) for row, tensors in arrays.items()}
        self.z, self.x = self.state["z"], self.state.get("x")
        self.m, self.v = self.state.get("exp_avg"), self.state.get("exp_avg_sq")
        self.dtype = self.z.dtype
        # Whether the parameters are roundings of y, which x and z give.
        self.master = is_master(self.z, self.params[0])
        self.one_pass = has_one_pass(self.z)
        self._spares: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def step(self, n: Numbers, grads: Sequence[Tensor]) -> None:
        z, x = self.z, self.x
        # What x is stored beside is looked at only where the decay asks for it.
        y = self._y(n) if x is None or n.decay_at == "y" else z
        if n.decay_moves_x:
            self._shrink(y, n)
        old_z = self._memory("z").copy_(z) if x is None else z
        if self.next_zs is not None:
            torch._foreach_copy_(self.z_parts, self.next_zs)
        else:
            self._move_z(self._gradient(grads), y, n)
        if x is None:
            self._move_y(y, old_z, n)
        else:
            x.lerp_(z, n.ckp1)
            y = self._between(x, n.z_in_next_y)
        self._put_back(self.dtype)
        if "y" in self.state:
            self.state["y"].copy_(y)

    def sums(
        self, grads: Sequence[Tensor], beta: float, b1: float
    ) -> list[tuple[int, Tensor]]:
        """Those of ``formula.sums``, with the number of a parameter that is in them."""
        g, way = self._gradient(grads), self._memory("direction")
        other = self._row("y", self.params, self.dtype) if self.x is None else self.x
        inner = torch.sub(self.z, other, out=way).mul_(g).sum()
        inner = (beta / b1 if self.x is None else beta) * inner
        sums = torch.stack([inner, torch.abs(g, out=way).sum()])
        return [(self.pieces[0].member, sums)]

    def to_compile(self, grads: Sequence[Tensor]) -> list[tuple[Leaf, Tensor]]:
        """What compiled code moves by ``formula.step``, before :meth:`finish`."""
        param = self._row("y", self.params, self.params[0].dtype)
        if len(self.pieces) == 1:  # in whichever dtype
            grad = flat(self.pieces[0].of(grads))
        else:
            grad = self._gradient(grads)
        return [({"param": param, **self.state}, grad)]

    def finish(self) -> None:
        """Ends a compiled step."""
        self._put_back(self.params[0].dtype)

    def _move_z(self, g: Tensor, y: Tensor, n: Numbers) -> None:
        """z and the moments."""
        at = self._at(y, n) if n.decay_at and not n.decay_moves_x else None
        if self.v is not None and self.one_pass and n.root:
            self._fused_adam(g, self.v, at, n)
            return
        direction, lr = g, n.lr
        if self.m is not None:
            direction = self.m.lerp_(g, n.m_weight)
        if self.v is not None:
            root = torch.mul(g, g, out=self._memory("root"))
            self.v.lerp_(root, n.v_weight)
            if n.root:
                torch.sqrt(self.v, out=root).add_(n.eps / n.root)
                direction, lr = torch.div(direction, root, out=root), lr / n.root
        if at is not None and lr:
            # One sum, so that z is rounded once.
            alpha, memory = n.decay / lr, self._memory("direction")
            direction = torch.add(direction, at, alpha=alpha, out=memory)
        self.z.add_(direction, alpha=-lr)

    def _fused_adam(self, g: Tensor, v: Tensor, at: Tensor | None, n: Numbers) -> None:
        target, m = self.z, self.m
        if at is not None:
            # Apart from z, so that z is rounded once, with the decay in it.
            target = torch.mul(at, -n.decay, out=self._memory("direction"))
        if m is None:
            # The kernel writes a first moment and reads it, if only 0 times.
            m = self._memory("mean").zero_()
        torch._fused_adam_(
            [target],
            [g],
            [m],
            [v],
            [],
            [ENDLESS],
            lr=n.lr / n.root,
            beta1=1 - n.m_weight,
            beta2=n.b2,
            weight_decay=0.0,
            eps=n.eps / n.root,
            amsgrad=False,
            maximize=False,
        )
        if at is not None:
            self.z.add_(target)
        if (n.k + 1) % CORRECTED_EVERY == 0 and _error_of(n.b2) != 1:
            v.mul_(_error_of(n.b2) ** CORRECTED_EVERY)

    def _move_y(self, y: Tensor, old_z: Tensor, n: Numbers) -> None:
        """Moves y in place, after z has moved. Overwrites ``old_z``.

        y' = y + to_step z' + (to_z - to_step) z - to_z y
        """
        if self.one_pass and n.to_step:
            # SGD in one pass: z' as the gradient, y decaying, z as the momentum.
            momentum = (n.to_z - n.to_step) / n.to_step
            torch._fused_sgd_(
                [y],
                [self.z],
                [old_z] if momentum else [],
                weight_decay=-n.to_z / n.to_step,
                momentum=momentum,
                lr=-n.to_step,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            return
        way = torch.sub(self.z, old_z, out=self._memory("direction")).mul_(n.to_step)
        y.add_(way.add_(old_z.sub_(y), alpha=n.to_z))

    def _shrink(self, y: Tensor, n: Numbers) -> None:
        """Shrinks z or y by the decay, and sets x to what the two imply."""
        if n.decay_at == "z":
            if self.x is not None:
                self.x.add_(self.z, alpha=-n.decay * n.z_in_x)
            self.z.mul_(1 - n.decay)
        elif self.x is None:
            y.mul_(1 - n.decay)
        else:
            self.x.add_(y, alpha=-n.decay * (1 - n.z_in_x))

    def _at(self, y: Tensor, n: Numbers) -> Tensor:
        """The iterate that decays: y, z or x before the step."""
        if n.decay_at == "x":
            if self.x is not None:
                return self.x
            return torch.lerp(y, self.z, n.z_in_x, out=self._memory("x"))
        return y if n.decay_at == "y" else self.z

    def _y(self, n: Numbers) -> Tensor:
        """y before the step."""
        if self.master and self.x is not None:
            return self._between(self.x, n.z_in_y)
        return self._row("y", self.params, self.dtype)

    def _between(self, x: Tensor, z_in_y: float) -> Tensor:
        """y of the present x and z: in the parameter's own memory where it can be."""
        alone = _alone(self.params, self.dtype)
        y = flat(self.params[0]) if alone else self._memory("y")
        return torch.lerp(x, self.z, z_in_y, out=y)

    def _put_back(self, dtype: torch.dtype) -> None:
        """Copies y of this dtype to the parameters, unless it lies there."""
        if not _alone(self.params, dtype):
            torch._foreach_copy_(self.params, self._spare("y", dtype)[1])

    def _gradient(self, grads: Sequence[Tensor]) -> Tensor:
        mine = [piece.of(grads) for piece in self.pieces]
        return self._row("gradient", mine, self.dtype)

    def _row(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """One tensor of each piece in a row, which is the tensor if it is alone."""
        if _alone(tensors, dtype):
            return flat(tensors[0])
        memory, parts = self._spare(name, dtype)
        torch._foreach_copy_(parts, list(tensors))
        return memory

    def _memory(self, name: str) -> Tensor:
        return self._spare(name, self.dtype)[0]

    def _spare(self, name: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Scratch memory for a row, and the part of each piece, laid out like it."""
        if (name, dtype) not in self._spares:
            sizes = [z.numel() for z in self.z_parts]
            memory = self.scratch.memory(self.z, sum(sizes), name, dtype)
            parts = zip(memory.split(sizes), self.z_parts, strict=True)
            laid_out = [part.as_strided(z.shape, z.stride()) for part, z in parts]
            self._spares[name, dtype] = memory, laid_out
        return self._spares[name, dtype]


def joined(tensors: Sequence[Tensor]) -> Tensor:
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


def _alone(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the tensors are one that needs no copy."""
    return len(tensors) == 1 and tensors[0].dtype == dtype


@cache
def _error_of(b2: float) -> float:
    """b2 over the float32 next to it, which Adam's kernel multiplies v by.

    For b2 = 0.999 the two differ by 1.3e-8, and v by 1.3e-5 after the 1,000 steps that
    it remembers. One step's share is below a rounding of v; that of 32 steps is not.
    """
    return b2 / torch.tensor(b2, dtype=torch.float32).item() if b2 else 1.0
