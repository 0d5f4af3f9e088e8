"""The PyTorch that the tests run with."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
"""Its major and minor version."""

needs_newer_compiler = pytest.mark.skipif(TORCH == (2, 6), reason="the compiler of PyTorch 2.6 refuses it")
