"""Chains of the shape that big_vision makes, which end in the sign of the step.

There an optimizer from a configuration makes directions; the learning rate, its
multipliers, the schedule, the frozen part and ``scale(-1)`` come after it
(https://github.com/google-research/big_vision, ``big_vision/optax.py``).
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import sf_jax

PARAMS = {"head": jnp.array([3.0, -2.0]), "trunk": jnp.ones((2, 2))}
TRAINED = {"head": True, "trunk": False}
FROZEN = {"head": False, "trunk": True}


def chain(optimizer, *last):
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(1.0), TRAINED),
        optax.masked(optimizer, TRAINED),
        *last,
        optax.masked(optax.set_to_zero(), FROZEN),
    )


def schedule(step):
    return jnp.minimum(step / 10, 1.0)  # 0 at the first step, as theirs


def loss(params):
    return jnp.sum(params["head"] ** 2)


def test_the_sign_and_what_scales_are_found_before_training():
    last = optax.scale(0.1), optax.scale_by_schedule(schedule), optax.scale(-1.0)
    with pytest.raises(ValueError, match="last in the chain"):
        sf_jax.check_optimizer(chain(sf_jax.schedule_free_sgd(0.1), *last), PARAMS)


@pytest.mark.slow
def test_unfound_the_sign_would_climb():
    tx = chain(sf_jax.schedule_free_sgd(0.1), optax.scale(-1.0))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(sf_jax.eval_params(state, params)) > loss(PARAMS)


def test_with_the_schedule_inside_the_same_chain_passes():
    tx = chain(sf_jax.schedule_free_sgd(lambda step: 0.1 * schedule(step)))
    sf_jax.check_optimizer(tx, PARAMS)


@pytest.mark.slow
def test_what_cannot_be_rehearsed_says_so():
    with pytest.raises(ValueError, match="z moved 0 times in 300 calls"):
        sf_jax.check_optimizer(sf_jax.schedule_free_sgd(lambda step: 0.0), PARAMS)
    with pytest.raises(ValueError, match="no Schedule-Free state"):
        sf_jax.check_optimizer(optax.sgd(0.1), PARAMS)


@pytest.mark.slow
def test_accumulation_half_precision_and_a_loss_pass_the_rehearsal():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    plus = optax.MultiSteps(sf_jax.schedule_free_plus(), 3)
    sf_jax.check_optimizer(plus, PARAMS, value=jnp.float32(1.0))
    sf_jax.check_optimizer(sf_jax.schedule_free_adamw(0.1, warmup_steps=5), params)
