"""Finding x: from whatever optimizer state the user holds, without changing it.

A :class:`ScheduleFreeState` may lie anywhere inside a state: under optax's
combinators, in several places that own different leaves, or as the plain dicts and
lists that a checkpoint library gives back. Which leaf of it is which parameter is said
by their paths (``_paths``). A state that came back plain may lack parts, so it is
checked whole.

What is returned owns its memory: x must outlive a step that is given the donated
buffers of params and state.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from sf_jax import _memory, _paths
from sf_jax._paths import ROOT, Path, show
from sf_jax._schedule_free import (
    ScheduleFreeState,
    as_array,
    leaf_dtype,
    recover_x,
    recover_y,
    recovery,
)

_SCALARS = ("count", "b1", "weight_ratio", "weight_ratio_lo", "lr_max")
# How far y may be from (1 - β) z + β x, in units of rounding.
_ROUNDINGS = 4


class _Found(NamedTuple):
    """A Schedule-Free state inside another."""

    state: ScheduleFreeState
    plain: bool  # restored as a dict


class _Owned(NamedTuple):
    """One leaf that a Schedule-Free state owns."""

    z: jax.Array
    x: jax.Array | None  # None: y and z give it
    b1: jax.Array
    recovery: jax.Array | None  # (1 - β) / β, where a leaf of the state is lean


def eval_params(state: Any, params: Any = None) -> Any:
    r"""The average x, the parameters to evaluate, save and ship.

    .. math::

        x = y + \frac{1 - \beta}{\beta} (y - z)

    or the stored x where the state holds it. Pure: works under ``jit``, ``vmap``,
    ``scan`` and ``shard_map``, and changes nothing.

    Args:
      state: a train state (anything with ``params`` and ``opt_state``, or a mapping
        with those keys), or an optimizer state, as it is or restored from a
        checkpoint as plain dicts. The Schedule-Free state may lie anywhere inside:
        under ``chain``, ``masked``, ``partition``, ``MultiSteps``,
        ``inject_hyperparams``, ``apply_if_finite``, nested; under ``optax.flatten``
        where that has all params.
      params: the live parameters y. Not needed with a train state, nor where the
        state holds all of x (``store_x=True``, half precision, ``b1=0``).

    Returns:
      x, with the structure and shapes of params. Its dtypes are those of params
      where they are known, else those of the state (float32 for bfloat16 params);
      a state under ``optax.flatten`` knows of no structure and gives a flat vector.
      Leaves that no Schedule-Free state owns come back as copies: all of it stays
      when params and state are donated to the next step.

    Raises:
      ValueError: no Schedule-Free state found, params missing, shapes that do not
        fit, two states that own the same leaf, a batch of states outside ``vmap``, or
        a plain state from a checkpoint that lacks a part.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = optax.chain(optax.clip(1.0), sf_jax.schedule_free_sgd(0.1, b1=0.5))
      >>> y = {"w": jnp.ones(2)}
      >>> state = tx.init(y)
      >>> updates, state = tx.update({"w": jnp.ones(2)}, state, y)
      >>> y = optax.apply_updates(y, updates)
      >>> sf_jax.eval_params(state, y)  # after one step x is z
      {'w': Array([0.9, 0.9], dtype=float32)}

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    opt_state, params = _opt_state_and_params(state, params)
    found = _found_in(opt_state)
    if params is None:
        return _stored_x(found)

    def to_x(leaf: _Owned, y: jax.Array) -> jax.Array:
        if leaf.x is not None:
            x = _memory.on_device(leaf.x)
            return jnp.array(x, jnp.result_type(y), copy=True)
        return recover_x(y, leaf.z, leaf.recovery)

    return _map_owned(to_x, found, params)


