"""Finding x: from whatever optimizer state the user holds, without changing it.

A :class:`ScheduleFreeState` may lie anywhere inside a state: under optax's
combinators, in several places that own different leaves, or as the plain dicts and
lists that a checkpoint library gives back. Leaves are therefore matched by their
path, and paths are compared by what they say and not by the containers they come
from.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from sf_jax._schedule_free import ScheduleFreeState, recover_x, recover_y

Path = tuple[str, ...]
_ROOT: Path = ()  # of a tree that is a single leaf

# What tells a ScheduleFreeState that came back from a checkpoint as a dict.
_FIELDS_OF_A_RESTORED_STATE = {"count", "b1", "lr_max", "z"}


class _Owned(NamedTuple):
    """One leaf that a Schedule-Free state owns."""

    z: jax.Array
    x: jax.Array | None  # None: y and z give it
    b1: jax.Array


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
      Leaves that no Schedule-Free state owns come back as they are.

    Raises:
      ValueError: no Schedule-Free state found, params missing, shapes that do not
        fit, two states that own the same leaf, or a batch of states outside ``vmap``.

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
    owned = _owned_leaves(opt_state)
    if params is None:
        return _stored_x(opt_state, owned)

    def to_x(leaf: _Owned, y: jax.Array) -> jax.Array:
        if leaf.x is not None:
            return jnp.array(leaf.x, jnp.result_type(y), copy=True)
        return recover_x(jnp.asarray(y), leaf.z, leaf.b1)

    return _map_owned(to_x, owned, params)


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
        x = leaf.x if leaf.x is not None else jnp.asarray(x)
        z = leaf.z.astype(jnp.promote_types(leaf.z.dtype, x.dtype))
        return recover_y(x, z, leaf.b1).astype(dtype)

    return _map_owned(to_y, _owned_leaves(opt_state), params)


def find_states(state: Any) -> list[ScheduleFreeState]:
    """Every Schedule-Free state inside, outermost only, in the order of the tree."""
    return list(_walk(state))


def _walk(node: Any) -> Iterator[ScheduleFreeState]:
    if isinstance(node, ScheduleFreeState):
        yield node
    elif isinstance(node, Mapping):
        if node.keys() >= _FIELDS_OF_A_RESTORED_STATE:
            fields: list[Any] = [node.get(name) for name in ScheduleFreeState._fields]
            yield ScheduleFreeState(*fields)
            return
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        for child in node:
            yield from _walk(child)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield from _walk(getattr(node, field.name))


def _opt_state_and_params(state: Any, params: Any) -> tuple[Any, Any]:
    if isinstance(state, Mapping) and state.keys() >= {"params", "opt_state"}:
        opt_state, own = state["opt_state"], state["params"]
    elif hasattr(state, "params") and hasattr(state, "opt_state"):
        opt_state, own = state.opt_state, state.params
    else:
        return state, params
    return opt_state, own if params is None else params


def _owned_leaves(opt_state: Any) -> dict[Path, _Owned]:
    states = find_states(opt_state)
    if not states:
        raise ValueError(
            "no Schedule-Free state found in a state of type "
            f"{type(opt_state).__name__}. Pass the optimizer state of a sf_jax "
            "optimizer, alone or under optax's combinators, or a train state that "
            "has it as opt_state."
        )
    owned: dict[Path, _Owned] = {}
    for state in states:
        stored = _leaves_by_path(state.x)
        for path, z in _leaves_by_path(state.z).items():
            if path in owned:
                raise ValueError(
                    f"two Schedule-Free states own the leaf {_name(path)}, so there "
                    "is no single x. Pass the one that belongs to these params."
                )
            owned[path] = _Owned(jnp.asarray(z), stored.get(path), _array(state.b1))
    return owned


def _stored_x(opt_state: Any, owned: Mapping[Path, _Owned]) -> Any:
    lean = [path for path, leaf in owned.items() if leaf.x is None]
    if lean:
        raise ValueError(
            f"the state does not hold x for {_name(lean[0])}"
            + (f" and {len(lean) - 1} more leaves" if len(lean) > 1 else "")
            + ". Pass the live parameters, eval_params(state, params), or build the "
            "optimizer with store_x=True."
        )
    tree = find_states(opt_state)[0].z

    def x_of(path: Any, leaf: Any) -> jax.Array:
        if _key(path) not in owned:
            raise ValueError(
                f"no Schedule-Free state owns the leaf {_name(_key(path))}. Pass the "
                "live parameters too: eval_params(state, params)."
            )
        return jnp.array(owned[_key(path)].x, copy=True)

    return jax.tree.map_with_path(x_of, tree, is_leaf=_is_masked)


def _map_owned(fn: Any, owned: Mapping[Path, _Owned], params: Any) -> Any:
    if _ROOT in owned and not jax.tree_util.all_leaves([params]):
        return _map_flat(fn, owned[_ROOT], params)
    shapes = {path: jnp.shape(p) for path, p in _leaves_by_path(params).items()}
    for path, leaf in owned.items():
        if path not in shapes:
            raise ValueError(
                f"params have no leaf {_name(path)}, which the state averages. Pass "
                "the params that this state was made from."
            )
        if shapes[path] != jnp.shape(leaf.z):
            raise ValueError(
                f"the leaf {_name(path)} has shape {shapes[path]} in params and "
                f"{jnp.shape(leaf.z)} in the state. Pass the params that this state "
                "was made from."
            )
        if jnp.ndim(leaf.b1) and leaf.x is None:
            raise ValueError(
                f"the state is a batch of states: b1 has shape {jnp.shape(leaf.b1)}. "
                "Use jax.vmap(sf_jax.eval_params)(state, params)."
            )

    def apply(path: Any, param: jax.Array) -> jax.Array:
        leaf = owned.get(_key(path))
        return param if leaf is None else fn(leaf, param)

    return jax.tree.map_with_path(apply, params)


def _map_flat(fn: Any, leaf: _Owned, params: Any) -> Any:
    """One vector owns the whole tree: ``optax.flatten`` made it."""
    flat, unflatten = ravel_pytree(params)
    if jnp.shape(leaf.z) != flat.shape:
        raise ValueError(
            f"the state averages one array of shape {jnp.shape(leaf.z)}, and params "
            f"have {flat.size} elements. Pass the params that this state was made "
            "from; under optax.flatten they must be all params, not those that "
            "optax.masked or optax.partition select."
        )
    return unflatten(_map_owned(fn, {_ROOT: leaf}, flat))


def _leaves_by_path(tree: Any) -> dict[Path, Any]:
    return {_key(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _key(path: Sequence[Any]) -> Path:
    """A path by its names alone: ``a[0]`` and ``a["0"]`` are the same leaf.

    So are a Flax NNX variable and the array in it, which is its ``value``.
    """
    names = tuple(
        str(getattr(entry, attribute))
        for entry in path
        for attribute in ("key", "name", "idx")
        if hasattr(entry, attribute)
    )
    return names[:-1] if names[-1:] == ("value",) else names


def _array(leaf: Any) -> jax.Array:
    """The array in an NNX variable, also one that was restored as a dict."""
    return jnp.asarray(leaf["value"] if isinstance(leaf, Mapping) else leaf)


def _name(path: Path) -> str:
    return "params" + "".join(f"[{part!r}]" for part in path)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
