"""Runs a case in JAX: sf_jax, or optax.contrib."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import sf_jax
from parity_tests.reference import wide
from parity_tests.registry.case import Case
from parity_tests.runners.trajectory import Trajectory

_STATES = (sf_jax.ScheduleFreeState, contrib.ScheduleFreeState)


def run(
    case: Case,
    steps: int,
    device: str = "cpu",
    *,
    mode: str = "scan",
    store_x: bool = False,
    package: str = "sf_jax",
) -> Trajectory:
    """Runs a case.

    Args:
      mode: "eager", "jit" (each step compiled) or "scan" (one program of all steps).
      package: "sf_jax" or "optax".
    """
    place = jax.default_device(jax.devices(device)[0])
    # By default, accelerators take products of float32 in a lower precision.
    precise = jax.default_matmul_precision("highest")
    with jax.enable_x64(case.dtype == "float64"), place, precise:
        source = case.source(steps)
        tx = optax.with_extra_args_support(_optimizer(case, package, store_x))
        dtype = None if case.is_complex else case.dtype
        params = {n: jnp.asarray(p, dtype) for n, p in case.params.items()}

        def step(carry: Any, now: Any) -> Any:
            params, state = carry
            value, grads = source.jax(params, now)
            updates, state = tx.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, _x(state, params), _z(state))

        carry = (params, tx.init(params))
        if mode == "scan":
            data = jax.tree.map(jnp.asarray, source.data)
            _, found = jax.jit(lambda c, d: jax.lax.scan(step, c, d))(carry, data)
            sequences = ({n: wide(v) for n, v in leaves.items()} for leaves in found)
            return _rounded(case, Trajectory(*sequences))
        one = jax.jit(step) if mode == "jit" else step
        record = []
        for k in range(steps):
            carry, after = one(carry, source.at(k))
            record.append(after)
        return _rounded(case, Trajectory.stacked(record))


def _rounded(case: Case, trajectory: Trajectory) -> Trajectory:
    if case.dtype != "bfloat16":
        return trajectory
    # optax passes y' - y in the parameters' dtype, which rounds it.
    return trajectory.with_rounding(changes_from=case.params)


def _optimizer(case: Case, package: str, store_x: bool) -> Any:
    def build(options: Any) -> Any:
        if package == "optax":
            assert case.optimizer.optax is not None
            return case.optimizer.optax(options)
        return case.optimizer.jax(options, store_x)

    if not case.groups:
        return build(case.options)
    labels = {n: str(i) for i, (leaves, _) in enumerate(case.groups) for n in leaves}
    by_label = {str(i): build(o) for i, (_, o) in enumerate(case.group_options)}
    return optax.partition(by_label, labels)


def _x(state: Any, params: Any) -> Any:
    if isinstance(state, contrib.ScheduleFreeState):
        return contrib.schedule_free_eval_params(state, params)
    if any(p.dtype == jnp.bfloat16 for p in params.values()):
        # With params, x would be rounded to their dtype. The state has it in float32.
        return sf_jax.eval_params(state)
    return sf_jax.eval_params(state, params)


def _z(state: Any) -> dict[str, jax.Array]:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _STATES))
    return {
        name: z
        for node in nodes
        if isinstance(node, _STATES)
        for name, z in node.z.items()
        if not isinstance(z, optax.MaskedNode)  # of another group
    }
