"""The right mode at every stage of a Lightning run. Needs ``pytorch-lightning``."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from sf_torch._optimizer import ScheduleFree


class ScheduleFreeCallback(Callback):
    """Trains at y; validates, tests, predicts and saves at x.

    Every Schedule-Free optimizer of the module is switched, others are left alone. A
    checkpoint holds x, ready to serve, whenever it is written; a run that resumes from
    it goes on at the y that it left. After ``fit`` the module holds x.

    Examples:
      ``Trainer(callbacks=[ScheduleFreeCallback()])``; the module's
      ``configure_optimizers`` returns the optimizer.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets every save of a fit find x, from whichever callback it comes."""
        if stage != "fit":
            return
        save = trainer.save_checkpoint

        # There is a hook for the content of a save, but it comes after the weights
        # have been read, and not at all for save_weights_only.
        def save_at_x(*args: Any, **kwargs: Any) -> None:
            with ExitStack() as stack:
                for optimizer in _schedule_free(trainer):
                    stack.enter_context(optimizer.eval_mode())
                save(*args, **kwargs)

        trainer.__dict__["save_checkpoint"] = save_at_x

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Takes it back."""
        if stage == "fit":
            trainer.__dict__.pop("save_checkpoint", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """To y, after whatever came between."""
        for optimizer in _schedule_free(trainer):
            optimizer.train()

    def _to_x(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in _schedule_free(trainer):
            optimizer.eval()

    on_validation_start = _to_x
    on_test_start = _to_x
    on_predict_start = _to_x
    on_train_end = _to_x


def _schedule_free(trainer: Trainer) -> Iterator[ScheduleFree]:
    return (o for o in trainer.optimizers if isinstance(o, ScheduleFree))
