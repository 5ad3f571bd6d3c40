"""The numbers of one step: all that its arithmetic needs besides the arrays.

    m' = m + m_weight (g - m)
    v' = v + v_weight (|g|² - v)
    d  = m' / (root sqrt(v') + eps)       with g for m' where there is no m, and
                                          d = m' where there is no v
    z' = z - lr d - decay p               p: y, z or x before the step
    x' = x + ckp1 (z' - x)
    y' = x' + z_in_next_y (z' - x')

Where x is not stored, y and z give it, and y moves without it:

    x  = y + z_in_x (z - y)
    y' = y + to_step (z' - z) + to_z (z - y)

with ``to_step = 1 - β' (1 - c)``, ``to_z = c + e (1 - c)`` and ``e = (β - β') / β``,
where β formed the present y and β' forms the next.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = Any
"""A float. In a compiled step, and with ``capturable``, a () tensor in float64."""

EPS_FLOOR = torch.finfo(torch.float32).tiny ** 0.5
"""The least eps: the root of the smallest normal float32.

While all gradients are 0, so is v, and 0 / 0 is NaN. A gradient may also be so small
that its square is 0: divided by less than this, it would throw z far off.
"""


class Numbers(NamedTuple):
    """The numbers of one step of some parameters; the module has the formulas."""

    lr: Number = 0.0  # lr_k, divided by the bias correction of m
    decay: Number = 0.0  # lr_k λ
    m_weight: Number = 1.0  # 1 - b, of g in the first moment
    v_weight: Number = 1.0  # 1 - b2, of |g|² in the second moment
    root: Number = 1.0  # 1 / sqrt(1 - b2^t); 0 where RAdam does not divide yet
    eps: Number = 1.0
    ckp1: Number = 0.0  # c_k, of z' in x'
    z_in_x: Number = 0.0  # 1 - 1 / β
    z_in_y: Number = 0.0  # 1 - β
    z_in_next_y: Number = 0.0  # 1 - β'
    to_z: Number = 0.0
    to_step: Number = 0.0
    skip: Number = 0.0  # 1 where nothing moves, which a captured step finds by itself
    # What is the same at every step, so that a kernel may be made for it.
    decay_at: str = ""  # which of y, z, x is p; empty where nothing decays
    # Whether p shrinks before the step, and x with it, as in the published GPA: y stays
    # where z shrinks, z stays where y does, and x is what the two imply.
    decay_moves_x: bool = False
    # Whether each operation on a narrow v rounds what it stores, as in-place ones do:
    # R(R(b2 v) + v_weight |g|²) is v', and R(R(sqrt(v')) + eps) the denominator.
    v_in_place: bool = False
    b2: float = 0.0
    k: Number = 0  # steps taken before this one
    step: int = 0  # the same of the group; known where the seed needs it

    def averaged(self, ckp1: Number, b1: float, next_b1: float) -> "Numbers":
        """The same with an average: c_k, and β before and after the step."""
        turn = (b1 - next_b1) / b1 if b1 != next_b1 and b1 else 0.0
        return self._replace(
            ckp1=ckp1,
            z_in_x=1 - 1 / b1 if b1 else 0.0,
            z_in_y=1 - b1,
            z_in_next_y=1 - next_b1,
            to_z=ckp1 + turn * (1 - ckp1),
            to_step=1 - next_b1 * (1 - ckp1),
        )

    def as_tensor(self, device: torch.device) -> Tensor:
        """Those of :data:`NAMES` together, in float64: no step size overflows it."""
        numbers = [getattr(self, name) for name in NAMES]
        if not any(isinstance(number, Tensor) for number in numbers):
            there = torch.tensor(numbers, dtype=torch.float64)
            if device.type == "cpu":
                return there
            return there.pin_memory().to(device, non_blocking=True)
        # Filled on the device: a CUDA graph takes no copies from the host.
        return torch.stack(
            [
                number.to(device, torch.float64)
                if isinstance(number, Tensor)
                else torch.full((), number, dtype=torch.float64, device=device)
                for number in numbers
            ]
        )

    def kind(self) -> "Numbers":
        """The same without those of :data:`NAMES` and k: what a kernel is made for."""
        nothing: Any = dict.fromkeys(NAMES, 0.0)
        return self._replace(**nothing, k=0)

    def unpacked(self, packed: Tensor) -> "Numbers":
        """The same with the numbers that :meth:`as_tensor` has packed, as tensors:
        torch.compile then takes other values without compiling anew."""
        values: Any = dict(zip(NAMES, packed.unbind(), strict=True))
        return self._replace(**values)

    def in_dtype(self, dtype: torch.dtype) -> "Numbers":
        """The same with its tensors in ``dtype``: PyTorch promotes a parameter of shape
        () to the dtype of a number of shape ()."""
        if not isinstance(self.lr, Tensor):
            return self
        values: Any = {name: getattr(self, name).to(dtype) for name in NAMES}
        return self._replace(**values)


NAMES = Numbers._fields[: Numbers._fields.index("decay_at")]
"""The numbers proper, in the order in which kernels find them in memory."""
