"""Models × inputs that every way of forming ξ must get right, ordinary layers and awkward architectures alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5
N = 7


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    generic: tuple[str, ...] = ()  # parameters that no rule covers

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        model, inputs = self.model().to(dtype), self.inputs()
        for module in model.modules():  # running statistics and affine parameters away from their initial 0 and 1
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        return model, inputs, torch.randint(0, CLASSES, (N,))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class LastMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class TiedLinear(nn.Module):
    """An embedding whose transpose is the output layer, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embedding(tokens)))
        return F.linear(h, self.embedding.weight).mean(1)[:, :CLASSES]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.norm(self.block(x)))
        return self.head(x)


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.dead = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.left(x)), torch.tanh(self.right(x))
        pooled = torch.cat([a, b], 1).mean((2, 3))
        self.dead(pooled[:, :4])
        return self.head(pooled)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.conv2(x)
        y += x
        return self.head(F.relu_(y).mean((2, 3)))


class Functional(nn.Module):
    """Parameters used without modules, some in ways with a rule, some without."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) / 3)
        self.matrix = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.shift = nn.Parameter(torch.zeros(1, 8))
        self.temperature = nn.Parameter(torch.tensor(1.3))
        self.stacked = nn.Parameter(torch.randn(CLASSES, 4) / 3)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.weight) @ self.matrix * self.scale + self.shift
        h = h * (1 + self.gain)
        return F.linear(torch.tanh(h), torch.cat([self.stacked, self.stacked], 1)) * self.temperature


class Transformer(nn.Module):
    """Class token, position embeddings, pre-norm attention with separate projections, folded and unfolded layers."""

    def __init__(self) -> None:
        super().__init__()
        d = 8
        self.patch = nn.Conv2d(3, d, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, d))
        self.position = nn.Parameter(torch.randn(1, 5, d))
        self.norm = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.layer_scale = nn.Parameter(torch.rand(d))
        self.rms = nn.RMSNorm(d)
        self.head = nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.layer_scale * self.out(attended.reshape(-1, 8)).view_as(attended)
        return self.head(self.rms(x)[:, 0])


class Language(nn.Module):
    """Token and position embeddings; inputs by keyword; an object with ``.logits`` comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6, padding_idx=0), nn.Embedding(9, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        positions = torch.arange(input_ids.shape[1])[None]
        h = self.tokens(input_ids) + self.positions(positions)
        h = self.encoder(h, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        return SimpleNamespace(logits=self.head(h.mean(1)))


class Attention(nn.Module):
    """torch's own attention: to itself under a mask, to another sequence, with appended biases, in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.across = nn.MultiheadAttention(6, 3, bias=False)
        self.appended = nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(6, 2, 8, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        h = self.norm(x + self.first(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])
        h = h + self.across(h.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1)
        h = h + self.appended(h, h, h)[0]
        return self.head(self.decoder(h, x[:, :2]).mean(1))


class Positions(nn.Module):
    """Positions without a dimension for samples: look-ups of one dimension, slices of a parameter, each added."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.looked_up, self.nested = nn.Embedding(9, 6, padding_idx=2), nn.Embedding(9, 6)
        self.rows = nn.Parameter(torch.randn(9, 6))
        self.block = nn.Parameter(torch.randn(2, 9, 6))
        self.scale = nn.Parameter(torch.rand(9))
        self.halved, self.detached = nn.Embedding(9, 6), nn.Parameter(torch.randn(9, 6))
        self.squared, self.halved_later = nn.Embedding(9, 6), nn.Embedding(9, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        h = self.tokens(tokens) + self.looked_up(positions)
        h = torch.tanh(h) + self.nested(positions).unsqueeze(0)
        h = torch.tanh(self.rows[: tokens.shape[1]] + h)
        h = h + self.block[1, None, 1 : tokens.shape[1] + 1]
        h = h * self.scale[2:8]
        halved = self.halved(positions)
        halved *= 0.5
        with torch.no_grad():
            detached = self.detached[: tokens.shape[1]]
        h = torch.tanh(h + detached) + self.detached[1]
        halved_later = self.halved_later(positions)
        h = h + self.squared(positions).square() + halved_later
        halved_later *= 0.5
        return self.head((h + halved + halved_later[None]).mean(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 3, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bilinear(a, b)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def _parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def _conv(dims: int, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return lambda: nn.Sequential(
        conv(*args, **kwargs), batch_norm(args[1]), nn.Tanh(), Pool(), nn.Linear(args[1], CLASSES)
    )


def _image(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *size, dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.randint(0, 11, (N, 4))


CASES = [
    Case("linear", lambda: nn.Linear(6, CLASSES), _image(6)),
    Case("linear without bias", lambda: nn.Linear(6, CLASSES, bias=False), _image(6)),
    Case(
        "linear on positions",
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), LastMean(), nn.Linear(4, CLASSES)),
        _image(3, 6),
    ),
    Case("conv2d same size", _conv(2, 3, 4, 3, padding=1), _image(3, 8, 8)),
    Case("conv2d valid", _conv(2, 3, 4, 3), _image(3, 8, 7)),
    Case("conv2d pointwise", _conv(2, 3, 4, 1), _image(3, 5, 6)),
    Case("conv2d pointwise strided", _conv(2, 3, 4, 1, stride=2), _image(3, 7, 6)),
    Case("conv2d strided", _conv(2, 3, 4, 3, stride=2, padding=1), _image(3, 9, 8)),
    Case("conv2d stride beyond kernel", _conv(2, 3, 4, 2, stride=3), _image(3, 9, 11)),
    Case("conv2d stem", _conv(2, 3, 4, 7, stride=2, padding=3), _image(3, 16, 16)),
    Case("conv2d dilated", _conv(2, 3, 4, 3, dilation=2, padding=2), _image(3, 8, 8)),
    Case("conv2d dilated strided", _conv(2, 3, 4, 3, dilation=3, stride=2, padding=4), _image(3, 11, 12)),
    Case("conv2d grouped", _conv(2, 4, 6, 3, groups=2, padding=1), _image(4, 6, 6)),
    Case("conv2d narrowing", _conv(2, 5, 2, (3, 2), padding=(1, 0), dilation=(2, 3)), _image(5, 7, 8)),
    Case("conv2d narrowing, padded beyond the kernel", _conv(2, 5, 2, 2, padding=2), _image(5, 6, 5)),
    Case("conv1d narrowing", _conv(1, 5, 3, 4, padding=2), _image(5, 9)),
    Case("conv2d depthwise", _conv(2, 4, 8, 3, groups=4, stride=2), _image(4, 7, 7)),
    Case("conv2d uneven", _conv(2, 3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 2)), _image(3, 7, 9)),
    Case("conv2d padding same", _conv(2, 3, 4, (4, 3), padding="same"), _image(3, 6, 6)),
    Case("conv2d reflect", _conv(2, 3, 4, 3, padding=1, padding_mode="reflect"), _image(3, 6, 6)),
    Case("conv2d circular", _conv(2, 3, 4, 3, padding=2, padding_mode="circular"), _image(3, 6, 6)),
    Case("conv1d", _conv(1, 3, 4, 3, stride=2, padding=1, dilation=2), _image(3, 12)),
    Case("conv3d", _conv(3, 2, 3, (2, 3, 3), stride=(1, 2, 1), padding=1), _image(2, 4, 6, 5)),
    Case("conv3d dilated", _conv(3, 2, 4, 2, dilation=2, groups=2), _image(2, 5, 6, 7)),
    Case("batchnorm on features", lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)), _image(6)),
    Case(
        "groupnorm",
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), Pool(), nn.Linear(4, CLASSES)),
        _image(4, 5, 5),
    ),
    Case(
        "instancenorm",
        lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Tanh(), Pool(), nn.Linear(4, CLASSES)),
        _image(4, 5, 5),
    ),
    Case(
        "instancenorm running",
        lambda: nn.Sequential(
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh(), Pool(), nn.Linear(4, CLASSES)
        ),
        _image(4, 5, 5),
    ),
    Case(
        "layernorm",
        lambda: nn.Sequential(nn.LayerNorm((3, 6)), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES)),
        _image(3, 6),
    ),
    Case(
        "rmsnorm", lambda: nn.Sequential(nn.RMSNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES)), _image(3, 6)
    ),
    Case("tied embedding", TiedLinear, _tokens),
    Case("reused block", Reused, _image(6)),
    Case("branched, dead and unused", Branched, _image(3, 6, 6)),
    Case("in place", InPlace, _image(3, 8, 8)),
    Case("frozen", _frozen, _image(6)),
    Case(
        "parametrized",
        _parametrized,
        _image(6),
        ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
    Case("functional", Functional, _image(6), ("stacked", "gain")),
    Case("vision transformer", Transformer, _image(3, 8, 8)),
    Case(
        "language by keyword",
        Language,
        lambda: {"input_ids": _tokens(), "attention_mask": torch.tensor([[1, 1, 1, 0]] * N)},
    ),
    Case(
        "torch's attention",
        Attention,
        _image(4, 6),
        tuple(
            f"appended.{name}"
            for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias")
        ),
    ),
    Case("positions", Positions, _tokens, ("detached", "halved.weight", "squared.weight", "halved_later.weight")),
    Case("two inputs", TwoInputs, lambda: (_image(4)(), _image(3)()), ("bilinear.weight", "bilinear.bias")),
    Case(
        "recurrent",
        Recurrent,
        _image(5, 4),
        ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
    ),
]
