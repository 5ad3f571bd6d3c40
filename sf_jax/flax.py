r"""x as a Flax model, for Linen and NNX, with BatchNorm's statistics taken there.

BatchNorm keeps running statistics of what it saw in training, at y. At x a layer's
inputs are distributed otherwise, so they have to be taken again: over some batches,
each with the same weight,

.. math::

    \bar s = \frac{1}{n} \sum_{i=1}^n b_i

where :math:`b_i` are the statistics of batch i alone. A layer does not give them away;
it moves its running average to

.. math::

    s' = m s + (1 - m) b

with its own momentum m. That is affine in s: its values at s = 0 and far away give m
and b, from one pass over the model as it is.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sf_jax._eval import eval_params, own

__all__ = ["eval_model", "eval_variables"]

Model = TypeVar("Model", bound=nnx.Module)
Batches = Iterable[Any]

_FAR = 2.0**64


def eval_variables(
    state: Any, batches: Batches | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The variables of a Linen model at x, ready for ``apply``.

    Args:
      state: a train state: ``params``, ``opt_state``, and with BatchNorm also
        ``batch_stats`` and ``apply_fn``, as in Flax's guide. It is left alone.
      batches: what BatchNorm's statistics are taken over, an iterable of inputs of
        the model, or of tuples and lists that begin with one (a dict is an input), or
        one array with the batches along its first axis, which suits ``jit`` (an
        iterable is unrolled there). None keeps the statistics of y, with a warning
        where there are any.
      kwargs: what your training step gives to ``apply_fn`` besides ``mutable``, such
        as ``train=True`` or ``rngs={"dropout": key}``.

    Returns:
      ``{"params": x}``, with ``"batch_stats"`` where the state has them. All of it
      stays when the state is donated to the next step.

    Warns:
      UserWarning: no batches, for a state that has ``batch_stats``.

    Raises:
      ValueError: batches without statistics, no batches in the iterable, a model
        that left its statistics as they were, or as
        :func:`~sf_jax.eval_params`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, sf_jax.flax
      >>> from flax.training import train_state
      >>> class TrainState(train_state.TrainState):
      ...     batch_stats: dict
      >>> net = nn.BatchNorm()
      >>> images = jnp.arange(12.0).reshape(3, 2, 2)  # three batches
      >>> variables = net.init(jax.random.key(0), images[0], use_running_average=True)
      >>> tx = sf_jax.schedule_free_sgd(0.1)
      >>> state = TrainState.create(apply_fn=net.apply, tx=tx, **variables)
      >>> x = sf_jax.flax.eval_variables(state, images, use_running_average=False)
      >>> x["batch_stats"]["mean"]
      Array([5., 6.], dtype=float32)
      >>> net.apply(x, images[0], use_running_average=True).shape
      (2, 2)
    """
    variables = {"params": eval_params(state)}
    stats = getattr(state, "batch_stats", None)
    if batches is not None:
        if not jax.tree.leaves(stats):
            raise ValueError(
                "the train state has no batch_stats to take over batches. Add them "
                "to it as a field of this name, or leave batches out."
            )
        stats = _mean_statistics(
            _update_linen, state.apply_fn, variables["params"], stats, batches, kwargs
        )
    elif jax.tree.leaves(stats):
        _warn_of_y("the train state's batch_stats")
    if stats is not None:
        variables["batch_stats"] = jax.tree.map(own, stats)
    return variables


def eval_model(
    optimizer: nnx.Optimizer,
    model: Model,
    batches: Batches | None = None,
    **kwargs: Any,
) -> Model:
    """A new NNX model at x, in eval mode.

    Args:
      optimizer: of the model; its transformation is one of this package, alone or
        under optax's combinators.
      model: holds y, and is left alone.
      batches: what BatchNorm's statistics are taken over, an iterable of inputs of
        the model, or of tuples and lists that begin with one (a dict is an input), or
        one array with the batches along its first axis, which suits ``nnx.jit`` (an
        iterable is unrolled there). None keeps the statistics of y, with a warning
        where there are any.
      kwargs: what else the model is called with in training. ``nnx.Rngs`` among it do
        not advance.

    Returns:
      The model at x, after ``.eval()``: no dropout, running statistics in use. It
      shares no memory with the old one, whose buffers may be donated.

    Warns:
      UserWarning: no batches, for a model that has ``nnx.BatchStat``.

    Raises:
      TypeError: something else in place of the optimizer, or of the model.
      ValueError: batches for a model without ``nnx.BatchStat``, no batches in the
        iterable, a model that left its statistics as they were, or as
        :func:`~sf_jax.eval_params`.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, sf_jax.flax
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = sf_jax.schedule_free_sgd(0.1)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
      >>> _ = optimizer.update(model, grads)
      >>> at_x = sf_jax.flax.eval_model(optimizer, model)
      >>> at_x(jnp.ones((1, 2))).shape
      (1, 1)
    """
    if not isinstance(optimizer, nnx.Optimizer) or not isinstance(model, nnx.Module):
        raise TypeError(
            "eval_model takes an nnx.Optimizer and its nnx.Module, in this order, got "
            f"{type(optimizer).__name__} and {type(model).__name__}. Call "
            "eval_model(optimizer, model)."
        )
    graph, y, rest = nnx.split(model, optimizer.wrt, ...)  # type: ignore[misc]
    x = eval_params(optimizer.opt_state, y)
    at_x = nnx.merge(graph, x, jax.tree.map(own, rest))
    if batches is not None:
        at_x.train()
        graph, stats, rest = nnx.split(at_x, nnx.BatchStat, ...)  # type: ignore[misc]
        if not jax.tree.leaves(stats):
            raise ValueError(
                f"{type(model).__name__} has no nnx.BatchStat to take over batches. "
                "Leave batches out."
            )
        nnx.update(
            at_x, _mean_statistics(_update_nnx, graph, rest, stats, batches, kwargs)
        )
    elif jax.tree.leaves(nnx.state(at_x, nnx.BatchStat)):
        _warn_of_y(f"the nnx.BatchStat of {type(model).__name__}")
    at_x.eval()
    return at_x


