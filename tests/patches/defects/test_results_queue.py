"""A killed rank leaves no process behind that passed on the results of its saves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launched import is_running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

_RANK = """
import sys, time
from ultramem_megatron.patches import registry
from megatron.core.dist_checkpointing.strategies import filesystem_async

if __name__ == "__main__":
    registry.apply_all(sys.argv[1:])
    queue = filesystem_async.get_write_results_queue()
    assert filesystem_async.get_write_results_queue() is queue
    queue.put("a result")
    print(queue.get(), queue._manager._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("patches", [["defects.results_queue"], ["defects.dataset_helpers"]])
def test_its_process_ends_with_the_rank_only_with_the_patch(patches, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    rank = subprocess.Popen(
        [sys.executable, script, *patches], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert rank.stdout is not None
    try:
        for line in rank.stdout:
            if line.startswith("a result"):
                break
        pid = int(line.split()[-1])
    finally:
        rank.kill()
        rank.wait()
    until = time.monotonic() + 10
    ended = patches == ["defects.results_queue"]
    while is_running(pid) and time.monotonic() < until and ended:
        time.sleep(0.02)
    assert is_running(pid) != ended
    if not ended:
        os.kill(pid, signal.SIGKILL)
