"""With --log-interval 1 every log line is of its own step; without the patch the second is not."""

import re

import pytest

from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.patches.registry import PATCH_MODULES

_NAME = "defects.first_log_line"


@pytest.mark.parametrize("patched", [True, False])
def test_the_second_line_is_of_the_second_step_alone(patched, capfd):
    patches = [name for name in PATCH_MODULES if patched or name != _NAME]
    run = run_pretrain(1, tiny_gpt(lr=1e-2), patches=patches, print_output=True)
    lines = re.findall(r"lm loss: (\S+)", capfd.readouterr().out)
    one, two, three = (float(f"{loss:.6E}") for loss in run.losses)
    shown = [float(line) for line in lines]
    assert (shown[0], shown[2]) == (one, three)
    assert shown[1] == pytest.approx(two if patched else (one + two) / 2, rel=1e-6)
    assert abs(one - two) > 1e-3 * one
