"""Lightning, the real one, on a tiny model."""

import itertools
import signal

import pytest
import torch
from torch_cases import same, values
from trainer_runs import (
    BUILDS,
    CLIP,
    INPUTS,
    TARGETS,
    bare_loop,
    bare_steps,
    builds,
    close,
    network,
    together,
)

pytestmark = [
    together,
    # Lightning uses a test of PyTorch's that PyTorch has deprecated since,
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    # and advises more workers for loading sixteen rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


def lightning_run(build, folder, epochs, **options):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.seen = {}

        def note(self, stage):
            (optimizer,) = self.trainer.optimizers
            self.seen.setdefault(stage, set()).add(optimizer.training)

        def training_step(self, batch, index):
            self.note("fit")
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.note("validate")
            self.log("loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def test_step(self, batch, index):
            self.note("test")

        def predict_step(self, batch, index):
            self.note("predict")
            return self.net(batch[0])

        def on_save_checkpoint(self, checkpoint):
            self.note("save")

        def configure_optimizers(self):
            return build(self.parameters())

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ScheduleFreeCallback(),
            pl.callbacks.ModelCheckpoint(folder, "best-{step}", monitor="loss"),
            pl.callbacks.ModelCheckpoint(
                folder,
                "weights-{step}",
                every_n_train_steps=3,
                save_weights_only=True,
                save_top_k=-1,
            ),
        ],
        **options,
    )
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(INPUTS, TARGETS), batch_size=4
    )
    return trainer, Module(), loader


@builds
def test_lightning_is_in_the_right_mode_at_every_stage(build, tmp_path):
    trainer, module, loader = lightning_run(build, tmp_path, epochs=2)
    trainer.fit(module, loader, loader)
    x, y = bare_loop(build, epochs=2)
    assert same(values(module), x)
    (optimizer,) = trainer.optimizers
    with optimizer.train_mode():
        assert same(values(module), y)
    trainer.test(module, loader, verbose=False)
    trainer.predict(module, loader)
    assert module.seen == {
        "fit": {True},
        "validate": {False},
        "save": {False},
        "test": {False},
        "predict": {False},
    }
    assert "save_checkpoint" not in trainer.__dict__


def clipped_run(folder, batch_size, sampler=None, **options):
    """x after two epochs in which Lightning clips gradients."""
    module = small_module(BUILDS["plus"], network())
    module.lr, module.batch_size, module.sampler = 0.5, batch_size, sampler
    from sf_torch.lightning import ScheduleFreeCallback

    trainer = small_trainer(
        folder,
        [ScheduleFreeCallback()],
        max_epochs=2,
        limit_val_batches=0,
        gradient_clip_val=CLIP,
        **options,
    )
    trainer.fit(module)
    return values(module)


def test_lightning_tells_plus_the_loss_of_accumulated_clipped_batches(tmp_path):
    x, _ = bare_loop(BUILDS["plus"], epochs=2, clip=CLIP)
    close(clipped_run(tmp_path, batch_size=2, accumulate_grad_batches=2), x)


# Lightning would rather resume in an empty folder.
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_lightning_checkpoints_hold_x_and_resume_at_y(tmp_path):
    build = BUILDS["adamw"]
    trainer, module, loader = lightning_run(build, tmp_path, epochs=2)
    trainer.fit(module, loader, loader)
    weights = torch.load(tmp_path / "weights-step=3.ckpt", weights_only=False)
    *_, (x, _) = itertools.islice(bare_steps(build), 3)
    assert same(weights["state_dict"].values(), x)

    (best,) = tmp_path.glob("best-*.ckpt")
    trainer, resumed, loader = lightning_run(build, tmp_path, epochs=4)
    trainer.fit(resumed, loader, loader, ckpt_path=best)
    x, _ = bare_loop(build, epochs=4)
    assert same(values(resumed), x)


# Interruptions, and callbacks and tools that put their own weights into the module


