"""What opening a process leaves behind: a world, a command line."""

import os
import sys

from tests.ranks import run_on_ranks

_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def _opened(without_launcher, flags, program):
    from ultramem_megatron.megatron.flags.process import open_process

    if without_launcher:
        for name in (*_WORLD, "MASTER_PORT"):
            del os.environ[name]
    open_process(flags, program=program)
    return [os.environ[name] for name in _WORLD], sys.argv


def test_without_a_launcher_it_is_a_world_of_one_process():
    (found,) = run_on_ranks(1, _opened, True, None, None)
    assert found[0] == ["0", "0", "1", "1", "127.0.0.1"]


def test_a_launchers_rank_stays_what_it_is():
    worlds = [world for world, _ in run_on_ranks(2, _opened, False, None, None)]
    assert [world[:3] for world in worlds] == [["0", "0", "2"], ["1", "1", "2"]]


def test_the_command_line_is_completed_behind_the_program():
    (found,) = run_on_ranks(1, _opened, False, ["--lr", "1"], "script.py")
    assert found[1][:3] == ["script.py", "--lr", "1"]
    (untouched,) = run_on_ranks(1, _opened, False, None, None)
    assert "--lr" not in untouched[1]
