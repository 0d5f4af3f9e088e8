from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.errors import (
    FlatminimaError,
    FlatminimaWarning,
    ShuffledLoaderWarning,
    did_you_mean,
    naming,
    one_line,
    require_one_of,
    require_positive,
    warn,
)


def test_a_warning_names_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with naming("a model"):
            warn("nested", FlatminimaWarning)
    (warning,) = caught
    assert (warning.filename, str(warning.message)) == (__file__, "a model: nested")


def test_a_warning_from_the_depth_of_a_measure_names_the_users_line() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(40, 20), torch.arange(40) % 2)
    loader = torch.utils.data.DataLoader(data, shuffle=True)
    model = nn.Linear(20, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fm.measure(model, loader, subset_size=5, trials=1, measures=())
    assert {warning.filename for warning in caught if issubclass(warning.category, FlatminimaWarning)} == {__file__}
    assert any(issubclass(warning.category, ShuffledLoaderWarning) for warning in caught)


def test_hints_and_messages_of_one_line() -> None:
    assert did_you_mean("resnet2", ["resnet20", "cnn"]) == " (did you mean 'resnet20'?)"
    assert did_you_mean("x", ["resnet20", "cnn"]) == ""
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


@pytest.mark.parametrize("depth", [0, 3])
def test_the_depth_of_our_own_calls_does_not_matter(depth: int) -> None:
    def call(left: int) -> None:
        call(left - 1) if left else warn("here", FlatminimaWarning)

    with pytest.warns(FlatminimaWarning, match="here") as caught:
        call(depth)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [True, "1", 0, -1, float("nan"), float("inf"), 10**400, None])
def test_what_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(FlatminimaError, match="beta must be a positive number, got"):
        require_positive("beta", value)


@pytest.mark.parametrize("name", [None, 3, ["digits"], "digts"])
def test_what_is_none_of_the_names_is_refused_whatever_its_type(name: object) -> None:
    with pytest.raises(FlatminimaError, match=r"unknown data .*; use one of digits, cifar10"):
        require_one_of("data", name, ("digits", "cifar10"))
