"""Which executor moves which parameters.

The only place that looks at device, dtypes and layout to decide. The decision is kept
from step to step, for as long as the same parameters take part and nothing has moved in
memory: to look at each of thousands of small tensors takes longer than their step.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor

from sf_torch._step import batches, eager, fused
from sf_torch._step.batches import Leaf, local, same_layout
from sf_torch._step.eager import Lists, Scratch, Tensors
from sf_torch._step.formula import Plain
from sf_torch._step.fused import Kernel
from sf_torch._step.numbers import Numbers

Executor = Kernel | Lists | Plain


class Way(NamedTuple):
    """How a group's options let its parameters move."""

    fuses: bool  # whether its arrays are the Triton kernel's where it takes them
    captures: bool  # whether nothing else may move them: a CUDA graph is to replay it
    together: bool  # whether parameters share a batch
    seed: int | None = None  # of random rounding, by the formula; None: to nearest


def way(group: Mapping[str, Any]) -> Way:
    """What a group's options ``foreach``, ``fused`` and ``capturable`` ask for."""
    fuses, captures = group["fused"], group["capturable"]
    if fuses is None and not captures:
        # Triton's interpreter is for tests, which ask for it.
        fuses = not group["foreach"] and all(
            p.is_cuda and fused.works_on(p.device) for p in group["params"]
        )
    together = group.get("foreach") is not False
    if group.get("rounding") == "stochastic":
        return Way(False, False, False, group["seed"])
    return Way(bool(fuses or captures), captures, together)


class Plan:
    """How some parameters of a group take their steps.

    Args:
      params: those that have a gradient.
      grads: theirs.
      leaves: the arrays of each.
      way: what their group asks for.
      kind: whatever else decides which arrays they have; equal while it is the same.
      scratch: of the optimizer.
      places: of the parameters in the optimizer, for random rounding.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Tensors,
        leaves: Sequence[Leaf],
        way: Way,
        kind: Any,
        scratch: Scratch,
        places: Sequence[int],
    ) -> None:
        self.params, self.kind, self.leaves = params, kind, leaves
        self.way, self.scratch, self.places = way, scratch, places
        self.rows = tuple(leaves[0])
        # Mixed dtypes have other rows beside one another, and next_z is another tensor
        # at every step: such parameters are looked at anew.
        self.lasts = "next_z" not in self.rows and all(
            tuple(leaf) == self.rows for leaf in leaves
        )
        self.sharded = any(local(p) is not p for p in params)
        self.grad_kinds = _kinds(self._local(grads))
        self.executors: list[Executor] = []
        self._look()

    def _look(self) -> None:
        """Remembers where the arrays lie."""
        rows = self.rows if self.lasts else ()
        columns = [[leaf[row] for leaf in self.leaves] for row in rows]
        self.addresses = [_addresses(column) for column in columns]

    def prepare(self, grads: Tensors) -> None:
        """Makes the executors, which may move state in memory. A compiler has its own.

        Raises:
          RuntimeError: the group asks for a way that its parameters cannot go.
        """
        if not self.executors:
            # A distributed tensor's local part may be an alias, which cannot be moved.
            way = self.way._replace(together=self.way.together and not self.sharded)
            given = self._local(grads), way, self.scratch, self.places
            self.executors = _executors(self.leaves, *given)
            self._look()

    def _local(self, grads: Tensors) -> Tensors:
        return list(map(local, grads)) if self.sharded else grads

    def fits(
        self,
        params: Sequence[Tensor],
        grads: Tensors,
        state: Mapping[Tensor, Any],
        kind: Any,
    ) -> bool:
        """Whether the plan still holds for these parameters, gradients and states."""
        if (
            not self.lasts
            or kind != self.kind
            or len(params) != len(self.params)
            or not all(map(is_, params, self.params))
            or _kinds(self._local(grads)) != self.grad_kinds
        ):
            return False
        states = [state[p] for p in params]
        try:
            columns = [[*params], *([s[row] for s in states] for row in self.rows[1:])]
        except KeyError:
            return False
        return [_addresses(self._local(c)) for c in columns] == self.addresses

    def step(self, n: Numbers, grads: Tensors) -> None:
        """Moves y, z, x and the moments of all in place."""
        grads = self._local(grads)
        for executor in self.executors:
            executor.step(n, grads)

    def sums(self, grads: Tensors, beta: float, b1: float) -> list[tuple[Any, Tensor]]:
        """Rows of :func:`formula.sums`, which add up to those over all parameters.

        Returns:
          Each with its place: a device, or the mesh and the placements of distributed
          parameters, of which this is the process's own part.
        """
        grads = self._local(grads)
        executors = self.executors or [Plain(dict(enumerate(self.leaves)))]
        rows = [e.sums(grads, beta, b1) for e in executors]
        return [(_place(self.params[i]), row) for each in rows for i, row in each]

    def captured(self) -> list[Any]:
        """The launches that a CUDA graph reads, if one is being made of the step."""
        kernels = [e for e in self.executors if isinstance(e, Kernel)]
        return [launch for kernel in kernels for launch in kernel.captured()]


def _executors(
    leaves: Sequence[Leaf],
    grads: Tensors,
    way: Way,
    scratch: Scratch,
    places: Sequence[int],
) -> list[Executor]:
    if way.seed is not None:
        return [Plain(dict(enumerate(leaves)), way.seed, places)]
    found: list[Executor] = []
    rest = dict(enumerate(leaves))
    if way.fuses:
        taken = {i: leaf for i, leaf in rest.items() if fused.takes(leaf, grads[i])}
        if taken:
            found.append(Kernel(taken, grads))
        rest = {i: leaf for i, leaf in rest.items() if i not in taken}
        if rest and way.captures:
            strides = next(iter(rest.values()))["param"].stride()
            raise RuntimeError(
                "capturable=True needs dense parameters and float32 state, got a "
                f"parameter of strides {strides}. Make it contiguous, or leave "
                "capturable out."
            )
    dense = {
        i: leaf for i, leaf in rest.items() if same_layout([*leaf.values(), grads[i]])
    }
    plain = {i: leaf for i, leaf in rest.items() if i not in dense}
    for batch in batches.batched(dense.items(), way.together):
        if eager.takes(batch):
            found.append(Lists(batch, scratch))
        else:
            plain |= {piece.member: rest[piece.member] for piece in batch}
    if plain:
        found.append(Plain(plain))
    return found


def _place(p: Tensor) -> Any:
    mesh = getattr(p, "device_mesh", None)
    return p.device if mesh is None else (mesh, getattr(p, "placements", ()))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    """Dtypes; and strides, unless all tensors are contiguous."""
    dtypes = list(map(attrgetter("dtype"), tensors))
    if all(map(Tensor.is_contiguous, tensors)):
        return dtypes
    return [*dtypes, *map(Tensor.stride, tensors)]
