"""A loop of nanoGPT's shape: modes of the model, lr set by hand, its own checkpoint.

https://github.com/karpathy/nanoGPT, ``train.py``: two groups by the number of
dimensions, ``estimate_loss`` between ``model.eval()`` and ``model.train()``, a dict of
state dicts that is saved in train mode, gradients clipped, and a scaler that does
nothing in full precision.
"""

import pytest
import torch
from torch_cases import same, values

import sf_torch

TEXT = torch.randint(8, (200,), generator=torch.Generator().manual_seed(0))
WARMUP, STEPS, EVERY = 4, 12, 4


class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.wte = torch.nn.Embedding(8, 6)
        self.ln = torch.nn.LayerNorm(6)
        self.lm_head = torch.nn.Linear(6, 8, bias=False)
        self.wte.weight = self.lm_head.weight  # tied, as theirs

    def forward(self, tokens, targets):
        logits = self.lm_head(self.ln(self.wte(tokens)))
        return torch.nn.functional.cross_entropy(logits, targets)

    def configure_optimizers(self, **options):
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return sf_torch.AdamWScheduleFree(groups, **options)


def batch(iteration):
    generator = torch.Generator().manual_seed(iteration)
    at = torch.randint(len(TEXT) - 1, (16,), generator=generator)
    return TEXT[at], TEXT[at + 1]


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    loss = model(TEXT[:-1], TEXT[1:])
    model.train()
    return loss.item()


class Run:
    """A run, which may begin with a checkpoint."""

    def __init__(self, checkpoint=None, load="model first"):
        self.model, self.iter_num, self.best = GPT(), 0, 1e9
        self.optimizer = self.model.configure_optimizers(lr=0.05, betas=(0.9, 0.95))
        parts = [("model", self.model), ("optimizer", self.optimizer)]
        if checkpoint is not None:
            for name, part in parts if load == "model first" else reversed(parts):
                part.load_state_dict(checkpoint[name])
            self.iter_num = checkpoint["iter_num"]
            self.best = checkpoint["best_val_loss"]
        sf_torch.follow(self.model, self.optimizer)
        self.losses = []

    def until(self, end, path=None):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        while self.iter_num < end:
            lr = 0.05 * min(1, (self.iter_num + 1) / WARMUP)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            if self.iter_num % EVERY == 0:
                self.losses.append(estimate_loss(self.model))
                if path is not None and self.iter_num > 0:
                    self.best = min(self.best, self.losses[-1])
                    checkpoint = {
                        "model": self.model.state_dict(),
                        "optimizer": self.optimizer.state_dict(),
                        "iter_num": self.iter_num,
                        "best_val_loss": self.best,
                    }
                    torch.save(checkpoint, path)
            loss = self.model(*batch(self.iter_num))
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            scaler.step(self.optimizer)
            scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.iter_num += 1
        return self


@pytest.mark.parametrize("load", ["model first", "optimizer first"])
def test_its_checkpoint_resumes_the_same_run(load, tmp_path):
    whole = Run().until(STEPS)
    Run().until(EVERY + 1, tmp_path / "ckpt.pt")
    resumed = Run(torch.load(tmp_path / "ckpt.pt"), load)
    assert (resumed.iter_num, resumed.optimizer.training) == (EVERY, True)
    resumed.until(STEPS)
    assert same(values(resumed.model), values(whole.model))
    assert same(resumed.optimizer.eval_params(), whole.optimizer.eval_params())
    assert resumed.losses == whole.losses[1:]


def test_it_is_evaluated_at_x_and_a_sampler_finds_x_in_its_checkpoint(tmp_path):
    """The file holds y, which the loop saves in train mode, and all that x needs."""
    run = Run().until(EVERY)
    x, y = run.optimizer.eval_params(), values(run.model)
    run.until(EVERY + 1, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt")
    assert same([saved["model"][n] for n, _ in run.model.named_parameters()], y)
    sampler = Run(saved)
    sampler.model.eval()
    assert same(sampler.optimizer.eval_params(), x)
    assert not same(x, y)
    with torch.no_grad():
        assert sampler.model(TEXT[:-1], TEXT[1:]).item() == run.losses[-1]
