"""Each recipe prints its plan and a whole command that Megatron takes, for its own model."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import ROOT
from tests.ranks import run_on_ranks
from ultramem_megatron.presets import find_preset

RECIPES = sorted(p for p in (ROOT / "launch/recipes").glob("*.sh") if p.stem != "run")
_QUICK = ("ultramem-151m-x12", "moe-1.6b-2in34")
_GPUS = 8


def _dry_run(name: str, *more: str) -> tuple[str, list[str]]:
    """What a recipe prints: its plan, and its command as words."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch/recipes" / f"{name}.sh"), "--dry-run", *more],
        env={**os.environ, "NPROC": str(_GPUS), "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan, command = done.stdout.rstrip("\n").rsplit("\n", 1)
    return plan, shlex.split(command)


def _parsed(flags: list[str]) -> dict[str, object]:
    """Megatron's flags as it reads and checks them for eight GPUs."""
    os.environ["WORLD_SIZE"] = str(_GPUS)
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
    [pytest.param(p.stem, marks=[] if p.stem in _QUICK else [pytest.mark.slow]) for p in RECIPES],
)
def test_a_recipe_prints_its_plan_and_a_command_that_parses(name):
    plan, command = _dry_run(name, "--log-interval", "7")
    assert re.search(r"parameters", plan), plan
    start = command.index("ultramem_megatron") + 1
    assert command[start - 2] == "-m"
    assert command[command.index("--nproc-per-node") + 1] == str(_GPUS)
    (args,) = run_on_ranks(1, _parsed, command[start + 1 :])
    preset = find_preset(name)
    for field in ("num_layers", "hidden_size"):
        assert args[field] == preset.model[field].value
    assert args["num_keys"] == (preset.memory["num_keys"].value if preset.memory else None)
    assert args["num_experts"] == getattr(preset.model.get("num_experts"), "value", None)
    assert args["log_interval"] == 7
    assert args["save"] == args["load"] == f"runs/{name}/checkpoints"
