"""Steps to compile, and what a compiler says about them."""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import sf_jax


class Optimizer(NamedTuple):
    """One to compile, and what its step has to move."""

    make: Callable[..., optax.GradientTransformation]
    moments: int  # arrays a leaf that it keeps besides z and x
    sums: bool = False  # whether its step size is found from sums over all leaves

    def arrays(self, has_x: bool, half: float = 1.0) -> float:
        """Float32 arrays a leaf that a step must read and write.

        The parameter, z, x and the moments are read and written, the gradient is read.
        The sums are of |g| and g·(x - z), and known before anything moves: g, z and x,
        or y where x is recovered, are read once more.

        Args:
          has_x: whether x is stored.
          half: size of the parameter and the gradient, as a share of float32's.
        """
        once = 2 * (1 + has_x + self.moments) + 3 * half
        return once + (2 + half if self.sums else 0)


adamw = sf_jax.schedule_free_adamw
OPTIMIZERS = {
    "sgd": Optimizer(
        partial(sf_jax.schedule_free_sgd, weight_decay=0.1, warmup_steps=10), 0
    ),
    "adamw": Optimizer(partial(adamw, weight_decay=0.1, warmup_steps=10), 1),
    "adamw_decay_at_x": Optimizer(partial(adamw, weight_decay=0.1, decay_at="x"), 1),
    "adamw_momentum": Optimizer(partial(adamw, inner_momentum=0.9), 2),
    "adamw_paper": Optimizer(partial(adamw, variant="paper"), 1),
    "adamw_algoperf": Optimizer(
        partial(adamw, variant="algoperf", weight_decay=0.1), 1
    ),
    "adamw_b1_schedule": Optimizer(
        partial(adamw, b1=optax.linear_schedule(0.9, 0.98, 100)), 1
    ),
    "radam": Optimizer(partial(sf_jax.schedule_free_radam, weight_decay=0.1), 1),
    "wrapped_rmsprop": Optimizer(
        partial(sf_jax.schedule_free, optax.rmsprop(0.01), 0.01), 1
    ),
}

refined = partial(adamw, average=sf_jax.refined_average(50.0), weight_decay=0.1)
gpa = partial(sf_jax.gpa_adamw, weight_decay=0.1)
FAMILY = {
    "plus": Optimizer(
        partial(
            sf_jax.schedule_free_plus,
            weight_decay=1.0,
            c_warmup=10,
            sf_beta1_anneal_steps=100,
        ),
        2,
        sums=True,
    ),
    "refined": Optimizer(refined, 1),
    "refined_momentum": Optimizer(partial(refined, inner_momentum=0.9), 2),
    "gpa": Optimizer(gpa, 2),
    "gpa_no_momentum": Optimizer(partial(gpa, b1=0.0), 1),
}
NARROW = {"state_dtype": jnp.bfloat16, "rounding": "stochastic"}
narrow_adamw = partial(adamw, moment_dtype=jnp.bfloat16, weight_decay=0.1, **NARROW)
# All arrays in bfloat16, rounded at random. (how it is made, its 16-bit arrays)
SIXTEEN_BITS = {
    "sgd": (partial(sf_jax.schedule_free_sgd, weight_decay=0.1, **NARROW), 5),
    "adamw": (narrow_adamw, 7),
    "adamw_x": (partial(narrow_adamw, store_x=True), 9),
    "radam": (
        partial(sf_jax.schedule_free_radam, moment_dtype=jnp.bfloat16, **NARROW),
        7,
    ),
}

# The steps of these are optax's, passes and temporaries too. Ours is what comes on top:
# y, and x where it is stored. (ours, the base optimizer alone)
OVER_OPTAX = {
    "prodigy": (
        sf_jax.schedule_free_prodigy,
        optax.contrib.prodigy(1.0, betas=(0.0, 0.999)),
    ),
    "muon": (sf_jax.schedule_free_muon, optax.contrib.muon(0.02, adam_b1=0.0)),
}


def compile_step(tx, params, sharding=None, returned_first="params"):
    """The compiled step, params and state donated; shapes are all that it needs.

    Args:
      tx: an optax transformation.
      params: their shapes and dtypes.
      sharding: that of an array, given its shape, for compiling ahead of time.
      returned_first: "params" returns (params, state), in the order in which both are
        donated; "state" returns them the other way round.
    """

    def abstract(leaf):
        placed = sharding and sharding(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    update = optax.with_extra_args_support(tx).update

    def step(params, state, grads, loss):
        updates, state = update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state) if returned_first == "params" else (state, params)

    params = jax.tree.map(abstract, params)
    state = jax.tree.map(abstract, jax.eval_shape(tx.init, params))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    loss = abstract(jax.ShapeDtypeStruct((), jnp.float32))
    return jitted.lower(params, state, params, loss).compile()


def accessed(compiled, size):
    """Float32 arrays of this size that a step reads and writes, says the compiler."""
    return compiled.cost_analysis()["bytes accessed"] / (4 * size)


def passes(compiled, size):
    """How often arrays of this size are copied, and how many fusions write one."""
    shape = rf"\[{size}\]"
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    copies = re.findall(rf"= [^ ]*{shape}[^ ]* copy(?:-start)?\(", text)
    fusions = re.findall(rf"= [^=]*{shape}[^=]* fusion\(", entry)
    return len(copies), len(fusions)
