"""Upstream's script, run unedited or patched, trains the model that our own command trains."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.megatron_lm.__main__ import fitting_patch

_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "split": "100,0,0",
}

# What pretrain_gpt.py of Megatron-LM 0.19 does, in the same order and by the same names.
_SCRIPT = """
import helper  # beside the script
from ultramem_megatron.megatron.flags.embedding_ranks import get_embedding_ranks
from ultramem_megatron.training.gpt_datasets import train_valid_test_datasets_provider
from ultramem_megatron.training.gpt_step import forward_step
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=helper.add_arguments, args_defaults={})
    assert args.of_the_script == 7
    model_cfg = gpt_config_from_args(args)
    pretrain(
        pretrain_cfg_container_from_args(args, model_cfg),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=get_embedding_ranks,
    )
"""
_HELPER = """
def add_arguments(parser):
    parser.add_argument("--of-the-script", type=int)
    return parser
"""


def _write(folder: Path, script: str = _SCRIPT) -> Path:
    (folder / "helper.py").write_text(_HELPER)
    (folder / "pretrain_gpt.py").write_text(script)
    return folder / "pretrain_gpt.py"


def run_script(argv: list[str]) -> list[float]:
    """Losses of a script run through `ultramem_megatron.training.run_script`."""
    from megatron.training import training

    from ultramem_megatron.patches import registry
    from ultramem_megatron.training import run_script as run

    registry.apply_all()  # they look at the signature that is wrapped here
    losses, log = [], training.training_log

    def training_log(loss_dict, *args, **kwargs):
        if "lm loss" in loss_dict:  # on the last stage only
            losses.append(float(loss_dict["lm loss"]))
        return log(loss_dict, *args, **kwargs)

    training.training_log = training_log
    run.main(argv)
    return losses


@pytest.mark.parametrize("memory", [True, False])
def test_a_script_trains_what_our_command_trains(memory, tmp_path):
    flags = dict(_FLAGS)
    if not memory:
        flags = {name: v for name, v in flags.items() if not name.startswith("ultramem")}
    argv = [str(_write(tmp_path)), *tiny_gpt(**flags, of_the_script=7)]
    (losses,) = run_on_ranks(1, run_script, argv)
    assert losses == run_pretrain(1, tiny_gpt(**flags)).losses


_HYBRID = {"num_layers": None, "hybrid_layer_pattern": "*-*-", "ultramem_spans": "2:4"}


@pytest.mark.long
def test_a_script_for_hybrid_models_trains_what_our_command_trains(tmp_path):
    flags = {**_FLAGS, **_HYBRID}
    script = _write(tmp_path, _SCRIPT.replace("gpt_config_from_args", "hybrid_config_from_args"))
    (losses,) = run_on_ranks(1, run_script, [str(script), *tiny_gpt(**flags, of_the_script=7)])
    assert losses == run_pretrain(1, tiny_gpt(**flags)).losses


@pytest.mark.parametrize(
    ("maker", "flags", "message"),
    [
        ("gpt_config_from_args", _HYBRID, "trains a GPT. Use pretrain_hybrid.py"),
        ("hybrid_config_from_args", {}, "--hybrid-layer-pattern is not given"),
    ],
)
def test_a_script_of_the_other_kind_of_model_is_refused(maker, flags, message, tmp_path):
    script = _write(tmp_path, _SCRIPT.replace("gpt_config_from_args", maker))
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(
            1, run_script, [str(script), *tiny_gpt(**{**_FLAGS, **flags}, of_the_script=7)]
        )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "gpt_config_from_args(args)",
            "None",
            "does not build its model from gpt_config_from_args",
        ),
        (
            "gpt_config_from_args(args)",
            "gpt_config_from_args(args, model_config_cls=dict)",
            "builds its model from a config of its own",
        ),
    ],
)
def test_a_script_without_place_for_memories_is_refused(before, after, message, tmp_path):
    argv = [
        str(_write(tmp_path, _SCRIPT.replace(before, after))),
        *tiny_gpt(**_FLAGS, of_the_script=7),
    ]
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(1, run_script, argv)


# What upstream's scripts for decoding do, in the same order.
_BUILDS = """
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, initialize_megatron
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.models import GPTModelBuilder

class OfTheScript(GPTModelBuilder):
    pass

if __name__ == "__main__":
    parse_and_validate_args(args_defaults={"no_load_rng": True, "no_load_optim": True})
    initialize_megatron()
    builder = GPTModelBuilder(gpt_config_from_args(get_args()))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = builder.build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    if get_args().load:
        load_checkpoint(model, None, None)
    names = [name for name, _ in model[0].named_parameters()]
    assert any(".memory.values" in name for name in names), names
