"""Every op's entry in the contract. Adding an op: write its file here and list it."""

from contracts.activation import APL_CONTRACT, MAXOUT
from contracts.color_transform import COLOR_TRANSFORM
from contracts.conditioning import AUGMENTATION, CONDITIONED_CONV
from contracts.gan_loss import GAN_LOSS
from contracts.info_nce import INFO_NCE, INFO_NCE_STATS
from contracts.key_queue import ENQUEUE
from contracts.momentum_update import MOMENTUM_UPDATE
from contracts.norm_act import NORM_ACT
from contracts.pooling import MAX_AVG_POOL, STOCHASTIC_POOL
from contracts.separable_conv import SEPARABLE_CONV
from contracts.small_loss import CO_TEACHING, CO_TEACHING_PLUS, DECOUPLING, JOCOR, SMALL_LOSS_MASK
from contracts.upsample_conv import UPSAMPLE_CONV

CONTRACTS = [
    INFO_NCE,
    INFO_NCE_STATS,
    MOMENTUM_UPDATE,
    ENQUEUE,
    SMALL_LOSS_MASK,
    DECOUPLING,
    CO_TEACHING,
    CO_TEACHING_PLUS,
    JOCOR,
    SEPARABLE_CONV,
    GAN_LOSS,
    UPSAMPLE_CONV,
    CONDITIONED_CONV,
    AUGMENTATION,
    MAXOUT,
    APL_CONTRACT,
    NORM_ACT,
    COLOR_TRANSFORM,
    MAX_AVG_POOL,
    STOCHASTIC_POOL,
]
