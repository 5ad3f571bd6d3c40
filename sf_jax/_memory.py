"""Arrays in the host's memory: JAX computes with arrays of one memory only.

Parameters and state may be offloaded, which is written ``memory_kind="pinned_host"`` in
their shardings. What is computed of them is computed in the device's memory, and goes
where the parameters lie.
"""

from typing import Any

import jax


def on_device(array: Any) -> Any:
    """The array in the device's memory."""
    return (
        jax.device_put(array, jax.memory.Space.Device) if _is_on_host(array) else array
    )


def beside(array: Any, other: Any) -> Any:
    """An array of the device's memory in the memory of another array."""
    return jax.device_put(array, jax.memory.Space.Host) if _is_on_host(other) else array


def _is_on_host(array: Any) -> bool:
    return bool(jax.typeof(array).memory_space == jax.memory.Space.Host)
