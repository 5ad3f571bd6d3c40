"""``model.train()`` and ``model.eval()`` that switch the optimizer too."""

import torch

from sf_torch._optimizer import ScheduleFree


class Follower:
    """What :func:`follow` returns; stands in for the model's ``train``."""

    def __init__(self, model: torch.nn.Module, optimizer: ScheduleFree) -> None:
        self.model = model
        self.optimizer = optimizer

    def __call__(self, mode: bool = True) -> torch.nn.Module:
        self.optimizer._switch(mode)
        return type(self.model).train(self.model, mode)

    def remove(self) -> None:
        """From now on the model's mode is its own again."""
        self.model.__dict__.pop("train", None)


def follow(model: torch.nn.Module, optimizer: ScheduleFree) -> Follower:
    """From now on ``model.train()`` and ``model.eval()`` switch the optimizer too.

    The optimizer takes the model's present mode at once.

    Args:
      model: the module whose parameters the optimizer moves.
      optimizer: an optimizer of this package.

    Returns:
      A handle; its ``remove()`` undoes it.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.Linear(2, 1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters())
      >>> handle = sf_torch.follow(model, optimizer)
      >>> _ = model.eval()
      >>> optimizer.training
      False
      >>> handle.remove()
    """
    follower = Follower(model, optimizer)
    model.__dict__["train"] = follower
    optimizer._switch(model.training)
    return follower
