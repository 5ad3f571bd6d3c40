"""The command line: the parity matrix, the replay of recorded runs and a long run.

    python -m parity_tests matrix --report out/parity
    python -m parity_tests matrix --case 'adamw/*' --steps 50 --device gpu
    python -m parity_tests replay run.safetensors
    python -m parity_tests long-run

Also installed as ``sf-parity``.
"""

import argparse
from collections.abc import Sequence

from parity_tests.cli import long_run, matrix, replay

# A module of a command has add_arguments(parser) and run(arguments) -> exit status.
COMMANDS = {"matrix": matrix, "replay": replay, "long-run": long_run}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 where implementations differ."""
    parser = argparse.ArgumentParser(
        prog="sf-parity",
        description="Compares sf_jax and sf_torch with a float64 reference, with "
        "Meta's schedulefree and with each other, step by step.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip().split("\n\n")
        command = commands.add_parser(name, help=text[0], description="\n\n".join(text))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
