"""Steps to compile, and what a compiler says about them."""

import re

import jax
import optax

import sf_jax

# Optimizer and the arrays that it keeps besides z, per leaf.
OPTIMIZERS = {
    "sgd": (sf_jax.schedule_free_sgd, {"weight_decay": 0.1, "warmup_steps": 10}, 0),
    "adamw": (
        sf_jax.schedule_free_adamw,
        {"weight_decay": 0.1, "warmup_steps": 10},
        1,
    ),
    "adamw_decay_at_x": (
        sf_jax.schedule_free_adamw,
        {"weight_decay": 0.1, "decay_at": "x"},
        1,
    ),
    "adamw_momentum": (sf_jax.schedule_free_adamw, {"inner_momentum": 0.9}, 2),
    "adamw_paper": (sf_jax.schedule_free_adamw, {"variant": "paper"}, 1),
    "adamw_algoperf": (
        sf_jax.schedule_free_adamw,
        {"variant": "algoperf", "weight_decay": 0.1},
        1,
    ),
    "adamw_b1_schedule": (
        sf_jax.schedule_free_adamw,
        {"b1": optax.linear_schedule(0.9, 0.98, 100)},
        1,
    ),
    "radam": (sf_jax.schedule_free_radam, {"weight_decay": 0.1}, 1),
    "wrapped_rmsprop": (
        lambda **options: sf_jax.schedule_free(optax.rmsprop(0.01), 0.01, **options),
        {},
        1,
    ),
}


def compile_step(tx, params, sharding=None, returned_first="params"):
    """The compiled step, params and state donated; shapes are all that it needs.

    Args:
      tx: an optax transformation.
      params: their shapes and dtypes.
      sharding: of every array, for compiling ahead of time.
      returned_first: "params" returns (params, state), in the order in which both are
        donated; "state" returns them the other way round.
    """

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state) if returned_first == "params" else (state, params)

    params = jax.tree.map(abstract, params)
    state = jax.tree.map(abstract, jax.eval_shape(tx.init, params))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, params).compile()


def passes(compiled, size):
    """How often arrays of this size are copied, and how many fusions write one."""
    shape = rf"\[{size}\]"
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    copies = re.findall(rf"= [^ ]*{shape}[^ ]* copy(?:-start)?\(", text)
    fusions = re.findall(rf"= [^=]*{shape}[^=]* fusion\(", entry)
    return len(copies), len(fusions)
