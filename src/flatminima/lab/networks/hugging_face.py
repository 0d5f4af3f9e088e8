"""``hf:NAME-or-folder``: a network of Transformers, with its own processor for images or tokenizer for texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, first_line, require, warn
from flatminima.lab.data import ImageSet, OwnData, Pictures, Preparation, Prepared, ReadySamples, Texts, as_pictures
from flatminima.lab.errors import AdaptedCheckpointWarning
from flatminima.lab.networks.kinds import MODEL_KINDS, ModelKind
from flatminima.lab.reading import Reading
from flatminima.lab.user_code import others_errors
from flatminima.losses import CrossEntropy, Loss

_WHERE_IT_LIES = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file", "is_local", "local_files_only")
"""What two copies of one tokenizer may differ in."""
_IGNORED = -100
"""The label of what a tokenizer pads with."""
_TOKENS = 512
"""Of a text at most, where neither tokenizer nor network says how many it takes."""
_NO_LIMIT = 10**6
"""What a tokenizer says that has no limit is far above this."""


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise FlatminimaError("hf: networks need the package transformers: pip install transformers") from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """The package, without bars and advice of its own: what matters of it is said here."""
    transformers = _transformers()
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _build(name: str, data: OwnData, with_weights: bool) -> nn.Module:
    with _quiet() as transformers, _loading(name, "its network"):
        config = transformers.AutoConfig.from_pretrained(name)
        kind = _class_of(transformers, config, name)
        if not with_weights:
            model: nn.Module = kind(config)
            return model
        model, about = kind.from_pretrained(name, output_loading_info=True)
    missing = sorted({*about["missing_keys"], *(key for key, *_ in map(_first, about["mismatched_keys"]))})
    if missing:
        raise FlatminimaError(
            f"model hf:{name} has no weights for {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}, "
            "which would be random: give a network with its trained head, or its weights as a checkpoint"
        )
    types = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype in (torch.half, torch.bfloat16)}
    if types:
        warn(
            f"model hf:{name}: weights of {' and '.join(sorted(types))} are measured in float32",
            AdaptedCheckpointWarning,
        )
        model.float()
    return model


def _first(key: Any) -> tuple[str, ...]:
    """The name of a tensor whose shape is another, alone or before both shapes, by the version."""
    return (key,) if isinstance(key, str) else tuple(key)


def _class_of(transformers: Any, config: Any, name: str) -> Any:
    """The class that the network was saved as: it knows whether it classifies or models language."""
    names = config.architectures or ["none"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise FlatminimaError(
            f"model hf:{name} says that it is of class {names[0]}, which transformers {transformers.__version__} does "
            "not have: code that comes with a network is never run; build it by package.module:factory"
        )
    return kind


@contextlib.contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """What transformers raises for a name that is nowhere says how, in a page."""
    try:
        yield
    except FlatminimaError:
        raise
    except Exception as error:
        raise FlatminimaError(
            f"model hf:{name}: transformers cannot load {what} ({first_line(error)}); give a folder written by "
            "save_pretrained, or connect to the network once"
        ) from error


def _prepare(name: str, model: nn.Module, data: OwnData, reading: Reading) -> tuple[ReadySamples, Preparation] | None:
    if isinstance(data, Texts):
        return _tokenized(name, model, data, reading)
    if isinstance(data, ReadySamples):
        loss = _loss_of(model)
        samples = ReadySamples(data.samples, data.num_classes, loss)
        return samples, Preparation("as the data give them", repr(loss))
    return None if reading.changes_images else _processed(name, model, data, reading)


def _loss_of(model: nn.Module) -> Loss:
    return CrossEntropy(next_token=True) if _models_language(model) else "cross_entropy"


def _models_language(model: nn.Module) -> bool:
    """Whether its outputs are of the next token, by the name of its class."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _processed(
    name: str, model: nn.Module, data: ImageSet | Pictures, reading: Reading
) -> tuple[ReadySamples, Preparation] | None:
    with _quiet() as transformers:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name)
        except Exception:  # it has none: what is raised depends on what else lies there
            return None
    pictures = as_pictures(data, f"hf:{name}", reading) if isinstance(data, ImageSet) else data
    channels = 1 if getattr(model.config, "num_channels", 3) == 1 else 3
    what = f"model hf:{name}: its {type(processor).__name__}"

    def prepare(indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        with others_errors(what):
            inputs = processor(images=pictures.images(indices, channels), return_tensors="pt")
        return dict(inputs), pictures.labels[torch.as_tensor(indices)]

    samples = ReadySamples(Prepared(len(pictures), prepare), data.num_classes)
    return samples, Preparation(f"its own {type(processor).__name__}", processor.to_json_string())


def _tokenized(name: str, model: nn.Module, texts: Texts, reading: Reading) -> tuple[ReadySamples, Preparation]:
    language = _models_language(model)
    require(
        language or type(model).__name__.endswith("ForSequenceClassification"),
        f"model hf:{name} is a {type(model).__name__}: texts are measured for classification "
        "(...ForSequenceClassification) and language modelling (...ForCausalLM); for another task pass data with its "
        "inputs and labels as package.module:factory",
    )
    if not language and texts.labels is None:
        raise FlatminimaError(f"{texts.no_labels}; {type(model).__name__} needs them")
    with _quiet() as transformers, _loading(name, "its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    _check_vocabulary(name, tokenizer, model)
    limits = (reading.max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    longest = min((limit for limit in limits if limit and limit < _NO_LIMIT), default=_TOKENS)
    if tokenizer.pad_token is None:
        require(
            tokenizer.eos_token is not None and language,
            f"model hf:{name}: its tokenizer has no token to pad texts of different length with: give it one "
            "(pad_token), as in the training",
        )
        tokenizer.pad_token = tokenizer.eos_token  # it is masked, and is no label
    if language:
        tokenizer.padding_side = "right"  # positions are counted from the left

    def prepare(indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        with others_errors(f"model hf:{name}: its tokenizer"):
            encoded = tokenizer(
                *texts.at(indices), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
        inputs = dict(encoded)
        if not language:
            assert texts.labels is not None
            return inputs, texts.labels[torch.as_tensor(indices)]
        for index, count in zip(indices, inputs["attention_mask"].sum(1).tolist(), strict=True):
            require(
                count >= 2,
                f"{texts.where}: row {int(texts.chosen[index])} has {count} token{'' if count == 1 else 's'}, so there "
                "is no next one to predict: drop such rows, or join them to longer texts",
            )
        return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, _IGNORED)

    samples = ReadySamples(Prepared(len(texts), prepare), None if language else texts.num_classes, _loss_of(model))
    task = "the next token" if language else "the text's class"
    said = f"its own {type(tokenizer).__name__}, at most {longest} tokens, to predict {task}"
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _WHERE_IT_LIES}
    return samples, Preparation(said, repr((settings, sorted(tokenizer.get_vocab().items()), longest)))


def _check_vocabulary(name: str, tokenizer: Any, model: nn.Module) -> None:
    """Where its files are missing, transformers makes a tokenizer that knows no words, without a word."""
    vocabulary = tokenizer.get_vocab()
    require(
        not vocabulary.keys() <= set(tokenizer.all_special_tokens),
        f"model hf:{name}: its tokenizer has no vocabulary: add the files that tokenizer.save_pretrained writes",
    )
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    highest = max(vocabulary.values())
    require(
        highest < embeddings.num_embeddings,
        f"model hf:{name}: its tokenizer has {highest + 1} tokens, the network {embeddings.num_embeddings}: give the "
        "tokenizer that it was trained with",
    )


MODEL_KINDS["hf"] = ModelKind("hf:NAME or hf:FOLDER", _build, _prepare)
