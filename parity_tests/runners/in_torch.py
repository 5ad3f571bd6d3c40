"""Runs a case in PyTorch: sf_torch, or Meta's schedulefree."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from parity_tests.registry.case import Case
from parity_tests.runners.trajectory import Trajectory
from sf_torch._step import batches
from sf_torch._step.fused import works_on

Params = dict[str, torch.nn.Parameter]
Leaves = dict[str, np.ndarray]


def run(
    case: Case,
    steps: int,
    device: str = "cpu",
    *,
    form: str = "",
    foreach: bool = False,
    fused: bool = False,
    blocks: bool = False,
    package: str = "sf_torch",
) -> Trajectory:
    """Runs a case.

    Args:
      form: "", "Reference" or "Closure", as in the names of the classes.
      blocks: cut tensors into blocks, as is done with large ones on CPUs.
      package: "sf_torch" or "meta".
    """
    params = parameters(case, device)
    # Meta's AdamW Reference prints when it switches modes.
    out = io.StringIO() if package == "meta" else sys.stdout
    in_blocks = _small_blocks() if blocks else contextlib.nullcontext()
    with contextlib.redirect_stdout(out), _one_thread(), in_blocks:
        optimizer = build(case, params, package, form, foreach, fused)
        closure_form = form == "Closure"
        if not closure_form:
            optimizer.train()
        # The closure form is at y only inside its closure, so the y after step k is
        # read in step k + 1, and one more step is taken.
        walk = _closure_steps if closure_form else advance
        record = list(walk(case, params, optimizer, range(steps), package))
    trajectory = Trajectory.stacked(record)
    return trajectory.with_rounding() if case.dtype == "bfloat16" else trajectory


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Restricts PyTorch to one thread: tensors here are too small for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _small_blocks() -> contextlib.AbstractContextManager[Any]:
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(batches, "BLOCK", 16))
    patches.enter_context(mock.patch.object(batches, "SHARE", 4))
    return patches


def parameters(case: Case, device: str = "cpu") -> Params:
    dtype = None if case.is_complex else getattr(torch, case.dtype)
    return {
        name: torch.nn.Parameter(torch.as_tensor(p).to(device, dtype))
        for name, p in case.params.items()
    }


def unfused(case: Case, device: str) -> str | None:
    """Why the fused kernel cannot run the case on the device, or None."""
    if not case.optimizer.fuses:
        return "moves z by another optimizer"
    if case.is_complex or case.dtype == "float64":
        return "its arithmetic is in float32"
    if not works_on(torch.device(device)):
        return "needs CUDA, or TRITON_INTERPRET=1"
    if case.dtype == "bfloat16" and device == "cpu":
        return "Triton's interpreter rounds to bfloat16 towards zero"
    return None


def build(
    case: Case,
    params: Params,
    package: str,
    form: str = "",
    foreach: bool = False,
    fused: bool = False,
) -> Any:
    make = case.optimizer.meta if package == "meta" else case.optimizer.torch
    assert make is not None, case.unsupported(package)
    groups = [
        {
            "params": [params[n] for n in leaves],
            **case.optimizer.arguments(options.at(0)),
            **({"fused": True} if fused else {}),
        }
        for leaves, options in case.group_options
    ]
    return make(groups, case.options.at(0), form, foreach)


def advance(
    case: Case, params: Params, optimizer: Any, ks: range, package: str
) -> Iterator[tuple[Leaves, Leaves | None, Leaves]]:
    """Takes the steps ``ks`` of a run and yields y, x and z after each."""
    source = case.source(max(ks.stop, 1))
    for k in ks:
        _schedule(case, optimizer, k)
        value = _differentiate(source, params, k)
        if hasattr(optimizer, "step_func"):  # takes the loss
            optimizer.step_func(function_value=value)
        else:
            optimizer.step()
        y = _numpy(params)
        yield y, _x(case, params, optimizer, package), _z(params, optimizer, y)


def _closure_steps(
    case: Case, params: Params, optimizer: Any, ks: range, package: str
) -> Iterator[tuple[Leaves, Leaves | None, Leaves]]:
    source = case.source(ks.stop)
    before: Any = None
    at_y: list[Leaves] = []

    def closure(k: int) -> float:
        at_y.append(_numpy(params))
        return _differentiate(source, params, min(k, ks.stop - 1))

    for k in range(ks.start, ks.stop + 1):
        _schedule(case, optimizer, k)
        optimizer.step(lambda k=k: closure(k))
        if before is not None:
            yield at_y[-1], *before
        x = _x(case, params, optimizer, package)
        before = x, _z(params, optimizer, _numpy(params))


def _schedule(case: Case, optimizer: Any, k: int) -> None:
    """Sets the scheduled arguments of every group, as a scheduler would."""
    options = [each.at(k) for _, each in case.group_options]
    if not case.groups:  # The optimizer may have split the one group.
        options *= len(optimizer.param_groups)
    for group, each in zip(optimizer.param_groups, options, strict=True):
        arguments = case.optimizer.arguments(each)
        group.update((n, v) for n, v in arguments.items() if n in _SCHEDULED)
    b1 = case.options.at(k).b1
    # A wrapper has one β for all groups; one that grows by itself, from the start.
    if hasattr(optimizer, "base") and not callable(b1):
        optimizer.momentum = b1


_SCHEDULED = ("lr", "betas", "momentum")


def _differentiate(source: Any, params: Params, k: int) -> float:
    value, grads = source.torch(params, source.at(k))
    for name, p in params.items():
        p.grad = grads[name]
    return value


def _x(case: Case, params: Params, optimizer: Any, package: str) -> Leaves | None:
    if package != "meta":
        wide = torch.float32 if case.dtype == "bfloat16" else None
        xs = iter(optimizer.eval_params(dtype=wide))
        # In the order of the groups, which need not be that of the leaves.
        by_name = {n: next(xs) for leaves, _ in case.group_options for n in leaves}
        return _numpy(by_name)
    if case.options.b1 == 0:
        return None  # its eval() divides by β
    # eval() and train() would round y at every step. It is put back instead.
    y = {name: p.detach().clone() for name, p in params.items()}
    optimizer.eval()
    x = _numpy(params)
    optimizer.train()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(y[name])
    return x


def _z(params: Params, optimizer: Any, unmoved: Leaves) -> Leaves:
    """z by leaf. A leaf that has had no gradient yet has no z: it has not moved."""
    zs = {n: optimizer.state[p].get("z") for n, p in params.items()}
    return {n: unmoved[n] if z is None else _numpy({n: z})[n] for n, z in zs.items()}


def _numpy(leaves: Any) -> Leaves:
    def copied(leaf: torch.Tensor) -> np.ndarray:
        leaf = leaf.detach().cpu()
        return (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy().copy()

    return {name: copied(leaf) for name, leaf in leaves.items()}
