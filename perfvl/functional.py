"""The public index of perfvl's functions. Each one's whole story is in ``perfvl/ops/<op>.py``."""

from perfvl.ops.info_nce import InfoNCEOutput, info_nce, info_nce_stats
from perfvl.ops.key_queue import enqueue_
from perfvl.ops.momentum_update import momentum_update_

__all__ = ["InfoNCEOutput", "enqueue_", "info_nce", "info_nce_stats", "momentum_update_"]
