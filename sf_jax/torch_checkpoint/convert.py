"""The two directions: :func:`from_torch` and :func:`to_torch`."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax._double import scalar_dtype
from sf_jax._eval import own
from sf_jax._paths import Path, leaves, map_leaves
from sf_jax._schedule_free import ScheduleFreeState
from sf_jax.torch_checkpoint.entries import (
    array_problems,
    check_model,
    check_optimizer,
)
from sf_jax.torch_checkpoint.names import (
    NAME_THEM,
    Leaf,
    Shape,
    check_names,
    first_names,
    guess_names,
    joined,
    leaf_name,
    leaves_of,
    raise_all,
    rows_by_tensor,
    shapes_of,
    torch_shapes,
)
from sf_jax.torch_checkpoint.state import (
    IMPLIED,
    Parameter,
    Scalars,
    common_scalars,
    name_order,
    read_parameters,
    to_numpy,
    to_tensor,
    what_it_holds,
    widen,
)

BUILD_ALIKE = "Build both optimizers with the same options, over the same parameters."
# What a moment is called in optax's states and in PyTorch's.
_MOMENTS = {"nu": "exp_avg_sq", "mu": "exp_avg", "trace": "momentum_buffer"}


class JaxRun(NamedTuple):
    """Where a run stands, in the structure of the trees that were given."""

    params: Any  # y
    opt_state: Any
    batch_stats: Any  # None where there were none


def from_torch(
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    params: Any,
    opt_state: Any,
    *,
    batch_stats: Any = None,
    names: Sequence[Leaf] | None = None,
    param_names: Sequence[str] | None = None,
    model_holds: str | None = None,
    unmoved: Collection[str] = (),
) -> JaxRun:
    r"""A PyTorch run as JAX parameters and optimizer state.

    .. math::

        x = y + \frac{1 - \beta}{\beta} (y - z), \qquad y = x + (1 - \beta)(z - x)

    where the one of x and y that is needed is not there.

    Args:
      model: ``model.state_dict()``, of tensors or NumPy arrays.
      optimizer: ``optimizer.state_dict()``. Build ``tx`` with its hyperparameters;
        they are functions of no state, so only β can be checked.
      params: parameters of the Flax model, for their structure, shapes and dtypes:
        Linen's dict, or ``nnx.state(model, nnx.Param)``.
      opt_state: ``tx.init(params)``, or an ``nnx.Optimizer``'s ``opt_state``. What is
        not Schedule-Free's in it stays as it is, counts of outer schedules included.
      batch_stats: BatchNorm's running statistics, of the same kind as params.
      names: which tensor is which leaf; by default :func:`guess_names`'s guess.
      param_names: the model's names in the order of the optimizer's parameters, group
        after group. By default those that the optimizer was given, else, with one
        group, ``model.named_parameters()``'s order.
      model_holds: "y" or "x", what the model's parameters are. By default what the
        optimizer's state shows where it holds x or y too, as in the file of
        ``sf_torch.save_checkpoint``, whose model is at x in either mode; else what the
        optimizer's mode says. Meta's wrapper saves neither.
      unmoved: the model's names of parameters that have had no gradient so far, such as
        frozen ones, beside others that have moved. PyTorch keeps nothing for them,
        which would otherwise be a state that has been lost. They arrive with
        ``z = x = y`` and moments 0, whose bias JAX corrects by the count of all.

    Returns:
      A :class:`JaxRun`.

    Raises:
      ValueError: leaves that are missing, left over, ambiguous or misshapen, moments
        without a place or without z, parameters without a state, values that are not
        finite or not real, negative second moments, counters that no run can have,
        groups that one state cannot hold, another β, parameters that are neither x nor
        y of their state, a parameter whose bias PyTorch corrects by fewer steps than
        its group's: all of it in one message.
      TypeError: an entry that is no tensor or no name where one belongs.

    Examples:
      >>> import numpy as np, jax.numpy as jnp, sf_jax
      >>> from sf_jax import torch_checkpoint
      >>> model = {"weight": np.ones((3, 2), "float32")}  # y, of a torch.nn.Linear
      >>> group = dict(params=[0], k=5, weight_sum=0.05, lr_max=0.1, momentum=0.9)
      >>> optimizer = {
      ...     "state": {0: {"z": np.zeros((3, 2), "float32")}},
      ...     "param_groups": [group | {"train_mode": True}],
      ... }
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> tx = sf_jax.schedule_free_sgd(0.1)
      >>> run = torch_checkpoint.from_torch(model, optimizer, params, tx.init(params))
      >>> int(run.opt_state.count), run.params["kernel"].shape
      (5, (2, 3))

    References:
      Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
    """
    check_model(model)
    check_optimizer(optimizer)
    row_of = {row.jax: row for row in _rows(names, model, params, batch_stats)}
    problems: list[str] = []
    parameters = read_parameters(
        model, optimizer, param_names, model_holds, unmoved, problems
    )
    for path, leaf in (leaves_of(params) | leaves_of(batch_stats)).items():
        if (name := row_of[path].torch) is None:
            continue
        tensor = to_numpy(model[name])
        if name not in parameters:
            problems += array_problems(name, "", tensor)
        if np.iscomplexobj(tensor) and not jnp.issubdtype(
            leaf.dtype, np.complexfloating
        ):
            problems.append(f"different: {name} is {tensor.dtype}, {path} {leaf.dtype}")
    raise_all(problems, BUILD_ALIKE)
    y_of: dict[str, np.ndarray] = {}
    used: set[tuple[str, str]] = set()

    def fill_state(state: ScheduleFreeState) -> ScheduleFreeState:
        _refuse_step_size_state(state)
        shapes = shapes_of(state.z)
        owned = _owned(shapes, row_of, parameters, problems)
        scalars = common_scalars(list(owned.values()), problems)
        if scalars is None:
            return state
        b1 = _b1(state, scalars, problems)

        def fill_leaf(key: str, path: str, like: Any) -> Any:
            if path not in owned:
                return like
            value = owned[path].get(key, b1)
            used.add((owned[path].name, key))
            if value is None:
                problems.append(f"missing: {key} of {owned[path].name}")
                return like
            return _as(row_of[path].to_jax(value, shapes[path]), like)

        def fill(key: str, tree: Any) -> Any:
            return map_leaves(
                lambda path, like: fill_leaf(key, leaf_name(path), like), tree
            )

        def fill_base(path: Path, like: Any) -> Any:
            field, leaf = _field(path, shapes)
            if field == "count":
                return _as(k, like)
            if field in _MOMENTS:
                return fill_leaf(_MOMENTS[field], leaf, like)
            if field is None:
                problems.append(f"missing: what becomes {leaf_name(path)} in the base")
            return like

        y_of.update({path: p.y(b1) for path, p in owned.items()})
        k = min(scalars.k, np.iinfo(np.int32).max)
        lr_max = np.asarray(scalars.lr_max, scalar_dtype())
        ratio = scalars.ratio(float(lr_max))
        rounded = np.asarray(ratio, scalar_dtype())
        return state._replace(
            count=_as(k, state.count),
            weight_ratio=_as(rounded, state.weight_ratio),
            weight_ratio_lo=_as(ratio - float(rounded), state.weight_ratio_lo),
            lr_max=_as(lr_max, state.lr_max),
            z=fill("z", state.z),
            x=fill("x", state.x),
            base_state=map_leaves(fill_base, state.base_state),
        )

    def fill_model(path: Path, like: Any) -> Any:
        row = row_of[leaf_name(path)]
        if row.torch is None:
            return like
        value = y_of.get(leaf_name(path))
        value = to_numpy(model[row.torch]) if value is None else value
        return _as(row.to_jax(value, tuple(like.shape)), like)

    opt_state = _map_states(fill_state, opt_state)
    problems += [
        f"left over: {key} of {parameter.name}"
        for parameter in parameters.values()
        for key in parameter.state
        if (parameter.name, key) not in used and (key == "z" or key not in IMPLIED)
    ]
    raise_all(problems, BUILD_ALIKE)
    run = JaxRun(
        params=map_leaves(fill_model, params),
        opt_state=opt_state,
        batch_stats=map_leaves(fill_model, batch_stats),
    )
    # What PyTorch has no part in comes from the caller's trees. It is copied, because
    # a step may donate the run, and the caller's buffers with it.
    return jax.tree.map(own, run)


def to_torch(
    params: Any,
    opt_state: Any,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    *,
    batch_stats: Any = None,
    names: Sequence[Leaf] | None = None,
    param_names: Sequence[str] | None = None,
    model_holds: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A JAX run as PyTorch ``state_dict``s: the way back from :func:`from_torch`.

    Args:
      params: y, as trained. Where the state stores x, anything else is refused.
      opt_state: the optimizer state, with Schedule-Free anywhere inside.
      model: ``model.state_dict()`` of the PyTorch model, for its names, shapes, dtypes
        and devices.
      optimizer: ``optimizer.state_dict()`` of its optimizer, new or not, whose
        hyperparameters stay as they are.
      batch_stats: BatchNorm's running statistics.
      names: as for :func:`from_torch`.
      param_names: as for :func:`from_torch`.
      model_holds: "y" or "x", what the model's parameters shall be, and with them the
        optimizer's mode. By default y; for Meta's wrapper, which has no saved mode and
        starts in eval mode, x.

    Returns:
      The state dicts of the model and the optimizer, of new tensors. After loading,
      call ``optimizer.train()`` and go on.

    Raises:
      ValueError: as :func:`from_torch`.

    Examples:
      >>> import numpy as np, jax.numpy as jnp, sf_jax
      >>> from sf_jax import torch_checkpoint
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> state = sf_jax.schedule_free_sgd(0.1).init(params)
      >>> model, optimizer = torch_checkpoint.to_torch(
      ...     params,
      ...     state,
      ...     {"weight": np.zeros((3, 2), "float32")},
      ...     {"state": {}, "param_groups": [dict(params=[0], momentum=0.9, lr=0.1)]},
      ... )
      >>> model["weight"].shape, sorted(optimizer["state"][0])
      ((3, 2), ['z'])
    """
    check_model(model)
    check_optimizer(optimizer)
    rows_of = rows_by_tensor(_rows(names, model, params, batch_stats))
    problems: list[str] = []
    order = name_order(model, optimizer, param_names, problems)
    states = _states_by_leaf(opt_state, problems)
    values = leaves_of(params) | leaves_of(batch_stats)
    groups, state, moved = [], {}, set()
    for group in optimizer["param_groups"]:
        at_x = (model_holds or ("y" if "train_mode" in group else "x")) == "x"
        new_group = dict(group)
        owners = {}
        for index in group["params"]:
            name = order.get(index, "")
            of_name = rows_of.get(name, {})
            if not of_name:
                continue
            if any(path not in states for path in of_name):
                problems.append(f"missing: a Schedule-Free state for {name}")
                continue
            like = model[name]
            by_key: dict[str, list[np.ndarray]] = defaultdict(list)
            dtypes: dict[str, Any] = {}
            for path in of_name:
                owner, arrays = states[path]
                owners[id(owner)] = owner
                moved.add(path)
                for key, array in arrays.items():
                    by_key[key].append(np.asarray(array))
                    dtypes[key] = array.dtype
                y, b1 = values[path], _b1(owner, Scalars.of(group), problems)
                if what_it_holds(np.asarray(y), _numpy(arrays), b1) in ("x", ""):
                    problems.append(
                        f"different: {path} in params is not the y of its state; "
                        "pass the live parameters, not x"
                    )
                if at_x:
                    values[path] = _x(y, arrays, b1)
                    if "b1" in group and "x" not in arrays:
                        # sf_torch keeps y meanwhile: made anew it is a rounding off.
                        by_key["y"].append(np.asarray(y))
            state[index] = {
                key: to_tensor(
                    joined(of_name.values(), parts, like.shape), like, dtypes.get(key)
                )
                for key, parts in by_key.items()
            }
        scalars = [_group_scalars(owner, group, problems) for owner in owners.values()]
        if any(other != scalars[0] for other in scalars):
            problems.append(f"one PyTorch group for states that differ: {scalars}")
        if scalars:
            new_group |= scalars[0]
        if "train_mode" in group:
            new_group["train_mode"] = not at_x
        groups.append(new_group)
    problems += [f"left over: z of {path}" for path in states if path not in moved]
    raise_all(problems, BUILD_ALIKE)

    def tensor(name: str) -> Any:
        rows = rows_of.get(first.get(name, ""))
        if not rows:
            return model[name]
        like = model[name]
        parts = [np.asarray(values[path]) for path in rows]
        return to_tensor(joined(rows.values(), parts, like.shape), like)

    first = first_names(model)
    return (
        {name: tensor(name) for name in model},
        {"state": state, "param_groups": groups},
    )


