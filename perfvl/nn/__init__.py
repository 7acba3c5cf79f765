"""Layers and losses: ``nn.Module``s that take the place of what they replace, state_dict included."""

from perfvl.nn.info_nce import CrossModalInfoNCELoss, InfoNCELoss

__all__ = ["CrossModalInfoNCELoss", "InfoNCELoss"]
