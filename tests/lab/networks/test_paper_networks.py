from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.names import OWN_NETWORKS
from flatminima.lab.networks.paper import BUILDERS, MODEL_NAMES, DenseNetBC, PreActResNet, build_model, network
from flatminima.lab.runs.spec import RunSpec

DIGITS_MODELS = ("small-cnn", "mlp")


def build(name: str, num_classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, num_classes=num_classes, in_channels=1 if name in DIGITS_MODELS else 3)


def images(name: str, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    shape = (1, 8, 8) if name in DIGITS_MODELS else (3, 32, 32)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def conv(cin: int, cout: int, k: int = 3, *, bias: bool = False) -> int:
    return cin * cout * k * k + bias * cout


def bn(channels: int) -> int:
    return 2 * channels


def linear(cin: int, cout: int) -> int:
    return (cin + 1) * cout


def cnn_count(num_classes: int) -> int:
    widths = (3, 64, 64, 128, 128, 192, 192)
    convs = sum(conv(a, b, bias=True) for a, b in itertools.pairwise(widths))
    return convs + linear(192, num_classes)


def resnet_count(widths: tuple[int, int, int], blocks: int, num_classes: int, *, projections: int) -> int:
    """Stem; per block two convolutions, each behind a BatchNorm of its input; the head's BatchNorm; the classifier."""
    total, channels = conv(3, 16), 16
    for width in widths:
        for _ in range(blocks):
            total += bn(channels) + conv(channels, width) + bn(width) + conv(width, width)
            channels = width
    return total + projections + bn(channels) + linear(channels, num_classes)


def resnet20_count(num_classes: int) -> int:
    return resnet_count((16, 32, 64), 3, num_classes, projections=0)  # option A shortcuts have no parameters


def wrn28_2_count(num_classes: int) -> int:
    projections = conv(16, 32, 1) + conv(32, 64, 1) + conv(64, 128, 1)
    return resnet_count((32, 64, 128), 4, num_classes, projections=projections)


def densenet_count(num_classes: int) -> int:
    """Channels at the start of each block: 24, then half of 24 + 16·12 = 216, then half of 108 + 192 = 300."""
    total = conv(3, 24)
    for start in (24, 108, 150):
        for channels in range(start, start + 16 * 12, 12):
            total += bn(channels) + conv(channels, 48, 1) + bn(48) + conv(48, 12)
    transitions = bn(216) + conv(216, 108, 1) + bn(300) + conv(300, 150, 1)
    return total + transitions + bn(342) + linear(342, num_classes)


# The paper's counts for CIFAR-10: 0.27 M, 1.47 M and 0.77 M for the last three of the first four.
COUNTS = {
    "cnn": {10: 815_434, 100: 832_804},
    "resnet20": {10: 269_722, 100: 275_572},
    "wrn28-2": {10: 1_467_610, 100: 1_479_220},
    "densenet-bc-100": {10: 769_162, 100: 800_032},
    # 27·16; blocks of BatchNorm, 3×3, BatchNorm, 3×3: 4,672, 13,920, 55,488; 2·64; the classifier
    "resnet8": {10: 75_290, 100: 81_140},
    # 27·16; 4,672, and as above 46,240 and 221,568; 2·128; the classifier
    "resnet8-wide": {10: 274_458, 100: 286_068},
    "small-cnn": {10: 33_546},  # (9 + 1)·16 + (16·9 + 1)·32 + (32·9 + 1)·64 + (64·4·4 + 1)·10
    "mlp": {10: 26_122},  # (64 + 1)·128 + (128 + 1)·128 + (128 + 1)·10
}
CLOSED_FORMS = {
    "cnn": cnn_count,
    "resnet20": resnet20_count,
    "wrn28-2": wrn28_2_count,
    "densenet-bc-100": densenet_count,
}


def test_every_model_has_a_count() -> None:
    assert tuple(COUNTS) == tuple(MODEL_NAMES) == OWN_NETWORKS


@pytest.mark.parametrize(("name", "classes"), [(name, k) for name, counts in COUNTS.items() for k in counts])
def test_parameter_count(name: str, classes: int) -> None:
    assert count(build(name, classes)) == COUNTS[name][classes]


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("classes", [10, 100])
def test_parameter_count_follows_from_the_architecture(name: str, classes: int) -> None:
    assert CLOSED_FORMS[name](classes) == COUNTS[name][classes]


@pytest.mark.parametrize(("name", "layers"), [("cnn", 7), ("resnet20", 20), ("wrn28-2", 26), ("densenet-bc-100", 100)])
def test_depth_in_weight_layers(name: str, layers: int) -> None:
    """Convolutions on the main path and the classifier.

    The 28 of WRN-28 are its 25 convolutions on the main path and the three of its shortcuts.
    """
    main_path = [
        module
        for path, module in build(name).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in path
    ]
    assert len(main_path) == layers


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("classes", [10, 100])
def test_forward_gives_logits(name: str, classes: int) -> None:
    logits = build(name, classes)(images(name, 2))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()
    assert (logits < 0).any()  # logits, not probabilities


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(name)
    nn.functional.cross_entropy(model(images(name, 4)), torch.tensor([1, 3, 5, 7])).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.abs().max() > 0, path


@pytest.mark.parametrize("name", MODEL_NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), batch=st.integers(1, 4))
def test_samples_do_not_interact_in_eval_mode(name: str, seed: int, batch: int) -> None:
    model = build(name).double()
    # Running statistics that do something: the initial ones are the identity.
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, dtype=torch.float64)
            module.running_var = torch.rand(module.num_features, dtype=torch.float64) + 0.5
    model.eval()
    x = images(name, batch, torch.float64, seed)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(sample[None]) for sample in x])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_seed_decides_the_weights(name: str) -> None:
    first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_he_initialization(name: str) -> None:
    """Weights of variance 2/fan: fan-in in the plain networks, fan-out in those with BatchNorm; biases zero."""
    model = build(name)
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        if module.bias is not None:
            assert (module.bias == 0).all(), path
        if normalized and isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        fan = weight.shape[0] if normalized else weight.shape[1]
        std = math.sqrt(2 / (fan * weight[0, 0].numel()))
        # A sample standard deviation of n normal draws is within 5/√(2n) of the truth but once in two million.
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), path


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_no_inplace_operations(name: str) -> None:
    """Rows of J are formed from a layer's input and output after the forward pass: nothing may overwrite them."""
    assert not any(getattr(module, "inplace", False) for module in build(name).modules())


