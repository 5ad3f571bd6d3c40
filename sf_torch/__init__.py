"""Schedule-Free learning for PyTorch, with the names of Meta's ``schedulefree``.

References:
  Defazio et al., *The Road Less Scheduled*, https://arxiv.org/abs/2405.15682
"""

from sf_torch import _requirements
from sf_torch._follow import follow
from sf_torch._optimizers.adamw import (
    AdamWScheduleFree,
    AdamWScheduleFreeAlgoPerf,
    AdamWScheduleFreeAlgoPerfV2,
    AdamWScheduleFreeClosure,
    AdamWScheduleFreePaper,
    AdamWScheduleFreeReference,
)
from sf_torch._optimizers.gpa import GPAAdamW
from sf_torch._optimizers.growing import growing_b1
from sf_torch._optimizers.muon import MuonScheduleFree
from sf_torch._optimizers.plus import AdamCScheduleFreePlus, AdamCScheduleFreePlusPaper
from sf_torch._optimizers.prodigy import ProdigyScheduleFree
from sf_torch._optimizers.radam import (
    RAdamScheduleFree,
    RAdamScheduleFreeClosure,
    RAdamScheduleFreeReference,
)
from sf_torch._optimizers.refined import (
    AdamWScheduleFreeRefined,
    RAdamScheduleFreeRefined,
    ScheduleFreeWrapperRefined,
    SGDScheduleFreeRefined,
)
from sf_torch._optimizers.sgd import (
    SGDScheduleFree,
    SGDScheduleFreeClosure,
    SGDScheduleFreeReference,
)
from sf_torch._optimizers.wrapper import (
    ScheduleFreeWrapper,
    ScheduleFreeWrapperClosure,
    ScheduleFreeWrapperReference,
)
from sf_torch._record import Recorder, read_record, record
from sf_torch._stand_in import replace_schedulefree
from sf_torch._wrapped import unwrapped
from sf_torch.bases import CombinedOptimizer
from sf_torch.batchnorm import update_bn
from sf_torch.checkpoint import load_checkpoint, save_checkpoint
from sf_torch.distributed import check_modes, mean_loss

__version__ = _requirements.version()

__all__ = [
    "AdamCScheduleFreePlus",
    "AdamCScheduleFreePlusPaper",
    "AdamWScheduleFree",
    "AdamWScheduleFreeAlgoPerf",
    "AdamWScheduleFreeAlgoPerfV2",
    "AdamWScheduleFreeClosure",
    "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference",
    "AdamWScheduleFreeRefined",
    "CombinedOptimizer",
    "GPAAdamW",
    "MuonScheduleFree",
    "ProdigyScheduleFree",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "RAdamScheduleFreeReference",
    "RAdamScheduleFreeRefined",
    "Recorder",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "SGDScheduleFreeReference",
    "SGDScheduleFreeRefined",
    "ScheduleFreeWrapper",
    "ScheduleFreeWrapperClosure",
    "ScheduleFreeWrapperReference",
    "ScheduleFreeWrapperRefined",
    "check_modes",
    "follow",
    "growing_b1",
    "load_checkpoint",
    "mean_loss",
    "read_record",
    "record",
    "replace_schedulefree",
    "save_checkpoint",
    "unwrapped",
    "update_bn",
]
