"""BatchNorm statistics at x: those gathered in training belong to y."""

from collections.abc import Iterable
from typing import Any

import torch

from sf_torch._wrapped import unwrapped


def update_bn(
    loader: Iterable[Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Recomputes the running statistics of every BatchNorm layer at x.

    Args:
      loader: batches, or tuples and lists that begin with one; read once.
      model: its modes come back as they were.
      optimizer: one of this package, or an object around one as
        :func:`~sf_torch.unwrapped` takes it; its mode comes back as it was.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.BatchNorm1d(1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters())
      >>> sf_torch.update_bn([torch.full((4, 1), 3.0)], model, optimizer)
      >>> model.running_mean
      tensor([3.])
    """
    with unwrapped(optimizer).eval_mode():
        torch.optim.swa_utils.update_bn(loader, model)