def train_params(state: Any, params: Any) -> Any:
    r"""The live parameters y, from x: the way back from :func:`eval_params`.

    .. math::

        y = (1 - \beta) z + \beta x

    Args:
      state: an optimizer state, as for :func:`eval_params`, or a train state, whose
        own params are not looked at.
      params: x. Where the state stores x (half precision above all), that is used.

    Returns:
      y, with the structure, shapes and dtypes of params. There and back again differs
      from the first y by one rounding at most.

    Raises:
      ValueError: as :func:`eval_params`.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> tx = sf_jax.schedule_free_sgd(0.1)
      >>> y = jnp.ones(2)
      >>> state = tx.init(y)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(2), state, y)
      ...     y = optax.apply_updates(y, updates)
      >>> x = sf_jax.eval_params(state, y)
      >>> bool(jnp.allclose(sf_jax.train_params(state, x), y, rtol=1e-7))
      True

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    opt_state, params = _opt_state_and_params(state, params)
    if params is None:
        raise ValueError("train_params needs params, the average x: pass it second.")

    def to_y(leaf: _Owned, x: jax.Array) -> jax.Array:
        # Arithmetic in the wider of the two, as in the update.
        dtype = jnp.result_type(x)
        x = jnp.asarray(x) if leaf.x is None else _memory.on_device(leaf.x)
        z = leaf.z.astype(max(leaf_dtype(leaf.z), leaf_dtype(x), key=_bits))
        return recover_y(x, z, leaf.b1).astype(dtype)

    return _map_owned(to_y, _found_in(opt_state), params)


def check_params(state: Any, params: Any = None) -> None:
    r"""Raises where the live parameters are not the y that the state expects.

    A step ends with

    .. math::

        y = (1 - \beta) z + \beta x

    and where the state stores x, y is known. It is another when something changed the
    parameters behind the optimizer: a transformation that comes after it in a chain,
    weights that were loaded or clipped in place. The mean of z is then no mean of
    what was trained. Call it outside of ``jit``, now and then.

    Args:
      state: as for :func:`eval_params`, with x stored: ``store_x=True``, or parameters
        narrower than float32. Leaves without x are not looked at.
      params: the live parameters y; not needed with a train state.

    Raises:
      ValueError: parameters that are not y, with the leaf and the distance; a state
        that stores no x; or as :func:`eval_params`.

    Examples:
      >>> import jax.numpy as jnp, optax, sf_jax
      >>> sgd = sf_jax.schedule_free_sgd(0.1, store_x=True)
      >>> params = jnp.ones(2)
      >>> updates, state = sgd.update(params, sgd.init(params), params)
      >>> sf_jax.check_params(state, optax.apply_updates(params, updates))
      >>> sf_jax.check_params(state, params)
      Traceback (most recent call last):
        ...
      ValueError: params are not the y that the state expects: 0.1 away from it...

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    opt_state, params = _opt_state_and_params(state, params)
    if params is None:
        raise ValueError("check_params needs params, the live parameters y.")
    narrowest = max(
        (float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params) if _inexact(p)),
        default=0.0,
    )
    known = 0
    for path, leaf, param in _match(_found_in(opt_state), params)[0]:
        if leaf is None or leaf.x is None or jnp.size(param) == 0:
            continue
        known += 1
        wide = leaf_dtype(leaf.z)
        x, z, y = map(_memory.on_device, (leaf.x, leaf.z, param))
        x, z, y = (jnp.asarray(a, wide) for a in (x, z, y))
        expected = recover_y(x, z, leaf.b1)
        distance = float(jnp.max(jnp.abs(y - expected.astype(jnp.result_type(param)))))
        size = max(float(jnp.max(jnp.abs(a))) for a in (x, z, y))
        # Under optax.flatten the vector is as exact as its narrowest part.
        eps = narrowest if path == ROOT else float(jnp.finfo(param.dtype).eps)
        if not distance <= _ROUNDINGS * (eps * size + float(jnp.finfo(wide).eps)):
            raise ValueError(
                f"params are not the y that the state expects: {distance:.3g} away "
                f"from it in {show(path)}. Put the Schedule-Free optimizer last in the "
                "chain, freeze parameters with optax.partition, and start anew with "
                "tx.init(params) where weights were loaded."
            )
    if not known:
        raise ValueError(
            "the state stores no x, so that any params may be its y. Build the "
            "optimizer with store_x=True."
        )


def find_states(state: Any) -> list[ScheduleFreeState]:
    """Every Schedule-Free state inside, outermost only, in the order of the tree."""
    _paths.check_depth(state)
    return [found.state for found in _walk(state)]


def _bits(dtype: jax.typing.DTypeLike) -> int:
    return jnp.finfo(dtype).bits


def own(leaf: Any) -> Any:
    """A copy of an array leaf, which shares no memory with it; others unchanged."""
    if isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf.copy()
    return leaf


def _walk(node: Any) -> Iterator[_Found]:
    if isinstance(node, ScheduleFreeState):
        yield _Found(node, plain=False)
    elif isinstance(node, Mapping):
        if _was_a_state(node):
            fields: list[Any] = [node.get(name) for name in ScheduleFreeState._fields]
            yield _Found(ScheduleFreeState(*fields), plain=True)
            return
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        for child in node:
            yield from _walk(child)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from _walk(getattr(node, field.name))


def _was_a_state(node: Mapping[Any, Any]) -> bool:
    """Whether a mapping was a Schedule-Free state, even if it lacks some fields."""
    known = node.keys() & {*_SCALARS, "z", "x"}
    # "count", "b1", "z" and "x" occur in other states too; the other names do not.
    return len(known) > 2 and not known.isdisjoint(_SCALARS[2:])


