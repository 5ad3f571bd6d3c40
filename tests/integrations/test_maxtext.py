"""Optimizers of the shape that MaxText makes: steps skipped on spikes, a frozen part.

Its state is a dict inside ``multi_transform``'s, and a skipped step is the other branch
of a ``lax.cond`` (https://github.com/AI-Hypercomputer/maxtext, ``optimizers.py``).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sf_jax

INTERVAL = 6
LABELS = {"decoder": {"kernel": "trainable", "scale": "trainable"}, "vision": "frozen"}


def skip_on_spikes(inner, factor=4.0):
    """Takes a step only where the loss is not far above the latest ones."""

    def init(params):
        losses = jnp.full(INTERVAL, jnp.nan)
        return {"inner_state": inner.init(params), "losses": losses}

    def update(grads, state, params=None, *, loss, **extra):
        losses = state["losses"]
        full = ~jnp.isnan(losses).any()
        spike = full & (loss > losses.mean() + factor * losses.std())

        def take():
            return inner.update(grads, state["inner_state"], params, **extra)

        def skip():
            return jax.tree.map(jnp.zeros_like, grads), state["inner_state"]

        updates, inner_state = jax.lax.cond(spike, skip, take)
        losses = jnp.roll(losses, 1).at[0].set(loss)
        return updates, {"inner_state": inner_state, "losses": losses}

    return optax.GradientTransformationExtraArgs(init, update)


def adamw():
    def decays(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return sf_jax.schedule_free_adamw(
        0.05, warmup_steps=4, weight_decay=0.1, mask=decays
    )


TX = optax.multi_transform(
    {"trainable": skip_on_spikes(adamw()), "frozen": optax.set_to_zero()}, LABELS
)
KERNEL = jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3)
PARAMS = {"decoder": {"kernel": KERNEL, "scale": jnp.ones(3)}, "vision": jnp.ones(2)}


@jax.jit
def step(params, state, k, loss):
    grads = jax.tree.map(lambda p: jnp.cos(3 * p + k).astype(p.dtype), params)
    updates, state = TX.update(grads, state, params, loss=loss)
    return optax.apply_updates(params, updates), state


def run(losses):
    """Steps with gradients that depend on y and on the number of the step."""
    params, state = PARAMS, TX.init(PARAMS)
    for k, loss in losses:
        params, state = step(params, state, k, loss)
    return params, state


def test_a_skipped_step_is_as_if_it_had_not_been():
    losses = [(k, 100.0 if k in (9, 17) else 1 / (k + 1)) for k in range(20)]
    params, state = run(losses)
    kept = [(k, loss) for k, loss in losses if loss < 100]
    expected, bare = run(kept)
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    x = sf_jax.eval_params(state, params)
    jax.tree.map(np.testing.assert_array_equal, x, sf_jax.eval_params(bare, expected))
    for leaf in ("kernel", "scale"):
        assert (x["decoder"][leaf] != params["decoder"][leaf]).any()
        assert x["decoder"][leaf].dtype == PARAMS["decoder"][leaf].dtype
    np.testing.assert_array_equal(x["vision"], PARAMS["vision"])


def test_it_passes_the_rehearsal():
    sf_jax.check_optimizer(TX, PARAMS, loss=1.0)
