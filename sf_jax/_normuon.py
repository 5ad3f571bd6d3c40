r"""NorMuon as an optax transformation: Muon whose rows are of one size.

NorMuon divides each row of P = O(m), which is what enters one output neuron (a column
of a Flax kernel), by its size so far, and gives the whole the size of an AdamW step:

.. math::

    v &= b_2 v + (1 - b_2)\, \mathrm{mean}_{row}(P^2),
        \quad \hat P = P / (\sqrt v + \epsilon) \\
    z' &= z - lr_k (0.2 \sqrt{mn}\, \hat P / |\hat P|_F + \lambda p)

References:
  Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061
"""

from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax._adamw import root
from sf_jax._arguments import DIMENSIONS, fitted, is_dimension_numbers
from sf_jax._paths import unboxed


class RowState(NamedTuple):
    """The second moments of NorMuon."""

    # like params, of size 1 along what enters an output neuron; without the boxes of
    # Flax, whose names of axes are those of the whole parameter
    v: optax.Params


def normuon(
    lr: Callable[[jax.Array], jax.Array],
    row_b2: float,
    momentum: float,
    b2: float,
    eps: jax.typing.ArrayLike,
    weight_decay: float,
    *,
    consistent_rms: float = 0.2,
    muon_weight_dimension_numbers: Any = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: Any = None,
    **options: Any,
) -> optax.GradientTransformation:
    """As ``optax.contrib.muon``, with :func:`_normalise_rows` after Newton-Schulz."""

    def dimensions(params: optax.Params) -> Any:
        return dimension_numbers(muon_weight_dimension_numbers, params)

    def labels(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda numbers: "adam" if numbers is None else "muon",
            dimensions(params),
            is_leaf=is_dimension_numbers,
        )

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum, eps=eps, weight_dimension_numbers=dimensions, **options
        ),
        _normalise_rows(row_b2, eps, consistent_rms, dimensions),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(lr),
    )
    adam = optax.adamw(
        lr if adam_learning_rate is None else adam_learning_rate,
        b1=0.0,  # β takes its place
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _normalise_rows(
    b2: float,
    eps: jax.typing.ArrayLike,
    rms: float,
    dimensions: Callable[[optax.Params], Any],
) -> optax.GradientTransformation:
    """P̂, of this root mean square. A leaf's other axes count separate matrices."""

    def init(params: optax.Params) -> RowState:
        def zeros(p: jax.Array, numbers: Any) -> jax.Array:
            inputs = _axes(numbers.reduction_axis, p)
            shape = (1 if a in inputs else size for a, size in enumerate(p.shape))
            return jnp.zeros(tuple(shape), p.dtype)

        return RowState(unboxed(jax.tree.map(zeros, params, dimensions(params))))

    def update(
        updates: optax.Updates, state: RowState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RowState]:
        def second_moment(p: jax.Array, v: jax.Array, numbers: Any) -> jax.Array:
            inputs = _axes(numbers.reduction_axis, p)
            total = jnp.sum(p**2, axis=inputs, keepdims=True)
            mean = total / max(1, prod(p.shape[a] for a in inputs))
            # Rounded to float32, b2 and 1 - b2 would not add up to 1.
            return v + (1 - b2) * (mean - v)

        def normalise(p: jax.Array, v: jax.Array, numbers: Any) -> jax.Array:
            p = p / (root(v) + eps)
            axes = tuple(a for axis in numbers for a in _axes(axis, p))
            norm = root(jnp.sum(p**2, axis=axes, keepdims=True))
            size = prod(p.shape[a] for a in axes)
            return rms * sqrt(size) * p / jnp.maximum(norm, eps)

        numbers = dimensions(updates)
        boxes, bare = jax.tree.structure(updates), jax.tree.structure(state.v)
        v = jax.tree.unflatten(boxes, jax.tree.leaves(state.v))
        v = jax.tree.map(second_moment, updates, v, numbers)
        bare_v = jax.tree.unflatten(bare, jax.tree.leaves(v))
        return jax.tree.map(normalise, updates, v, numbers), RowState(bare_v)

    return optax.GradientTransformation(init, update)


def matrices(given: Any, params: optax.Params) -> list[jax.Array]:
    """The leaves of params that Muon orthogonalises."""
    numbers = jax.tree.leaves(
        dimension_numbers(given, params), is_leaf=is_dimension_numbers
    )
    return [
        leaf
        for leaf, number in zip(jax.tree.leaves(params), numbers, strict=True)
        if number is not None
    ]


def dimension_numbers(given: Any, params: optax.Params) -> Any:
    """optax's numbers for each leaf, None where it is no matrix.

    ``given`` is what ``optax.contrib.muon`` takes: None for all leaves of two axes, a
    tree or the beginning of one, or a function of params.
    """
    if given is None:
        matrix = optax.contrib.MuonDimensionNumbers()
        return jax.tree.map(lambda p: matrix if p.ndim == 2 else None, params)
    return fitted(
        "muon_weight_dimension_numbers", given, params, DIMENSIONS, is_dimension_numbers
    )


def _axes(axis: Any, leaf: jax.Array) -> tuple[int, ...]:
    return tuple(a % leaf.ndim for a in ((axis,) if isinstance(axis, int) else axis))
