"""Which tensors take their step together: data only.

A step reads and writes each array several times. It therefore works through blocks that
stay in the cache: small tensors together, large ones in slices.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

Leaf = dict[str, Tensor]
"""The arrays of one parameter by name: "param" and "z"; "x" and "y" where they are
stored; "exp_avg_sq" and "exp_avg" where the base step keeps moments; and "next_z" where
another optimizer has moved z already."""

MISSED = "missed"
"""Key in the state of a parameter: steps of its group in which it had no gradient,
those before its first gradient included. Absent, as in Meta's states, it is 0."""

BLOCK = 2**19
"""Elements of a block on a CPU: two megabytes of float32 an array. On an accelerator it
is larger: there the caches are, and to start an operation takes longer."""

SHARE = 8
"""Parameters up to this part of a block share one. Their arrays are copied to and fro
for it, which is less than what the calls and the threads of each would take."""


def block_size(tensor: Tensor) -> int:
    """Elements of a block on the tensor's device."""
    return BLOCK if tensor.is_cpu else 8 * BLOCK


class Piece(NamedTuple):
    """A parameter, or a slice of one that is larger than a block."""

    member: int  # which parameter
    part: slice | None  # which elements, in the order of memory; None: all
    leaf: Leaf

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same piece of the member's tensor among others, such as gradients."""
        tensor = tensors[self.member]
        return tensor if self.part is None else flat(tensor)[self.part]


def blocks(
    pieces: Iterable[Piece], together: bool, sliced: bool
) -> Iterator[list[Piece]]:
    """Dense parameters of one kind, block by block.

    Args:
      pieces: the parameters.
      together: False keeps them apart.
      sliced: False keeps large ones whole.
    """
    block: list[Piece] = []
    room = 0
    for piece in pieces:
        param = piece.leaf["param"]
        size, limit = param.numel(), block_size(param)
        if not together or size > limit // SHARE:
            yield from ([each] for each in (slices(piece) if sliced else [piece]))
            continue
        if size > room:
            if block:
                yield block
            block, room = [], limit
        block.append(piece)
        room -= size
    if block:
        yield block


def slices(piece: Piece) -> Iterator[Piece]:
    """A dense parameter as it is, or in slices of a block."""
    size, limit = piece.leaf["param"].numel(), block_size(piece.leaf["param"])
    if size <= limit:
        yield piece
        return
    rows = {row: flat(tensor) for row, tensor in piece.leaf.items()}
    for start in range(0, size, limit):
        part = slice(start, start + limit)
        yield Piece(piece.member, part, {row: t[part] for row, t in rows.items()})


def kind_of(leaf: Leaf) -> tuple[Any, ...]:
    """What leaves have in common that may share a block: device, arrays and dtypes."""
    return leaf["param"].device, *leaf, *[tensor.dtype for tensor in leaf.values()]


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def is_master(z: Tensor, param: Tensor) -> bool:
    """Whether the parameter is a rounded copy of what the state holds."""
    return z.dtype.itemsize > param.dtype.itemsize


def arithmetic_dtype(leaf: Leaf) -> torch.dtype:
    """The dtype of a parameter's step."""
    return wide_dtype(leaf["param"].dtype, leaf["z"].dtype)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on these: their widest, at least float32."""
    # PyTorch does not promote float8, whose values float32 has all.
    wide = (dtype for dtype in dtypes if dtype.itemsize > 1)
    return reduce(torch.promote_types, wide, torch.float32)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor; another tensor as it is."""
    if type(tensor) in (Tensor, Parameter):  # where thousands are asked, most are
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def of_all_shards(number: Tensor) -> Tensor:
    """A sum over a distributed tensor, over all its shards; another as it is."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def is_flat(p: Tensor) -> bool:
    """Whether the parameter is FSDP1's: a part that does not know of the whole."""
    return hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened")


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
