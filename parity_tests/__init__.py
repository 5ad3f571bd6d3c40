"""Compares sf_jax and sf_torch with a float64 reference and with each other.

The rooms, each of which imports only from itself and from those after it:

    cli/         the commands of ``python -m parity_tests``
    compare/     how far two trajectories are apart, and how far they may be
    runners/     runs a case: in NumPy, in JAX, in PyTorch, or as recorded
    registry/    every optimizer, and the cases that it is run in
    reference/   the formulas, in NumPy and float64

``golden/`` has trajectories that other implementations recorded.
"""
