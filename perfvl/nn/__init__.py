"""Layers and losses: ``nn.Module``s that take the place of what they replace, state_dict included."""

from perfvl.nn.activation import APL, FELU, Asinh, ELULeaky, FReLU, Maxout, RReLU, ScaledTanh, ShiftedSoftplus, VLReLU
from perfvl.nn.activation_names import NormAct2d, activation
from perfvl.nn.color_transform import ColorTransform
from perfvl.nn.conditioning import ConditioningAugmentation
from perfvl.nn.info_nce import CrossModalInfoNCELoss, InfoNCELoss
from perfvl.nn.key_queue import KeyQueue
from perfvl.nn.key_queue_ddp import prepare_queues
from perfvl.nn.key_queue_formats import dump_queues, load_queues
from perfvl.nn.lsuv import lsuv_init_
from perfvl.nn.momentum_update import MomentumEncoder
from perfvl.nn.pooling import MaxAvgPool2d, StochasticPool2d
from perfvl.nn.roi_pooling import RoIGridPool
from perfvl.nn.separable_conv import SeparableConv2d, SeparableConvBNAct2d
from perfvl.nn.small_loss import CoTeachingLoss, CoTeachingPlusLoss, DecouplingLoss, JoCoRLoss
from perfvl.nn.twin_step import TwinStep
from perfvl.nn.upsample_conv import UpsampleConv2d

__all__ = [
    "APL",
    "FELU",
    "Asinh",
    "CoTeachingLoss",
    "CoTeachingPlusLoss",
    "ColorTransform",
    "ConditioningAugmentation",
    "CrossModalInfoNCELoss",
    "DecouplingLoss",
    "ELULeaky",
    "FReLU",
    "InfoNCELoss",
    "JoCoRLoss",
    "KeyQueue",
    "MaxAvgPool2d",
    "Maxout",
    "MomentumEncoder",
    "NormAct2d",
    "RReLU",
    "RoIGridPool",
    "ScaledTanh",
    "SeparableConv2d",
    "SeparableConvBNAct2d",
    "ShiftedSoftplus",
    "StochasticPool2d",
    "TwinStep",
    "UpsampleConv2d",
    "VLReLU",
    "activation",
    "dump_queues",
    "load_queues",
    "lsuv_init_",
    "prepare_queues",
]
