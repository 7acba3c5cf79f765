"""Every op's entry in the contract. Adding an op: write its file here and list it."""

from contracts.info_nce import INFO_NCE, INFO_NCE_STATS
from contracts.key_queue import ENQUEUE
from contracts.momentum_update import MOMENTUM_UPDATE

CONTRACTS = [INFO_NCE, INFO_NCE_STATS, MOMENTUM_UPDATE, ENQUEUE]
