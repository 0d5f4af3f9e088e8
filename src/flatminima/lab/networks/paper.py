"""The four networks of the paper (Jia & Su, App. E), two small ResNets, and two networks for the 8×8 digits.

Every network maps images ``(B, C, H, W)`` to logits ``(B, num_classes)``; the softmax belongs to the loss. The first
six end in a global average pool and accept any image size that survives their pooling, the other two take 8×8
only. Weights are drawn from torch's global generator: seed it before :func:`build_model`.

A network is one registered builder, known from then on to :func:`build_model`, to specifications and to the command
line::

    @network("linear")
    def _linear(num_classes: int, in_channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 8 * 8, num_classes))
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, require_one_of

Builder = Callable[[int, int], nn.Module]

BUILDERS: dict[str, Builder] = {}
"""The registered builders by name."""

MODEL_NAMES: Collection[str] = BUILDERS.keys()
"""The names :func:`build_model` knows: the paper's four networks, two small ones, the two for the digits, your own."""

_DIGIT_SIZE = 8


def network(name: str) -> Callable[[Builder], Builder]:
    """Register the decorated builder, a function of ``(num_classes, in_channels)``, as the network ``name``."""

    def register(builder: Builder) -> Builder:
        BUILDERS[name] = builder
        return builder

    return register


def build_model(name: str, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A freshly initialized network.

    Args:
        name: One of :data:`MODEL_NAMES`.
        num_classes: Number of logits, at least 1.
        in_channels: Channels of the input images (3 for CIFAR, 1 for the digits), at least 1.

    Raises:
        FlatminimaError: The name is unknown, or a count is below 1.

    Example:
        >>> build_model("resnet20")(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    require_one_of("model", name, MODEL_NAMES)
    if num_classes < 1 or in_channels < 1:
        raise FlatminimaError(
            f"model {name!r} needs num_classes >= 1 and in_channels >= 1, got {num_classes} and {in_channels}"
        )
    return BUILDERS[name](num_classes, in_channels)


# ---------------------------------------------------------------------------------------------------------------------
# Plain networks: no normalization layer, biases everywhere
# ---------------------------------------------------------------------------------------------------------------------


class _RequireDigits(nn.Module):
    """The identity on 8×8 images; names the fault where a flatten would leave it to a matrix product."""

    def __init__(self, model_name: str, in_channels: int) -> None:
        super().__init__()
        self.model_name = model_name
        self.shape = (in_channels, _DIGIT_SIZE, _DIGIT_SIZE)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise FlatminimaError(
                f"model {self.model_name!r} takes images of shape {self.shape}, got {tuple(images.shape[1:])}; "
                "use one of the other models for other sizes"
            )
        return images


def _classifier(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _initialize_plain(model: nn.Module) -> nn.Module:
    """He normal with fan-in, zero biases: without normalization the forward signal must keep its scale by itself."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Networks with BatchNorm: no bias in a convolution
# ---------------------------------------------------------------------------------------------------------------------


def _initialize_normalized(model: nn.Module) -> None:
    """The initialization of the published ResNet, WRN and DenseNet code.

    Convolutions are He normal with fan-out; the classifier keeps torch's default weights and gets a zero bias;
    BatchNorm starts as the identity, which is torch's default.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


Shortcut = Literal["pad", "projection"]


class PreActResNet(nn.Module):
    """A residual network of basic blocks with pre-activation (He et al., 2016b), for small images.

    Three stages of 3×3 convolutions; the second and the third halve the image. A stage's first block activates its
    input before the fork, so that the shortcut sees the activated input as well (as in the published code of
    pre-activation ResNets and of WRNs); in the other blocks the shortcut is the identity.

    Args:
        widths: Channels of the three stages.
        blocks_per_stage: Blocks in each stage; the depth in weight layers is 6 × this + 2.
        shortcut: How a first block that changes the shape joins: ``"pad"`` subsamples and appends zero channels (option
            A of He et al., 2016a: no parameters), ``"projection"`` is a 1×1 convolution (option B).
        first_stride: Stride of the first convolution; 2 halves the image at once.
        num_classes: Number of logits.
        in_channels: Channels of the images.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int],
        blocks_per_stage: int,
        shortcut: Shortcut,
        first_stride: int = 1,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.conv = _conv(in_channels, 16, 3, first_stride)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, width in enumerate(widths):
            for i in range(blocks_per_stage):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_PreActBlock(channels, width, stride=stride, shortcut=shortcut, opens_stage=i == 0))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), *_classifier(channels, num_classes))
        _initialize_normalized(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        logits: Tensor = self.head(self.blocks(self.conv(images)))
        return logits


class _PreActBlock(nn.Module):
    """BatchNorm, ReLU, 3×3 convolution, twice; plus the shortcut."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut, opens_stage: bool
    ) -> None:
        super().__init__()
        self.opens_stage = opens_stage
        self.activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.residual = nn.Sequential(
            _conv(in_channels, out_channels, 3, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv(out_channels, out_channels, 3),
        )
        self.shortcut = _shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        out: Tensor = self.residual(activated) + self.shortcut(activated if self.opens_stage else x)
        return out


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: Shortcut) -> nn.Module:
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return _SubsampleAndPad(stride, out_channels - in_channels)
    return _conv(in_channels, out_channels, 1, stride)


class _SubsampleAndPad(nn.Module):
    """Option A of He et al. (2016a): every ``stride``-th pixel, and zeros for the new channels."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class DenseNetBC(nn.Module):
    """DenseNet with bottlenecks and compression (Huang et al., 2017), for small images.

    Three dense blocks; the transition after the first and the second compresses the channels and halves the image.

    Args:
        depth: Number of weight layers, 6n + 4; each dense block has n layers of two convolutions.
        growth_rate: Channels that each dense layer adds (k in the paper); the first convolution has 2k.
        compression: Fraction of the channels that a transition keeps.
        num_classes: Number of logits.
        in_channels: Channels of the images.

    Raises:
        FlatminimaError: The depth is not 6n + 4 with n >= 1.
    """

    def __init__(self, *, depth: int, growth_rate: int, compression: float, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers_per_block, rest = divmod(depth - 4, 6)
        if layers_per_block < 1 or rest:
            raise FlatminimaError(f"a DenseNet-BC has depth 10, 16, 22, ..., 100, ...; got {depth}")
        channels = 2 * growth_rate
        layers: list[nn.Module] = [_conv(in_channels, channels, 3)]
        for block in range(3):
            if block > 0:
                layers.append(_transition(channels, int(channels * compression)))
                channels = int(channels * compression)
            for _ in range(layers_per_block):
                layers.append(_DenseLayer(channels, growth_rate))
                channels += growth_rate
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), *_classifier(channels, num_classes))
        _initialize_normalized(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class _DenseLayer(nn.Module):
    """1×1 bottleneck to 4k channels, then 3×3 to k; the output is the input with those k channels appended."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.new_features = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            _conv(in_channels, 4 * growth_rate, 1),
            nn.BatchNorm2d(4 * growth_rate),
            nn.ReLU(),
            _conv(4 * growth_rate, growth_rate, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new_features(x)], dim=1)


def _transition(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), _conv(in_channels, out_channels, 1), nn.AvgPool2d(2))


