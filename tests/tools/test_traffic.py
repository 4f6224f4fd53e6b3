"""The command that prints the cost model: its verdicts, its figure, its refusals."""

import pytest

from tests import ROOT
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.traffic import main


def test_command_prints_the_table_and_draws_the_figure(tmp_path, capsys):
    picture = tmp_path / "figure9.png"
    numbers = tmp_path / "figure9.csv"
    main(["--sizes", "8", "512", "--plot", str(picture), "--csv", str(numbers)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit("| ")[-1] for line in printed[3:5]] == ["dimension", "number"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    committed = ROOT / "launch/results/figure9.csv"
    assert numbers.read_text() == committed.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--topk", "0"], "--topk is 0"), (["--sizes", "4", "-1"], "--sizes has -1")],
)
def test_command_refuses_wrong_values(argv, message):
    with pytest.raises(UltraMemError, match=message):
        main(argv)
