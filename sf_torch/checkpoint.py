"""Checkpoints that hold x under "model", ready to serve, and resume at y."""

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from sf_torch._optimizer import ScheduleFree

FORMAT = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: ScheduleFree,
    **extra: Any,
) -> None:
    """Writes model and optimizer, whole or not at all; neither changes.

    The file is a dict that ``torch.load(path, weights_only=True)`` reads: ``model``
    (the state dict at x), ``optimizer``, ``training`` (the mode), ``y`` (in train mode,
    the live parameters), ``versions`` and ``extra``.

    Args:
      path: of the file. It is replaced only once the new one is complete.
      model: the module whose parameters the optimizer moves.
      optimizer: an optimizer of this package, in either mode.
      extra: anything that ``weights_only`` loading allows: numbers, strings, tensors.

    Raises:
      ValueError: the optimizer holds parameters that are not the model's.

    Examples:
      >>> import tempfile, torch, sf_torch
      >>> model = torch.nn.Linear(2, 1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters(), lr=0.1)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     sf_torch.save_checkpoint(f"{folder}/run.pt", model, optimizer, epoch=3)
      ...     sf_torch.load_checkpoint(f"{folder}/run.pt", model, optimizer)
      {'epoch': 3}
    """
    _check_pair(model, optimizer)
    content = {
        "format": FORMAT,
        "model": optimizer.eval_state_dict(model),
        "optimizer": optimizer.state_dict(),
        "training": optimizer.training,
        # x and z give y back but for its last digit, which a resumed run would notice.
        "y": _parameters(optimizer) if optimizer.training else None,
        "versions": {"torch": str(torch.__version__)},
        "extra": extra,
    }
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(
    path: str | os.PathLike[str], model: torch.nn.Module, optimizer: ScheduleFree
) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` wrote: the model at y or x, as it was saved.

    A run that goes on from here is the uninterrupted run, bit for bit.

    Args:
      path: of the file.
      model: a module of the same structure and shapes.
      optimizer: an optimizer over its parameters, with the same groups.

    Returns:
      The extra that was saved.

    Raises:
      ValueError: a file that is damaged, holds code, or does not fit the model and
        the optimizer; they are as before then.
    """
    _check_pair(model, optimizer)
    content = _read(path)
    _check_shapes(path, content["model"], model)
    saved = content["optimizer"]
    groups = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if groups != own:
        raise ValueError(
            f"{path} has parameter groups of {groups} parameters, the optimizer of "
            f"{own}. Build the optimizer as it was when the file was saved."
        )
    # The model holds x until the optimizer's state is there to give y.
    at_x = [{**group, "train_mode": False} for group in saved["param_groups"]]
    optimizer.load_state_dict({**saved, "param_groups": at_x})
    model.load_state_dict(content["model"])
    if content["training"]:
        optimizer.train()
        with torch.no_grad():
            for p, y in zip(_parameters(optimizer), content["y"], strict=True):
                p.copy_(y)
    model.train(content["training"])
    return content["extra"]


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds code, which is never run. Load a file that "
            "save_checkpoint wrote."
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {error}. Load a file that save_checkpoint wrote."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of format {FORMAT}. Load a file that "
            "save_checkpoint wrote."
        )
    return content


def _parameters(optimizer: ScheduleFree) -> list[torch.Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def _check_pair(model: torch.nn.Module, optimizer: ScheduleFree) -> None:
    params = {id(p) for p in model.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in params:
                raise ValueError(
                    f"the optimizer moves a parameter of shape {tuple(p.shape)} that "
                    "is not the model's. Pass the model that it was built over."
                )


def _check_shapes(
    path: str | os.PathLike[str], saved: dict[str, Any], model: torch.nn.Module
) -> None:
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(saved[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if isinstance(own[name], torch.Tensor) and saved[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(sorted(problems))}."
        )
