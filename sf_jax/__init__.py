"""Schedule-Free learning for JAX: optax transformations, and x by a pure function.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from sf_jax import _requirements
from sf_jax._adamw import schedule_free_adamw
from sf_jax._averaging import exponential_average, refined_average
from sf_jax._eval import check_params, eval_params, train_params
from sf_jax._gpa import gpa_adamw
from sf_jax._muon import growing_b1, schedule_free_muon
from sf_jax._plus import schedule_free_plus
from sf_jax._prodigy import schedule_free_prodigy
from sf_jax._radam import schedule_free_radam
from sf_jax._rehearsal import check_optimizer
from sf_jax._schedule_free import ScheduleFreeState, schedule_free
from sf_jax._sgd import schedule_free_sgd

__version__ = _requirements.version()

__all__ = [
    "ScheduleFreeState",
    "check_optimizer",
    "check_params",
    "eval_params",
    "exponential_average",
    "gpa_adamw",
    "growing_b1",
    "refined_average",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_muon",
    "schedule_free_plus",
    "schedule_free_prodigy",
    "schedule_free_radam",
    "schedule_free_sgd",
    "train_params",
]
