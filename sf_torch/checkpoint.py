"""Checkpoints that hold x under "model", ready to serve, and resume at y."""

import os
from typing import Any

import torch

from sf_torch import _archive, _loaded
from sf_torch._optimizer import ScheduleFree
from sf_torch._optimizers.forms import Closure
from sf_torch._step.schedule import has_begun
from sf_torch._wrapped import unwrapped

FORMAT = 1
PARTS = {
    "model": dict,
    "optimizer": dict,
    "optimizer_training": bool,
    "training": bool,
    "extra": dict,
}


def save_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    **extra: Any,
) -> None:
    """Writes model and optimizer, whole or not at all; neither changes.

    The file is a dict that ``torch.load(path, weights_only=True)`` reads: ``model``
    (the state dict at x), ``optimizer`` (its state dict, and y), ``training`` (the
    mode of both), ``versions`` and ``extra``.

    Args:
      path: of the file. It is replaced only once the new one is complete and on the
        disk; a link is followed, and an existing file keeps its mode.
      model: the module whose parameters the optimizer moves.
      optimizer: an optimizer of this package, in either mode, or an object around one
        as :func:`~sf_torch.unwrapped` takes it.
      extra: anything that ``weights_only`` loading allows: numbers, strings, tensors,
        and lists, tuples and dicts of them. Scalars of NumPy, here and in the groups,
        are written as Python numbers.

    Raises:
      ValueError: an entry that could not be read again; parameters that are sharded
        over processes; the optimizer holds parameters that are not in the model's
        state dict; or one of the two is in train mode and the other in eval mode. An
        optimizer that has not stepped yet, or whose form has no modes, is in the
        model's.
      OSError: the folder of path does not exist, path is a folder, or the file cannot
        be written. What was there is as before.

    Examples:
      >>> import tempfile, torch, sf_torch
      >>> model = torch.nn.Linear(2, 1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters(), lr=0.1)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sf_torch.save_checkpoint(f"{folder}/run.pt", model, optimizer, epoch=3)
      ...     sf_torch.load_checkpoint(f"{folder}/run.pt", model, optimizer)
      {'epoch': 3}
    """
    optimizer = unwrapped(optimizer)
    _check_pair(model, optimizer)
    saved = optimizer.state_dict()
    if optimizer.training:
        # Made from x and z on loading, y could be a rounding off.
        for index, p, state in _loaded.saved_states(optimizer, saved):
            if "z" in state:
                saved["state"][index] = {"y": p.detach(), **state}
    content = {
        "format": FORMAT,
        "model": optimizer.eval_state_dict(model),
        "optimizer": saved,
        "optimizer_training": optimizer.training,
        "training": model.training,
        "versions": {"torch": str(torch.__version__)},
        "extra": extra,
    }
    _archive.write(path, content)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` wrote: x, y, z and modes, bit for bit.

    Args:
      path: of the file.
      model: a module of the same structure and shapes.
      optimizer: an optimizer over its parameters, with the same groups, or an object
        around it.

    Returns:
      The extra that was saved.

    Raises:
      ValueError: a file that is damaged, holds code, or does not fit the model and
        the optimizer, or a pair that :func:`save_checkpoint` refuses; they are as
        before then.
    """
    optimizer = unwrapped(optimizer)
    _check_pair(model, optimizer)
    content = _read(path)
    _check_shapes(path, content["model"], model)
    saved = content["optimizer"]
    optimizer._check_fits(saved)
    # The file is that of eval mode: the model at x, and y aside.
    at_x = [{**group, "train_mode": False} for group in saved["param_groups"]]
    with optimizer._moving():
        optimizer.load_state_dict({**saved, "param_groups": at_x})
        model.load_state_dict(content["model"])
        if content["optimizer_training"]:
            _resume(optimizer)
    model.train(content["training"])
    return content["extra"]


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = _archive.read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of format {FORMAT}. Load a file that "
            "save_checkpoint wrote."
        )
    kinds = {key: type(value) for key, value in content.items()}
    if any(kinds.get(key) is not kind for key, kind in PARTS.items()):
        raise ValueError(
            f"{path} is damaged: it holds {kinds}. Load a file that save_checkpoint "
            "wrote."
        )
    return content


@torch.no_grad()
def _resume(optimizer: ScheduleFree) -> None:
    """From x to the y that was saved, not one made anew."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state and "y" in state:
                p.copy_(state["y"])
        group["train_mode"] = True
    optimizer._settle()


def _check_pair(model: torch.nn.Module, optimizer: ScheduleFree) -> None:
    stepped = any(map(has_begun, optimizer.param_groups))
    half_moved = optimizer._spoiled is not None
    has_modes = stepped and not half_moved and not isinstance(optimizer, Closure)
    if has_modes and model.training != optimizer.training:
        modes = [m.training for m in (model, optimizer)]
        model_mode, mode = ("train" if training else "eval" for training in modes)
        raise ValueError(
            f"the model is in {model_mode} mode, the optimizer in {mode} mode. Call "
            "train() or eval() on both; follow(model, optimizer) keeps them together."
        )
    saved = model.state_dict(keep_vars=True)
    _archive.refuse_sharded(saved)
    optimizer._check_saved(model, saved)


def _check_shapes(
    path: str | os.PathLike[str], saved: dict[str, Any], model: torch.nn.Module
) -> None:
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - own.keys()]
    problems += [
        f"{name} is {_kind(saved[name])}, the model's {_kind(own[name])}"
        for name in own.keys() & saved.keys()
        if isinstance(own[name], torch.Tensor)
        and _kind(saved[name]) != _kind(own[name])
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(sorted(problems))}."
        )


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    return f"{tuple(value.shape)}{', complex' if value.is_complex() else ''}"
