"""Fixtures shared by all tests."""

import os

if not os.environ.get("ULTRAMEM_TEST_GPU"):  # bash tests/run.sh --gpu
    # Ranks of tests talk over gloo, with Megatron patched for a CPU. Before torch looks for GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

_EMPTY_FUNCTIONS = ("empty", "empty_like", "empty_strided")


def _filled_with_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin give NaN, so a kernel that leaves a slot unwritten shows it."""
    for name in _EMPTY_FUNCTIONS:
        monkeypatch.setattr(torch, name, _filled_with_nan(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _filled_with_nan(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    """Megatron and launched commands write into the environment; the next test is to see none."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's settings alone."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(1234)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
