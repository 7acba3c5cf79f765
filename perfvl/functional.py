"""The public index of perfvl's functions. Each one's whole story is in ``perfvl/ops/<op>.py``."""

from perfvl.ops.info_nce import InfoNCEOutput, info_nce, info_nce_stats

__all__ = ["InfoNCEOutput", "info_nce", "info_nce_stats"]
