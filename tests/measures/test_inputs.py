"""What people pass by mistake is told in one line; what a model makes of its labels is made here too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, NonFiniteError
from support.oracles import explicit_gram

N, CLASSES = 20, 3
torch.manual_seed(0)
X, Y = torch.randn(N, 5), torch.arange(N) % CLASSES
OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 2, "progress": False, "measures": ()}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, CLASSES, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


class AsComplex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x)


lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(CLASSES))
MISTAKES = {
    "float64 inputs": (
        lambda: fm.measure(mlp(), (X.double(), Y), **OPTIONS),
        "float64.*the parameters' type, torch.fl",
    ),
    "float64 inputs to gram": (lambda: fm.gram(mlp(), X.double(), Y), "float64.*the parameters' type, torch.float32"),
    "byte inputs": (lambda: fm.measure(mlp(), (X.byte(), Y), **OPTIONS), "uint8.*convert bytes as in training"),
    "too many inputs": (lambda: fm.measure(mlp(), ((X, X), Y), **OPTIONS), "cannot be run on these inputs"),
    "a model without values": (
        lambda: fm.measure(nn.Linear(5, CLASSES, device="meta"), (X, Y), **OPTIONS),
        "'weight' is on the meta device, without values: load the model's weights",
    ),
    "data without values": (lambda: fm.measure(mlp(), (X.to("meta"), Y), **OPTIONS), "data are on the meta device"),
    "complex logits": (
        lambda: fm.measure(nn.Sequential(mlp(), AsComplex()), (X, Y), **OPTIONS),
        "returned torch.complex64: return real logits",
    ),
    "lazy": (lambda: fm.measure(lazy, (X, Y), **OPTIONS), "'0.weight' has no shape yet.*run the model on one batch"),
    "complex": (lambda: fm.measure(Complex(), (X, Y), **OPTIONS), "complex64, and gradients of complex ones"),
    "a path": (lambda: fm.measure("a.pt", (X, Y)), "a model is a torch.nn.Module, got str"),
    "a path for gram": (lambda: fm.gram("a.pt", X, Y), "a model is a torch.nn.Module, got str"),
    "a class for the exact Fisher": (
        lambda: fm.exact_fisher(nn.Linear, X, Y),
        "a model is a torch.nn.Module, got type",
    ),
    "a number to compare": (lambda: fm.compare({"a": mlp(), "b": 3}, (X, Y), **OPTIONS), "torch.nn.Module, got int"),
    "a list of targets": (lambda: fm.gram(mlp(), X, Y.tolist()), "targets must be a tensor, got list"),
    "an unknown path": (lambda: fm.gram(mlp(), X, Y, path="fast"), "unknown path='fast'"),
    "smoothing as text": (
        lambda: fm.CrossEntropy(label_smoothing="0.1"),
        "label_smoothing must be a number, got '0.1'",
    ),
    "a weight for all": (lambda: fm.CrossEntropy(weight=2.0), "weight must be a factor for every class, got 2.0"),
    "a regularizer of a path": (lambda: fm.FisherTraceRegularizer("a.pt"), "a model is a torch.nn.Module, got str"),
    "a regularizer of lazy": (
        lambda: fm.FisherTraceRegularizer(nn.Sequential(nn.LazyLinear(3))),
        "'0.weight' has no shape yet.*run the model on one batch",
    ),
    "beta as text": (lambda: fm.FisherTraceRegularizer(mlp(), beta="10"), "beta must be zero or a positive.*'10'"),
    "alpha as nothing": (lambda: fm.FisherTraceRegularizer(mlp(), alpha=None), "alpha must be a positive.*None"),
    "a list as norm": (lambda: fm.FisherTraceRegularizer(mlp(), max_grad_norm=[1]), r"max_grad_norm must be.*\[1\]"),
    "a number as parameters": (lambda: fm.FisherTraceRegularizer(mlp(), parameters=3), "parameters must be.*got 3"),
    "numbers as names": (lambda: fm.compare({0: mlp(), 1: mlp()}, (X, Y)), r"models' names are strings, got \[0\]"),
    "nothing measured": (lambda: fm.comparison_of({}), "comparison_of takes at least one minimum, got none"),
    "models as measured": (
        lambda: fm.comparison_of({"a": mlp()}),
        "comparison_of takes what measure returned, by name",
    ),
    "a list to compare": (lambda: fm.compare([mlp(), mlp()], (X, Y)), "needs models by name.*got list"),
    "a tensor as loss": (lambda: fm.measure(mlp(), (X, Y), loss=torch.ones(3)), "unknown loss a tensor of shape"),
    "half a sample": (lambda: fm.measure(mlp(), (X, Y), subset_size=6.5), "subset_size must be an integer, got 6.5"),
}


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake: str) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(FlatminimaError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert "(copy.deepcopy(model).float())" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_measure_that_does_not_exist_has_no_ranks() -> None:
    comparison = fm.compare({"a": mlp(), "b": mlp()}, (X, Y), **OPTIONS)
    with pytest.raises(FlatminimaError, match=r"no measure 'fisher_trac' \(did you mean 'fisher_trace'\?\)"):
        comparison.ranks("fisher_trac")
    assert comparison.ranks("robustness") == {}


def test_missing_values_are_named_with_their_samples() -> None:
    x = torch.randn(1200, 5)
    x[1003] = torch.nan
    with pytest.raises(NonFiniteError, match=r"first: \[1003\].*the inputs themselves hold NaN"):
        fm.measure(mlp(), (x, torch.arange(1200) % CLASSES), **OPTIONS)


class Imputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill, self.net = nn.Parameter(torch.zeros(5)), mlp()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(torch.where(x.isnan(), self.fill, x.nan_to_num()))
        return logits


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_network_that_imputes_missing_values_is_measured() -> None:
    x = X.clone()
    x[::3, 1] = torch.nan
    model = Imputing().double()
    c = fm.measure(model, (x.double(), Y), **{**OPTIONS, "subset_size": N, "trials": 1})
    expected = torch.linalg.slogdet(explicit_gram(model, x, Y))[1].item()
    assert c.log_det_fisher.mean == pytest.approx(expected, rel=1e-9)


def encoder_decoders() -> dict[str, nn.Module]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    bart = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    )
    t5 = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return {
        "bart": transformers.BartForConditionalGeneration(bart).double().eval(),
        "t5": transformers.T5ForConditionalGeneration(t5).double().eval(),
    }


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_is_fed_its_labels_as_the_model_does(name: str) -> None:
    """Losses and ξ of the model's own loss, one sample at a time."""
    model = encoder_decoders()[name]
    tokens, labels = torch.randint(4, 40, (5, 7)), torch.randint(4, 40, (5, 6))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    rows, losses = [], []
    for i in range(5):
        loss = model(**{key: value[i : i + 1] for key, value in inputs.items()}, labels=labels[i : i + 1]).loss
        losses.append(loss.item())
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    jacobian = torch.stack(rows)
    data = [{**{key: value[i] for key, value in inputs.items()}, "labels": labels[i]} for i in range(5)]
    c = fm.measure(model, data, **{**OPTIONS, "subset_size": 5, "trials": 1})
    assert c.train_loss == pytest.approx(sum(losses) / 5, rel=1e-9)
    expected = torch.linalg.slogdet(jacobian @ jacobian.T)[1].item()
    assert c.log_det_fisher.mean == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(
        fm.gram(model, inputs, labels), jacobian @ jacobian.T, rtol=1e-5, atol=1e-6
    )  # norms in float32
    with pytest.raises(FlatminimaError, match="pass the inputs as a mapping"):
        fm.gram(model, tokens, labels)
