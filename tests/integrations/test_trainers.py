"""Accelerate, Lightning and Hugging Face, the real ones, on a tiny model."""

import pytest
import torch
from torch_cases import same, values

import sf_torch

pytestmark = [
    # They take seconds to import: once.
    pytest.mark.xdist_group("trainers"),
    # Lightning uses a test of PyTorch's that PyTorch has deprecated since,
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    # and advises more workers for loading sixteen rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]

INPUTS = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.sum(1, keepdim=True)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )


BUILDS = {
    "adamw": lambda params: sf_torch.AdamWScheduleFree(params, lr=0.05),
    "wrapper": lambda params: sf_torch.ScheduleFreeWrapper(
        torch.optim.SGD(params, lr=0.1)
    ),
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def bare_loop(build, epochs, batch_size=4):
    """x and y after training without any trainer."""
    model = network()
    optimizer = build(model.parameters())
    optimizer.train()
    for _ in range(epochs):
        for inputs, targets in zip(
            INPUTS.split(batch_size), TARGETS.split(batch_size), strict=True
        ):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    return optimizer.eval_params(), values(model)


# Accelerate


@builds
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_passes_modes_on(build, accumulate, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate
    )
    net = network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(INPUTS, TARGETS), batch_size=4 // accumulate
    )
    model, optimizer, loader = accelerator.prepare(net, build(net.parameters()), loader)
    for epoch in range(3):
        optimizer.train()
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 1:
            accelerator.save_state(tmp_path)  # in train mode, with y
            saved = values(net)
        optimizer.eval()
    x, y = bare_loop(build, epochs=3)
    for a, b in zip(values(net), x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    optimizer.train()
    for a, b in zip(values(net), y, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    accelerator.load_state(tmp_path)
    assert optimizer.optimizer.training
    assert same(values(net), saved)


# Lightning


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


# Lightning would rather resume in an empty folder.
@pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")
def test_lightning_checkpoints_hold_x_and_resume_at_y(tmp_path):
    build = BUILDS["adamw"]
    trainer, module, loader = lightning_run(build, tmp_path, epochs=2)
    trainer.fit(module, loader, loader)
    weights = torch.load(tmp_path / "weights-step=3.ckpt", weights_only=False)
    model = network()
    optimizer = build(model.parameters())
    optimizer.train()
    for inputs, targets in zip(INPUTS.split(4)[:3], TARGETS.split(4), strict=False):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    assert same(weights["state_dict"].values(), optimizer.eval_params())

    (best,) = tmp_path.glob("best-*.ckpt")
    trainer, resumed, loader = lightning_run(build, tmp_path, epochs=4)
    trainer.fit(resumed, loader, loader, ckpt_path=best)
    x, _ = bare_loop(build, epochs=4)
    assert same(values(resumed), x)


# Hugging Face


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, inputs, labels):
        outputs = self.net(inputs)
        return {
            "loss": torch.nn.functional.mse_loss(outputs, labels),
            "logits": outputs,
        }


def hugging_face_run(build, folder, **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from sf_torch.transformers import ScheduleFreeCallback

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = WithLoss()
    optimizer = build(model.parameters())
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_strategy="no",
        **options,
    )
    rows = [{"inputs": i, "labels": t} for i, t in zip(INPUTS, TARGETS, strict=True)]
    trainer = Ordered(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[ScheduleFreeCallback()],
    )
    return trainer, optimizer


def stored(folder):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    return [state[name] for name in WithLoss().state_dict()]


@builds
def test_hugging_face_evaluates_saves_and_ends_at_x(build, tmp_path):
    trainer, optimizer = hugging_face_run(
        build, tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=4
    )
    trainer.train()
    for epochs in (1, 2):
        x, y = bare_loop(build, epochs)
        assert same(stored(tmp_path / f"checkpoint-{4 * epochs}"), x)
    assert same(values(trainer.model), x)
    loss = torch.nn.functional.mse_loss(trainer.model.net(INPUTS), TARGETS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss)
    trainer.predict(trainer.eval_dataset)
    assert not optimizer.training
    optimizer.train()
    assert same(values(trainer.model), y)


def test_hugging_face_resumes_at_y(tmp_path):
    build = BUILDS["adamw"]
    for epochs, resume in ((2, None), (4, True)):
        trainer, _ = hugging_face_run(
            build, tmp_path, num_train_epochs=epochs, save_strategy="epoch"
        )
        trainer.train(resume_from_checkpoint=resume)
    x, _ = bare_loop(build, epochs=4)
    assert same(values(trainer.model), x)


def test_hugging_face_loads_the_best_x(tmp_path):
    trainer, optimizer = hugging_face_run(
        BUILDS["adamw"],
        tmp_path,
        num_train_epochs=3,
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is not the last
    )
    trainer.train()
    best, _ = bare_loop(BUILDS["adamw"], epochs=1)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert same(values(trainer.model), best)
    assert not optimizer.training


def test_hugging_face_refuses_an_optimizer_without_modes(tmp_path):
    trainer, _ = hugging_face_run(
        lambda params: torch.optim.SGD(params), tmp_path, num_train_epochs=1
    )
    with pytest.raises(ValueError, match="SGD, which has no train"):
        trainer.train()
