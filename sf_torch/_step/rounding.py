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

With y and z alone in bfloat16, x is what y has besides its share of z. Were it

    β x = y - (1 - β) z

then every step would round it anew, since (1 - β) z lies between y's digits. So the
share of z is first rounded to a whole number of y's last digits, to nearest:

    t = y - s(z, y),    s(z, y) = ulp(y) round((1 - β) z / ulp(y)),    x = t / β

y and t then have the same digits. While x stands still, y follows z by whole digits
and is rounded nowhere; what is rounded at random is what a step adds to t:

    t' = (1 - c) (β' / β) t + c β' z'
    y' = t' + s(z', t' + (1 - β') z')

References:
  Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sf_torch._step.numbers import Numbers

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


def lean_y(y: Tensor, z: Tensor, next_z: Tensor, n: Numbers) -> Tensor:
    """y' in float32, which is to be rounded; from bfloat16 numbers in float32."""
    t = y - in_digits_of(y, _share_of_z(n.z_in_y) * z)
    t = t + (n.ckp1 * (1 - n.z_in_next_y) * next_z - n.to_z * t)
    share = _share_of_z(n.z_in_next_y) * next_z
    return t + in_digits_of(t + share, share)


def in_digits_of(y: Tensor, share: Tensor) -> Tensor:
    """The share to the nearest multiple of the last digit that y has in bfloat16."""
    e = torch.maximum(_exponent(y), _exponent(share) - (16 << 23))  # no overflow below
    e = e.clamp(min=8 << 23)
    digit = e - (7 << 23)
    digits_in_one = ((254 << 23) - digit).view(torch.float32)
    return (share * digits_in_one).round() * digit.view(torch.float32)


def _share_of_z(share: float) -> float:
    """``1 - β`` from β in float32, as sf_jax has β: where a share of z lies between two
    digits, the last digit of 1 - β decides."""
    return float(1 - torch.tensor(1 - share, dtype=torch.float32))


def _exponent(value: Tensor) -> Tensor:
    """The bits of its power of two, in int32."""
    return value.contiguous().view(torch.int32) & 0x7F800000


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
