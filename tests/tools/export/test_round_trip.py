"""A Megatron model, its export read without Megatron, and the checkpoint made of that are one."""

import json
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.closeness import assert_close
from tests.decoding import LOGITS
from tests.ranks import RanksFailed, run_on_ranks
from tests.tools.export.models import MODELS, TOLERANCES, flags, round_trip, tokens
from tests.training_runs import make_saving_fast, run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export import load_plain
from ultramem_megatron.tools.export.megatron import plain_name

_REFUSED = {
    "moe": (
        {"num_experts": 4, "moe_router_score_function": "sigmoid", "moe_layer_freq": 2},
        "biases in experts, --moe-layer-freq, --moe-router-score-function sigmoid",
    ),
    "hybrid": (
        {"hybrid_layer_pattern": "E-E", "num_layers": None, "num_experts": 4},
        "a --hybrid-layer-pattern with neither attention nor Mamba, biases in experts",
    ),
    "later tokens": ({"mtp_num_layers": 1}, "--mtp-num-layers"),
    "later tokens of a pattern": (
        {"hybrid_layer_pattern": "*-*-/*-", "num_layers": None},
        "--mtp-num-layers",
    ),
    "squared": ({"squared_relu": True}, "an activation other than GELU and SwiGLU"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return folder, run_on_ranks(1, round_trip, folder, MODELS, "plain")[0]


_WITHOUT_MEGATRON = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("megatron", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch
from ultramem_megatron.tools.export import load_plain
from ultramem_megatron.tools.export.megatron import plain_name
tokens, names = torch.load(sys.argv[1]), sys.argv[3:]
with torch.no_grad():
    torch.save({n: load_plain(f"{sys.argv[2]}/{n}/plain")(tokens) for n in names}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def plain_logits(exported, tmp_path_factory):
    """Of every model, computed in a process that cannot import Megatron."""
    file = tmp_path_factory.mktemp("logits") / "logits.pt"
    torch.save(tokens(), file)
    command = [sys.executable, "-c", _WITHOUT_MEGATRON, str(file), str(exported[0]), *MODELS]
    subprocess.run(command, check=True, cwd=ROOT)
    return torch.load(file)


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_model_gives_the_same_logits_without_megatron(exported, plain_logits, name):
    original, back = exported[1][name]
    assert torch.equal(back, original)
    assert plain_logits[name].dtype == original.dtype
    assert_close(plain_logits[name], original, TOLERANCES.get(name, LOGITS))


def test_training_goes_on_from_an_import(exported):
    folder = exported[0] / "convolution/back"
    changes = {**MODELS["convolution"], "num_layers": 4, "train_iters": 1, "lr": 1e-9}
    start = {"load": folder, "ckpt_format": "torch_dist", "min_lr": 0, "finetune": True}
    run = run_pretrain(1, tiny_gpt(**changes, **start), initial_parameters=True)
    plain = load_plain(exported[0] / "convolution/plain").state_dict()
    ours = run.ranks[0].initial_parameters
    assert len(run.losses) == 1
    for name, tensor in ours.items():
        assert torch.equal(tensor, plain[plain_name(name.removeprefix("module."))]), name


def test_the_configuration_says_what_the_model_is(exported):
    content = json.loads((exported[0] / "swiglu/plain/config.json").read_text())
    assert content["model"]["activation"] == "swiglu"
    assert content["model"]["ultramem"]["spans"] == "2:3"
    assert content["notes"] == {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}


def _export_refused(folder, changes):
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.__main__ import main

    make_saving_fast()
    model, args = untrained_model(flags(changes))
    save_weights(model, args, folder / "checkpoint")
    main(["--load", f"{folder}/checkpoint", "--to", f"{folder}/plain"])


@pytest.mark.parametrize("name", _REFUSED)
def test_what_the_plain_model_has_not_is_refused_by_name(tmp_path, name):
    changes, message = _REFUSED[name]
    with pytest.raises(RanksFailed, match=f"A model with {message} cannot be exported"):
        run_on_ranks(1, _export_refused, tmp_path, changes)
    assert not (tmp_path / "plain").exists()


def _damaged(exported, tmp_path, file, change):
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        content = (exported[0] / "swiglu/plain" / name).read_bytes()
        (folder / name).write_bytes(change(content) if name == file else content)
    return folder


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda b: b[:-100], r"model\.safetensors cannot be read"),
        ("model.safetensors", lambda b: b"", r"model\.safetensors cannot be read"),
        ("model.safetensors", lambda b: b"\x80\x04" + b, r"model\.safetensors cannot be read"),
        ("config.json", lambda b: b[:40], r"config\.json cannot be read"),
        ("config.json", lambda b: b"{}", r"config\.json is not of the format"),
        ("config.json", lambda b: b.replace(b'"bias"', b'"bia"'), r"does not describe a model"),
        (
            "config.json",
            lambda b: b.replace(b'"num_layers": 4', b'"num_layers": 3'),
            r"does not fit config\.json: layers\.3\..* is not expected",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"pattern": null', b'"pattern": "*-*"'),
            r"does not describe a model: the pattern '\*-\*' has not 4 layers",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"num_layers": 4', b'"num_layers": 4000000000'),
            r"does not describe a model: num_layers is 4000000000",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"value_dim": 16', b'"value_dim": "16"'),
            r"does not describe a model: --ultramem-value-dim is '16'",
        ),
        (
            "config.json",
            lambda b: b.replace(b'"value_dim": 16', b'"value_dim": 18'),
            r"memory\.value_proj\.weight has shape \(32, 64\), not \(32, 72\)",
        ),
    ],
)
def test_damaged_files_are_named(exported, tmp_path, file, change, message):
    with pytest.raises(UltraMemError, match=message):
        load_plain(_damaged(exported, tmp_path, file, change))


def _differing():
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.tools.export.megatron import plain_config, plain_model

    model, args = untrained_model(flags(MODELS["swiglu"]))
    config = plain_config(args, model.config, config_from_args(args))
    plain_model(model, config)
    model.decoder.final_layernorm.eps = 0.5  # something that no flag shows
    plain_model(model, config)


def test_a_model_that_computes_something_else_is_not_exported():
    with pytest.raises(RanksFailed, match=r"logits differ from Megatron's by"):
        run_on_ranks(1, _differing)


def test_the_command_wants_one_direction():
    from ultramem_megatron.tools.export.__main__ import main

    with pytest.raises(UltraMemError, match=r"Give --load DIR and --to \[hf\] OUT, or --from"):
        main(["--load", "a", "--from", "b"])