# ---------------------------------------------------------------------------------------------------------------------
# The networks by name
# ---------------------------------------------------------------------------------------------------------------------


@network("cnn")
def _cnn(num_classes: int, in_channels: int) -> nn.Module:
    """The paper's six-layer CNN; the classifier after the pool is linear."""
    layers: list[nn.Module] = []
    channels = in_channels
    for i, width in enumerate((64, 64, 128, 128, 192, 192), start=1):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        if i in (2, 4):
            layers.append(nn.MaxPool2d(2))
        channels = width
    return _initialize_plain(nn.Sequential(*layers, *_classifier(channels, num_classes)))


@network("resnet20")
def _resnet20(num_classes: int, in_channels: int) -> nn.Module:
    # Option A, as the CIFAR networks of He et al. (2016a) have it: every shortcut is free of parameters.
    return PreActResNet(
        widths=(16, 32, 64), blocks_per_stage=3, shortcut="pad", num_classes=num_classes, in_channels=in_channels
    )


@network("wrn28-2")
def _wrn28_2(num_classes: int, in_channels: int) -> nn.Module:
    return PreActResNet(
        widths=(32, 64, 128),
        blocks_per_stage=4,
        shortcut="projection",
        num_classes=num_classes,
        in_channels=in_channels,
    )


@network("densenet-bc-100")
def _densenet_bc_100(num_classes: int, in_channels: int) -> nn.Module:
    return DenseNetBC(depth=100, growth_rate=12, compression=0.5, num_classes=num_classes, in_channels=in_channels)


@network("resnet8")
def _resnet8(num_classes: int, in_channels: int) -> nn.Module:
    # A thirteenth of ResNet-20's arithmetic: one block per stage, and the first convolution halves the image.
    return PreActResNet(
        widths=(16, 32, 64),
        blocks_per_stage=1,
        shortcut="pad",
        first_stride=2,
        num_classes=num_classes,
        in_channels=in_channels,
    )


@network("resnet8-wide")
def _resnet8_wide(num_classes: int, in_channels: int) -> nn.Module:
    # Twice the channels where the image is small, and a product of many channels fast: less than twice the time.
    return PreActResNet(
        widths=(16, 64, 128),
        blocks_per_stage=1,
        shortcut="pad",
        first_stride=2,
        num_classes=num_classes,
        in_channels=in_channels,
    )


@network("small-cnn")
def _small_cnn(num_classes: int, in_channels: int) -> nn.Module:
    """Three convolutions and one pool for 8×8 images.

    It ends in a flatten, not in the global pool of its larger sibling: that fits random labels in a fraction of the
    epochs, and a confusion set is what the digits are for.
    """
    return _initialize_plain(
        nn.Sequential(
            _RequireDigits("small-cnn", in_channels),
            nn.Conv2d(in_channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (_DIGIT_SIZE // 2) ** 2, num_classes),
        )
    )


@network("mlp")
def _mlp(num_classes: int, in_channels: int) -> nn.Module:
    """Two hidden layers for 8×8 images."""
    return _initialize_plain(
        nn.Sequential(
            _RequireDigits("mlp", in_channels),
            nn.Flatten(),
            nn.Linear(in_channels * _DIGIT_SIZE**2, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )
    )
