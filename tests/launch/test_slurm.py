"""launch/slurm/train.sbatch on a real two-node Slurm: warned, requeued, finished, or given up."""

import re
import time
from collections.abc import Iterator

import pytest

from launch.recipe import TINY_VOCAB_SIZE, make_recipe
from tests import ROOT
from tests.launch.shrunk import shrunk
from tests.launch.slurm_cluster import Cluster, slurm_cluster, why_not
from tests.launched import flags, launch, losses_of, printed_losses
from ultramem_megatron.data.prepare import prepare

STEPS = 600


def _arguments(folder, data):
    """The quickstart's recipe at its tiny size, on real text; resumes by itself."""
    made = make_recipe(tiny=True, steps=STEPS, extra=("--ultramem-parallel-size", "2"))
    return [*made.arguments(data, folder), "--load", str(folder / "checkpoints")]


pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("daemons")) as running:
        yield running


def test_a_job_that_keeps_failing_is_given_up(cluster, tmp_path):
    fails = tmp_path / "fails.sh"
    fails.write_text(
        "trap 'exit 3' TERM  # the other node's end: srun reports the largest status\n"
        'echo "node $SLURM_NODEID of $NNODES meets at $MASTER_ADDR"\nsleep 1\nexit 3\n'
    )
    output = tmp_path / "output"
    job = cluster.submit(
        [
            "--nodes=2",
            "--time=5",
            f"--output={output}",
            f"--chdir={ROOT}",
            "launch/slurm/train.sbatch",
            str(fails),
        ],
        {"LOG_DIR": str(tmp_path / "logs"), "MAX_REQUEUES": "1"},
    )
    assert cluster.wait_for_end(job, 120, output) == "FAILED"
    assert "ExitCode=3:0" in cluster.command(["scontrol", "show", "job", str(job)])
    text = output.read_text()
    assert text.count("status 3: requeueing") == 1
    assert text.count("status 3 after 1 requeues: giving up") == 1
    assert sorted(re.findall(r"node \d of 2 meets at node1", text)) == [
        "node 0 of 2 meets at node1",
        "node 0 of 2 meets at node1",
        "node 1 of 2 meets at node1",
        "node 1 of 2 meets at node1",
    ]


_BOTH_NODES_HERE = {"MASTER_ADDR": "127.0.0.1", "NETWORK": "lo", "NPROC": "1"}


def test_a_recipe_made_small_trains_on_two_nodes(cluster, tmp_path):
    output, name = tmp_path / "output", "ultramem-1.6b-x12"
    job = cluster.submit(
        [
            "--nodes=2",
            "--time=10",
            f"--output={output}",
            f"--chdir={ROOT}",
            "launch/slurm/train.sbatch",
            f"launch/recipes/{name}.sh",
            *shrunk(name, 2),
        ],
        {**_BOTH_NODES_HERE, "LOG_DIR": str(tmp_path / "logs"), "RUN": str(tmp_path / "run")},
    )
    assert cluster.wait_for_end(job, 240, output) == "COMPLETED", output.read_text()[-4000:]
    text = output.read_text()
    assert text.count("\n2 GPUs: 2 tensor x 1 pipeline x 1 data") == 1  # the job's own size, once
    assert "iteration        2/       2" in text
    assert (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    shown = cluster.command(["scontrol", "show", "job", str(job)])
    assert "OverSubscribe=NO" in shown  # exclusive
    assert "NumCPUs=4" in shown


def test_a_refused_job_is_not_requeued(cluster, tmp_path):
    output = tmp_path / "output"
    job = cluster.submit(
        [
            "--nodes=2",
            "--time=10",
            f"--output={output}",
            f"--chdir={ROOT}",
            "launch/slurm/train.sbatch",
            "launch/torchrun.sh",
            *flags(tmp_path, ultramem_spans="1:9"),
        ],
        {**_BOTH_NODES_HERE, "LOG_DIR": str(tmp_path / "logs")},
    )
    assert cluster.wait_for_end(job, 120, output) == "FAILED", output.read_text()[-4000:]
    assert "ExitCode=2:0" in cluster.command(["scontrol", "show", "job", str(job)])
    text = output.read_text()
    assert "requeueing" not in text
    assert "refused, and not requeued" in text
    assert text.splitlines()[-1].startswith("error: --ultramem-spans 1:9: span 1:9 leaves the")


def test_a_warned_job_saves_requeues_and_finishes(cluster, tmp_path):
    data = tmp_path / "data"
    prepare(None, data, TINY_VOCAB_SIZE)
    one_host = tmp_path / "one_host"
    one_host.mkdir()
    with launch(one_host, _arguments(one_host, data)) as run:
        assert run.wait() == 0, run.output()
    folder = tmp_path / "job"
    folder.mkdir()
    output = folder / "output"
    settings = {  # both nodes are this host
        "MASTER_ADDR": "127.0.0.1",
        "NETWORK": "lo",
        "NPROC": "1",
        "LOG_DIR": str(folder / "logs"),
    }
    job = cluster.submit(
        [
            "--nodes=2",
            "--time=15",
            f"--output={output}",
            f"--chdir={ROOT}",
            "launch/slurm/train.sbatch",
            "launch/torchrun.sh",
            *_arguments(folder, data),
        ],
        settings,
    )
    until = time.monotonic() + 120
    while not (output.exists() and re.search(r"iteration +20/", output.read_text())):
        assert time.monotonic() < until, cluster.state(job)
        time.sleep(0.02)
    warned = time.monotonic()
    cluster.command(["scancel", "--batch", "--signal=USR1", str(job)])
    assert cluster.wait_for_end(job, 240, output) == "COMPLETED"
    seconds = time.monotonic() - warned
    text = output.read_text()
    assert "warned by Slurm: saving" in text
    assert "requeueing" in text
    starts = (folder / "logs" / str(job) / "starts.txt").read_text()
    assert re.findall(r"start (\d)", starts) == ["0", "1"]
    assert "nodes node[1-2]" in starts

    steps = [int(step) for step in re.findall(r"iteration +(\d+)/ +\d+ ", text)]
    assert steps == list(range(1, STEPS + 1))  # nothing lost, nothing repeated
    losses = {**losses_of(text), **printed_losses(folder / "logs" / str(job))}
    resumed_at = _second_start(folder, job)
    assert 20 < resumed_at < STEPS
    losses.pop(resumed_at + 1)  # Megatron prints the mean of a start's first two
    assert losses.items() <= {**losses_of(run.output()), **run.losses()}.items()
    assert len(losses) >= STEPS - 4
    print(f"Slurm: {seconds:.1f} s from the warning to the end, resumed at step {resumed_at}")


def _second_start(folder, job) -> int:
    """The first iteration of the requeued job."""
    firsts = []
    for file in (folder / "logs" / str(job)).glob("*/attempt_0/*/stdout.log"):
        if steps := re.findall(r"iteration +(\d+)/ +\d+ ", file.read_text()):
            firsts.append(int(steps[0]))
    return max(firsts)
