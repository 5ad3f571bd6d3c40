"""The right mode at every stage of a Hugging Face run. Needs ``transformers``."""

from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class ScheduleFreeCallback(TrainerCallback):
    """Trains at y; evaluates, predicts and saves at x.

    ``Trainer`` by itself switches for a training step and for an evaluation, and saves
    whichever the model holds by then. A checkpoint holds x with this, ready to serve; a
    run that resumes from it goes on at the y that it left. After ``train()`` the model
    holds x, also the best one of ``load_best_model_at_end``.

    Raises:
      ValueError: as training begins, an optimizer that has no modes.

    Examples:
      ``Trainer(..., optimizers=(optimizer, None), callbacks=[ScheduleFreeCallback()])``
      with ``lr_scheduler_type="constant"``: decay schedules do not belong here.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuses what it could not switch."""
        optimizer = kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)
        if not (hasattr(inner, "train") and hasattr(inner, "eval")):
            raise ValueError(
                f"the optimizer is {type(inner).__name__}, which has no train() and "
                "eval(). Pass optimizers=(sf_torch.AdamWScheduleFree(...), None)."
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To y, after whatever came between."""
        kwargs["optimizer"].train()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To x where a save or an evaluation follows."""
        if control.should_save or control.should_evaluate:
            kwargs["optimizer"].eval()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To x: what follows may save, evaluate, or load the best x."""
        kwargs["optimizer"].eval()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """To x, for whoever saves the model now."""
        kwargs["optimizer"].eval()
