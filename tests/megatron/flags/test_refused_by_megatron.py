"""What Megatron refuses in flags is one line of ours: nothing else of it is shown."""

import pytest

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt


def _refused(argv):
    from ultramem_megatron.errors import UltraMemError
    from ultramem_megatron.training.pretrain import main

    try:
        main(argv)
    except UltraMemError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["--ultramem-sapns", "1:2"],
            "unrecognized arguments: --ultramem-sapns 1:2. Did you mean --ultramem-spans? ",
        ),
        (["--num-layers", "two"], "argument --num-layers: invalid int value: 'two'."),
        (
            ["--swiglu", "--squared-relu"],
            "Megatron refuses these flags: assert not args.swiglu (argument_utils.py, line ",
        ),
        (["--save", "x"], "Megatron refuses these flags: assert args.save_interval is not None ("),
        (["--min-lr", "9"], "Megatron refuses these flags: assert args.min_lr <= args.lr ("),
    ],
)
def test_it_is_one_line_that_names_the_flag(wrong, said):
    (message,) = run_on_ranks(1, _refused, [*tiny_gpt(), *wrong])
    assert said in message
    assert "\n" not in message
    assert len(message) < 400
