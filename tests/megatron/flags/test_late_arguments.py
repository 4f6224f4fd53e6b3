"""A refusal is easily seen: not below hundreds of arguments, and in torchrun's last lines."""

import contextlib
import io
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt
from ultramem_megatron.errors import UltraMemError, exit_on_user_error

_END = "end of arguments"


class _CheckedError(Exception):
    """All checks are behind it."""


def _printed(argv):
    from ultramem_megatron.training.pretrain import main

    def stop():
        raise _CheckedError

    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.suppress(UltraMemError, _CheckedError),
    ):
        main(argv, before_training=stop)
    return output.getvalue()


@pytest.mark.parametrize("refused", [True, False])
def test_megatrons_list_of_arguments_comes_when_all_is_checked(refused):
    wrong = {"num_layers": 4, "ultramem_spans": "1:9"} if refused else {}
    (output,) = run_on_ranks(1, _printed, tiny_gpt(**wrong))
    assert output.count(_END) == (0 if refused else 1)
    assert "using world size: 1" in output


def test_torchruns_report_shows_it_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UltraMemError("--wrong 7: use 8.")
    report = str(ChildFailedError("train", {0: ProcessFailure(0, 1, 2, str(file))}))
    assert report.splitlines()[-2] == "  traceback : error: --wrong 7: use 8."
