"""What a leaf's path is: one definition, for finding x and for PyTorch's names.

A path is the keys on the way to a leaf, as they are: 0 and "0" are two keys, and a
dict's key may be called anything. The container does not count: ``a[0]`` of a tuple
and of a dict that has 0 are one path. Nor does a box around an array, which is what
Flax calls an NNX variable and a partitioned parameter; it is known by its class.

What a checkpoint library gives back as plain dicts and lists has lost the kinds of its
keys, and boxes in it are dicts. Such leaves are matched by *name*, the path in words.
"""

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

import jax

Path = tuple[Any, ...]
ROOT: Path = ()  # of a tree that is a single leaf

# Flax is not imported here: a run without it has no boxes.
_BOXES = {"Variable", "AxisMetadata"}
_DEEPEST = 400  # levels of a tree, well below Python's own limit


def paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Path]:
    """The path of each leaf, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: two leaves of one path, or a tree that contains itself.
    """
    check_depth(tree)
    found: dict[Path, str] = {}

    def add(path: Path, name: str) -> None:
        if path in found:
            raise ValueError(
                f"two leaves share the path {show(path)}: {found[path]} and {name}. "
                "Register their container with a key of its own for each."
            )
        found[path] = name

    def stop(node: Any) -> bool:
        return _is_box(node) or (is_leaf is not None and is_leaf(node))

    for entries, node in jax.tree.leaves_with_path(tree, is_leaf=stop):
        path = tuple(map(_key, entries))
        if not _is_box(node):
            add(path, jax.tree_util.keystr(entries))
            continue
        for inner, _ in jax.tree.leaves_with_path(node, is_leaf=is_leaf):
            name = jax.tree_util.keystr((*entries, *inner))
            add((*path, *map(_key, inner[1:])), name)
    return list(found)


def map_leaves(fn: Callable[[Path, Any], Any], tree: Any) -> Any:
    """``fn(path, leaf)`` for each leaf, in the tree's structure."""
    flat, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(fn, paths(tree), flat))


def leaves(tree: Any) -> dict[Path, Any]:
    """The leaves by their path."""
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def unboxed(tree: Any) -> Any:
    """The tree with what a box holds in place of each box."""

    def content(node: Any) -> Any:
        inside = jax.tree.leaves(node, is_leaf=lambda n: n is not node)
        return inside[0] if _is_box(node) else node

    return jax.tree.map(content, tree, is_leaf=_is_box)


def pair(mine: Collection[Path], theirs: Collection[Path], plain: bool) -> dict:
    """Maps each of my paths to that of theirs which is the same leaf, if there is one.

    The same leaf has an equal path. Names are compared instead, for all leaves, where
    some path has no equal or ``plain`` says that one of the trees has lost the kinds of
    its keys. A box may have become a dict in one of the trees; a name therefore also
    matches one that has a further "value" at its end.

    Raises:
      ValueError: two leaves of theirs, or of mine, have the name that is looked for.
    """
    known = set(theirs)
    if not plain and all(path in known for path in mine):
        return {path: path for path in mine}
    by_name: dict[Path, list[Path]] = {}
    for path in theirs:
        by_name.setdefault(in_words(path), []).append(path)
    found: dict[Path, Path] = {}
    for path in mine:
        words = in_words(path)
        names = [words, (*words, "value")]
        names += [words[:-1]] if words[-1:] == ("value",) else []
        same = [other for name in names for other in by_name.get(name, ())]
        if len(same) > 1:
            raise ValueError(
                f"the leaves {show(same[0])} and {show(same[1])} have one name, and "
                "a plain state does not tell which is which. Restore it into the "
                "structure that it was saved from."
            )
        if same:
            found[path] = same[0]
    return found


def in_words(path: Path) -> tuple[str, ...]:
    """The name of a leaf: the path as checkpoint libraries write it."""
    return tuple(map(str, path))


def show(path: Path) -> str:
    """The path as it stands in messages."""
    return "params" + "".join(f"[{key!r}]" for key in path)


def check_depth(tree: Any) -> None:
    """Refuses what contains itself, or is too deep to be walked."""
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > _DEEPEST:
            raise ValueError(
                f"a tree is nested more than {_DEEPEST} levels deep, or contains "
                "itself. Pass the parameters and the state as the optimizer made them."
            )
        if isinstance(node, Mapping):
            stack += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, (list, tuple)):
            stack += [(child, depth + 1) for child in node]


def _key(entry: Any) -> Any:
    """The key in an entry of JAX's path; a foreign kind of entry is its own key."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _is_box(node: Any) -> bool:
    kind: Any = type(node)
    return _boxes(kind)


@lru_cache(maxsize=1024)  # of classes, which are few and asked about for every leaf
def _boxes(kind: type) -> bool:
    return any(
        base.__name__ in _BOXES and base.__module__.split(".")[0] == "flax"
        for base in kind.__mro__
    )
