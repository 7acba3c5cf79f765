"""The public index of perfvl's functions. Each one's whole story is in ``perfvl/ops/<op>.py``."""

from perfvl.ops.color_transform import color_transform
from perfvl.ops.conditioning import conditioned_conv2d
from perfvl.ops.info_nce import InfoNCEOutput, info_nce, info_nce_stats
from perfvl.ops.key_queue import enqueue_
from perfvl.ops.momentum_update import momentum_update_
from perfvl.ops.pooling import max_avg_pool2d
from perfvl.ops.separable_conv import separable_conv2d
from perfvl.ops.small_loss import (
    TwinLoss,
    co_teaching_loss,
    co_teaching_plus_loss,
    decoupling_loss,
    jocor_loss,
    small_loss_mask,
)
from perfvl.ops.upsample_conv import upsample_conv2d

__all__ = [
    "InfoNCEOutput",
    "TwinLoss",
    "co_teaching_loss",
    "co_teaching_plus_loss",
    "color_transform",
    "conditioned_conv2d",
    "decoupling_loss",
    "enqueue_",
    "info_nce",
    "info_nce_stats",
    "jocor_loss",
    "max_avg_pool2d",
    "momentum_update_",
    "separable_conv2d",
    "small_loss_mask",
    "upsample_conv2d",
]
