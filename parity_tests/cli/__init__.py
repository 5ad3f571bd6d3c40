"""The commands of ``python -m parity_tests``, one module a command."""