"""


def _building(folder: Path, script: str = _BUILDS, **changes: object) -> list[str]:
    return [str(_write(folder, script)), *tiny_gpt(**{**_FLAGS, **changes})]


def test_a_script_that_builds_its_model_itself_gets_memories(tmp_path):
    run_on_ranks(1, run_script, _building(tmp_path))


def test_a_builder_of_the_scripts_own_is_refused(tmp_path):
    script = _BUILDS.replace("builder = GPTModelBuilder", "builder = OfTheScript")
    with pytest.raises(RanksFailed, match="OfTheScript would build a model without memory layers"):
        run_on_ranks(1, run_script, _building(tmp_path, script))


def test_tables_are_not_cut_over_groups_that_were_made_before(tmp_path):
    message = "cut over 2 ranks, but Megatron was initialised before, with expert groups of 1"
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(2, run_script, _building(tmp_path, ultramem_parallel_size=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_pretrain(
        1, tiny_gpt(**_FLAGS, ckpt_format="torch_dist", train_iters=1, save=folder, save_interval=1)
    )
    return folder


def test_a_checkpoint_with_memories_is_loaded_with_them_alone(saved, tmp_path):
    run_on_ranks(1, run_script, _building(tmp_path, load=saved))
    plain = {name: None for name in _FLAGS if name.startswith("ultramem")}
    with pytest.raises(RanksFailed, match="the checkpoint has memory layers, this run asks for no"):
        run_on_ranks(1, run_script, _building(tmp_path, load=saved, **plain))


def test_a_parser_of_the_scripts_own_sees_its_flags_alone(tmp_path):
    script = "import sys\nassert sys.argv[1:] == ['--of-the-script', '7'], sys.argv\n"
    run_on_ranks(1, run_script, [str(_write(tmp_path, script)), "--of-the-script", "7"])


@pytest.mark.parametrize(
    ("argv", "message"), [([], "no script is given"), (["/nowhere.py"], "no such script")]
)
def test_a_missing_script_is_refused(argv, message):
    from ultramem_megatron.training import run_script as run

    with pytest.raises(UltraMemError, match=message):
        run.main(argv)


def test_a_folder_without_the_script_has_no_patch(tmp_path):
    with pytest.raises(UltraMemError, match=r"no pretrain_gpt\.py there"):
        fitting_patch(tmp_path)


def test_another_script_has_no_patch(tmp_path):
    _write(tmp_path)
    with pytest.raises(UltraMemError, match=r"no patch applies \(0\.19\.patch: "):
        fitting_patch(tmp_path)


_CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
_needs_checkout = pytest.mark.skipif(
    _CHECKOUT is None, reason="MEGATRON_LM_PATH names no checkout of Megatron-LM 0.19"
)


def checkout_scripts(folder: Path) -> Path:
    """The checkout's top-level scripts; its megatron package is the installed one."""
    for script in Path(str(_CHECKOUT)).glob("*.py"):
        shutil.copy(script, folder)
    return folder / "pretrain_gpt.py"


@_needs_checkout
def test_upstreams_script_unedited(tmp_path):
    argv = [str(checkout_scripts(tmp_path)), *tiny_gpt(**_FLAGS)]
    (losses,) = run_on_ranks(1, run_script, argv)
    assert losses == run_pretrain(1, tiny_gpt(**_FLAGS)).losses


@_needs_checkout
def test_upstreams_script_for_hybrid_models_unedited(tmp_path):
    flags = tiny_gpt(**{**_FLAGS, **_HYBRID})
    script = checkout_scripts(tmp_path).with_name("pretrain_hybrid.py")
    (losses,) = run_on_ranks(1, run_script, [str(script), *flags])
    assert losses == run_pretrain(1, flags).losses


def _run_patched(argv: list[str]) -> None:
    import runpy
    import sys

    from ultramem_megatron.megatron.flags import machine_flags
    from ultramem_megatron.patches import registry

    registry.apply_all()  # without CUDA, before upstream is imported
    script = argv[0]
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *machine_flags.complete(argv[1:])]
    runpy.run_path(script, run_name="__main__")


@_needs_checkout
def test_the_patch_makes_a_fork_train_memories(tmp_path, capfd):
    script = checkout_scripts(tmp_path)
    patch = fitting_patch(tmp_path)
    subprocess.run(["git", "apply", "-C1", str(patch.resolve())], cwd=tmp_path, check=True)
    run_on_ranks(1, _run_patched, [str(script), *tiny_gpt(**_FLAGS)], print_output=True)
    assert "value learning rate" in capfd.readouterr().out
