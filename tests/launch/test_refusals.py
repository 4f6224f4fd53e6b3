"""A refusal ends a launch once and for all, its message in the last line; wrappers of python."""

import os
import signal
import stat
import sys

import pytest

from tests.launched import flags, launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--ultramem-spans", "1:9"], "error: --ultramem-spans 1:9: span 1:9 leaves the model"),
        (["--ultramem-sapns", "1:2"], "error: Wrong flags: unrecognized arguments: --ultramem-sap"),
        (["--num-attention-heads", "5"], "error: Megatron refuses these flags: assert args.hidden"),
    ],
)
def test_what_is_refused_is_not_tried_again(tmp_path, wrong, said):
    with launch(tmp_path, [*flags(tmp_path), *wrong], env={"MAX_RESTARTS": "3"}) as run:
        assert run.wait() == 2
    assert run.output().splitlines()[-1].startswith(said)
    assert run.iterations() == []
    assert not list(run.logs.glob("*/attempt_1/*/stdout.log"))


def _wrapper(folder):
    """A program that calls python and stays, as numactl, nsys or apptainer do; its path."""
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/bash\n{sys.executable} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return str(wrapper)


def test_a_wrapper_of_python_trains_and_takes_sigterm(tmp_path):
    arguments = flags(tmp_path, train_iters=100_000, save_interval=100_000)
    wrapper = _wrapper(tmp_path)
    with launch(tmp_path, arguments, env={"PYTHON": wrapper}) as run:
        run.wait_for_iteration(3)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() == 0
    tracker = tmp_path / "checkpoints/latest_checkpointed_iteration.txt"
    assert int(tracker.read_text()) >= 3
