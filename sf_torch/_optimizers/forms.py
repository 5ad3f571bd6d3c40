"""Two other forms of every optimizer: Reference and Closure.

Each is a base class that stands before the class of an optimizer.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sf_torch._optimizer import ScheduleFree
from sf_torch._step.schedule import Group


class Reference(ScheduleFree):
    """Stores x, y and z: the formulas as they stand, nothing recovered.

    Uses two more arrays a parameter than the plain form; switching modes loses nothing
    to rounding.
    """

    _stores_y = True

    def _stores_x(self, group: Group) -> bool:
        return True

    def _state_of(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        state = super()._state_of(p, group)
        if "y" not in state:
            state["y"] = p.detach().to(state["z"].dtype, copy=True)
        return state


class Closure(ScheduleFree):
    """The parameters hold x, but for the time that a step's closure runs.

    There are no modes to switch and none to forget; the price is a second pass over
    the parameters and x in the state.
    """

    def _stores_x(self, group: Group) -> bool:
        return True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
          closure: evaluates the loss and its gradients; it finds y in the parameters.

        Returns:
          What closure returned.

        Raises:
          ValueError: no closure.
        """
        if closure is None:
            if self._is_asked_for_state():
                return ScheduleFree.step(self)
            raise ValueError(
                "step() needs a closure here: between steps the parameters hold x, and "
                "gradients belong to y. Call step(closure), or use the form without "
                "Closure in its name."
            )
        with self.train_mode():
            # By its name: the class between may carry torch's step hooks as well.
            return ScheduleFree.step(self, closure)
