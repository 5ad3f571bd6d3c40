"""Schedule-Free learning for PyTorch, with the names of Meta's ``schedulefree``.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from sf_torch._adamw import AdamWScheduleFree, AdamWScheduleFreePaper
from sf_torch._follow import follow
from sf_torch._radam import RAdamScheduleFree
from sf_torch._sgd import SGDScheduleFree
from sf_torch.batchnorm import update_bn
from sf_torch.checkpoint import load_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "AdamWScheduleFree",
    "AdamWScheduleFreePaper",
    "RAdamScheduleFree",
    "SGDScheduleFree",
    "follow",
    "load_checkpoint",
    "save_checkpoint",
    "update_bn",
]