def _warn_of_y(whose: str) -> None:
    warnings.warn(
        f"{whose} were taken at y, and at x the layers see other inputs. Pass batches, "
        "over which they are taken again; or, if you are going to take them at x "
        "yourself, ignore this warning.",
        UserWarning,
        stacklevel=3,
    )


def _update_linen(apply_fn: Any, params: Any, stats: Any, batch: Any, **kw: Any) -> Any:
    variables = {"params": params, "batch_stats": stats}
    return apply_fn(variables, batch, mutable=["batch_stats"], **kw)[1]["batch_stats"]


def _update_nnx(graph: Any, rest: Any, stats: Any, batch: Any, **kw: Any) -> Any:
    # Copied: variables may only change in the trace that made them.
    model = nnx.merge(graph, stats, rest, copy=True)
    model(batch, **kw)
    return nnx.state(model, nnx.BatchStat)


def _mean_statistics(
    update: Callable[..., Any],
    definition: Any,
    arrays: Any,
    stats: Any,
    batches: Batches,
    kwargs: dict[str, Any],
) -> Any:
    """The mean of the batches' own statistics; the model runs jitted."""
    # Flags are known when the model is traced; arrays, such as random keys, are not.
    leaves, structure = jax.tree.flatten(kwargs)
    flags = tuple(None if hasattr(v, "ndim") else _Flag(v) for v in leaves)
    others = [v for v, flag in zip(leaves, flags, strict=True) if flag is None]
    static = (update, definition, structure, flags)

    total, count = jax.tree.map(jnp.zeros_like, stats), 0
    if isinstance(batches, (jax.Array, np.ndarray)):
        count = len(batches)
        total = _add_all(static, arrays, others, total, batches)
    else:
        for batch in batches:
            count += 1
            if isinstance(batch, (tuple, list)) and batch:
                batch = batch[0]
            total = _add(static, arrays, others, total, batch)
    if not count:
        raise ValueError(
            "batches is empty, so there are no statistics. Pass at least one batch, "
            "and an iterator only once."
        )
    return jax.tree.map(lambda s: s / count, total)


@partial(jax.jit, static_argnums=0)
def _add_all(static: Any, arrays: Any, others: Any, total: Any, batches: Any) -> Any:
    def body(total: Any, batch: Any) -> tuple[Any, None]:
        return _add(static, arrays, others, total, batch), None

    return jax.lax.scan(body, total, batches)[0]


@partial(jax.jit, static_argnums=0)
def _add(static: Any, arrays: Any, others: Any, total: Any, batch: Any) -> Any:
    update, definition, structure, flags = static

    def of_stats(stats: Any) -> Any:
        # Made here: variables may only change in the trace that made them.
        rest = iter(others)
        leaves = [next(rest) if flag is None else flag.value for flag in flags]
        kwargs = structure.unflatten(leaves)
        try:
            after = update(definition, arrays, stats, batch, **kwargs)
        except Exception as error:
            if isinstance(batch, Mapping):
                error.add_note(
                    f"The batch is a dict of {', '.join(map(repr, batch))}, which the "
                    "model got as its input. If it takes one of them, pass that: "
                    "(batch[name] for batch in loader)."
                )
            raise
        if any(map(operator.is_, jax.tree.leaves(after), jax.tree.leaves(stats))):
            raise ValueError(
                "the model left its batch statistics as they were. Pass what puts it "
                "into training, such as train=True."
            )
        return after

    # Nothing else depends on the running statistics while they are being updated, so
    # vmap runs the model once. (A derivative would not do: NNX stops gradients here.)
    probes = jax.tree.map(lambda t: jnp.stack([0 * t, jnp.full_like(t, _FAR)]), total)
    return jax.tree.map(_plus_own, total, jax.vmap(of_stats)(probes))


def _plus_own(total: jax.Array, after: jax.Array) -> jax.Array:
    at_zero, far = after
    # b is nothing beside _FAR, but m comes out rounded, and 1 - m would magnify that
    # a hundredfold for m = 0.99. m is a decimal that somebody wrote: seven places
    # restore it.
    share = jnp.round((1 - far / _FAR) * 1e7) / 1e7
    # What is no running average becomes NaN rather than nonsense.
    return total + jnp.where((share > 0) & (share <= 1), at_zero / share, jnp.nan)


class _Flag:
    """A value that is part of what is compiled; by its identity if it has no hash."""

    def __init__(self, value: Any):
        self.value = value

    def _id(self) -> Any:
        try:
            hash(self.value)
        except TypeError:
            return id(self.value)
        return type(self.value), self.value

    def __hash__(self) -> int:
        return hash(self._id())

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Flag) and self._id() == other._id()
