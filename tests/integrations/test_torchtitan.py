"""A container of torchtitan's shape: one optimizer a part of the model, one state dict.

https://github.com/pytorch/torchtitan, ``torchtitan/components/optimizer.py``. PyTorch's
``get_optimizer_state_dict``, which it calls, makes the state of a fresh optimizer by a
step with a learning rate of 0.
"""

import itertools

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch_cases import same, values

import sf_torch

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Container(torch.optim.Optimizer):
    def __init__(self, parts, make, **options):
        self.parts = parts
        self.optimizers = [make(part.parameters(), **options) for part in parts]
        params = itertools.chain(*(part.parameters() for part in parts))
        super().__init__(list(params), options)

    def __iter__(self):
        return iter(self.optimizers)

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        pairs = zip(self.parts, self, strict=True)
        saved = (get_optimizer_state_dict(*pair, options=FLAT) for pair in pairs)
        return {key: value for state in saved for key, value in state.items()}

    def load_state_dict(self, state_dict):
        for part, optimizer in zip(self.parts, self, strict=True):
            set_optimizer_state_dict(
                part, optimizer, optim_state_dict=state_dict, options=FLAT
            )


def parts():
    torch.manual_seed(0)
    names = ("embed", "norm"), ("head",)
    layers = {
        "embed": torch.nn.Linear(3, 4),
        "norm": torch.nn.LayerNorm(4),
        "head": torch.nn.Linear(4, 2),
    }
    # As pipeline stages are: each has the names of the whole model.
    return [torch.nn.ModuleDict({n: layers[n] for n in stage}) for stage in names]


def over_adam(params, lr, warmup_steps):
    base = torch.optim.Adam(params, lr=lr, betas=(0.0, 0.99))
    return sf_torch.ScheduleFreeWrapper(base, warmup_steps=warmup_steps)


BUILDS = {"adamw": sf_torch.AdamWScheduleFree, "wrapper": over_adam}
builds = pytest.mark.parametrize("make", BUILDS.values(), ids=BUILDS)


class Run:
    def __init__(self, make):
        self.parts = parts()
        self.container = Container(self.parts, make, lr=0.05, warmup_steps=4)
        for part, optimizer in zip(self.parts, self.container, strict=True):
            sf_torch.follow(part, optimizer)
            part.train()

    def steps(self, ks):
        for k in ks:
            generator = torch.Generator().manual_seed(k)
            for part in self.parts:
                for p in part.parameters():
                    p.grad = torch.randn(p.shape, generator=generator) + p.detach()
            self.container.step()
            self.container.zero_grad()
        return self

    def at(self):
        xs = [x for optimizer in self.container for x in optimizer.eval_params()]
        return xs, [p for part in self.parts for p in values(part)]


@builds
def test_a_look_at_the_state_before_training_is_no_step(make):
    looked = Run(make)
    before = looked.at()[1]
    looked.container.state_dict()
    assert same(looked.at()[1], before)
    plain = Run(make)
    for mine, theirs in zip(
        looked.steps(range(6)).at(), plain.steps(range(6)).at(), strict=True
    ):
        assert same(mine, theirs)
    assert {g["k"] for o in looked.container for g in o.param_groups} == {6}


@builds
def test_one_state_dict_brings_the_run_of_all_parts_back(make, tmp_path):
    whole, first = Run(make).steps(range(8)), Run(make).steps(range(5))
    models = [part.state_dict() for part in first.parts]
    torch.save((models, first.container.state_dict()), tmp_path / "run.pt")
    models, state = torch.load(tmp_path / "run.pt")
    resumed = Run(make)
    for part, model in zip(resumed.parts, models, strict=True):
        part.load_state_dict(model)
    resumed.container.load_state_dict(state)
    resumed.steps(range(5, 8))
    for mine, theirs in zip(resumed.at(), whole.at(), strict=True):
        assert same(mine, theirs)
