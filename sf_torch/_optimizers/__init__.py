"""The optimizers: each file fills the seams of :mod:`sf_torch._optimizer`."""
