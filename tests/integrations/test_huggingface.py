"""Hugging Face's Trainer, the real one, on a tiny model."""

import copy
import importlib.metadata
import itertools
import pickle
import sys

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

import sf_torch
from sf_torch.accelerate import tell_losses

pytestmark = together


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


def hugging_face_run(build, folder, others=(), first=True, **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from sf_torch.transformers import ScheduleFreeCallback

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = WithLoss()
    optimizer = build(model.parameters()) if build else None
    callback = [ScheduleFreeCallback()]
    options = {"per_device_train_batch_size": 4} | options
    options = {"logging_strategy": "no", "save_strategy": "no", **options}
    options = {"max_grad_norm": 0.0, **options}
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **options,
    )
    rows = [{"inputs": i, "labels": t} for i, t in zip(INPUTS, TARGETS, strict=True)]
    trainer = Ordered(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[*callback, *others] if first else [*others, *callback],
    )
    if hasattr(optimizer, "tell"):
        tell_losses(trainer.accelerator, optimizer)
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


def test_hugging_face_tells_plus_the_loss_of_accumulated_clipped_batches(tmp_path):
    trainer, _ = hugging_face_run(
        BUILDS["plus"],
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
    )
    trainer.train()
    close(values(trainer.model), bare_loop(BUILDS["plus"], epochs=2, clip=CLIP)[0])


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


def callback_at(event, act):
    """A callback of somebody else's that acts at one event."""
    import transformers

    def at_event(self, args, state, control, **kwargs):
        act(state, control, kwargs["model"])

    return type("Other", (transformers.TrainerCallback,), {event: at_event})()


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_hugging_face_saves_x_whoever_asks_for_it(event, first, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    read = []

    def ask(state, control, model):
        if state.global_step == 3:
            control.should_save = True
            read.append([v.clone() for v in model.state_dict().values()])
            read.append([v.clone() for v in model.net[2].state_dict().values()])

    trainer, _ = hugging_face_run(
        BUILDS["adamw"],
        tmp_path,
        [callback_at(event, ask)],
        first,
        num_train_epochs=2,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    *_, (x, _) = itertools.islice(bare_steps(BUILDS["adamw"]), 3)
    assert same(stored(tmp_path / "checkpoint-3"), x)
    assert same(read[0], x)
    assert same(read[1], x[2:])
    assert same(values(trainer.model), bare_loop(BUILDS["adamw"], epochs=2)[0])


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_hugging_face_saves_x_after_an_interruption(interruption, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")

    def interrupt(state, control, model):
        if state.global_step == 3:
            raise interruption

    trainer, optimizer = hugging_face_run(
        BUILDS["adamw"],
        tmp_path,
        [callback_at("on_step_end", interrupt)],
        num_train_epochs=2,
    )
    with pytest.raises(interruption):
        trainer.train()
    *_, (x, y) = itertools.islice(bare_steps(BUILDS["adamw"]), 3)
    trainer.save_model(tmp_path / "interrupted")
    assert same(stored(tmp_path / "interrupted"), x)
    optimizer.train()
    assert same(values(trainer.model), y)


def test_hugging_face_evaluates_what_was_loaded_after_an_interruption(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")

    def interrupt(state, control, model):
        if state.global_step == 3:
            raise KeyboardInterrupt

    trainer, _ = hugging_face_run(
        BUILDS["adamw"],
        tmp_path,
        [callback_at("on_step_end", interrupt)],
        num_train_epochs=1,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    served = {name: v + 1 for name, v in WithLoss().state_dict().items()}
    trainer.model.load_state_dict(served)
    trainer.evaluate()
    assert same(values(trainer.model), list(served.values()))


def test_hugging_face_reads_between_micro_batches_change_nothing(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers")
    copies = []

    def read(state, control, model):
        model.state_dict()

    def copied(state, control, model):
        copies.append(copy.deepcopy(model))
        copies.append(pickle.loads(pickle.dumps(model)))
        before = values(model)
        for each in copies:
            each.state_dict()
            each.load_state_dict(each.state_dict())
        assert same(values(model), before)

    trainer, optimizer = hugging_face_run(
        BUILDS["adamw"],
        tmp_path,
        [callback_at("on_substep_end", read), callback_at("on_step_end", copied)],
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    close(values(trainer.model), bare_loop(BUILDS["adamw"], epochs=2)[0])
    assert not optimizer.training
    assert not any(m._state_dict_pre_hooks for m in trainer.model.modules())


class Without:
    """An import finder that does not find ``schedulefree``."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        if name.partition(".")[0] == "schedulefree":
            return None
        return self.finder.find_spec(name, *args)

    def find_distributions(self, context):
        if context.name == "schedulefree":
            return ()
        return getattr(self.finder, "find_distributions", lambda _: ())(context)

    def invalidate_caches(self):
        pass


@pytest.fixture
def no_schedulefree(monkeypatch):
    """The session as it is where Meta's package is not installed."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    available = transformers.utils.import_utils.is_schedulefree_available
    loaded = {n: m for n, m in sys.modules.items() if n.startswith("schedulefree")}
    monkeypatch.setattr(sys, "meta_path", [Without(f) for f in sys.meta_path])
    for name in loaded:
        del sys.modules[name]
    # Older ones look once, as they are imported.
    if not hasattr(available, "cache_clear"):
        pytest.skip("needs transformers 5")
    available.cache_clear()
    yield available
    available.cache_clear()
    sys.modules.pop("schedulefree", None)
    sys.modules.update(loaded)


def test_hugging_face_takes_sf_torch_for_schedulefree(no_schedulefree, tmp_path):
    def run():
        trainer, _ = hugging_face_run(
            None,
            tmp_path,
            num_train_epochs=2,
            optim="schedule_free_adamw",
            learning_rate=0.05,
            warmup_steps=0,
        )
        trainer.train()
        return trainer

    with pytest.raises(ImportError, match="schedulefree"):
        run()
    no_schedulefree.cache_clear()
    for _ in range(2):  # once is enough, twice is as good
        sf_torch.replace_schedulefree()
    trainer = run()
    assert type(trainer.optimizer.optimizer) is sf_torch.AdamWScheduleFree
    close(values(trainer.model), bare_loop(BUILDS["adamw"], epochs=2)[0])

    import schedulefree

    assert schedulefree.__version__ == importlib.metadata.version("schedulefree")
    assert schedulefree.__all__ == sf_torch.__all__
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")
