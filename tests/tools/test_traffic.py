"""The command that prints the cost model: its verdicts and refusals."""

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.traffic import main


def test_command_prints_the_table(capsys):
    main(["--sizes", "8", "512"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit("| ")[-1] for line in printed[3:5]] == ["dimension", "grid"]


def test_links_decide(capsys):
    """Where the network is no slower, the bytes of the grid in the node count as much."""
    for bandwidths, fastest in (("350", "45"), "grid"), (("45", "45"), "dimension"):
        main(["--sizes", "64", "--bandwidth", *bandwidths])
        assert capsys.readouterr().out.split()[-1] == fastest


def test_cuts_that_sizes_do_not_allow_have_no_bytes(capsys):
    main(["--value-dim", "1000", "--sizes", "8", "16", "64", "--ranks-per-node", "3"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    shown = [["-" not in cell for cell in line[1:-1]] for line in lines]
    only_by_number = [False, True, True, False]  # 1000 columns over 16 and 64 ranks
    assert shown == [[True, True, True, False], only_by_number, only_by_number]
    assert [line[-1] for line in lines] == ["dimension", "number", "number"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--value-dim", "1000", "--cores", "3"], "--value-dim 1000 is not divisible by --cores 3"),
        (["--topk", "0"], "--topk is 0"),
        (["--sizes", "4", "-1"], "--sizes has -1"),
        (["--bandwidth", "1", "0"], "--bandwidth has 0"),
    ],
)
def test_command_refuses_wrong_values(argv, message):
    with pytest.raises(UltraMemError, match=message):
        main(argv)
