"""What the numbers belong to: the machine, and what is installed on it."""

import importlib.util
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "optax",
    "torch",
    "triton",
    "schedulefree",
    "heavyball",
    "pytorch_optimizer",
)


def facts(devices: dict[str, str], command: str) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "machine": _machine(devices),
        "devices": devices,
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def devices_for(device: str) -> dict[str, str]:
    """Framework -> its name for the device, for those that have it.

    Args:
      device: "cpu", "gpu" or "tpu".
    """
    found = {}
    if importlib.util.find_spec("torch") is not None and device != "tpu":
        import torch

        if device == "cpu":
            found["torch"] = "cpu"
        elif torch.cuda.is_available():
            found["torch"] = "cuda"
    if importlib.util.find_spec("jax") is not None:
        import jax

        try:
            jax.devices(device)
            found["jax"] = device
        except RuntimeError:  # no such platform
            pass
    return found


def _machine(devices: dict[str, str]) -> str:
    if devices.get("torch") == "cuda":
        import torch

        return torch.cuda.get_device_name()
    if "cpu" in devices.values():
        return f"{len(os.sched_getaffinity(0))}-core {platform.machine()} CPU"
    import jax

    return jax.devices(devices["jax"])[0].device_kind


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(Path(__file__).parent), *arguments),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"
