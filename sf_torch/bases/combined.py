"""Several torch optimizers as one, for ScheduleFreeWrapper: Muon and AdamW, say."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters that take their steps together.

    Args:
      optimizers: any torch optimizers, no parameter in two of them. Their groups and
        state become this one's, and stay theirs.

    Raises:
      ValueError: a parameter in two optimizers, no optimizer at all, or a group that
        is added later, which could belong to any.

    Examples:
      >>> import torch, sf_torch
      >>> model = torch.nn.Linear(3, 2)
      >>> base = sf_torch.CombinedOptimizer(
      ...     torch.optim.Muon([model.weight], lr=0.02, weight_decay=0.0),
      ...     torch.optim.AdamW([model.bias], lr=0.02, betas=(0.0, 0.999)),
      ... )
      >>> optimizer = sf_torch.ScheduleFreeWrapper(base, momentum=0.9)
      >>> optimizer.train()
      >>> model(torch.ones(3)).sum().backward()
      >>> optimizer.step()
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        groups = [group for each in optimizers for group in each.param_groups]
        super().__init__(groups, {})
        self.optimizers = optimizers
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for each in optimizers:
            state.update(each.state)
        self.state = state
        self._share()

    def _share(self) -> None:
        """The optimizers see this one's groups and state."""
        groups = iter(self.param_groups)
        for each in self.optimizers:
            each.param_groups = [next(groups) for _ in each.param_groups]
            each.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.optimizers:
            raise ValueError(
                "a group added here could belong to any of the optimizers. Add it to "
                "one of them before they are put together."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; closure is called once, before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss
