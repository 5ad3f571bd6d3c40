"""Scalars in double-float arithmetic: a value as the unevaluated sum ``hi + lo``.

The sum of averaging weights has to stay exact over 1e8 steps, and JAX has no
float64 unless x64 is on. A pair of floats of the same type carries twice its
digits. Used for a handful of scalars a step, never for arrays of parameters.

References:
  Dekker, *A floating-point technique for extending the available precision*, 1971
  Knuth, *The Art of Computer Programming* 2, section 4.2.2 (the sum's error)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Clears the lower half of the significand, so that products of halves are exact.
_UPPER_HALF: dict[np.dtype, Any] = {
    np.dtype("float32"): np.uint32(0xFFFF_F000),
    np.dtype("float64"): np.uint64(0xFFFF_FFFF_F800_0000),
}


class Double(NamedTuple):
    """A scalar ``hi + lo`` with ``|lo|`` at most half a unit in hi's last place."""

    hi: jax.Array  # () scalar_dtype(): the value, rounded
    lo: jax.Array  # () scalar_dtype(): what the rounding left over


def scalar_dtype() -> np.dtype:
    """The widest float that JAX offers now: float32, or float64 where x64 is on."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def double(value: jax.typing.ArrayLike) -> Double:
    """A Python number with twice the digits; an array with the digits that it has."""
    dtype = scalar_dtype()
    if isinstance(value, (int, float)):
        rounded = np.asarray(value, dtype)
        rest = value - float(rounded) if np.isfinite(rounded) else 0.0
        return Double(jnp.asarray(rounded), jnp.asarray(rest, dtype))
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        # An int32 count beyond 2^24 does not fit into float32: in two parts it does.
        low = array & 0xFF
        return _renormalise((array - low).astype(dtype), low.astype(dtype))
    return Double(array.astype(dtype), jnp.zeros((), dtype))


def add(a: Double, b: Double) -> Double:
    total, error = _two_sum(a.hi, b.hi)
    return _renormalise(total, error + (a.lo + b.lo))


def multiply(a: Double, b: Double) -> Double:
    product, error = _two_product(a.hi, b.hi)
    return _renormalise(product, error + (a.hi * b.lo + a.lo * b.hi))


def divide(a: Double, b: Double) -> Double:
    quotient = a.hi / b.hi
    product, error = _two_product(quotient, b.hi)
    rest = ((a.hi - product) - error) + (a.lo - quotient * b.lo)
    return _renormalise(quotient, rest / b.hi)


def where(condition: jax.Array, a: Double, b: Double) -> Double:
    return Double(jnp.where(condition, a.hi, b.hi), jnp.where(condition, a.lo, b.lo))


def _renormalise(hi: jax.Array, lo: jax.Array) -> Double:
    total = hi + lo
    return Double(total, lo - (total - hi))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _two_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Products of halves only: they are exact, so a compiler that contracts a * b + c
    # into one rounding changes nothing. For the same reason the halves are cut with a
    # mask and not with Veltkamp's multiplication.
    a_hi, a_lo = _halves(a)
    b_hi, b_lo = _halves(b)
    total, error = _two_sum(a_hi * b_hi, a_hi * b_lo)
    total, more = _two_sum(total, a_lo * b_hi)
    return total, (error + more) + a_lo * b_lo


def _halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    mask = _UPPER_HALF[np.dtype(a.dtype)]
    bits = jax.lax.bitcast_convert_type(a, mask.dtype)
    upper = jax.lax.bitcast_convert_type(bits & mask, a.dtype)
    return upper, a - upper
