r"""Rounding of what a step writes: to nearest, or at random to bfloat16.

A bfloat16 number has 8 binary digits, so a small step is lost when its sum is rounded
to the nearest. Rounded at random, up or down with a probability by distance, the sum
is right in the mean. The random numbers are a function of the state: of Threefry2x32
with 20 rounds, of which each evaluation has four numbers of 16 bits,

    key      (seed, leaf)
    counter  (element, step + 2^31 block)

with the leaf's place in the tree, the element's in the whole array, and the steps
taken before this one. y, z, v and m take the numbers of block 0, x one of block 1. All
of it is done element by element, so that the compiler fuses it into the step.

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

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

Seed = int | jax.Array
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Block, word and shift of each array's number.
_NUMBERS = {"y": (0, 0, 0), "z": (0, 0, 16), "v": (0, 1, 0), "m": (0, 1, 16)}
_NUMBERS["x"] = (1, 0, 0)


class Rounding(NamedTuple):
    """How arrays are brought from the dtype of arithmetic to their own."""

    seed: Seed | None = None  # None: to nearest

    def is_random(self, dtype: Any) -> bool:
        """Whether arrays of a dtype are rounded at random."""
        return self.seed is not None and jnp.dtype(dtype) == jnp.bfloat16

    def __call__(
        self, value: jax.Array, dtype: Any, array: str, leaf: int, count: jax.Array
    ) -> jax.Array:
        """The value in a dtype; at random only where that is bfloat16.

        Args:
          value: in the dtype of arithmetic.
          dtype: of the result.
          array: "y", "z", "v", "m" or "x".
          leaf: the place of the leaf in the tree.
          count: steps taken before this one.
        """
        if not self.is_random(dtype):
            return value if value.dtype == dtype else value.astype(dtype)
        assert self.seed is not None
        bits = random_bits(self.seed, leaf, count, array, value.shape)
        return to_bfloat16(value, bits)

    def tree(
        self, values: optax.Params, like: optax.Params, array: str, count: jax.Array
    ) -> optax.Params:
        """All leaves of a tree, in the dtypes of another."""
        return jax.tree.map(
            lambda leaf, v, old: self(v, old.dtype, array, leaf, count),
            numbered(values),
            values,
            like,
        )


NEAREST = Rounding()


def numbered(tree: optax.Params) -> Any:
    """For each leaf of a tree its place in the order of the tree's leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, range(len(leaves)))


def rounding_of(rounding: str, seed: Seed, state_dtype: Any) -> Rounding:
    """What the options ``rounding`` and ``seed`` mean; raises where nothing."""
    if rounding == "nearest":
        return NEAREST
    if state_dtype is None or jnp.dtype(state_dtype) != jnp.bfloat16:
        raise ValueError(
            'rounding="stochastic" is to bfloat16, got state_dtype='
            f"{state_dtype}. Pass state_dtype=jnp.bfloat16, or leave rounding out."
        )
    return Rounding(seed)


class LeanNumbers(NamedTuple):
    """The numbers of a step of y that has x in it; each () float32."""

    z_in_y: jax.Array  # 1 - β, of the β that formed y
    z_in_next_y: jax.Array  # 1 - β'
    z_in_t: jax.Array  # c β'
    off_t: jax.Array  # 1 - (1 - c) β' / β


def share_of_z(b1: jax.typing.ArrayLike) -> jax.Array:
    """``1 - β`` from β in float32: where a share lies between two digits, its own last
    digit decides, so it must not depend on the precision of β."""
    return 1 - jnp.asarray(b1, jnp.float32)


def lean_y(
    y: jax.Array, z: jax.Array, next_z: jax.Array, numbers: LeanNumbers
) -> jax.Array:
    """y' in float32, which is to be rounded; from bfloat16 numbers in float32."""
    t = y - in_digits_of(y, numbers.z_in_y * z)
    t = t + (numbers.z_in_t * next_z - numbers.off_t * t)
    share = numbers.z_in_next_y * next_z
    return t + in_digits_of(t + share, share)


def in_digits_of(y: jax.Array, share: jax.Array) -> jax.Array:
    """The share to the nearest multiple of the last digit that y has in bfloat16."""
    e = jnp.maximum(_exponent(y), _exponent(share) - (16 << 23))  # no overflow below
    e = jnp.maximum(e, 8 << 23)
    digit = e - (7 << 23)
    digits_in_one = lax.bitcast_convert_type((254 << 23) - digit, jnp.float32)
    digit = lax.bitcast_convert_type(digit, jnp.float32)
    return lax.round(share * digits_in_one, lax.RoundingMethod.TO_NEAREST_EVEN) * digit


def _exponent(value: jax.Array) -> jax.Array:
    """The bits of its power of two, in int32."""
    return lax.bitcast_convert_type(value, jnp.int32) & 0x7F800000


def threefry2x32(
    key: tuple[Seed, int], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two words of 32 bits for each counter, both in uint32."""
    keys = [jnp.asarray(k, jnp.uint32) for k in key]
    keys.append(keys[0] ^ keys[1] ^ jnp.uint32(_PARITY))
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for by in _ROTATIONS[block % 2]:
            a = a + b
            b = a ^ ((b << by) | (b >> (32 - by)))
        a = a + keys[(block + 1) % 3]
        b = b + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return a, b


def random_bits(
    seed: Seed, leaf: int, count: jax.Array, array: str, shape: tuple[int, ...]
) -> jax.Array:
    """Numbers from 0 to 2^16 - 1 in uint32, one for each element of an array."""
    if math.prod(shape) > 2**32:
        raise ValueError(
            'rounding="stochastic" numbers the elements of an array in 32 bits, got '
            f"shape {shape}. Split it into arrays of 2**32 elements or fewer."
        )
    block, word, shift = _NUMBERS[array]
    element, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = lax.broadcasted_iota(jnp.uint32, shape, axis)
        element = element + place * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    second = jnp.asarray(count, jnp.uint32) | jnp.uint32(block << 31)
    words = threefry2x32((seed, leaf), (element, jnp.broadcast_to(second, shape)))
    return (words[word] >> shift) & jnp.uint32(0xFFFF)


def to_bfloat16(value: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 as bfloat16, the bits added first; what is not finite stays as it is."""
    value = value.astype(jnp.float32)
    raw = lax.bitcast_convert_type(value, jnp.uint32) + bits
    rounded = lax.bitcast_convert_type(raw & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(value), rounded, value).astype(jnp.bfloat16)
