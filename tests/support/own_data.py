"""Data as people have them: class folders, rows of the datasets library, small networks of Transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from support.lazily import Lazily

transformers = Lazily("transformers")

WORDS = ("a", "good", "bad", "film", "book", "play", "song")


def write_image(path: Path, height: int = 6, width: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A PNG with random pixels, and what is in it."""
    shape = (height, width) if mode in ("L", "P") else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    image = Image.fromarray(pixels, "L" if mode == "P" else None).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def class_folders(
    folder: Path, *, count: int = 6, classes: tuple[str, ...] = ("cat", "dog"), mode: str = "RGB"
) -> Path:
    """So many images of 6×8 in each class folder."""
    for number, name in enumerate(classes):
        for i in range(count):
            write_image(folder / name / f"{i}.png", mode=mode, seed=100 * number + i)
    return folder


def sentences(count: int) -> tuple[list[str], list[int]]:
    """Texts of different lengths, no two the same, and their classes."""
    labels = [i % 2 for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, len(WORDS), (2 + i % 4,), generator=generator).tolist() for i in range(count)]
    texts = [
        " ".join(["a", "bad" if label else "good", *(WORDS[w] for w in words)])
        for words, label in zip(drawn, labels, strict=True)
    ]
    return texts, labels


def tokenizer_of_words(*, pad: bool = True) -> transformers.PreTrainedTokenizerFast:
    """One token for each of :data:`WORDS`, between [CLS] and [SEP]."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **tokens, **({"pad_token": "[PAD]"} if pad else {})
    )


def text_classifier(num_labels: int = 2, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=1.0,
        num_labels=num_labels,
    )
    return transformers.BertForSequenceClassification(config).eval()


def language_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=4 + len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3
    )
    return transformers.GPT2LMHeadModel(config).eval()


def image_classifier() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4,
        patch_size=2,
        num_labels=2,
    )
    return transformers.ViTForImageClassification(config).eval()


def written(folder: Path, *parts: transformers.PreTrainedModel | transformers.PreTrainedTokenizerFast) -> Path:
    """A folder as ``save_pretrained`` writes it."""
    for part in parts:
        part.save_pretrained(folder)
    return folder
