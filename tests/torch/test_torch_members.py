"""The table that other tests are parametrised over holds every optimizer."""

import torch
from members import MEMBERS

import sf_torch


def test_every_public_optimizer_is_a_member():
    public = {
        name
        for name in sf_torch.__all__
        if isinstance(each := getattr(sf_torch, name), type)
        and issubclass(each, torch.optim.Optimizer)
        and hasattr(each, "eval_params")
    }
    assert {make.__name__ for make, _ in MEMBERS.values()} == public
