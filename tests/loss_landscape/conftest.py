from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(24) % 3
