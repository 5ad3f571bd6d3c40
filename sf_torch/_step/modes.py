"""What a parameter holds: y while training, x while evaluating.

x takes the place of y in memory. Where the state does not have x, y stays in the state
meanwhile: made anew from x and z it would be a rounding off, and another one at the
next switch. Weights that are written over x meanwhile are x from then on, and y moves
by β times what x has moved by:

    y' = y + β (x' - x),    with x as it was made of y and z
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import Leaf, Piece, blocks, kind_of, local, same_layout
from sf_torch._step.formula import wide_lerp
from sf_torch._step.rows import Scratch

State = dict[str, Tensor]  # of one parameter
Moved = Sequence[tuple[Tensor, State]]
Tensors = list[Tensor]


class Modes:
    """Switches parameters between y and x.

    On a CPU the memory of the kept y stays here while training: fresh memory comes page
    by page from the operating system, which takes longer than the switch. On other
    devices PyTorch keeps memory by itself.
    """

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._scratch = Scratch()

    def to_x(self, moved: Moved, b1: float) -> None:
        """Switches parameters from y to x, and keeps y in the state."""
        for p, state in moved:
            if "x" not in state:
                state["y"] = self._empty_like(p)
        for ps, zs, xs, ys in _blocks(moved):
            if xs is not None:
                torch._foreach_copy_(ps, xs)
            elif ys is not None:
                torch._foreach_copy_(ys, ps)
                _lerp(ps, zs, 1 - 1 / b1, out=ps)

    def to_y(self, moved: Moved, b1: float) -> None:
        """Switches parameters from x to y, to the last bit where x is as it was."""
        for ps, zs, xs, ys in _blocks(moved):
            if ys is None:
                _lerp(xs or ps, zs, 1 - b1, out=ps)
            elif xs is not None:
                torch._foreach_copy_(ps, ys)
            else:
                _move(ps, ys, self._lerped(ys, zs, 1 - 1 / b1), b1)
        for p, state in moved:
            kept = state.pop("y", None) if "x" not in state else None
            if kept is not None and kept.is_cpu:
                self._memory[id(p)] = kept

    def _empty_like(self, param: Tensor) -> Tensor:
        memory = self._memory.pop(id(param), None)
        if memory is not None and _kind(memory) == _kind(param):
            return memory
        return torch.empty_like(param.detach())

    def _lerped(self, starts: Tensors, ends: Tensors, weight: float) -> Tensors:
        """What :func:`_lerp` gives, as new tensors; a single one in kept memory."""
        if len(starts) > 1 and _is_plain(starts[0], ends[0]):
            return list(torch._foreach_lerp(starts, ends, weight))
        if len(starts) > 1:
            out = list(map(torch.empty_like, starts))
        else:
            start = starts[0]
            memory = self._scratch.memory(start, start.numel(), "x")
            out = [memory.as_strided(start.shape, start.stride())]
        _lerp(starts, ends, weight, out)
        return out


def _blocks(moved: Moved) -> Iterator[tuple[Tensors, Tensors, Any, Any]]:
    """Parameters with their z, x and y, None where they have none, block by block."""
    alike: dict[Any, list[Piece]] = {}
    for i, (p, state) in enumerate(moved):
        rows = [row for row in ("z", "x", "y") if row in state]
        leaf: Leaf = {"param": local(p), **{row: local(state[row]) for row in rows}}
        is_dense = same_layout(list(leaf.values()))
        alike.setdefault((is_dense, *kind_of(leaf)), []).append(Piece(i, None, leaf))
    for (is_dense, *_), pieces in alike.items():
        for block in blocks(pieces, together=is_dense, sliced=is_dense):
            leaves = [piece.leaf for piece in block]
            columns: dict[str, Any] = {
                row: [leaf[row] for leaf in leaves] for row in leaves[0]
            }
            yield columns["param"], columns["z"], columns.get("x"), columns.get("y")


def _lerp(starts: Tensors, ends: Tensors, weight: float, out: Tensors) -> None:
    """``start + weight (end - start)``: the same bits for the same numbers."""
    if not (_is_plain(starts[0], ends[0]) and out[0].dtype == starts[0].dtype):
        pairs = zip(starts, ends, strict=True)
        torch._foreach_copy_(out, [wide_lerp(a, b, weight) for a, b in pairs])
    elif len(out) == 1:
        torch.lerp(starts[0], ends[0], weight, out=out[0])
    else:
        if out is not starts:
            torch._foreach_copy_(out, starts)
        torch._foreach_lerp_(out, ends, weight)


def _is_plain(start: Tensor, end: Tensor) -> bool:
    """Whether arithmetic on the two is in their own dtype."""
    return start.dtype == end.dtype and start.dtype.itemsize >= 4


def _move(ps: Tensors, ys: Tensors, xs: Tensors, b1: float) -> None:
    """Moves parameters from x' to y + β (x' - x)."""
    if ps[0].dtype.itemsize < 4:
        for p, y, x in zip(ps, ys, xs, strict=True):
            p.copy_(y.float() + b1 * (p.float() - x.float()))
        return
    torch._foreach_sub_(ps, xs)
    if len(ps) == 1:
        torch.add(ys[0], ps[0], alpha=b1, out=ps[0])
    else:
        torch._foreach_mul_(ps, b1)
        torch._foreach_add_(ps, ys)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
