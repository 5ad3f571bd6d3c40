"""Which PyTorch tensor is which JAX leaf, and how the one is laid out as the other.

The answer is data: a list of :class:`Leaf`, one a row, to print, edit and pass on.
:func:`guess_names` writes it for common layers; :func:`check_names` holds any such
list against both sides and finds everything that does not fit.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sf_jax import _paths
from sf_jax._paths import Path, in_words, show
from sf_jax.torch_checkpoint.entries import check_model

NAME_THEM = (
    "Name the leaves with rows of torch_checkpoint.Leaf: "
    "names=guess_names(model, params, batch_stats, known=[Leaf(...), ...])."
)
Shape = tuple[int, ...]
Signature = frozenset[tuple[str, Shape]]

# Flax's names of a layer's leaves, and PyTorch's.
_TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_STATISTICS = {"running_mean", "running_var"}
# Counts batches for BatchNorm's cumulative average; Flax has nothing like it.
_NO_COUNTERPART = "num_batches_tracked"


@dataclass(frozen=True)
class Leaf:
    """One PyTorch tensor and the JAX leaf that it becomes.

    The tensor is seen in the shape ``split`` (if given), its axes are put in the order
    ``axes``, those in ``flip`` are reversed, and with ``split`` the result is reshaped
    to the leaf's shape. State of the optimizer goes the same way.

    Args:
      torch: key in the model's state dict; None for a JAX leaf that keeps its value.
      jax: path of the leaf, joined by "/"; None for a tensor to leave behind.
      axes: PyTorch's axes in JAX's order; None for the same order.
      split: shape to see the tensor in first. A linear layer behind a flattened
        (C, H, W) image is ``split=(out, C, H, W), axes=(2, 3, 1, 0)``; one with heads
        is ``split=(heads, head_dim, in), axes=(2, 0, 1)``.
      flip: axes to reverse afterwards: the spatial ones of a transposed convolution.
      part: (i, n) for the i-th, from 0, of n equal parts of the tensor's first axis,
        where it becomes n leaves, each with a row of its own: the ``in_proj_weight`` of
        ``nn.MultiheadAttention`` is query, key and value. ``split`` and ``axes`` are
        then those of the part.

    Examples:
      >>> import numpy as np
      >>> leaf = Leaf("conv.weight", "conv/kernel", axes=(2, 3, 1, 0))
      >>> print(leaf)
      conv.weight -> conv/kernel, axes (2, 3, 1, 0)
      >>> leaf.to_jax(np.zeros((16, 8, 3, 3)), (3, 3, 8, 16)).shape
      (3, 3, 8, 16)
    """

    torch: str | None
    jax: str | None
    axes: tuple[int, ...] | None = None
    split: tuple[int, ...] | None = None
    flip: tuple[int, ...] = ()
    part: tuple[int, int] | None = None

    def to_jax(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """The tensor, or state of its shape, as the JAX leaf of this shape."""
        if self.part is not None:
            array = np.split(array, self.part[1])[self.part[0]]
        if self.split is None:
            return np.flip(array.transpose(self.axes or range(array.ndim)), self.flip)
        array = array.reshape(self.split).transpose(self.axes or range(len(self.split)))
        return np.flip(array, self.flip).reshape(shape)

    def to_torch(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """The way back, to a tensor of this shape, or to the row's part of it."""
        if self.part is not None:
            shape = (shape[0] // self.part[1], *shape[1:])
        before = self.split or shape
        axes = self.axes or tuple(range(len(before)))
        array = np.flip(array.reshape([before[axis] for axis in axes]), self.flip)
        return array.transpose(np.argsort(axes)).reshape(shape)

    def __str__(self) -> str:
        options = [
            f"{name} {value}"
            for name in ("part", "split", "axes", "flip")
            if (value := getattr(self, name))
        ]
        return ", ".join([f"{self.torch} -> {self.jax}", *options])


def leaf_name(path: Path) -> str:
    """A path as it stands in :attr:`Leaf.jax`."""
    return "/".join(in_words(path))


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves by name.

    Raises:
      ValueError: two leaves of one name, as of the keys 0 and "0".
    """
    found: dict[str, tuple[Path, Any]] = {}
    for path, leaf in _paths.leaves(tree).items():
        name = leaf_name(path)
        if name in found:
            raise ValueError(
                f"the leaves {show(found[name][0])} and {show(path)} have one name, "
                f"{name}, so rows cannot tell them apart. Rename one of their keys."
            )
        found[name] = path, leaf
    return {name: leaf for name, (_, leaf) in found.items()}


def shapes_of(tree: Any) -> dict[str, Shape]:
    """The leaves' shapes by name."""
    return {name: tuple(leaf.shape) for name, leaf in leaves_of(tree).items()}


def torch_shapes(model: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors' shapes by name, without those that have no counterpart.

    A tensor that the model has twice, as tied embeddings are, counts once.
    """
    return {
        name: tuple(model[name].shape)
        for name, first in first_names(model).items()
        if name == first and name.rpartition(".")[2] != _NO_COUNTERPART
    }


def first_names(model: Mapping[str, Any]) -> dict[str, str]:
    """For each tensor's name the first name under which the model has it."""
    first: dict[Any, str] = {}
    names = {}
    for name, tensor in model.items():
        if hasattr(tensor, "shape"):  # modules may keep other extra state
            in_memory = hasattr(tensor, "data_ptr") and tensor.data_ptr()
            identity = (tensor.data_ptr(), tensor.shape) if in_memory else id(tensor)
            names[name] = first.setdefault(identity, name)
    return names


def guess_names(
    model: Mapping[str, Any],
    params: Any,
    batch_stats: Any = None,
    known: Iterable[Leaf] = (),
) -> list[Leaf]:
    """Guesses which tensor is which leaf, layer by layer.

    Layers with the same leaves and shapes are paired by name where all of them have
    the same names on both sides (``blocks.0.fc`` is ``blocks_0/fc``), by being the only
    one of their shapes, or by order where the JAX names differ in nothing but their
    numbers (``Dense_0``, ``Dense_1``). Kernels of linear layers are transposed, those
    of convolutions go from (out, in, ...) to (..., in, out).

    Args:
      model: a PyTorch model's state dict, of tensors or arrays.
      params: the parameters of the Flax model: Linen's dict or ``nnx.state``.
      batch_stats: BatchNorm's running statistics, of the same kind.
      known: rows that are right already; the rest is guessed around them.

    Returns:
      The rows, those of ``known`` first. ``print(*rows, sep="\\n")`` shows them.

    Raises:
      ValueError: leaves that are missing, left over, ambiguous or misshapen, all of
        them in one message.
      TypeError: an entry of model that is no tensor or no name where one belongs.

    Examples:
      >>> import numpy as np
      >>> model = {"0.weight": np.zeros((8, 4)), "0.bias": np.zeros(8)}
      >>> params = {"Dense_0": {"kernel": np.zeros((4, 8)), "bias": np.zeros(8)}}
      >>> print(*guess_names(model, params), sep="\\n")
      0.weight -> Dense_0/kernel, axes (1, 0)
      0.bias -> Dense_0/bias
    """
    check_model(model)
    theirs = torch_shapes(model)
    ours = shapes_of(params) | shapes_of(batch_stats)
    rows, ambiguous = _guess(theirs, ours, list(known))
    problems = [f"ambiguous, of the same shapes: {names}" for names in ambiguous]
    settled = {name for names in ambiguous for name in names.split(", ")}
    raise_all(problems + check_names(rows, theirs, ours, settled), NAME_THEM)
    return rows


def check_names(
    rows: Sequence[Leaf],
    theirs: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    settled: Collection[str] = (),
) -> list[str]:
    """Everything that does not fit, except that `settled` names have no row."""
    problems = []
    for side, leaves in (("torch", theirs), ("jax", ours)):
        word = {"torch": "left over", "jax": "missing"}[side]
        counts = Counter(getattr(row, side) for row in rows)
        counts.pop(None, None)
        problems += [
            f"{word}: {name} {shape}"
            for name, shape in leaves.items()
            if name not in counts and name not in settled
        ]
        problems += [f"unknown: {name}" for name in counts if name not in leaves]
        problems += [
            f"named twice: {name}"
            for name, n in counts.items()
            if n > 1 and side == "jax"
        ]
    problems += [
        f"not in whole parts: {name}, {', '.join(map(str, of_name.values()))}"
        for name, of_name in rows_by_tensor(rows).items()
        if not _whole(of_name.values())
    ]
    for row in rows:
        before, wanted = theirs.get(row.torch or ""), ours.get(row.jax or "")
        if before is not None and wanted is not None:
            try:
                after = row.to_jax(np.broadcast_to(0, before), wanted).shape
            except ValueError:
                after = None
            if after != wanted:
                becomes = f"becomes {after}" if after else "cannot be laid out"
                problems.append(
                    f"misshapen: {row.torch} {before} {becomes}, {row.jax} is {wanted}"
                )
    return problems


def rows_by_tensor(rows: Iterable[Leaf]) -> dict[str, dict[str, Leaf]]:
    """For each tensor that becomes something its rows by leaf, in order of their parts.

    A tensor that becomes one leaf has one row.
    """
    found: dict[str, dict[str, Leaf]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.part or (0, 1)):
        if row.torch is not None and row.jax is not None:
            found[row.torch][row.jax] = row
    return found


def joined(rows: Iterable[Leaf], arrays: Iterable[np.ndarray], shape: Shape) -> Any:
    """The tensor of this shape that the rows are parts of, from the leaves."""
    parts = [row.to_torch(a, shape) for row, a in zip(rows, arrays, strict=True)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _whole(rows: Iterable[Leaf]) -> bool:
    parts = [row.part or (0, 1) for row in rows]
    return parts == [(i, len(parts)) for i in range(len(parts))]


def raise_all(problems: Sequence[str], advice: str) -> None:
    if problems:
        raise ValueError(
            "the PyTorch state and the JAX trees do not fit each other:\n  "
            + "\n  ".join(problems)
            + f"\n{advice}"
        )


def _guess(
    theirs: Mapping[str, Shape], ours: Mapping[str, Shape], known: list[Leaf]
) -> tuple[list[Leaf], list[str]]:
    """The rows, and the names of each set of leaves that nothing tells apart."""
    torch_layers = _layers(theirs, ".", {row.torch for row in known})
    jax_layers = _layers(ours, "/", {row.jax for row in known})
    alike: dict[Signature, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for layer, leaves in torch_layers.items():
        alike[_signature(leaves)][0].append(layer)
    for layer, leaves in jax_layers.items():
        in_torch = dict(_in_torch(*leaf)[:2] for leaf in leaves.items())
        alike[_signature(in_torch)][1].append(layer)

    pairs: list[tuple[str, str]] = []
    ambiguous: list[str] = []
    alone: tuple[list[str], list[str]] = ([], [])
    for torch_names, jax_names in alike.values():
        found = _pair(torch_names, jax_names)
        pairs += found
        if not found and torch_names and jax_names:
            names = [_join(a, b, ".") for a in torch_names for b in torch_layers[a]]
            names += [_join(a, b, "/") for a in jax_names for b in jax_layers[a]]
            ambiguous.append(", ".join(names))
        elif not found:
            alone[0].extend(torch_names)
            alone[1].extend(jax_names)
    # Of the same name but not of the same shapes: the check will say so.
    by_name = {_words(name): name for name in alone[1]}
    pairs += [(a, by_name[_words(a)]) for a in alone[0] if _words(a) in by_name]

    rows = []
    for torch_layer, jax_layer in pairs:
        for leaf, shape in jax_layers[jax_layer].items():
            name, _, axes = _in_torch(leaf, shape)
            if name in torch_layers[torch_layer]:
                row = _join(torch_layer, name, "."), _join(jax_layer, leaf, "/")
                rows.append((row[0], Leaf(*row, axes)))
    order = list(theirs)
    rows.sort(key=lambda row: order.index(row[0]))
    return [*known, *(row for _, row in rows)], ambiguous


def _layers(
    shapes: Mapping[str, Shape], dot: str, known: Collection[str | None]
) -> dict[str, dict[str, Shape]]:
    layers: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        if name not in known:
            layer, _, leaf = name.rpartition(dot)
            layers[layer][leaf] = shape
    return layers


def _join(layer: str, leaf: str, dot: str) -> str:
    return f"{layer}{dot}{leaf}" if layer else leaf


def _in_torch(leaf: str, shape: Shape) -> tuple[str, Shape, tuple[int, ...] | None]:
    """PyTorch's name of a layer's leaf, the tensor's shape, and `axes` of its row."""
    axes = None
    if leaf == "kernel" and len(shape) >= 2:
        axes = (*range(2, len(shape)), 1, 0)
        shape = (shape[-1], shape[-2], *shape[:-2])
    return _TORCH_LEAF.get(leaf, leaf), shape, axes


def _signature(leaves: Mapping[str, Shape]) -> Signature:
    # Statistics follow their layer: without them it is still the same layer.
    return frozenset(
        (leaf, shape)
        for leaf, shape in leaves.items()
        if leaf not in _STATISTICS or leaves.keys() <= _STATISTICS
    )


def _pair(torch_names: list[str], jax_names: list[str]) -> list[tuple[str, str]]:
    """Layers of the same shapes, two by two; none where that would be a bet."""
    by_name = {_words(name): name for name in jax_names}
    if by_name.keys() == {_words(name) for name in torch_names}:
        return [(name, by_name[_words(name)]) for name in torch_names]
    if len(torch_names) != len(jax_names):
        return []
    stems = {re.sub(r"\d+", "", name) for name in jax_names}
    if len(stems) > 1:
        return []

    def numbers(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name)]

    return list(zip(torch_names, sorted(jax_names, key=numbers), strict=True))


def _words(name: str) -> tuple[str, ...]:
    """``blocks.0.fc``, ``blocks/0/fc`` and ``blocks_0/fc`` are one name."""
    return tuple(re.split("[._/]", name))
