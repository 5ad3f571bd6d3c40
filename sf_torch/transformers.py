"""The right mode at every stage of a Hugging Face run. Needs ``transformers``."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sf_torch._wrapped import layers_of


class ScheduleFreeCallback(TrainerCallback):
    """Trains at y; evaluates, predicts and saves at x.

    ``Trainer`` by itself switches for a training step and for an evaluation, and saves
    whichever the model holds by then. A checkpoint holds x with this, ready to serve; a
    run that resumes from it goes on at the y that it left. After ``train()`` the model
    holds x, also the best one of ``load_best_model_at_end``.

    The order of the callbacks does not matter, nor who asks for a save: while the run
    lasts, and after Ctrl-C or an exception, ``model.state_dict()`` and whatever is made
    from it, such as ``trainer.save_model()``, is at x, and ``model.load_state_dict()``
    replaces x.

    Raises:
      ValueError: as training begins, an optimizer that has no modes.

    Examples:
      ``Trainer(..., optimizers=(optimizer, None), callbacks=[ScheduleFreeCallback()])``
      with ``lr_scheduler_type="constant"``: decay schedules do not belong here.
      ScheduleFree+ needs the loss too, which is a line more:
      ``sf_torch.accelerate.tell_losses(trainer.accelerator, optimizer)``.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuses what it could not switch, and ties the model's state dict to x."""
        optimizer = _innermost(kwargs["optimizer"])
        if not (hasattr(optimizer, "train") and hasattr(optimizer, "eval")):
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__}, which has no train() "
                "and eval(). Pass optimizers=(sf_torch.AdamWScheduleFree(...), None)."
            )
        self._release()
        # No event tells of a save beforehand, and none of Ctrl-C.
        to_x = _ToX(optimizer.eval)
        for module in kwargs["model"].modules():
            self._handles += [
                module.register_state_dict_pre_hook(to_x),
                module.register_load_state_dict_pre_hook(to_x),
            ]

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To y, after whatever came between."""
        _innermost(kwargs["optimizer"]).train()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To x: what follows may evaluate, or load the best x."""
        _innermost(kwargs["optimizer"]).eval()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To x, for whoever uses the model now."""
        _innermost(kwargs["optimizer"]).eval()
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _innermost(optimizer: Any) -> Any:
    """The optimizer itself: what is around it may not pass train() and eval() on."""
    return layers_of(optimizer)[-1]


class _ToX:
    """A hook of a module, called before its state dict is read or replaced."""

    def __init__(self, switch: Callable[[], None] | None = None) -> None:
        self.switch = switch

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if self.switch is not None:
            self.switch()

    def __reduce__(self) -> tuple[type["_ToX"], tuple[()]]:
        # A copy of the module, and a pickled one, belongs to no optimizer.
        return _ToX, ()
