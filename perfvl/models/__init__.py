"""Whole models built from the layers and losses of :mod:`perfvl.nn`."""

from perfvl.models import caffenet, fitnet, noisy_label, stackgan
from perfvl.models.brivl import BriVL, BriVLOutput, Retrieval, retrieve, similarity
from perfvl.models.brivl_checkpoint import load_released_state_dict, released_state_dict
from perfvl.models.brivl_presets import TokenFeatures, brivl_paper, brivl_released, brivl_small
from perfvl.models.brivl_towers import BriVLImageTower, BriVLTextTower
from perfvl.models.xception import Xception, xception

__all__ = [
    "BriVL",
    "BriVLImageTower",
    "BriVLOutput",
    "BriVLTextTower",
    "Retrieval",
    "TokenFeatures",
    "Xception",
    "brivl_paper",
    "brivl_released",
    "brivl_small",
    "caffenet",
    "fitnet",
    "load_released_state_dict",
    "noisy_label",
    "released_state_dict",
    "retrieve",
    "similarity",
    "stackgan",
    "xception",
]
