"""Rounding of what a step writes: to nearest, or at random to bfloat16.

A bfloat16 number has 8 binary digits, so a small step is lost when its sum is rounded
to the nearest. Rounded at random, up or down with a probability by distance, the sum
is right in the mean. The random numbers are a function of the state: of Threefry2x32
with 20 rounds, of which each evaluation has four numbers of 16 bits,

    key      (seed, leaf)
    counter  (element, step + 2^31 block)

with the parameter's place in the optimizer, the element's place in row-major order, and
the steps of the group before this one. y, z, v and m take the numbers of block 0, x one
of block 1. sf_jax rounds alike.

References:
  Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF
# Block, word and shift of each array's number.
_NUMBERS = {
    "param": (0, 0, 0),
    "y": (0, 0, 0),
    "z": (0, 0, 16),
    "exp_avg_sq": (0, 1, 0),
    "exp_avg": (0, 1, 16),
    "x": (1, 0, 0),
}


@dataclass
class Rounding:
    """Of one parameter at one step, at random."""

    seed: int
    leaf: int  # the parameter's place in the optimizer
    step: int  # steps of the group before this one
    # By block: the words, which several arrays take their numbers from.
    words: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to_bfloat16(self, row: str, value: Tensor) -> Tensor:
        """The value to be entered into the array of this name."""
        return to_bfloat16(value, random_bits(self, row, value.shape, value.device))


def threefry2x32(
    key: tuple[int, int], counter: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Two words of 32 bits for each counter, all in int64."""
    keys = (*key, _PARITY ^ key[0] ^ key[1])
    a, b = (counter[0] + keys[0]) & _WORD, (counter[1] + keys[1]) & _WORD
    for block in range(5):
        for by in _ROTATIONS[block % 2]:
            a = (a + b) & _WORD
            b = a ^ (((b << by) & _WORD) | (b >> (32 - by)))
        a = (a + keys[(block + 1) % 3]) & _WORD
        b = (b + keys[(block + 2) % 3] + block + 1) & _WORD
    return a, b


def random_bits(
    rounding: Rounding, row: str, shape: torch.Size, device: torch.device
) -> Tensor:
    """Numbers from 0 to 2^16 - 1 in int32, one for each element of an array."""
    block, word, shift = _NUMBERS[row]
    if block not in rounding.words:
        element = torch.arange(shape.numel(), device=device)
        second = torch.full_like(element, rounding.step | block << 31)
        key = rounding.seed, rounding.leaf
        rounding.words[block] = threefry2x32(key, (element, second))
    words = rounding.words[block]
    return ((words[word] >> shift) & 0xFFFF).to(torch.int32).reshape(shape)


def to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """float32 as bfloat16, the bits added first; what is not finite stays as it is."""
    value = value.float().contiguous()
    rounded = ((value.view(torch.int32) + bits) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