def small_module(build, net, at_step=lambda module: None):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net
            self.lr = 0.05
            self.batch_size = 4
            self.sampler = None
            self.losses = []
            self.evaluated = []

        def training_step(self, batch, index):
            statistics = self.trainer.fit_loop._skip_backward  # of SWA, for BatchNorm
            assert self.trainer.optimizers[0].training or statistics
            at_step(self)
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            assert not any(o.training for o in self.trainer.optimizers)
            self.evaluated.append(values(self))

        def test_step(self, batch, index):
            self.evaluated.append(values(self))

        def predict_step(self, batch, index):
            self.evaluated.append(values(self))
            return self.net(batch[0])

        def configure_optimizers(self):
            optimizer = build(self.parameters())
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            return optimizer

        def train_dataloader(self):
            data = torch.utils.data.TensorDataset(INPUTS, TARGETS)
            return torch.utils.data.DataLoader(
                data, batch_size=self.batch_size, sampler=self.sampler
            )

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    return Module()


def small_trainer(folder, callbacks, **options):
    import pytorch_lightning as pl

    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(
            isinstance(c, pl.callbacks.Checkpoint) for c in callbacks
        ),
        default_root_dir=folder,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_lightning_is_at_x_after_an_interruption(interruption, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    def at_step(module):
        if len(module.losses) == 6:
            raise interruption

    module = small_module(BUILDS["adamw"], network(), at_step)
    checkpoints = pl.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1
    )
    trainer = small_trainer(
        tmp_path, [checkpoints, ScheduleFreeCallback()], max_epochs=2
    )
    handler = signal.getsignal(signal.SIGINT)  # which Lightning takes away
    try:
        with pytest.raises((interruption, SystemExit)):
            trainer.fit(module)
    finally:
        signal.signal(signal.SIGINT, handler)
    x3, x6 = (x for x, _ in itertools.islice(bare_steps(BUILDS["adamw"]), 2, 6, 3))
    assert same(values(module), x6)
    assert "save_checkpoint" not in trainer.__dict__
    early = tmp_path / "step=3.ckpt"
    state = torch.load(early, weights_only=False)["state_dict"]
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    for stage in (trainer.validate, trainer.test, trainer.predict):
        module.evaluated.clear()
        stage(module, ckpt_path=early, weights_only=False)
        for seen in module.evaluated:
            assert same(seen, list(state.values()))
        assert len(module.evaluated) == 4
    late = torch.load(tmp_path / "late.ckpt", weights_only=False)["state_dict"]
    assert same(list(late.values()), x6)
    assert same(list(state.values()), x3)


orders = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])


def in_order(callback, other, first):
    return [callback, other] if first else [other, callback]


def with_batch_norm():
    net = network()
    return torch.nn.Sequential(net[0], torch.nn.BatchNorm1d(4), *net[1:])


