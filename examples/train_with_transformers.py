"""
Train with Transformers
=======================

The regularizer in the Trainer of Hugging Face Transformers, on a tiny language model: another class of Trainer, and one
argument more.

::

    python examples/train_with_transformers.py output/
    torchrun --nproc-per-node 2 examples/train_with_transformers.py output/
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from flatminima.integrations.transformers import FisherTraceTrainer

# %%
# Something to learn
# ------------------


class CountingSentences(Dataset):
    """Sequences that count upwards, modulo 16."""

    def __len__(self) -> int:
        """How many there are."""
        return 128

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The one that starts at ``index``."""
        tokens = (torch.arange(12) + index) % 16
        return {"input_ids": tokens, "labels": tokens}


# %%
# The Trainer
# -----------


def main(output: str, **arguments: object) -> list[dict[str, float]]:
    """Train a small GPT-2 from scratch; returns the Trainer's log."""
    config = GPT2Config(vocab_size=16, n_positions=12, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    trainer = FisherTraceTrainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output,
            **{
                "max_steps": 12,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "learning_rate": 5e-3,
                "logging_steps": 2,
                "save_steps": 6,
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                **arguments,
            },
        ),
        train_dataset=CountingSentences(),
        regularizer={"beta": 10.0, "num_sub_batches": 4},  # this, and FisherTraceTrainer for Trainer
    )
    trainer.train(resume_from_checkpoint=bool(arguments.get("resume_from_checkpoint")))
    return trainer.state.log_history


if __name__ == "__main__":
    for entry in main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()):
        print(entry)
