"""Each recipe prints its plan and a whole command that Megatron takes, for its own model."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import ROOT
from tests.launch.shrunk import shrunk
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain
from ultramem_megatron.data.prepare import prepare
from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.flags import flags as preset_flags

RECIPES = sorted(p for p in (ROOT / "launch/recipes").glob("*.sh") if p.stem != "run")
_QUICK = ("ultramem-151m-x12", "moe-1.6b-2in34")


def _gpus(name: str) -> int:
    """That a recipe's layout fits on."""
    return 24 if name == "moe-680m-2in33" else 8


def _run(name, *more, **settings):
    """A recipe as its user starts it; what is set outside does not reach it."""
    names = ("DATA", "TOKENIZER", "RUN", "ASYNC_SAVE", "GPUS", "NPROC", "NNODES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", str(ROOT / "launch/recipes" / f"{name}.sh"), *more],
        env={**environment, "PYTHON": sys.executable, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def _dry_run(name: str, *more: str) -> tuple[str, list[str]]:
    """What a recipe prints: its plan, and its command as words."""
    done = _run(name, "--dry-run", *more, NPROC=str(_gpus(name)))
    assert done.returncode == 0, done.stderr
    plan, command = done.stdout.rstrip("\n").rsplit("\n", 1)
    return plan, shlex.split(command)


def _parsed(flags: list[str], gpus: int) -> dict[str, object]:
    """Megatron's flags as it reads and checks them for so many GPUs."""
    os.environ["WORLD_SIZE"] = str(gpus)
    from megatron.training.arguments import parse_and_validate_args

    from ultramem_megatron.megatron.flags import machine_flags
    from ultramem_megatron.megatron.flags.arguments import add_ultramem_arguments, config_from_args
    from ultramem_megatron.patches import registry

    registry.apply_all()
    sys.argv = ["pretrain", *machine_flags.complete(flags)]
    args = parse_and_validate_args(extra_args_provider=add_ultramem_arguments)
    ultramem = config_from_args(args)
    return {**vars(args), "num_keys": ultramem and ultramem.num_keys}


def test_there_is_a_recipe_for_each_model_and_its_twins():
    assert len(RECIPES) == 9
    assert {p.stem for p in RECIPES} >= set(_QUICK)


@pytest.mark.parametrize(
    "name",
    [pytest.param(p.stem, marks=[] if p.stem in _QUICK else [pytest.mark.long]) for p in RECIPES],
)
def test_a_recipe_prints_its_plan_and_a_command_that_parses(name, tmp_path):
    plan, command = _dry_run(name, "--log-interval", "7")
    assert re.search(r"parameters", plan), plan
    assert f"\n{_gpus(name)} GPUs: " in plan
    start = command.index("ultramem_megatron") + 1
    assert command[start - 2] == "-m"
    assert command[command.index("--nproc-per-node") + 1] == str(_gpus(name))
    flags = command[start + 1 :]
    (args,) = run_on_ranks(1, _parsed, flags, _gpus(name))
    preset = find_preset(name)
    for field in ("num_layers", "hidden_size"):
        assert args[field] == preset.model[field].value
    assert args["num_keys"] == (preset.memory["num_keys"].value if preset.memory else None)
    assert args["num_experts"] == getattr(preset.model.get("num_experts"), "value", None)
    assert args["log_interval"] == 7
    assert args["save"] == args["load"] == f"runs/{name}/checkpoints"
    assert args["save_retain_interval"] % args["save_interval"] == 0
    assert args["async_save"]  # there is no GPU here
    for what in ("log_throughput", "log_timers_to_tensorboard", "log_memory_to_tensorboard"):
        assert args[what]
    # The printed command trains: made small, and writing elsewhere.
    folders = ["--save", str(tmp_path), "--load", str(tmp_path), "--tensorboard-dir", str(tmp_path)]
    assert len(run_pretrain(2, [*flags, *shrunk(name, 2), *folders]).losses) == 2


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [p.stem for p in RECIPES])
def test_a_recipe_started_as_it_is_trains_and_saves(name, ranks, tmp_path):
    done = _run(
        name, *shrunk(name, ranks), NPROC=str(ranks), RUN=str(tmp_path), LOG_DIR=str(tmp_path / "l")
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"\n{ranks} GPUs: " in done.stdout
    for said in ("iteration        2/       2", "TFLOP/s/GPU", "validation loss at iteration 2"):
        assert said in done.stdout
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.long
def test_a_recipe_trains_on_data_of_its_own(tmp_path):
    data = tmp_path / "data"
    prepare(None, data, 512)
    name = "ultramem-151m-x12"
    done = _run(
        name,
        *shrunk(name, 1),
        NPROC="1",
        RUN=str(tmp_path),
        LOG_DIR=str(tmp_path / "logs"),
        DATA=str(data / "train"),
        TOKENIZER=str(data / "tokenizer"),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "iteration        2/       2" in done.stdout
    assert "MockGPTDataset" not in done.stdout


@pytest.mark.parametrize(("given", "missing"), [("DATA", "TOKENIZER"), ("TOKENIZER", "DATA")])
def test_data_or_tokenizer_alone_is_refused(given, missing):
    done = _run("dense-151m", "--dry-run", **{given: "there/it"})
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {given}=there/it is given, {missing} is not. Set {missing} "
    )
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_background_saves_are_on_or_off():
    done = _run("dense-151m", "--dry-run", ASYNC_SAVE="yes")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ASYNC_SAVE=yes: must be a whole number from 0 to 1")
    assert "--async-save" not in _run("dense-151m", "--dry-run", ASYNC_SAVE="0").stdout


@pytest.mark.parametrize("name", ["dense-1.6b", "moe-151m-2in32", "ultramem-227m-1.2b"])
def test_a_presets_flags_lack_only_data_and_layout(name, tmp_path):
    data_and_layout = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "512"]
    saving = ["--save", str(tmp_path)]  # Megatron then asks for an interval
    words = preset_flags(name, model=True, training=True)
    run = run_pretrain(1, [*words, *data_and_layout, *saving, *shrunk(name, 1)])
    assert len(run.losses) == 2