def _rows(
    names: Sequence[Leaf] | None, model: Mapping[str, Any], params: Any, stats: Any
) -> Sequence[Leaf]:
    if names is None:
        return guess_names(model, params, stats)
    ours = shapes_of(params) | shapes_of(stats)
    raise_all(check_names(names, torch_shapes(model), ours), NAME_THEM)
    return names


def _owned(
    paths: Mapping[str, Shape],
    row_of: Mapping[str | None, Leaf],
    parameters: Mapping[str, Parameter],
    problems: list[str],
) -> dict[str, Parameter]:
    """The PyTorch parameters of the leaves of one Schedule-Free state."""
    owned = {}
    for path in paths:
        name = row_of[path].torch
        if name is None:
            continue
        if name in parameters:
            owned[path] = parameters[name]
        else:
            problems.append(f"missing: {name} in the PyTorch optimizer")
    return owned


def _states_by_leaf(
    opt_state: Any, problems: list[str]
) -> dict[str, tuple[ScheduleFreeState, dict[str, Any]]]:
    """For each leaf the state that owns it, and its arrays by PyTorch's keys."""
    found = {}

    def look(state: ScheduleFreeState) -> ScheduleFreeState:
        _refuse_step_size_state(state)
        arrays: dict[str, dict[str, Any]] = {path: {} for path in shapes_of(state.z)}
        for key, tree in (("z", state.z), ("x", state.x)):
            for name, leaf in leaves_of(tree).items():
                arrays[name][key] = leaf
        for path, leaf in leaves(state.base_state).items():
            field, name = _field(path, arrays)
            if field in _MOMENTS:
                arrays[name][_MOMENTS[field]] = leaf
            elif field is None:
                problems.append(f"left over: {leaf_name(path)} in the base")
        found.update({path: (state, arrays[path]) for path in arrays})
        return state

    _map_states(look, opt_state)
    return found