def _opt_state_and_params(state: Any, params: Any) -> tuple[Any, Any]:
    if isinstance(state, Mapping) and state.keys() >= {"params", "opt_state"}:
        opt_state, own = state["opt_state"], state["params"]
    elif hasattr(state, "params") and hasattr(state, "opt_state"):
        opt_state, own = state.opt_state, state.params
    elif hasattr(state, "opt_state"):
        raise ValueError(
            f"{type(state).__name__} holds an optimizer state without its params. For "
            "NNX call sf_jax.flax.eval_model(optimizer, model), or pass the state and "
            "the params: optimizer.opt_state, nnx.state(model, optimizer.wrt)."
        )
    else:
        return state, params
    return opt_state, own if params is None else params


def _found_in(opt_state: Any) -> list[_Found]:
    _paths.check_depth(opt_state)
    found = list(_walk(opt_state))
    if not found:
        raise ValueError(
            "no Schedule-Free state found in a state of type "
            f"{type(opt_state).__name__}. Pass the optimizer state of a sf_jax "
            "optimizer, alone or under optax's combinators, or a train state that "
            "has it as opt_state."
        )
    for state, plain in found:
        if plain:
            _check_whole(state)
    return found


def _check_whole(state: ScheduleFreeState) -> None:
    """Raises if a state restored as a dict lacks a part or has one out of range."""
    lost = [name for name in (*_SCALARS, "z") if getattr(state, name) is None]
    if lost:
        raise _damaged(f"lacks {', '.join(lost)}")
    for name in _SCALARS:
        value = _scalar(getattr(state, name))
        if isinstance(value, jax.core.Tracer):
            continue
        if not np.isfinite(value).all() or (
            name != "weight_ratio_lo" and value.min() < 0
        ):
            raise _damaged(f"has {name} = {value}")
    z, x = _paths.leaves(state.z), _paths.leaves(state.x)
    beside = _nodes(state.x)
    for path, leaf in z.items():
        if not (hasattr(leaf, "dtype") and _inexact(leaf)):
            raise _damaged(f"has z of {show(path)} = {leaf!r}, which is no array")
        if not _is_within(path, beside):
            raise _damaged(f"lacks x of {show(path)}, or what stands for it")
        if path in x and jnp.shape(x[path]) != jnp.shape(leaf):
            raise _damaged(
                f"has x of shape {jnp.shape(x[path])} and z of {jnp.shape(leaf)} for "
                f"{show(path)}"
            )
    if alone := [path for path in x if path not in z]:
        raise _damaged(f"lacks z of {show(alone[0])}, of which it has x")
    b1 = _scalar(state.b1)
    if not isinstance(b1, jax.core.Tracer):
        lean = x.keys() != z.keys()
        if not ((b1 > 0 if lean else b1 >= 0) & (b1 <= 1)).all():
            raise _damaged(f"has b1 = {b1}, which lies in (0, 1]")


def _damaged(how: str) -> ValueError:
    return ValueError(
        f"a Schedule-Free state that came back as a dict {how}. Restore the whole "
        "optimizer state, as it was saved."
    )


def _nodes(tree: Any) -> set[Path]:
    """Paths of all leaves and of all empty nodes, as a checkpoint restores them."""
    return set(_paths.paths(tree, is_leaf=_is_empty))


def _is_within(path: Path, nodes: set[Path]) -> bool:
    """Whether there is something at this path, or an empty node at or above it."""
    return any(path[:end] in nodes for end in range(len(path) + 1))


def _is_empty(node: Any) -> bool:
    """Whether a node is empty: checkpoints restore a MaskedNode as {}, [] or None."""
    return node is None or (isinstance(node, (Mapping, list, tuple)) and not node)


def _owned_leaves(found: _Found) -> dict[Path, _Owned]:
    state = found.state
    stored, z = _paths.leaves(state.x), _paths.leaves(state.z)
    b1 = _memory.on_device(jnp.asarray(_scalar(state.b1)))
    way = recovery(b1) if stored.keys() != z.keys() else None
    return {
        path: _Owned(as_array(leaf), stored.get(path), b1, way)
        for path, leaf in z.items()
    }


def _take_in(owned: dict[Path, _Owned], path: Path, leaf: _Owned) -> None:
    if path in owned:
        raise ValueError(
            f"two Schedule-Free states own the leaf {show(path)}, so there is no "
            "single x. Pass the one that belongs to these params."
        )
    owned[path] = leaf


