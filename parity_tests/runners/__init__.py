"""Runs one case in one voice: NumPy, JAX or PyTorch."""
