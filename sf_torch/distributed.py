"""Whether all processes of a distributed run are in the same mode."""

import torch.distributed as dist

from sf_torch._optimizer import ScheduleFree


def check_modes(
    optimizer: ScheduleFree, group: dist.ProcessGroup | None = None
) -> None:
    """Raises on every rank when ranks disagree about the mode.

    A collective: all ranks of the group must call it, before evaluation or a save for
    instance. Without a process group it does nothing.

    Args:
      optimizer: this rank's optimizer.
      group: the process group; by default that of all ranks.

    Raises:
      RuntimeError: on all ranks, naming those in train mode and those in eval mode.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.Linear(2, 1)
      >>> optimizer = sf_torch.SGDScheduleFree(model.parameters())
      >>> sf_torch.check_modes(optimizer)  # a single process agrees with itself
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
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
