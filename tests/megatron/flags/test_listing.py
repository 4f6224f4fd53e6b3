"""`ultramem flags`: every flag of ours once, with the value in force."""

import re
from argparse import SUPPRESS, ArgumentParser

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments
from ultramem_megatron.megatron.flags.listing import main


def _printed(capsys, *argv):
    main(argv)
    text = capsys.readouterr().out
    found = dict(re.findall(r"^  --(?:\[no-\])?(?:ultramem-)?(\S+) +(\S+)$", text, re.MULTILINE))
    return text, found


def test_every_flag_stands_in_a_group_with_its_value_in_force(capsys):
    text, found = _printed(capsys)
    actions = add_ultramem_arguments(ArgumentParser(add_help=False))._actions
    flags = {action.option_strings[0] for action in actions if action.help != SUPPRESS}
    names = {flag.removeprefix("--").removeprefix("ultramem-") for flag in flags}
    assert found.keys() == names
    assert len(re.findall(r"^UltraMem memory layers: .*in force", text, re.MULTILINE)) == 7
    assert (found["topk"], found["softmax"], found["num-keys"]) == ("42", "no", "-")
    assert found["query-centering"] == "yes"
    assert max(map(len, text.splitlines())) <= 100


def test_a_preset_puts_its_values_in_force(capsys):
    _, found = _printed(capsys, "--ultramem-preset", "ultramem-227m-1.2b")
    assert found["preset"] == "ultramem-227m-1.2b"
    assert (found["num-keys"], found["topk"], found["init"]) == ("808", "80", "official")
    assert found["query-centering"] == "no"
    assert found["spans"] == "3:6/7:10/11:14/15:18"
    with pytest.raises(UltraMemError, match="'nothing' is unknown"):
        main(["--ultramem-preset", "nothing"])
