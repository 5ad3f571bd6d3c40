"""Prints as JSON which machine this is and what is installed."""

import json
import os
import sys


def main(device: str) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    from benchmarks.facts import devices_for, facts

    devices = devices_for(device)
    command = f"python -m benchmarks gpu-day --device {device}"
    found = facts(devices, command) if devices else {"devices": {}}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
