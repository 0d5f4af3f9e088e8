"""The integrations under FSDP2: two processes on the CPU that share the weights, against one that has them all."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.collectives import free_port, run_in_processes
from support.regularizer_cases import SEED, mlp

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")

OPTIONS: dict[str, Any] = {"alpha": 1e-2, "beta": 20.0}
SUB_BATCHES = 8
"""Of one sample each, so that no random split stands in between."""

STEPS, MICRO_BATCHES, PROCESSES = 3, 2, 2


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (STEPS, MICRO_BATCHES, PROCESSES, SUB_BATCHES)
    return torch.randn(*shape, 6, generator=generator), torch.randint(3, shape, generator=generator)


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(16, (MICRO_BATCHES, PROCESSES, SUB_BATCHES, 12), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(SEED)
    return mlp()


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(SEED)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=16, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def under_accelerate(rank: int, folder: str) -> dict[str, Tensor]:
    """The weights after some steps with clipping."""
    import accelerate
    from accelerate.utils import FullyShardedDataParallelPlugin

    from flatminima.integrations.accelerate import backward

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=MICRO_BATCHES)
    shard_on_the_cpu(accelerator, plugin)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    regularizer = FisherTraceRegularizer(model, num_sub_batches=SUB_BATCHES, max_grad_norm=0.2, **OPTIONS)
    for inputs, targets in zip(*data(), strict=True):
        for x, y in zip(inputs[:, rank], targets[:, rank], strict=True):
            with accelerator.accumulate(model):
                assert accelerator.is_fsdp2
                backward(accelerator, regularizer, F.cross_entropy, x, y)
                optimizer.step()
                optimizer.zero_grad()
    return whole(dict(model.named_parameters()))


def shard_on_the_cpu(accelerator: Any, plugin: Any) -> None:
    """Accelerate takes notice of the plugin on accelerators alone; what it then does works on the CPU as well."""
    from accelerate import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def under_transformers(rank: int, folder: str) -> dict[str, Tensor]:
    """The gradients of two micro-batches."""
    import accelerate
    from transformers import TrainingArguments

    from flatminima.integrations.transformers import FisherTraceTrainer

    class Trainer(FisherTraceTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            plugin = accelerate.FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            shard_on_the_cpu(self.accelerator, plugin)
            self.is_fsdp_enabled = True

    arguments = TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, fsdp=True, fsdp_config={"version": 2},
        gradient_accumulation_steps=MICRO_BATCHES, max_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model=language_model(), args=arguments, regularizer={"num_sub_batches": SUB_BATCHES, "every": 2, **OPTIONS}
    )
    model, _ = trainer._prepare_for_training(1, None, None)
    trainer.current_gradient_accumulation_steps = MICRO_BATCHES
    for k, part in enumerate(tokens()[:, rank]):
        with trainer.accelerator.no_sync(model) if k + 1 < MICRO_BATCHES else torch.enable_grad():
            assert trainer.is_fsdp_enabled
            assert trainer.accelerator.is_fsdp2
            trainer.training_step(model, {"input_ids": part, "labels": part})
    return whole({name: p.grad for name, p in model.named_parameters()})


def under_lightning(rank: int, folder: str) -> dict[str, Tensor]:
    """The weights after some steps."""
    import lightning.pytorch as lightning
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    from flatminima.integrations.lightning import FisherTraceCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def configure_model(self) -> None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Started(LightningEnvironment):
        creates_processes_externally = True

    trainer = lightning.Trainer(
        accelerator="cpu", devices=PROCESSES, plugins=[Started()], use_distributed_sampler=False, max_epochs=1,
        strategy=ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=MICRO_BATCHES, callbacks=[FisherTraceCallback(num_sub_batches=SUB_BATCHES, **OPTIONS)],
    )  # fmt: skip
    module = Module()
    mine = TensorDataset(*(values[:, :, rank].flatten(0, 2) for values in data()))
    trainer.fit(module, DataLoader(mine, batch_size=SUB_BATCHES))
    return whole(dict(module.network.named_parameters()))


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.full_tensor().detach() for name, tensor in tensors.items()}


FRAMEWORKS = {"accelerate": under_accelerate, "transformers": under_transformers, "lightning": under_lightning}


def in_each_process(rank: int, framework: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES),
        "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.save(FRAMEWORKS[framework](rank, folder), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def trained(max_grad_norm: float | None) -> dict[str, Tensor]:
    """The weights that one process ends with."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sub_batches = PROCESSES * SUB_BATCHES
    regularizer = FisherTraceRegularizer(model, num_sub_batches=sub_batches, max_grad_norm=max_grad_norm, **OPTIONS)
    for inputs, targets in zip(*data(), strict=True):
        optimizer.zero_grad()
        for k, (x, y) in enumerate(zip(inputs.flatten(1, 2), targets.flatten(1, 2), strict=True)):
            last = k + 1 == MICRO_BATCHES
            regularizer.backward(F.cross_entropy, x, y, weight=1 / MICRO_BATCHES, last=last)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients() -> dict[str, Tensor]:
    """The gradients of the language model on one process."""
    model = language_model()
    options = {**OPTIONS, "beta": 2 * OPTIONS["beta"]}  # every=2
    regularizer = FisherTraceRegularizer(model, num_sub_batches=PROCESSES * SUB_BATCHES, **options)
    for part in tokens().flatten(1, 2):
        batch = {"input_ids": part, "labels": part}
        regularizer.backward(lambda output, _: output.loss, batch, None, weight=1 / MICRO_BATCHES, last=False)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_processes_that_share_the_weights_are_one(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    run_in_processes(in_each_process, PROCESSES, framework, free_port(), str(tmp_path), within=300)
    if framework == "transformers":
        expected, tolerance = gradients(), {"rtol": 1e-3, "atol": 1e-5}
    else:
        expected, tolerance = trained(0.2 if framework == "accelerate" else None), {"rtol": 1e-4, "atol": 1e-6}
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, **tolerance)