@orders
@pytest.mark.parametrize("make_network", [network, with_batch_norm])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_lightning_beside_swa(make_network, first, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    swa = pl.callbacks.StochasticWeightAveraging(
        swa_lrs=0.05, swa_epoch_start=2, device=None
    )
    module = small_module(BUILDS["adamw"], make_network())
    callbacks = in_order(ScheduleFreeCallback(), swa, first)
    trainer = small_trainer(tmp_path, callbacks, max_epochs=4, limit_val_batches=0)
    trainer.fit(module)

    # Lightning's SWA averages what an epoch starts from, here epochs 2 to 4.
    steps = itertools.islice(
        bare_steps(BUILDS["adamw"], model=make_network()), 3, 12, 4
    )
    mean = [torch.stack(xs).mean(0) for xs in zip(*(x for x, _ in steps), strict=True)]
    close([p.detach() for p in module.parameters()], mean)
    if make_network is with_batch_norm:
        inputs = mean[0] @ INPUTS.T + mean[1][:, None]
        of_batches = inputs.reshape(4, 4, 4).mean(2)
        close([module.net[1].running_mean], [of_batches.mean(1)])


@orders
def test_lightning_beside_ema(first, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("needs Lightning 2.6")
    ema = pl.callbacks.EMAWeightAveraging(decay=0.5)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "last", save_top_k=1)
    module = small_module(BUILDS["adamw"], network())
    callbacks = in_order(ScheduleFreeCallback(), ema, first)
    trainer = small_trainer(tmp_path, [*callbacks, checkpoints], max_epochs=2)
    trainer.fit(module)

    mean, means = None, []
    for _, y in itertools.islice(bare_steps(BUILDS["adamw"]), 8):
        mean = (
            y if mean is None else [(a + b) / 2 for a, b in zip(mean, y, strict=True)]
        )
        means.append(mean)
    close(values(module), means[7])
    close(module.evaluated[0], means[3])
    close(module.evaluated[-1], means[7])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    close(list(saved["state_dict"].values()), means[7])
    x, _ = bare_loop(BUILDS["adamw"], epochs=2)
    assert same(list(saved["current_model_state"].values()), x)


@orders
def test_lightning_beside_a_callback_that_swaps_weights(first, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    class Sevens(pl.Callback):
        """Validates at weights of its own, from the earliest hook to the latest."""

        def on_validation_start(self, trainer, pl_module):
            self.kept = values(pl_module)
            for p in pl_module.parameters():
                p.data.fill_(7)

        def on_validation_end(self, trainer, pl_module):
            for p, kept in zip(pl_module.parameters(), self.kept, strict=True):
                p.data.copy_(kept)

    module = small_module(BUILDS["adamw"], network())
    callbacks = in_order(ScheduleFreeCallback(), Sevens(), first)
    small_trainer(tmp_path, callbacks, max_epochs=2).fit(module)
    for seen in module.evaluated:
        assert all(bool((v == 7).all()) for v in seen)
    assert same(values(module), bare_loop(BUILDS["adamw"], epochs=2)[0])


def test_lightning_finds_a_learning_rate_and_goes_on_with_it(tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    module = small_module(BUILDS["adamw"], network())
    trainer = small_trainer(tmp_path, [ScheduleFreeCallback()], max_epochs=2)
    start = values(module)
    found = pl.tuner.Tuner(trainer).lr_find(
        module, min_lr=1e-3, max_lr=0.1, num_training=8, early_stop_threshold=None
    )
    assert same(values(module), start)
    tried = found.results["lr"]

    model = network()
    optimizer = BUILDS["adamw"](model.parameters())
    optimizer.train()
    losses = []
    batches = list(zip(INPUTS.split(4), TARGETS.split(4), strict=True))
    for lr, (inputs, targets) in zip(tried, 2 * batches, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert module.losses == pytest.approx(losses, rel=1e-5)

    module.lr = 0.05
    trainer = small_trainer(tmp_path, [ScheduleFreeCallback()], max_epochs=2)
    trainer.fit(module)
    assert same(values(module), bare_loop(BUILDS["adamw"], epochs=2)[0])


def test_lightning_finds_a_learning_rate_within_a_run(tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    class InTheSecondEpoch(pl.callbacks.LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before = values(pl_module)
                self.lr_find(trainer, pl_module)
                assert same(values(pl_module), before)
                trainer.optimizers[0].param_groups[0]["lr"] = 0.05

    module = small_module(BUILDS["adamw"], network())
    finder = InTheSecondEpoch(num_training_steps=4, early_stop_threshold=None)
    trainer = small_trainer(tmp_path, [finder, ScheduleFreeCallback()], max_epochs=3)
    trainer.fit(module)
    assert same(values(module), bare_loop(BUILDS["adamw"], epochs=3)[0])


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_lightning_scales_the_batch_size(method, tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning")
    from sf_torch.lightning import ScheduleFreeCallback

    module = small_module(BUILDS["adamw"], network())
    trainer = small_trainer(tmp_path, [ScheduleFreeCallback()], max_epochs=2)
    start = values(module)
    size = pl.tuner.Tuner(trainer).scale_batch_size(
        module, method=method, init_val=2, max_trials=2, steps_per_trial=2
    )
    assert size == 4
    assert same(values(module), start)
    module.batch_size = 4
    module.train()  # which Lightning has not done after its validation
    trainer.fit(module)
    assert same(values(module), bare_loop(BUILDS["adamw"], epochs=2)[0])
