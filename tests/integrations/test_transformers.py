from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import SEED, gradients_of

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate, which the Trainer needs, is not installed")

from flatminima.integrations.transformers import FisherTraceTrainer  # noqa: E402 - after the check for Transformers

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_transformers.py"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tiny_model() -> Any:
    torch.manual_seed(SEED)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def trainer_for(model: Any, folder: Path, **arguments: Any) -> Any:
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, **arguments}
    return FisherTraceTrainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **settings),
        regularizer={"alpha": 1e-2, "beta": 20.0, "num_sub_batches": 8, "every": 2},
    )


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_same_gradient_as_by_hand(tmp_path: Path, precision: dict[str, bool]) -> None:
    """Two micro-batches of eight sub-batches of one sentence, before any optimizer step; dropout is off."""
    model = tiny_model()
    by_hand = copy.deepcopy(model)
    tokens = torch.randint(16, (2, 8, 12))
    trainer = trainer_for(model, tmp_path, gradient_accumulation_steps=2, **precision)
    wrapped = trainer.accelerator.prepare(model)
    trainer.current_gradient_accumulation_steps = 2
    for part in tokens:
        trainer.training_step(wrapped, {"input_ids": part, "labels": part})

    regularizer = FisherTraceRegularizer(by_hand, alpha=1e-2, beta=40.0, num_sub_batches=8)
    for k, part in enumerate(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(precision)):
            regularizer.backward(
                lambda output, _: output.loss, {"input_ids": part, "labels": part}, None, weight=0.5, last=k == 1
            )
    tolerance = {"rtol": 0.05, "atol": 2e-3} if precision else {"rtol": 1e-4, "atol": 1e-6}
    for name, gradient in gradients_of(by_hand).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, **tolerance)
    penalty = trainer.regularizer.diagnostics()["penalty"]
    assert penalty > 0
    trainer.state.global_step = 1  # every=2: no penalty, and no new diagnostics
    trainer.training_step(wrapped, {"input_ids": tokens[0], "labels": tokens[0]})
    assert trainer.regularizer.diagnostics()["penalty"] == penalty


def test_refuses_what_the_trainer_owns(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="max_grad_norm is not the regularizer's here"):
        FisherTraceTrainer(model=tiny_model(), regularizer={"max_grad_norm": 1.0})
    trainer = trainer_for(tiny_model(), tmp_path)
    with pytest.raises(FlatminimaError, match="alpha must be"):
        FisherTraceTrainer(model=trainer.model, args=trainer.args, regularizer={"alpha": -1})
    trainer.is_fsdp_enabled = True  # and Accelerate does not say that it is FSDP2
    with pytest.raises(FlatminimaError, match="DeepSpeed and FSDP1 are not supported"):
        trainer.training_step(trainer.model, {})


def test_example_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    whole = main(str(tmp_path / "whole"))
    training = [entry for entry in whole if "loss" in entry]
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    assert all(entry["fisher_trace"] > 0 for entry in training)

    checkpoint = tmp_path / "whole" / "checkpoint-6"
    (tmp_path / "resumed").mkdir()
    checkpoint.rename(tmp_path / "resumed" / "checkpoint-6")
    resumed = [entry for entry in main(str(tmp_path / "resumed"), resume_from_checkpoint=True) if "loss" in entry]
    assert resumed == training


@pytest.mark.slow
def test_example_runs_on_two_processes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(EXAMPLE), str(tmp_path)], check=True, timeout=200)


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flatminima.integrations.transformers")
    with pytest.raises(FlatminimaError, match=r"pip install 'transformers\[torch\]'"):
        import flatminima.integrations.transformers  # noqa: F401
