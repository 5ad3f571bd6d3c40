"""What processes must agree on: their modes, and for ScheduleFree+ their losses."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sf_torch._wrapped import unwrapped


def check_modes(optimizer: Optimizer, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank when ranks disagree about the mode.

    A collective: all ranks of the group must call it, before evaluation or a save for
    instance. Without a process group it does nothing.

    Args:
      optimizer: this rank's optimizer, or an object around it as
        :func:`~sf_torch.unwrapped` takes it.
      group: the process group; by default that of all ranks.

    Raises:
      RuntimeError: on all ranks, naming those in train mode and those in eval mode.
      ValueError: this rank is no member of the group.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.Linear(2, 1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters())
      >>> sf_torch.check_modes(optimizer)  # a single process agrees with itself
    """
    optimizer = unwrapped(optimizer)
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group. Call check_modes on "
            "the ranks of the group alone, or leave group out."
        )
    ranks = dist.get_process_group_ranks(group)
    modes: list[bool] = [False] * len(ranks)
    dist.all_gather_object(modes, optimizer.training, group=group)
    train = [rank for rank, training in zip(ranks, modes, strict=True) if training]
    evaluating = [rank for rank in ranks if rank not in train]
    if train and evaluating:
        raise RuntimeError(
            f"ranks {train} are in train mode, ranks {evaluating} in eval mode: some "
            "hold y, others x. Call optimizer.train() or optimizer.eval() on all ranks."
        )


def mean_loss(loss: float | Tensor, group: dist.ProcessGroup | None = None) -> float:
    """The mean of the processes' losses: what ScheduleFree+ needs under DDP.

    A collective: all ranks of the group must call it. Without a process group it is the
    loss as it is.

    Args:
      loss: this rank's loss, one number.
      group: the process group; by default that of all ranks.

    Returns:
      The mean, the same number on all ranks.

    Examples:
      >>> import torch, sf_torch
      >>> loss = torch.tensor(2.0, requires_grad=True)
      >>> sf_torch.mean_loss(loss)  # a single process has the mean
      2.0
    """
    # PyTorch warns of a number from what has a graph.
    number = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if not (dist.is_available() and dist.is_initialized()):
        return number
    return totals([number], group)[0] / dist.get_world_size(group)


def totals(numbers: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sums over the processes of a group, or the numbers where there is no group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return list(numbers)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    together = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(together, group=group)
    return together.tolist()


def mean_over_mesh(loss: float, mesh: Any) -> float:
    """The mean of the losses of a device mesh's processes."""
    from torch.distributed.tensor import Shard

    return totals_over_mesh([loss], mesh, [Shard(0)] * mesh.ndim)[0] / mesh.size()


def totals_over_mesh(
    sums: Sequence[float], mesh: Any, placements: Sequence[Any]
) -> list[float]:
    """Sums over a distributed tensor, of those over each process's part of it."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    here = torch.tensor(sums, dtype=torch.float64, device=mesh.device_type)
    kinds = [Replicate() if p.is_replicate() else Partial() for p in placements]
    parts = DTensor.from_local(here, mesh, kinds, run_check=False)
    return parts.full_tensor().tolist()


def warn_of_other_processes(known: int) -> None:
    """Warns where there are more processes than the loss is known to be the mean of."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size() > known:
        warnings.warn(
            f"there are {dist.get_world_size()} processes, and the loss that "
            f"ScheduleFree+ got is of {known}. If all train one model together (DDP), "
            "pass sf_torch.mean_loss(loss): else each takes a step of its own, and the "
            "replicas part. If they train several models, pass loss.detach().",
            stacklevel=2,
        )
