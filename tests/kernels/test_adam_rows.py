"""AdamW on touched rows: every bit is that of PyTorch's AdamW on all rows."""

import itertools
import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.compiler import NATIVE, needs_compiler
from ultramem_megatron.kernels.adam_rows import (
    AdamRows,
    AdamStep,
    Moments,
    choice,
    native_path,
    table,
    torch_path,
)
from ultramem_megatron.kernels.adam_rows import history as histories
from ultramem_megatron.kernels.adam_rows.history import growth

_ROWS, _NEVER = 40, 7
"""The last _NEVER rows are read by nobody."""
_PATHS = {"torch": torch_path, "native": native_path}


@pytest.fixture(autouse=True)
def _whole_vectors():
    """PyTorch's kernel rounds otherwise where numbers fill no vector: none are left over here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", NATIVE])
def path(request, monkeypatch):
    monkeypatch.setattr(table, "update", _PATHS[request.param].update)
    return request.param


def _table(seed, width, copy=None, rows=_ROWS):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    zeros = [torch.zeros_like(values) for _ in range(2)]
    return Moments(values, *zeros, None if copy is None else values.to(copy))


def _steps(count, *, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8):
    """Rates that rise and fall, as a schedule's."""
    for number in range(1, count + 1):
        lr = 1e-2 * min(number / 10, 1.0) * (1 - number / (2 * count))
        yield AdamStep(lr, weight_decay * number / count, *betas, eps, number)


def _dense(moments, grad, step):
    torch._fused_adamw_(
        *([tensor] for tensor in (moments.values, grad, moments.mean, moments.square)),
        [],
        [torch.tensor(float(step.number))],
        lr=step.lr,
        beta1=step.beta1,
        beta2=step.beta2,
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
    )
    if moments.copy is not None:
        moments.copy.copy_(moments.values)


def _assert_same(found, expected, rows=slice(None)):
    for name, ours, theirs in zip(Moments._fields, found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours[rows], theirs[rows]), name


def _run(steps, width=32, *, copy=None, share=0.2, look_at=1):
    """Read some rows, step, beside dense AdamW; what is read has its bits, at last all has."""
    generator = torch.Generator().manual_seed(3)
    ours, dense = _table(1, width, copy), _table(1, width, copy)
    rows = AdamRows(_ROWS, torch.device("cpu"))
    for number, step in enumerate(steps):
        picks = (torch.rand(_ROWS - _NEVER, generator=generator) < share).nonzero().flatten()
        picks = picks[torch.randint(max(len(picks), 1), (2 * len(picks), 1), generator=generator)]
        rows.read(ours, picks)
        if number % look_at == 0:
            _assert_same(ours, dense, picks.flatten())
        grad = torch.zeros(_ROWS, width)
        grad[picks.flatten()] = torch.randn(len(picks), width, generator=generator)
        grad[picks[4::5].flatten()] = 0.0  # a row may be read and have no gradient
        rows.step(ours, grad, step)
        _dense(dense, grad, step)
    rows.catch_up(ours)
    _assert_same(ours, dense)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("copy", [None, torch.bfloat16, torch.float16])
def test_fifty_steps_with_any_rows_are_those_of_dense_adamw(path, weight_decay, copy):
    if path == "native" and copy == torch.float16:
        assert not native_path.serves(_table(1, 32, copy))
        return
    _run(_steps(50, weight_decay=weight_decay), copy=copy)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_no_row_few_rows_and_every_row(path, share):
    _run(_steps(20), share=share)


@pytest.mark.parametrize("width", [2, 6, 50, 300])
def test_rows_of_any_width(path, width):
    _run(_steps(12), width=width)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.6)])
@needs_compiler
def test_rows_that_stand_still_are_replayed_to_the_bit(betas, monkeypatch):
    """Over gaps in which moments underflow, with rates that rise a thousandfold in between."""
    monkeypatch.setattr(table, "update", native_path.update)
    steps = [
        step._replace(lr=step.lr * (1000 if number > 600 else 1))
        for number, step in enumerate(_steps(900, betas=betas))
    ]
    _run(steps, width=16, share=0.004, look_at=50)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_any_epsilon(path, eps):
    ours, dense = _table(2, 16), _table(2, 16)
    rows = AdamRows(_ROWS, torch.device("cpu"))
    everywhere = torch.randn(_ROWS, 16)
    for number, step in enumerate(_steps(30, eps=eps)):
        grad = everywhere if number == 0 else torch.zeros_like(everywhere)
        rows.read(ours, torch.arange(_ROWS if number == 0 else 1))
        rows.step(ours, grad, step)
        _dense(dense, grad, step)
    rows.catch_up(ours)
    _assert_same(ours, dense)


