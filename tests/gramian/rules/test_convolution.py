"""Rows in float32, which are formed in other ways than in float64; test_engine has all of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.gramian.rules.convolution import convolution

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "3x3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}, (9, 8)),
    "stride": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "stride": 2}, (9, 8)),
    "uneven stride and dilation": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 3), "dilation": (2, 1)}, (9, 8)),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2}, (9, 8)),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2}, (9, 8)),
    "1d": (nn.Conv1d, {"kernel_size": 5, "padding": 2, "stride": 2}, (17,)),
    "3d": (nn.Conv3d, {"kernel_size": 2, "padding": 1}, (4, 3, 5)),
}


class Operations(TorchDispatchMode):
    """The operations that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("channels", [(0, 64), (16, 48), (5, 37)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_by_groups_of_samples_equals_float64(
    case: str, channels: tuple[int, int], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr("flatminima.gramian.rules.convolution.CACHE_BYTES", 2**17)  # several chunks
    kind, options, size = CONVOLUTIONS[case]
    layer = kind(32, 64, **options)
    x = torch.randn(5, 32, *size)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    output = layer(x)
    grad = torch.randn_like(output)

    def rows(dtype: torch.dtype) -> torch.Tensor:
        names = ("stride", "padding", "dilation", "groups")
        arguments = {name: getattr(layer, name) for name in names}
        (use, *_) = convolution(5, x.to(dtype), layer.weight.detach().to(dtype), **arguments) or []
        return use.rows(grad.to(dtype), *channels)

    with Operations() as of_exact:
        exact = rows(torch.float64)
    with Operations() as of_quick:
        quick = rows(torch.float32)
    by_groups = torch.ops.aten.convolution_backward.default
    whole_blocks = case == "groups" or (channels[1] - channels[0]) % 16 == 0
    assert by_groups not in of_exact.seen
    assert (by_groups in of_quick.seen) == whole_blocks
    assert quick.shape == exact.shape == (5, channels[1] - channels[0], *layer.weight.shape[1:])
    assert (quick - exact).abs().max() < 1e-5 * exact.abs().max()
