"""``model.train()`` and ``model.eval()`` that switch optimizers too."""

from collections.abc import Callable
from typing import Any

import torch

from sf_torch._optimizer import ScheduleFree
from sf_torch._wrapped import unwrapped


class _Train:
    """Stands in for the ``train`` of one model, which ``eval`` calls as well."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizers: list[ScheduleFree] = []

    def __call__(self, mode: bool = True) -> torch.nn.Module:
        for optimizer in self.optimizers:
            optimizer._switch(mode)
        return type(self.model).train(self.model, mode)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # A copy of the model, and a pickled one, has a plain train of its own: it
        # neither brings a copy of the optimizer along nor switches ours.
        return getattr, (self.model, "train")


class Follower:
    """What :func:`follow` returns: one optimizer's tie to one model."""

    def __init__(self, model: torch.nn.Module, optimizer: ScheduleFree) -> None:
        self.model = model
        self.optimizer = optimizer

    def remove(self) -> None:
        """From now on the model's mode is not the optimizer's any more."""
        train = self.model.__dict__.get("train")
        if isinstance(train, _Train) and self.optimizer in train.optimizers:
            train.optimizers.remove(self.optimizer)
            if not train.optimizers:
                del self.model.__dict__["train"]


def follow(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Follower:
    """From now on ``model.train()`` and ``model.eval()`` switch the optimizer too.

    The optimizer takes the model's present mode at once. Several optimizers may follow
    one model. A deep copy of the model, or a pickled one, is followed by none.

    Args:
      model: the module whose parameters the optimizer moves.
      optimizer: an optimizer of this package, or an object around one as
        :func:`~sf_torch.unwrapped` takes it.

    Returns:
      A handle; its ``remove()`` undoes it.

    Raises:
      ValueError: the optimizer moves no parameter of the model: a trainer has given it
        copies, which no switch brings back to the model.

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
    optimizer = unwrapped(optimizer)
    own = set(map(id, model.parameters()))
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not own & moved:
        raise ValueError(
            f"the optimizer moves none of the {len(own)} parameters of "
            f"{type(model).__name__}: it was built over another model, or a trainer "
            "has given it copies (as DeepSpeed's ZeRO does). Build it over the "
            "parameters of this model."
        )
    train = model.__dict__.get("train")
    if not isinstance(train, _Train):
        train = model.__dict__["train"] = _Train(model)
    if optimizer not in train.optimizers:
        train.optimizers.append(optimizer)
    optimizer._switch(model.training)
    return Follower(model, optimizer)
