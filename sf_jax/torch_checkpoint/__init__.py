r"""A PyTorch run becomes a JAX run, and back, in mid-run, on the same trajectory.

From the ``state_dict``\ s of a model and of its Schedule-Free optimizer (``sf_torch``'s
or Meta's ``schedulefree``: SGD, AdamW, RAdam, the wrapper over SGD) to the parameters
y and the optimizer state of a Flax model, Linen or NNX, under any optax combinators:

    model:     parameters y or x, statistics     params (y), batch_stats
    state:     z, x                              z, x
               exp_avg_sq, exp_avg               nu, mu
               momentum_buffer                   trace
    group:     k, lr_max, β                      count, lr_max, b1
               weight_sum                        weight_ratio + weight_ratio_lo

PyTorch's modes are resolved on the way: in JAX params always hold y. Where one of x
and y is missing it comes from the other and z, in double precision. JAX keeps the sum
of weights in units of the last, ``k^r lr_max^weight_lr_power``, with the two powers
that the group has; Meta's wrapper keeps them elsewhere, and then they are taken for its
defaults, 0 and 2, unless you write them into the group. Nothing here
imports torch; tensors are only asked for their values.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from sf_jax.torch_checkpoint.convert import JaxRun, from_torch, to_torch
from sf_jax.torch_checkpoint.names import Leaf, guess_names

__all__ = ["JaxRun", "Leaf", "from_torch", "guess_names", "to_torch"]
