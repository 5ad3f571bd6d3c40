"""Which tensors take their step together, and in which form arithmetic sees them.

A step reads and writes each array many times over. On a CPU it therefore works
through blocks that stay in the cache: small tensors together, large ones in slices.
On an accelerator all tensors that share a device and dtypes go together, in few and
large kernels. Arithmetic is done in the widest dtype of parameter and state, at least
float32, on copies where a tensor is narrower than that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sf_torch import _kernels
from sf_torch._kernels import Scalars, Tensors

BLOCK = 2**19
"""Elements of a block: two megabytes of float32 an array."""

FOR_ONE_THREAD, FOR_ALL_THREADS = 2**8, 2**15
"""Elements of a tensor that are worth waking one more thread for, or any number."""

MISSED = "missed"
"""Key in the state of a parameter: steps of its group in which it had no gradient,
those before its first gradient included. Absent, as in Meta's states, it is 0."""


@dataclass
class Leaf:
    """One parameter, or a slice of one, with its gradient and its state."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]  # z; x and y where they are stored; moments


class Scratch:
    """Memory for what a step needs besides its arrays: on a CPU one block's, kept.

    Fresh memory comes page by page from the operating system there, which takes
    longer than the arithmetic done in it. Elsewhere PyTorch keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def like(self, tensors: Tensors, name: str) -> Tensors:
        if not _works_in_blocks(tensors[0]):
            return [torch.empty_like(t) for t in tensors]
        total = sum(t.numel() for t in tensors)
        key = (name, tensors[0].dtype)
        memory = self._kept.get(key)
        if memory is None or memory.numel() < total:
            memory = self._kept[key] = tensors[0].new_empty(max(total, BLOCK))
        if len(tensors) == 1 and tensors[0].dim() == 1:  # a block
            return [memory[:total] if total < memory.numel() else memory]
        parts = memory[:total].split([t.numel() for t in tensors])
        # In t's own layout, where it is more than a row.
        return [
            part if t.dim() == 1 else part.as_strided(t.shape, t.stride())
            for part, t in zip(parts, tensors, strict=True)
        ]


@dataclass
class Leaves:
    """Parameters that take their step together: parallel lists in one dtype."""

    params: Tensors
    grads: Tensors
    ys: Tensors | None  # None: the parameters are roundings of it, x and z have it
    zs: Tensors
    xs: Tensors | None  # None: recovered from y and z
    b1: float  # β: what ys were formed with
    moments: dict[str, Tensors]
    kept_ys: Tensors | None  # y where the state keeps it too
    narrow: list[tuple[Tensors, Tensors]]  # (what is stored, its wide copy)
    one_pass: bool  # whether PyTorch's one-pass optimizers for CPUs are the better way
    scratch: Scratch

    def at(self, name: str) -> Tensors:
        """x, y or z before the step."""
        if name == "z":
            return self.zs
        if name == "y":
            return self.ys or self._between(self.b1)
        return self.xs or _kernels.recover_x(self.at("y"), self.zs, self.b1)

    def _between(self, b1: float) -> Tensors:
        """y of the present x and z."""
        assert self.xs is not None
        ys = self.spare("y")
        _kernels.set_between(ys, self.xs, self.zs, b1)
        return ys

    def spare(self, name: str) -> Tensors:
        """Memory like z for what a step needs besides its arrays."""
        return self.scratch.like(self.zs, name)

    def advance(self, move_z: Callable[["Leaves"], None], scalars: Scalars) -> None:
        """Moves z, then x and y with it, and writes them where they stay."""
        if self.xs is None:
            ys, before = self.at("y"), self.spare("z - y")
            _kernels.set_difference(before, self.zs, ys)
            move_z(self)
            _kernels.move_y(self, ys, before, scalars)
        else:
            move_z(self)
            _kernels.move_x(self.xs, self.zs, scalars.ckp1)
            ys = self._between(scalars.next_b1)
        if ys is not self.params:
            torch._foreach_copy_(self.params, ys)
        if self.kept_ys is not None:
            torch._foreach_copy_(self.kept_ys, ys)
        for stored, copies in self.narrow:
            torch._foreach_copy_(stored, copies)


