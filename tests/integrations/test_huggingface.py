"""Hugging Face models, built from a configuration with random weights: inputs by keyword, tokens, masks, adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import flatminima as fm
from flatminima.gramian.engine import factored_gram
from support.lazily import Lazily, needs
from support.oracles import explicit_gram

transformers = Lazily("transformers")

pytestmark = [needs("transformers"), pytest.mark.xdist_group("transformers")]

N, CLASSES, VOCABULARY, LENGTH = 5, 3, 40, 9


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        )
    )


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="bottleneck", num_labels=CLASSES
        )
    )


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=CLASSES,
        )
    )


def llama() -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=CLASSES,
            pad_token_id=0,
        )
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )


def multiple_choice() -> nn.Module:
    """Folds the choices into the batch."""
    return transformers.BertForMultipleChoice(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def choices() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, VOCABULARY, (N, CLASSES, LENGTH))}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, 16, 16, dtype=torch.float64)}


def text() -> dict[str, Tensor]:
    mask = torch.ones(N, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    mask[3, 4:] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (N, LENGTH)) * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("build", "batch", "tolerance"),
    [(vit, images, 1e-10), (resnet, images, 1e-10), (bert, text, 1e-10), (llama, text, 1e-6)],
    ids=["vit", "resnet", "bert", "llama"],
)
def test_classifiers(build: Callable[[], nn.Module], batch: Callable[[], dict[str, Tensor]], tolerance: float) -> None:
    """Llama normalizes in float32 whatever its own type, hence its tolerance."""
    torch.manual_seed(0)
    model, inputs, targets = build().double(), batch(), torch.arange(N) % CLASSES
    result = factored_gram(model, inputs, targets)
    expected = explicit_gram(model, inputs, targets)
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(result.matrix(), expected, rtol=10 * tolerance, atol=atol)
    assert result.generic_parameters == ()


def test_choices_folded_into_the_batch() -> None:
    torch.manual_seed(0)
    model, inputs, targets = multiple_choice().double(), choices(), torch.arange(N) % CLASSES
    result = factored_gram(model, inputs, targets)
    expected = explicit_gram(model, inputs, targets)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item())
    assert result.generic_parameters == ("bert.embeddings.token_type_embeddings.weight",)


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(logits[:, :-1].movedim(-1, 1), labels[:, 1:], reduction="none", ignore_index=-100)
    return each.sum(1) / (labels[:, 1:] != -100).sum(1)


def test_language_model_with_tied_embeddings_and_ignored_tokens() -> None:
    torch.manual_seed(0)
    model, inputs = gpt2().double(), text()
    assert model.lm_head.weight is model.transformer.wte.weight
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    result = factored_gram(model, inputs, labels, loss=fm.CrossEntropy(next_token=True))
    expected = explicit_gram(model, inputs, labels, next_token)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item())
    assert result.generic_parameters == ()


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_measure_takes_a_dataset_of_mappings() -> None:
    class Texts(Dataset[dict[str, Any]]):
        def __init__(self) -> None:
            torch.manual_seed(1)
            self.tokens = torch.randint(1, VOCABULARY, (30, LENGTH))

        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> dict[str, Any]:
            tokens = self.tokens[index]
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    c = fm.measure(gpt2(), Texts(), loss=fm.CrossEntropy(next_token=True), subset_size=6, trials=2)
    assert c.robustness is None
    assert c.train_accuracy is None
    assert c.train_loss > 0


def test_adapters_alone_are_measured() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(bert(), config).double()
    inputs, targets = text(), torch.arange(N) % CLASSES
    result = factored_gram(model, inputs, targets)
    expected = explicit_gram(model, inputs, targets)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * 2 * 2 * (2 * 16)
    assert result.generic_parameters == ()
