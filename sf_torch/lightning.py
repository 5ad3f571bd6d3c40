"""The right mode at every stage of a Lightning run. Needs ``pytorch-lightning``."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from sf_torch._optimizer import ScheduleFree
from sf_torch._optimizers.plus import AdamCScheduleFreePlus


class ScheduleFreeCallback(Callback):
    """Trains at y; validates, tests, predicts and saves at x.

    Every Schedule-Free optimizer of the module is switched, others are left alone. A
    checkpoint holds x, ready to serve, whenever it is written; a run that resumes from
    it goes on at the y that it left. After ``fit`` the module holds x, also when an
    exception or Ctrl-C ended it. The learning rate finder and the batch size scaler
    work as usual. ScheduleFree+ is told the loss of the step, the mean over accumulated
    batches and processes, and the norm that its gradients have before Lightning clips
    them; under manual optimization call ``step(closure)`` yourself.

    The order of the callbacks does not matter: this one puts itself first. Beside it,
    ``StochasticWeightAveraging`` averages the x of each epoch, and
    ``EMAWeightAveraging`` the y of each step. What they put into the module is
    validated, and is what the module holds after ``fit``; neither changes the x that a
    checkpoint resumes from. x is an average already, so that neither is needed.

    Examples:
      ``Trainer(callbacks=[ScheduleFreeCallback()])``; the module's
      ``configure_optimizers`` returns the optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shares: list[Tensor] = []  # of the step's loss, one a batch

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """The batches of another step begin."""
        self._shares.clear()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Tells ScheduleFree+ the loss, which is divided by the number of batches."""
        told = _told(trainer, pl_module)
        if not told:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        share = loss.detach().float() / scale
        self._shares.append(trainer.strategy.reduce(share, reduce_op="mean"))
        for optimizer in told:
            optimizer.tell(loss=sum(self._shares))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Tells ScheduleFree+ the norm of its gradients; clipping comes after."""
        for optimizer in _told(trainer, pl_module):
            optimizer.tell(grad_norm=optimizer.grad_norm())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts itself first. In a fit every step finds y then, and every save x."""
        # Whoever overwrites weights must find x there: y would be taken for it.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        _to_x(trainer)
        if stage != "fit":
            return

        # Hooks of callbacks are not enough. Lightning's tuner runs without them; the
        # hook for the content of a save comes after the weights have been read.
        strategy = trainer.strategy
        start_batch, take_step = strategy.on_train_batch_start, strategy.optimizer_step

        # StochasticWeightAveraging ends with a pass for BatchNorm at its average. It
        # has no backward pass: neither y nor a step from old gradients belongs there.
        def on_train_batch_start(*args: Any, **kwargs: Any) -> None:
            if not trainer.fit_loop._skip_backward:
                for optimizer in _schedule_free(trainer):
                    optimizer.train()
            start_batch(*args, **kwargs)

        def optimizer_step(
            optimizer: Optimizer, closure: Callable[[], Any], **kwargs: Any
        ) -> Any:
            if trainer.fit_loop._skip_backward:
                return closure()
            return take_step(optimizer, closure, **kwargs)

        strategy.__dict__["on_train_batch_start"] = on_train_batch_start
        strategy.__dict__["optimizer_step"] = optimizer_step
        strategy.__dict__["validation_step"] = _at_x(trainer, strategy.validation_step)
        trainer.__dict__["save_checkpoint"] = _at_x(trainer, trainer.save_checkpoint)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Undoes what setup did."""
        for name in ("on_train_batch_start", "optimizer_step", "validation_step"):
            trainer.strategy.__dict__.pop(name, None)
        trainer.__dict__.pop("save_checkpoint", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Switches to x: someone may save, evaluate or overwrite the module now."""
        _to_x(trainer)
        self.teardown(trainer, pl_module, "fit")

    def _to_x(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _to_x(trainer)

    # Before other callbacks put their averages there for the validation,
    on_validation_start = _to_x
    on_test_start = _to_x
    on_predict_start = _to_x
    # or for good; StochasticWeightAveraging does so at the start of an epoch.
    on_train_epoch_end = _to_x
    on_train_end = _to_x


def _told(trainer: Trainer, pl_module: LightningModule) -> list[AdamCScheduleFreePlus]:
    if not pl_module.automatic_optimization:
        return []
    return [o for o in trainer.optimizers if isinstance(o, AdamCScheduleFreePlus)]


def _to_x(trainer: Trainer) -> None:
    for optimizer in _schedule_free(trainer):
        optimizer.eval()


def _at_x(trainer: Trainer, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for optimizer in _schedule_free(trainer):
                stack.enter_context(optimizer.eval_mode())
            return call(*args, **kwargs)

    return called


def _schedule_free(trainer: Trainer) -> Iterator[ScheduleFree]:
    return (o for o in trainer.optimizers if isinstance(o, ScheduleFree))
