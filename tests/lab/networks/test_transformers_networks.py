"""Networks of Transformers with their own processors and tokenizers, from folders that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatminima import measure
from flatminima.errors import FlatminimaError
from flatminima.lab.data import Pictures, Preparation, Texts, open_data
from flatminima.lab.errors import AdaptedCheckpointWarning
from flatminima.lab.reading import Reading
from flatminima.lab.runs import LoadedNetwork, load_network
from flatminima.lab.runs.measuring import Measuring, measure_images
from flatminima.losses import CrossEntropy
from support.lazily import Lazily
from support.messages import one_line
from support.own_data import (
    class_folders,
    image_classifier,
    language_model,
    sentences,
    text_classifier,
    tokenizer_of_words,
    written,
)

transformers = Lazily("transformers")

datasets = Lazily("datasets")

HOW = Measuring(subset_size=4, trials=1, measures=())
TEXTS, CLASSES = sentences(12)


def texts_of(labels: list[int] | None = CLASSES, texts: list[str] = TEXTS) -> Texts:
    rows = datasets.Dataset.from_dict({"text": texts})

    def columns(places: object) -> tuple[list[str], ...]:
        return (rows[list(places)]["text"],)  # type: ignore[call-overload]

    found = None if labels is None else torch.tensor(labels)
    classes = None if labels is None else max(labels) + 1
    return Texts("reviews", columns, torch.arange(len(texts)), found, classes, "reviews: no column of labels")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return written(tmp_path / "classifier", text_classifier(), tokenizer_of_words())


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    data = open_data(str(class_folders(tmp_path / "photos"))).data
    assert isinstance(data, Pictures)
    return data


def test_a_text_classifier_tokenizes_its_texts(classifier: Path) -> None:
    network = load_network(f"hf:{classifier}", None, texts_of())
    inputs, labels = network.data.fetch([3, 0])
    expected = tokenizer_of_words()([TEXTS[3], TEXTS[0]], padding=True, return_tensors="pt")
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {k: v.tolist() for k, v in expected.items()}
    assert labels.tolist() == [CLASSES[3], CLASSES[0]]
    assert "at most 16 tokens, to predict the text's class" in str(network.preparation)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_texts_are_measured_as_the_library_measures_their_tokens(classifier: Path) -> None:
    network = load_network(f"hf:{classifier}", None, texts_of())
    found = measure_images(network.model, network.data, HOW, device="cpu", progress=False)
    encoded = dict(tokenizer_of_words()(TEXTS, padding=True, return_tensors="pt"))
    options = {"subset_size": 4, "trials": 1, "measures": (), "progress": False}
    expected = measure(text_classifier(), (encoded, torch.tensor(CLASSES)), **options)
    assert found.log_det_fisher.mean == pytest.approx(expected.log_det_fisher.mean, rel=1e-4)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
@pytest.mark.parametrize("pad", [True, False])
def test_a_language_model_is_asked_for_the_next_token_of_what_is_no_padding(pad: bool, tmp_path: Path) -> None:
    folder = written(tmp_path / "gpt", language_model(), tokenizer_of_words(pad=pad))
    network = load_network(f"hf:{folder}", None, texts_of(labels=None))
    assert network.data.loss == CrossEntropy(next_token=True)
    inputs, labels = network.data.fetch(range(12))
    losses = network.data.loss(network.model(**inputs).logits, labels)
    for i, text in enumerate(TEXTS):
        tokens = tokenizer_of_words()(text, return_tensors="pt")["input_ids"]
        expected = network.model(input_ids=tokens, labels=tokens).loss
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-5)
    found = measure_images(network.model, network.data, HOW, device="cpu", progress=False)
    assert found.train_loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_long_texts_are_cut_where_the_user_says(classifier: Path) -> None:
    network = load_network(f"hf:{classifier}", None, texts_of(), Reading(max_length=4))
    assert network.data.fetch(range(12))[0]["input_ids"].shape == (12, 4)


def test_an_image_classifier_uses_its_own_processor(tmp_path: Path, pictures: Pictures) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 4, "width": 4}, image_mean=[0.2, 0.3, 0.4])
    folder = written(tmp_path / "vit", image_classifier(), processor)  # type: ignore[arg-type]
    network = load_network(f"hf:{folder}", None, pictures)
    inputs, labels = network.data.fetch([8, 1])
    expected = processor(images=pictures.images([8, 1], 3), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], expected)
    assert labels.tolist() == [1, 0]
    assert network.preparation.is_that_of(load_network(f"hf:{folder}", None, pictures).preparation)


def test_without_a_processor_images_are_prepared_as_for_others(tmp_path: Path, pictures: Pictures) -> None:
    folder = written(tmp_path / "vit", image_classifier())
    reading = Reading(normalize="none", resize="4x4")
    data = open_data(str(tmp_path / "photos"), reading).data
    network = load_network(f"hf:{folder}", None, data, reading)
    assert network.preparation.name == "none"
    assert network.data.fetch([0])[0].shape == (1, 3, 4, 4)


def test_a_checkpoint_takes_the_place_of_its_weights(classifier: Path, tmp_path: Path) -> None:
    other = text_classifier(seed=1)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    model = load_network(f"hf:{classifier}", tmp_path / "other.safetensors", texts_of()).model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_half_precision_is_measured_in_float32_and_said(tmp_path: Path) -> None:
    folder = written(tmp_path / "half", text_classifier().to(torch.bfloat16), tokenizer_of_words())
    with pytest.warns(AdaptedCheckpointWarning, match="weights of bfloat16 are measured in float32"):
        network = load_network(f"hf:{folder}", None, texts_of())
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.float32}


def without_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("classifier")}
    save_file(kept, path, metadata={"format": "pt"})


def of_unknown_class(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["TheirOwnNet"]}))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_more_tokens(folder: Path) -> None:
    tokenizer = tokenizer_of_words()
    tokenizer.add_tokens(["novel"])
    tokenizer.save_pretrained(folder)


def masked(folder: Path) -> None:
    config = text_classifier().config
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_head, r"has no weights for classifier\.bias, classifier\.weight, which would be random"),
        (of_unknown_class, "says that it is of class TheirOwnNet, which transformers .* code .* is never run"),
        (without_tokenizer, "its tokenizer has no vocabulary"),
        (with_more_tokens, "its tokenizer has 12 tokens, the network 11"),
        (masked, "is a BertForMaskedLM: texts are measured for classification"),
        (damaged, "transformers cannot load its network"),
    ],
)
def test_a_folder_that_is_wrong_is_one_line(change: object, said: str, classifier: Path) -> None:
    change(classifier)  # type: ignore[operator]
    with pytest.raises(FlatminimaError, match=said) as caught:
        load_network(f"hf:{classifier}", None, texts_of())
    assert f"model hf:{classifier}" in one_line(caught)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (texts_of(labels=None), "no column of labels; BertForSequenceClassification needs them"),
        (texts_of(labels=[0, 1, 2] * 4), "has 2 outputs, but the data have 3 classes"),
    ],
)
def test_texts_that_are_not_the_networks_are_one_line(texts: Texts, said: str, classifier: Path) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        load_network(f"hf:{classifier}", None, texts)
    one_line(caught)


def test_a_text_without_a_next_token_is_named(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_words()
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    folder = written(tmp_path / "gpt", language_model(), tokenizer)
    network = load_network(f"hf:{folder}", None, texts_of(labels=None, texts=["a film", "a", "a book"]))
    with pytest.raises(FlatminimaError, match="reviews: row 1 has 1 token, so there is no next one"):
        network.data.fetch(range(3))


def test_a_network_without_a_tokenizer_takes_no_texts() -> None:
    with pytest.raises(FlatminimaError, match=r"torch\.nn:Identity has no tokenizer for the texts of reviews"):
        load_network("torch.nn:Identity", None, texts_of())


def test_data_with_their_own_tokens_keep_the_networks_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens_of_a_stranger.py").write_text(
        "import torch\n"
        "TOKENS = torch.arange(20).reshape(4, 5) % 11\n"
        "def rows(): return [{'input_ids': row, 'labels': row} for row in TOKENS]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = written(tmp_path / "gpt", language_model())
    network = load_network(f"hf:{folder}", None, open_data("tokens_of_a_stranger:rows").data)
    assert network.data.loss == CrossEntropy(next_token=True)
    assert isinstance(network, LoadedNetwork)
    assert isinstance(network.preparation, Preparation)
    with pytest.raises(FlatminimaError, match="normalize is for images"):
        load_network(f"hf:{folder}", None, open_data("tokens_of_a_stranger:rows").data, Reading(normalize="none"))
