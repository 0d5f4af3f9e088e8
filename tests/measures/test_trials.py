from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.measures.trials import perform_trials
from support.collectives import free_port, run_in_processes

OPTIONS = {"subset_size": 10, "trials": 7, "progress": False}


def network_and_data() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    y = torch.arange(40) % 3
    x = torch.randn(40, 20, dtype=torch.float64) + 20 * nn.functional.one_hot(y, 20)
    model = nn.Linear(20, 3).double()
    model.weight.data.copy_(torch.eye(3, 20))
    return model, (x, y)


def rank_process(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, data = network_and_data()
    whole = fm.measure(model, data, distributed=True, **OPTIONS)
    short = fm.measure(model, data, distributed=True, max_standard_error=1e9, **OPTIONS)
    other = nn.Linear(20, 3).double()
    other.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()})
    differing = fm.compare({"a": model, "b": other}, data, distributed=True, max_standard_error=1e9, **OPTIONS)
    try:
        fm.measure(model, (data[0].where(torch.arange(40)[:, None] != 7, 0), data[1]), distributed=True, **OPTIONS)
        failed = ""
    except FlatminimaError as error:
        failed = str(error)
    Path(f"{out}.{rank}").write_text("\n".join([whole.to_json(), short.to_json(), differing.to_json(), failed]))
    dist.destroy_process_group()


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_ends_with_the_result_of_a_single_process(world: int, tmp_path: Path) -> None:
    run_in_processes(rank_process, world, world, free_port(), str(tmp_path / "out"))
    model, data = network_and_data()
    alone = fm.measure(model, data, **OPTIONS)
    stopped = fm.measure(model, data, max_standard_error=1e9, **OPTIONS)
    for rank in range(world):
        whole, short, differing, failed = (tmp_path / f"out.{rank}").read_text().split("\n")
        together = fm.Characterization.from_json(whole)
        assert together.log_det_fisher.per_trial == pytest.approx(alone.log_det_fisher.per_trial, rel=1e-10)
        assert together.robustness.mean == pytest.approx(alone.robustness.mean, rel=1e-10)
        cut = fm.Characterization.from_json(short)
        assert cut.settings.trials == stopped.settings.trials == 5
        assert cut.log_det_fisher.mean == pytest.approx(stopped.log_det_fisher.mean, rel=1e-10)
        for c in json.loads(differing)["characterizations"].values():
            assert c["settings"]["trials"] == 5
        assert json.loads(differing)["characterizations"]["a"]["log_det_fisher"]["per_trial"] == pytest.approx(
            stopped.log_det_fisher.per_trial, rel=1e-10
        )
        assert failed == ""  # a zero input still has a gradient at the bias


def test_without_a_process_group_it_says_how_to_get_one() -> None:
    with pytest.raises(FlatminimaError, match="start with torchrun"):
        perform_trials(lambda t: t, 3, lambda done: False, distributed=True, progress=False)


def test_trials_are_cut_where_enough() -> None:
    assert perform_trials(lambda t: t, 9, lambda done: sum(done) >= 3, distributed=False, progress=False) == [0, 1, 2]