def _map_states(
    fn: Callable[[ScheduleFreeState], ScheduleFreeState], opt_state: Any
) -> Any:
    found = []

    def visit(node: Any) -> Any:
        if not isinstance(node, ScheduleFreeState):
            return node
        found.append(node)
        return fn(node)

    mapped = jax.tree.map(
        visit, opt_state, is_leaf=lambda node: isinstance(node, ScheduleFreeState)
    )
    if not found:
        raise ValueError(
            "no Schedule-Free state found in opt_state. Pass tx.init(params) of a "
            "sf_jax optimizer, alone or under optax's combinators."
        )
    return mapped


def _field(path: Path, names: Mapping[str, Any]) -> tuple[str | None, str]:
    """Which field of a base optimizer's state a leaf lies in, and which leaf it is.

    A leaf may be called as a field is: fields come first, and what follows is a name.
    """
    for at, field in enumerate(path):
        if field == "hyperparams":
            return field, ""
        if field in _MOMENTS and (name := leaf_name(path[at + 1 :])) in names:
            return field, name
    return ("count" if "count" in path else None), ""


def _b1(state: ScheduleFreeState, scalars: Scalars, problems: list[str]) -> float:
    """β, with a double's digits where PyTorch tells it."""
    b1 = float(jax.tree.leaves(state.b1)[0])
    if scalars.b1 is None:
        return b1
    if abs(scalars.b1 - b1) > 1e-6:
        problems.append(
            f"different: β is {scalars.b1:g} in PyTorch and {b1:g} in JAX, and it "
            "formed y"
        )
    return scalars.b1


