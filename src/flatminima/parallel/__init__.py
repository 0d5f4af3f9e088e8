"""Several processes: what they exchange, and models whose parameters they share."""

from flatminima.parallel.ddp import data_parallel, without_exchanges
from flatminima.parallel.fsdp import (
    fsdp_modules,
    gathered_parameters,
    is_sharded,
    outermost_fsdp_modules,
    processes_of,
    reshard,
    shard_of,
    shared,
    whole,
)
from flatminima.parallel.processes import Processes

__all__ = [
    "Processes",
    "data_parallel",
    "fsdp_modules",
    "gathered_parameters",
    "is_sharded",
    "outermost_fsdp_modules",
    "processes_of",
    "reshard",
    "shard_of",
    "shared",
    "whole",
    "without_exchanges",
]
