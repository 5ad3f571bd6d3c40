"""Base optimizers for :class:`sf_torch.ScheduleFreeWrapper` that PyTorch lacks."""

from sf_torch.bases.combined import CombinedOptimizer
from sf_torch.bases.muon import Muon

__all__ = ["CombinedOptimizer", "Muon"]
