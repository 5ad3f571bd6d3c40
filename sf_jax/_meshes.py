"""What the types of arrays say of a mesh, and bases that look across a whole leaf.

Most steps move every element by itself, and work on any part of a leaf. Products of
matrices and sums over leaves do not:

- on an *explicit* mesh (``AxisType.Explicit``, what ``jax.make_mesh`` makes by default)
  the sharding is part of an array's type, and a product over a sharded axis has none.
  :func:`auto` leaves the sharding inside a base to the compiler;
- in ``shard_map`` and ``pmap`` a device sees its own part of a leaf and nothing else.
  :func:`whole` refuses parts.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Update = Callable[..., tuple[optax.Updates, optax.OptState]]


def auto(update: Update) -> Update:
    """An optax update in which the compiler shards, also on explicit meshes.

    An update is placed like its gradient, and the new state like the old one.
    """

    def sharded(
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        mesh = _explicit_mesh((grads, state, params))
        if mesh is None:
            return update(grads, state, params, **extra_args)

        def placed(leaf: Any) -> NamedSharding:
            own = jax.typeof(leaf).sharding
            return NamedSharding(mesh, P()) if own.mesh.empty else own

        in_auto_mode = jax.sharding.auto_axes(
            lambda grads, state, params: update(grads, state, params, **extra_args),
            axes=mesh.explicit_axes,
            out_sharding=jax.tree.map(placed, (grads, state)),
        )
        try:
            # Eagerly, arrays that have no mesh get the devices of it only under jit.
            return jax.jit(in_auto_mode)(grads, state, params)
        except ValueError as error:
            if "context mesh" not in str(error):
                raise
            raise ValueError(
                "the base optimizer holds arrays that lie on an explicit mesh, as "
                "numbers under optax.inject_hyperparams do, and cannot be run there. "
                "Use a mesh of AxisType.Auto, or give inject_hyperparams all numbers "
                "as static_args."
            ) from error

    return sharded


def whole(
    transformation: optax.GradientTransformation,
    per_device: bool,
    leaves: Callable[[optax.Params], Iterable[Any]],
    what: str,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, which refuses to see a part of what it looks at as a whole.

    Args:
      transformation: any optimizer.
      per_device: whether what each device holds is a whole; nothing is refused then.
      leaves: which leaves of params it looks at as a whole.
      what: what would go wrong, for the message.
    """
    transformation = optax.with_extra_args_support(transformation)

    def update(
        grads: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        axes = {axis for leaf in leaves(params) for axis in varying(leaf)}
        if not per_device and (axes or is_unknown()):
            raise ValueError(
                f"{what} inside shard_map or pmap, "
                + (
                    f"where params differ along the mesh axes {sorted(axes)}"
                    if axes
                    else "where nothing says whether params are parts (check_vma=False)"
                )
                + ". Call update under jit, outside of shard_map; or, where each device"
                " holds whole parameters, build the optimizer with per_device=True."
            )
        return transformation.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def varying(leaf: Any) -> frozenset[str]:
    """The mesh axes of shard_map along which devices hold different values."""
    aval = jax.typeof(leaf)
    # JAX 0.10 has put it into an object; before it was vma.
    kind = getattr(aval, "manual_axis_type", None)
    return aval.vma if kind is None else kind.varying


def manual_axes() -> tuple[str, ...]:
    """The mesh axes of shard_map or pmap that the caller is mapped over."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def is_unknown() -> bool:
    """Whether the caller is mapped, and types do not say which values differ.

    So it is in shard_map with ``check_vma=False``, and in pmap: not even a device's own
    index differs there.
    """
    return any(not varying(jax.lax.axis_index(axis)) for axis in manual_axes())


def _explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes that arrays of the tree lie on, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None
