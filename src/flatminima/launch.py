"""Which of a launch's processes this one is: known before torch is imported."""

from __future__ import annotations

import os


def rank_and_size() -> tuple[int, int]:
    """This process's number among those that ``torchrun`` started, and how many these are; without it, (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # as torch.distributed.is_torchelastic_launched documents
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