@pytest.mark.parametrize("name", ["resnet20", "wrn28-2", "densenet-bc-100"])
def test_batchnorm_before_every_convolution_but_the_stem(name: str) -> None:
    """Pre-activation: no BatchNorm normalizes the output of the stem's or a block's last convolution."""
    model = build(name)
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    main_path = [m for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in path]
    classifier = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert norms == [m.in_channels for m in main_path[1:]] + [classifier.in_features]


def test_resnet20_shortcut_subsamples_and_pads() -> None:
    """With the residual branches silenced, stage changes pass every second pixel and append zero channels."""
    model = build("resnet20")
    assert isinstance(model, PreActResNet)
    block = model.blocks[3].eval()  # opens the second stage
    for module in block.residual.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    x = torch.randn(2, 16, 8, 8)
    out = block(x)
    activated = torch.relu(x / math.sqrt(1 + 1e-5))  # BatchNorm with its initial running statistics
    torch.testing.assert_close(out[:, :16], activated[:, :, ::2, ::2])
    assert (out[:, 16:] == 0).all()


def test_later_blocks_have_the_identity_shortcut() -> None:
    model = build("wrn28-2")
    block = model.blocks[1].eval()
    for module in block.residual.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x), x)


def test_dense_layers_append_to_their_input() -> None:
    model = DenseNetBC(depth=10, growth_rate=4, compression=0.5, num_classes=3, in_channels=1)
    layer = model.features[1]
    x = torch.randn(2, 8, 4, 4)
    out = layer(x)
    assert out.shape == (2, 12, 4, 4)
    assert torch.equal(out[:, :8], x)


@pytest.mark.parametrize("name", ["cnn", "resnet20", "wrn28-2", "densenet-bc-100"])
@pytest.mark.parametrize("size", [8, 12])
def test_convolutional_networks_take_other_sizes_and_channels(name: str, size: int) -> None:
    model = build_model(name, num_classes=4, in_channels=1)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 4)


@pytest.mark.parametrize("name", DIGITS_MODELS)
def test_digits_networks_refuse_other_sizes(name: str) -> None:
    message = r"takes images of shape \(1, 8, 8\), got \(3, 32, 32\)"
    with pytest.raises(FlatminimaError, match=message):
        build(name)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "meant"), [("resnet-20", "resnet20"), ("ResNet20", "resnet20"), ("wrn-28-2", "wrn28-2"), ("MLP", "mlp")]
)
def test_unknown_name_suggests_the_close_one(name: str, meant: str) -> None:
    with pytest.raises(FlatminimaError, match=f"did you mean '{meant}'") as caught:
        build_model(name)
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(FlatminimaError) as caught:
        build_model("transformer")
    message = str(caught.value)
    assert all(name in message for name in MODEL_NAMES)
    assert "did you mean" not in message


@pytest.mark.parametrize("counts", [{"num_classes": 0}, {"in_channels": 0}])
def test_impossible_counts(counts: dict[str, int]) -> None:
    with pytest.raises(FlatminimaError, match="num_classes >= 1 and in_channels >= 1"):
        build_model("resnet20", **counts)


@pytest.mark.parametrize("depth", [4, 11, 99])
def test_impossible_densenet_depth(depth: int) -> None:
    with pytest.raises(FlatminimaError, match=f"got {depth}"):
        DenseNetBC(depth=depth, growth_rate=4, compression=0.5, num_classes=3, in_channels=1)


def test_a_registered_network_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "linear", lambda classes, channels: nn.Identity())  # taken away after the test

    @network("linear")
    def linear(num_classes: int, in_channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))

    assert build_model("linear", num_classes=3, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert RunSpec(model="linear").model == "linear"
    with pytest.raises(FlatminimaError, match="mlp, linear"):
        build_model("transformer")
