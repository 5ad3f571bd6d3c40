"""The loss for ScheduleFree+ where Accelerate trains, and Hugging Face's Trainer."""

import math
from typing import Any

from torch import Tensor


def tell_losses(accelerator: Any, optimizer: Any) -> None:
    """From now on the optimizer knows the loss, and what clipping did.

    ``AcceleratedOptimizer.step`` has no argument for either. This listens to
    ``accelerator.backward`` and ``accelerator.clip_grad_norm_``: the loss of a step is
    the sum of what was given to ``backward`` for it, divided by the number of
    micro-batches as there, and the mean of that over the processes. With
    ``Trainer`` of Hugging Face, which uses an accelerator of its own, the line is
    ``tell_losses(trainer.accelerator, optimizer)``, before ``trainer.train()``.

    Args:
      accelerator: an ``accelerate.Accelerator`` that trains one model.
      optimizer: a ScheduleFree+, prepared or not.

    Raises:
      TypeError: the optimizer takes no loss.
      ValueError: from ``clip_grad_norm_`` then, of another than the Euclidean norm.

    Examples:
      ``tell_losses(accelerator, optimizer)``, and the loop as it was.
    """
    plus = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(plus, "tell"):
        raise TypeError(
            f"{type(plus).__name__} takes no loss. Give tell_losses an "
            "AdamCScheduleFreePlus, and leave it out for other optimizers."
        )
    backward, clip = accelerator.backward, accelerator.clip_grad_norm_
    shares: list[Tensor] = []

    def told_backward(loss: Tensor, **kwargs: Any) -> None:
        backward(loss, **kwargs)
        share = loss.detach().float() / accelerator.gradient_accumulation_steps
        shares.append(accelerator.reduce(share, "mean"))
        if accelerator.sync_gradients:  # the last micro-batch of a step
            plus.tell(loss=sum(shares))
            shares.clear()

    def told_clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        if norm_type != 2:
            raise ValueError(
                f"norm_type must be 2 for ScheduleFree+, got {norm_type}: from the "
                "Euclidean norm it finds what clipping did."
            )
        norm = clip(parameters, max_norm, norm_type=norm_type)
        if not math.isinf(max_norm):  # by which Trainer asks for the norm alone
            plus.tell(grad_norm=norm)
        return norm

    accelerator.backward, accelerator.clip_grad_norm_ = told_backward, told_clip