def gather(
    leaves: Iterable[Leaf],
    b1: float,
    scratch: Scratch,
    together: bool = True,
    compiles: bool = False,
) -> Iterator[Leaves]:
    """The leaves in the batches in which they take their step.

    ``together=False`` keeps parameters apart, so that what a step needs besides the
    state is no larger than one of them. ``compiles=True`` is for code to be compiled,
    which fuses a step by itself: no blocks and no kernels of PyTorch's.
    """
    batches: dict[Any, list[Leaf]] = {}
    sizes: dict[Any, int] = {}
    for number, leaf in enumerate(leaves):
        param, z = leaf.param, leaf.state["z"]
        sliced = _works_in_blocks(param) and not compiles
        tensors = [param, leaf.grad, *leaf.state.values()]
        dense = not compiles and same_layout(tensors)
        alike = (dense, param.device, param.dtype, z.dtype, *leaf.state)
        key = alike if together else (dense, number)
        for piece in _slices(leaf) if sliced and dense else [leaf]:
            size = piece.param.numel()
            before = sizes.get(key, 0)
            if sliced and before and before + size > BLOCK:
                yield _batch(batches.pop(key), b1, dense, scratch)
                before = 0
            batches.setdefault(key, []).append(piece)
            sizes[key] = before + size
        if not together and key in batches:
            yield _batch(batches.pop(key), b1, dense, scratch)
    for (dense, *_), batch in batches.items():
        yield _batch(batch, b1, dense, scratch)


def _batch(leaves: list[Leaf], b1: float, dense: bool, scratch: Scratch) -> Leaves:
    first = leaves[0]
    dtype = _kernels.wide_dtype(first.param.dtype, first.state["z"].dtype)
    narrow: list[tuple[Tensors, Tensors]] = []

    def wide(tensors: list[Tensor]) -> Tensors:
        to = dtype if tensors[0].is_complex() else dtype.to_real()
        if tensors[0].dtype == to:
            return tensors
        copies = [t.to(to) for t in tensors]
        narrow.append((tensors, copies))
        return copies

    def state(key: str) -> list[Tensor]:
        return [leaf.state[key] for leaf in leaves]

    params = [leaf.param for leaf in leaves]
    zs = wide(state("z"))
    xs = wide(state("x")) if "x" in first.state else None
    ys = None if xs is not None and is_master(first.state["z"], first.param) else params
    grads: Tensors = [leaf.grad for leaf in leaves]
    if grads[0].dtype != zs[0].dtype:
        narrow_grads, grads = grads, scratch.like(zs, "gradient")
        torch._foreach_copy_(grads, narrow_grads)
    moments = {
        key: wide(state(key)) for key in first.state if key not in ("x", "y", "z")
    }
    kept_ys = state("y") if "y" in first.state else None
    one_pass = (
        dense  # their kernels do not look at strides
        and _works_in_blocks(params[0])
        and zs[0].dtype == torch.float32
        and (ys is None or ys[0].dtype == torch.float32)
        # They wake all threads for every tensor, which takes longer than a small one.
        and sum(z.numel() for z in zs) >= _worth_all_threads() * len(zs)
    )
    return Leaves(
        params, grads, ys, zs, xs, b1, moments, kept_ys, narrow, one_pass, scratch
    )


def is_master(z: Tensor, param: Tensor) -> bool:
    """Whether the parameter is a rounded copy of what the state holds."""
    return z.dtype.itemsize > param.dtype.itemsize


def local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor; another tensor as it is."""
    if type(tensor) in (Tensor, Parameter):  # where thousands are asked, most are
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _worth_all_threads() -> int:
    return min(FOR_ONE_THREAD * max(1, torch.get_num_threads() - 1), FOR_ALL_THREADS)


def _works_in_blocks(param: Tensor) -> bool:
    # Compiled code fuses a step by itself.
    return param.device.type == "cpu" and not torch.compiler.is_compiling()


def _slices(leaf: Leaf) -> Iterator[Leaf]:
    if leaf.param.numel() <= BLOCK:
        yield leaf
        return
    tensors = [leaf.param, leaf.grad, *leaf.state.values()]
    for param, grad, *states in in_blocks(tensors):
        yield Leaf(param, grad, dict(zip(leaf.state, states, strict=True)))


def in_blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors of one shape, on a CPU in slices that stay in its cache."""
    size = tensors[0].numel()
    if size <= BLOCK or not _works_in_blocks(tensors[0]) or not same_layout(tensors):
        yield tensors
        return
    flat = [t.as_strided((size,), (1,)) for t in tensors]
    yield from zip(*(t.split(BLOCK) for t in flat), strict=True)


def same_device(tensors: Sequence[Tensor]) -> bool:
    """Whether one kernel can reach them all."""
    return all(t.device == tensors[0].device for t in tensors)


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether all fill their memory without gaps, in one and the same order."""
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    shape, strides = tensors[0].shape, tensors[0].stride()
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return all(t.stride() == strides for t in tensors)