def _x(y: Any, arrays: Mapping[str, Any], b1: float) -> np.ndarray:
    if "x" in arrays:
        return np.asarray(arrays["x"])
    y, z = widen(np.asarray(y)), widen(np.asarray(arrays["z"]))
    return y + (1 - b1) / b1 * (y - z)


def _numpy(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.asarray(array) for key, array in arrays.items()}


def _group_scalars(
    state: ScheduleFreeState, group: Mapping[str, Any], problems: list[str]
) -> dict[str, float]:
    hi, lo, lr_max, k = (
        jax.tree.leaves(field)[0].item()
        for field in (
            state.weight_ratio,
            state.weight_ratio_lo,
            state.lr_max,
            state.count,
        )
    )
    there = Scalars.of(group)
    weight_sum = (hi + lo) * there.unit(k, lr_max) if hi else 0.0
    # float32 is all that JAX keeps of it; the group may know the number itself.
    if (lr := group.get("lr")) is not None and np.float32(lr) == np.float32(lr_max):
        lr_max = float(lr)
    _b1(state, there, problems)
    return {"k": k, "weight_sum": weight_sum, "lr_max": lr_max}


def _refuse_step_size_state(state: ScheduleFreeState) -> None:
    if jax.tree.leaves(state.step_size_state):
        raise ValueError(
            "this optimizer's step size has a state of its own, which is not ported. "
            "SGD, AdamW, RAdam and schedule_free over optax.sgd are."
        )


def _as(value: Any, like: Any) -> Any:
    """The value as an array, or as a variable of one, like the other."""

    def convert(leaf: Any) -> jax.Array:
        # A copy: a tensor's memory may change under a borrowed array.
        array = jnp.array(np.asarray(value).astype(leaf.dtype), copy=True)
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.device_put(array, sharding)
        return array

    return jax.tree.map(convert, like)
