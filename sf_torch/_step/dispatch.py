"""Which executor moves which parameters.

The only place that looks at device, dtypes and layout to decide. The decision is kept
from step to step, for as long as the same parameters take part and nothing has moved in
memory: to look at each of thousands of small tensors takes longer than their step.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sf_torch._step import fused, rows
from sf_torch._step.batches import Leaf, Piece, blocks, kind_of, local, same_layout
from sf_torch._step.formula import Plain
from sf_torch._step.fused import Kernel
from sf_torch._step.numbers import Numbers
from sf_torch._step.rows import Rows, Scratch

Executor = Kernel | Rows | Plain
Tensors = Sequence[Tensor]


class Way(NamedTuple):
    """How a group's options let its parameters move."""

    fuses: bool  # whether its arrays are the Triton kernel's where it takes them
    captures: bool  # whether nothing else may move them: a CUDA graph is to replay it
    together: bool  # whether small parameters share a block
    seed: int | None = None  # of random rounding, by the formula; None: to nearest
    sliced: bool = True  # whether large parameters are: a compiler has them whole


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
        self.rows = tuple(leaves[0])
        # Mixed dtypes have other rows beside one another, and next_z is another tensor
        # at every step: such parameters are looked at anew.
        self.lasts = "next_z" not in self.rows and all(
            tuple(leaf) == self.rows for leaf in leaves
        )
        self.sharded = any(local(p) is not p for p in params)
        if self.sharded:
            # A distributed tensor's local part may be an alias, which cannot be moved.
            way = way._replace(together=False)
        grads = self._local(grads)
        self.grad_kinds = _kinds(grads)
        self.strays = [
            i
            for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True))
            if not same_layout([leaf["param"], grad]) and same_layout([leaf["param"]])
        ]
        self.executors = _executors(leaves, self._laid_out(grads), way, scratch, places)
        # Where the arrays lie now that executors may have moved them.
        rows = self.rows if self.lasts else ()
        columns = [[leaf[row] for leaf in leaves] for row in rows]
        self.addresses = list(map(_addresses, columns))

    def _local(self, tensors: Tensors) -> Tensors:
        """The process's own parts."""
        return list(map(local, tensors)) if self.sharded else tensors

    def _laid_out(self, grads: Tensors) -> Tensors:
        """The process's own parts of gradients, in the layouts of the parameters."""
        grads = self._local(grads)
        if not self.strays:
            return grads
        grads = list(grads)
        for i in self.strays:
            like = torch.empty_like(self.leaves[i]["param"], dtype=grads[i].dtype)
            grads[i] = like.copy_(grads[i])
        return grads

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
        grads = self._laid_out(grads)
        for executor in self.executors:
            executor.step(n, grads)

    def to_compile(self, grads: Tensors) -> list[tuple[Leaf, Tensor]]:
        """Leaves and gradients that compiled code moves in place of :meth:`step`."""
        grads = self._laid_out(grads)
        return [pair for e in self._compilable() for pair in e.to_compile(grads)]

    def finish(self) -> None:
        """Ends a compiled step."""
        for executor in self._compilable():
            executor.finish()

    def _compilable(self) -> list[Rows | Plain]:
        return [e for e in self.executors if not isinstance(e, Kernel)]

    def sums(self, grads: Tensors, beta: float, b1: float) -> list[tuple[Any, Tensor]]:
        """Rows of :func:`formula.sums`, which add up to those over all parameters.

        Returns:
          Each with its place: a device, or the mesh and the placements of distributed
          parameters, of which this is the process's own part.
        """
        grads = self._laid_out(grads)
        sums = [row for e in self.executors for row in e.sums(grads, beta, b1)]
        return [(_place(self.params[i]), row) for i, row in sums]

    def captured(self) -> list[Tensor]:
        """What a CUDA graph reads, if one is being made of the step."""
        kernels = [e for e in self.executors if isinstance(e, Kernel)]
        return [tensor for kernel in kernels for tensor in kernel.captured()]


def _executors(
    leaves: Sequence[Leaf],
    grads: Tensors,
    way: Way,
    scratch: Scratch,
    places: Sequence[int],
) -> list[Executor]:
    """Each parameter's, of which those that are alike share one."""
    alike: dict[Any, list[Piece]] = {}
    for i, leaf in enumerate(leaves):
        if leaf["param"].numel():
            taken = _taken(leaf, grads[i], way)
            alike.setdefault(taken, []).append(Piece(i, None, leaf))
    found: list[Executor] = []
    for (executor, *_), pieces in alike.items():
        if executor is Kernel:
            found.append(Kernel(pieces, grads))
        elif executor is Rows:
            for block in blocks(pieces, way.together, way.sliced):
                found.append(Rows(block, scratch))
        else:
            for i, _, leaf in pieces:
                found.append(Plain(i, leaf, way.seed, places[i] if places else 0))
    return found


def _taken(leaf: Leaf, grad: Tensor, way: Way) -> tuple[Any, ...]:
    """The first executor that takes the leaf, and what it takes only alike."""
    if way.fuses and fused.takes(leaf, grad):
        return Kernel, grad.dtype, fused.is_aligned(leaf, grad), *kind_of(leaf)
    if way.captures:
        raise RuntimeError(
            "capturable=True needs dense parameters and float32 state, got a "
            f"parameter of strides {leaf['param'].stride()}. Make it contiguous, or "
            "leave capturable out."
        )
    if way.seed is None and rows.takes(leaf):
        return Rows, *kind_of(leaf)
    return (Plain,)


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