def test_in_the_middle_of_a_training(path):
    """Where the second moment's bias correction is 1 in float32."""
    _run(step._replace(number=step.number + 2000) for step in _steps(30))


def test_other_betas_on_the_way(path):
    steps = list(_steps(30))
    steps[15:] = [step._replace(beta1=0.7, eps=1e-6) for step in steps[15:]]
    _run(steps)


def test_no_row_falls_behind_further_than_the_history_reaches(path, monkeypatch):
    for module in (histories, table, native_path):
        monkeypatch.setattr(module, "SLOTS", 8)
    _run(_steps(40), share=0.02)


def test_growth_bounds_what_a_step_without_gradient_can_move():
    """|update| / |value| of each step over the one before, in float64, against the bound."""
    for betas, decay in itertools.product([(0.9, 0.999), (0.9, 0.5)], [0.0, 0.3]):
        steps = list(_steps(60, betas=betas, weight_decay=decay))
        torch.manual_seed(0)
        values, mean, square = torch.randn(3, 1000, dtype=torch.float64)
        square = square.abs() * 1e-6
        moved, before = None, None
        for step in steps:
            mean, square = mean * step.beta1, square * step.beta2
            values = values * (1 - step.lr * step.weight_decay)
            root = square.sqrt() / (1 - step.beta2**step.number) ** 0.5 + step.eps
            now = (step.lr / (1 - step.beta1**step.number) * mean / root / values).abs()
            if moved is not None:
                assert (now <= moved * growth(before, step)).all()
            moved, before = now, step


def test_an_implementation_that_rounds_otherwise_is_not_taken(monkeypatch, caplog):
    class Other:
        __name__ = "other"

        @staticmethod
        def update(moments, rows, behind, grad=None):
            torch_path.update(moments, rows, behind, grad)
            moments.values[0, 0] = moments.values[0, 0].nextafter(torch.tensor(9.0))

    cpu = torch.device("cpu")
    assert choice.agrees(torch_path, cpu)
    with caplog.at_level("INFO"):
        assert not choice.agrees(Other, cpu)
    assert "rounds otherwise than PyTorch's AdamW" in caplog.text


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="for Triton's interpreter")
@pytest.mark.parametrize(
    ("count", "share", "betas", "copy"),
    [
        (8, 0.3, (0.9, 0.95), torch.bfloat16),
        (5, 1.0, (0.9, 0.999), None),
        (50, 0.02, (0.2, 0.6), None),
    ],
)
def test_triton_on_some_rows_is_triton_on_all(count, share, betas, copy, monkeypatch):
    """With the numbers for GPUs. Their rounding is another; it is close to the CPU's."""
    from ultramem_megatron.kernels.adam_rows import triton_path

    monkeypatch.setattr(table, "update", triton_path.update)
    monkeypatch.setattr(histories, "_on_cpu", histories._on_gpu)
    generator = torch.Generator().manual_seed(3)
    size, width = 8, 12
    everywhere = torch.arange(size)
    some, every, dense = (_table(1, width, copy, size) for _ in range(3))
    rows, all_rows = (AdamRows(size, torch.device("cpu")) for _ in range(2))
    for step in _steps(count, betas=betas):
        picks = (torch.rand(size - 1, generator=generator) < share).nonzero().flatten()
        grad = torch.zeros(size, width)
        grad[picks] = torch.randn(len(picks), width, generator=generator)
        for moments, which, read in ((some, rows, picks.repeat(2)), (every, all_rows, everywhere)):
            which.read(moments, read)
            which.step(moments, grad, step)
        _dense(dense, grad, step)
    rows.catch_up(some)
    _assert_same(some, every)
    assert_close(some.values, dense.values, rounding(torch.float32, 16 * count))


@needs_compiler
def test_here_the_native_kernel_is_taken():
    assert choice._path(_table(1, 16)) is native_path


@needs_compiler
def test_threads_change_no_bit():
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(choice._tried(native_path, torch.device("cpu"), 0.9, 0.95))
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)
