"""Layers and losses: ``nn.Module``s that take the place of what they replace, state_dict included."""

from perfvl.nn.conditioning import ConditioningAugmentation
from perfvl.nn.info_nce import CrossModalInfoNCELoss, InfoNCELoss
from perfvl.nn.key_queue import KeyQueue
from perfvl.nn.key_queue_ddp import prepare_queues
from perfvl.nn.key_queue_formats import dump_queues, load_queues
from perfvl.nn.momentum_update import MomentumEncoder
from perfvl.nn.roi_pooling import RoIGridPool
from perfvl.nn.separable_conv import SeparableConv2d, SeparableConvBNAct2d
from perfvl.nn.small_loss import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss
from perfvl.nn.twin_step import TwinStep
from perfvl.nn.upsample_conv import UpsampleConv2d

__all__ = [
    "CoTeachingLoss",
    "CoTeachingPlusLoss",
    "ConditioningAugmentation",
    "CrossModalInfoNCELoss",
    "DecouplingLoss",
    "InfoNCELoss",
    "JoCoRLoss",
    "KeyQueue",
    "MomentumEncoder",
    "RoIGridPool",
    "SeparableConv2d",
    "SeparableConvBNAct2d",
    "TwinStep",
    "UpsampleConv2d",
    "dump_queues",
    "load_queues",
    "prepare_queues",
]
