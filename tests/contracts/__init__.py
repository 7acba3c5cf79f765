"""Every op's entry in the contract. Adding an op: write its file here and list it."""

from contracts.info_nce import INFO_NCE, INFO_NCE_STATS

CONTRACTS = [INFO_NCE, INFO_NCE_STATS]
