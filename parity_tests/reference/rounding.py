r"""Stochastic rounding to bfloat16, by random bits that are a function of the state.

A float32 lies between two bfloat16 numbers. It becomes the one further from zero with
a probability that is its distance from the other, in units of theirs: to the bits of
the float32 a random number of 16 bits is added, and the lower 16 bits are dropped. The
mean of the result is the number itself.

The random numbers are of Threefry2x32 with 20 rounds, a counter-based generator:

    key      (seed, leaf)
    counter  (element, step + 2^31 block)

with the leaf's place in the order of the optimizer, the element's place in the whole
array in row-major order, and the steps taken before this one. A block has two words
of 32 bits and so four numbers: of y, z, v and m; of x there is one in the next block.

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

import ml_dtypes
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
ARRAYS = ("y", "z", "v", "m", "x")


def lean_y(
    y: np.ndarray,
    z: np.ndarray,
    next_z: np.ndarray,
    c: float,
    b1: float,
    next_b1: float,
) -> np.ndarray:
    """y' in float32, which is to be rounded; all arrays are float32."""
    f = np.float32
    t = y - in_digits_of(y, (1 - f(b1)) * z)
    off_t = 1 - (1 - c) * next_b1 / b1
    t = t + (f(c * next_b1) * next_z - f(off_t) * t)
    share = (1 - f(next_b1)) * next_z
    return t + in_digits_of(t + share, share)


def in_digits_of(y: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The share to the nearest multiple of the last digit that y has in bfloat16."""
    # The share has 24 digits, of which no more are to be dropped than there are.
    e = np.maximum(_exponent(y), _exponent(share) - 16)
    digit = np.ldexp(1.0, np.maximum(e, -119) - 7)
    return (np.rint(share / digit) * digit).astype(np.float32)


def _exponent(values: np.ndarray) -> np.ndarray:
    """e with ``2^e <= |value| < 2^(e + 1)``; of the smallest normal number for 0."""
    return np.frexp(np.maximum(np.abs(values), 2.0**-126))[1] - 1


def threefry2x32(
    key: tuple[int, int], counter: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Two words of 32 bits for each counter."""
    keys = [np.uint32(k) for k in (*key, PARITY ^ key[0] ^ key[1])]
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for by in ROTATIONS[block % 2]:
            a = a + b
            b = (b << np.uint32(by)) | (b >> np.uint32(32 - by))
            b = b ^ a
        a = a + keys[(block + 1) % 3]
        b = b + keys[(block + 2) % 3] + np.uint32(block + 1)
    return a, b


def random_bits(
    seed: int, leaf: int, step: int, array: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Numbers from 0 to 2^16 - 1, one for each element of an array."""
    block, number = divmod(ARRAYS.index(array), 4)
    element = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint32)
    second = np.full_like(element, step | block << 31)
    words = threefry2x32((seed, leaf), (element, second))
    return (words[number // 2] >> np.uint32(16 * (number % 2)) & 0xFFFF).reshape(shape)


def to_bfloat16(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16; what is not finite stays as it is."""
    raw = np.asarray(values, np.float32).view(np.uint32) + bits.astype(np.uint32)
    rounded = (raw & np.uint32(0xFFFF0000)).view(np.float32)
    finite = np.isfinite(values)
    return np.where(finite, rounded, values).astype(ml_dtypes.bfloat16)