def _stored_x(found: Sequence[_Found]) -> Any:
    owned: dict[Path, _Owned] = {}
    for one in found:
        for path, leaf in _owned_leaves(one).items():
            _take_in(owned, path, leaf)
    lean = [path for path, leaf in owned.items() if leaf.x is None]
    if lean:
        raise ValueError(
            f"the state does not hold x for {show(lean[0])}"
            + (f" and {len(lean) - 1} more leaves" if len(lean) > 1 else "")
            + ". Pass the live parameters, eval_params(state, params), or build the "
            "optimizer with store_x=True."
        )

    def x_of(path: Path) -> jax.Array:
        if path not in owned:
            raise ValueError(
                f"no Schedule-Free state owns the leaf {show(path)}. Pass the live "
                "parameters too: eval_params(state, params)."
            )
        return jnp.array(owned[path].x, copy=True)

    # Leaves of other owners are empty nodes in this z.
    is_leaf = _is_empty if found[0].plain else _is_masked
    structure = jax.tree.structure(found[0].state.z, is_leaf=is_leaf)
    return jax.tree.unflatten(
        structure, map(x_of, _paths.paths(found[0].state.z, is_leaf=is_leaf))
    )


def _map_owned(fn: Any, found: Sequence[_Found], params: Any) -> Any:
    def computed(leaf: _Owned | None, param: Any) -> Any:
        if leaf is None:
            return own(param)
        inside = leaf._replace(z=_memory.on_device(leaf.z))
        return _memory.beside(fn(inside, _memory.on_device(param)), param)

    leaves, rebuild = _match(found, params)
    return rebuild([computed(leaf, param) for _, leaf, param in leaves])


_Match = tuple[Path, _Owned | None, Any]


def _match(
    found: Sequence[_Found], params: Any
) -> tuple[list[_Match], Callable[[list[Any]], Any]]:
    """Each leaf of params with its owner, and how new leaves become params again."""
    where = _paths.paths(params)  # first, since it refuses what cannot be walked
    flat, structure = jax.tree.flatten(params)
    rebuild: Callable[[list[Any]], Any] = partial(jax.tree.unflatten, structure)
    leaves_of = [_owned_leaves(one) for one in found]
    if where != [ROOT] and any(ROOT in leaves for leaves in leaves_of):
        # One vector owns the whole tree: optax.flatten made it.
        vector, unravel = ravel_pytree(params)
        flat, where, rebuild = [vector], [ROOT], lambda leaves: unravel(*leaves)

    owned: dict[Path, _Owned] = {}
    for one, leaves in zip(found, leaves_of, strict=True):
        pairs = _paths.pair(leaves, where, one.plain)
        for path, leaf in leaves.items():
            if path not in pairs:
                raise ValueError(
                    f"params have no leaf {show(path)}, which the state averages. "
                    "Pass the params that this state was made from."
                )
            _take_in(owned, pairs[path], leaf)
        if one.plain:
            _check_none_lost(one.state, where)
    for path, param in zip(where, flat, strict=True):
        if path in owned:
            _check_fit(path, owned[path], param)
    matches = [(p, owned.get(p), leaf) for p, leaf in zip(where, flat, strict=True)]
    return matches, rebuild


def _check_fit(path: Path, leaf: _Owned, param: Any) -> None:
    if path == ROOT and jnp.shape(leaf.z) != jnp.shape(param):
        raise ValueError(
            f"the state averages one array of shape {jnp.shape(leaf.z)}, and params "
            f"have {jnp.size(param)} elements. Pass the params that this state was "
            "made from; under optax.flatten they must be all params, not those that "
            "optax.masked or optax.partition select."
        )
    if jnp.shape(param) != jnp.shape(leaf.z):
        raise ValueError(
            f"the leaf {show(path)} has shape {jnp.shape(param)} in params and "
            f"{jnp.shape(leaf.z)} in the state. Pass the params that this state was "
            "made from."
        )
    if jnp.ndim(leaf.b1) and leaf.x is None:
        raise ValueError(
            f"the state is a batch of states: b1 has shape {jnp.shape(leaf.b1)}. "
            "Use jax.vmap(sf_jax.eval_params)(state, params)."
        )


def _check_none_lost(state: ScheduleFreeState, where: Sequence[Path]) -> None:
    """A leaf that this state does not own left an empty node; a lost one did not."""
    known = set(map(_paths.in_words, _nodes(state.z)))
    for path in where:
        if not _is_within((*_paths.in_words(path), "value"), known):
            raise _damaged(
                f"has no z for {show(path)}, nor a sign that it had none. Leave that "
                "leaf out of params if it was not the optimizer's"
            )


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _scalar(field: Any) -> Any:
    """The number in a field, also in an NNX variable or in what is restored of one."""
    (leaf,) = jax.tree.leaves(field)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
