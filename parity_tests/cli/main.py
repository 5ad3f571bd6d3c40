"""The command line: the parity matrix, the replay of recorded runs and a long run.

    python -m parity_tests matrix --report out/parity
    python -m parity_tests matrix --case 'adamw/*' --steps 50 --device gpu
    python -m parity_tests replay run.safetensors
    python -m parity_tests long-run

Also installed as ``sf-parity``.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

# A module of a command has add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = {"matrix": "matrix", "replay": "replay", "long-run": "long_run"}
# All commands need what [record] brings. [parity] brings what they draw and write with.
_EXTRAS = {
    "record": ("jax", "optax", "torch", "safetensors", "rich"),
    "parity": ("jinja2", "matplotlib"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 where implementations differ.

    It is 2 where a package is absent that the command needs. The extra that brings the
    package is then printed.
    """
    try:
        return _main(argv)
    except ModuleNotFoundError as error:
        extra = next((e for e, names in _EXTRAS.items() if error.name in names), None)
        if extra is None:
            raise
        print(
            f"sf-parity needs {error.name}, which is not installed: pip install "
            f"{' '.join(_EXTRAS[extra])}, or this package with its extra [{extra}].",
            file=sys.stderr,
        )
        return 2


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="sf-parity",
        description="Compares sf_jax and sf_torch with a float64 reference, with "
        "Meta's schedulefree and with each other, step by step.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, of in COMMANDS.items():
        module = importlib.import_module(f"parity_tests.cli.{of}")
        text = (module.__doc__ or "").strip().split("\n\n")
        command = commands.add_parser(name, help=text[0], description="\n\n".join(text))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
