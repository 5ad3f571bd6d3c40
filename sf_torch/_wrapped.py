"""The optimizer inside what a trainer has put around it."""

from typing import Any

from torch.optim import Optimizer

from sf_torch._optimizer import ScheduleFree

# Where wrappers keep what they wrap: Accelerate's and DeepSpeed's, Lightning's, others.
_PLACES = ("optimizer", "_optimizer", "base_optimizer", "optim")


def unwrapped(optimizer: Optimizer) -> ScheduleFree:
    """The Schedule-Free optimizer inside the objects that a trainer puts around it.

    Such objects pass ``step()`` on, and ``train()`` and ``eval()`` not always:
    Accelerate's does through one more object, and does nothing at all where it finds
    neither of the two there. The optimizer that this returns has them.

    Args:
      optimizer: one of this package, or an object that holds one as its ``optimizer``,
        ``_optimizer``, ``base_optimizer`` or ``optim``, through any number of others.

    Raises:
      TypeError: there is none inside.

    Examples:
      >>> import torch, sf_torch
      >>> class Forwarding:
      ...     def __init__(self, optimizer):
      ...         self.optimizer = optimizer
      >>> ours = sf_torch.SGDScheduleFree(torch.nn.Linear(2, 1).parameters())
      >>> sf_torch.unwrapped(Forwarding(Forwarding(ours))) is ours
      True
    """
    layers = layers_of(optimizer)
    for layer in layers:
        if isinstance(layer, ScheduleFree):
            return layer
    raise TypeError(
        "no Schedule-Free optimizer inside "
        f"{' around '.join(type(layer).__name__ for layer in layers)}. Pass the one "
        "that you built."
    )


def layers_of(optimizer: Any) -> list[Any]:
    """The optimizer and all that is inside it, from the outside in."""
    layers = [optimizer]
    while not isinstance(layers[-1], ScheduleFree):
        held = [getattr(layers[-1], place, None) for place in _PLACES]
        # Their forwarding may give themselves, or what has been seen.
        known = set(map(id, layers))
        new = [h for h in held if _is_layer(h) and id(h) not in known]
        if not new:
            break
        layers.append(new[0])
    return layers


def _is_layer(held: Any) -> bool:
    return any(hasattr(held, name) for name in ("param_groups", *_PLACES))
