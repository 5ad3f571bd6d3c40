"""Whether gradients are finite, found on their device and for all shards of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sf_torch._step.batches import local


def not_finite(grads: Sequence[Tensor | None]) -> Tensor:
    """Whether any of them has a NaN or an infinity: a () tensor of bool.

    It lies on the device of the first. Of distributed gradients all processes find the
    same.
    """
    given: list[Any] = [grad for grad in grads if grad is not None]
    found = torch.zeros((), dtype=torch.bool, device=given[0].device if given else None)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in map(local, given):
        if grad.numel():
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            alike.setdefault((real.device, real.dtype), []).append(real)
    for tensors in alike.values():
        # The largest magnitudes, which no dtype overflows by and NaN is larger than.
        largest = torch.stack(torch._foreach_norm(tensors, float("inf")))
        found = found | ~largest.isfinite().all().to(found.device)
    for mesh in dict.fromkeys(g.device_mesh for g in given if local(g) is not g):
        found = _in_any_process(found, mesh)
    return found


def _in_any_process(found: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial

    shares = [Partial("sum")] * mesh.ndim
    return DTensor.from_local(found.float(), mesh, shares).full_tensor() > 0
