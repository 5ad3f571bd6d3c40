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
    # The types of jax 0.7.0, which AlgoPerf pins, do not say where an array lies.
    space = getattr(jax.typeof(array), "memory_space", None)
    return space is not None and bool(space == jax.memory.Space.Host)
