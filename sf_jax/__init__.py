"""Schedule-Free learning for JAX: optax transformations, and x by a pure function.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from sf_jax._adamw import schedule_free_adamw
from sf_jax._eval import eval_params, train_params
from sf_jax._radam import schedule_free_radam
from sf_jax._schedule_free import ScheduleFreeState, schedule_free
from sf_jax._sgd import schedule_free_sgd

__version__ = "0.1.0"

__all__ = [
    "ScheduleFreeState",
    "eval_params",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "train_params",
]
