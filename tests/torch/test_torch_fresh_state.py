"""``torch.distributed.checkpoint`` looks at the state of an optimizer by a step.

It sets lr and all gradients to 0 and calls ``step(closure=None)``, in whichever mode.
Such a step must make the state and change nothing else.
"""

import copy

import pytest
import torch
from members import MEMBERS, build, iterates, parameters, run, set_gradients
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch_cases import identical

SHAPES = [(3, 2), (2,)]
every = pytest.mark.parametrize("name", MEMBERS)


def model_over(params):
    return torch.nn.ParameterList(params)


def begin(optimizer):
    if "Closure" not in type(optimizer).__name__:
        optimizer.train()


@pytest.mark.parametrize("training", [True, False])
@every
def test_a_fresh_optimizer_that_was_looked_at_is_fresh(name, training):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, never_seen = build(name, params), build(name, twins)
    if not training:
        optimizer.eval()
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    get_optimizer_state_dict(model_over(params), optimizer)
    assert identical(optimizer.state_dict()["param_groups"], before)
    with torch.no_grad():
        for p in (*params, *twins):  # weights that are loaded only now
            p.mul_(0.5)
    begin(optimizer)
    for each, its in ((optimizer, params), (never_seen, twins)):
        run(each, its, range(4))
    assert identical(iterates(optimizer, params), iterates(never_seen, twins))
    assert identical(optimizer.state_dict(), never_seen.state_dict())


@pytest.mark.parametrize("flatten", [True, False])
@every
def test_a_fresh_optimizer_goes_on_from_what_is_loaded(name, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    params, twins = parameters(SHAPES), parameters(SHAPES)
    former, resumed = build(name, params), build(name, twins)
    run(former, params, range(4))
    saved = get_optimizer_state_dict(model_over(params), former, options=options)
    saved = copy.deepcopy(saved)
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            twin.copy_(p)
    set_optimizer_state_dict(model_over(twins), resumed, saved, options=options)
    begin(resumed)
    for each, its in ((former, params), (resumed, twins)):
        run(each, its, range(4, 7))
    assert identical(iterates(resumed, twins), iterates(former, params))


def test_a_learning_rate_of_zero_counts_where_there_are_gradients():
    params = parameters(SHAPES)
    optimizer = build("AdamWScheduleFree", params, lr=0.0)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1
