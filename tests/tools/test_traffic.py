"""The command that prints the cost model: its verdicts and refusals."""

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.traffic import main


def test_command_prints_the_table(capsys):
    main(["--sizes", "8", "512"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit("| ")[-1] for line in printed[3:5]] == ["dimension", "number"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--topk", "0"], "--topk is 0"), (["--sizes", "4", "-1"], "--sizes has -1")],
)
def test_command_refuses_wrong_values(argv, message):
    with pytest.raises(UltraMemError, match=message):
        main(argv)
