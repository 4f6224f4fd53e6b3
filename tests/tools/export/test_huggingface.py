"""An exported folder in transformers is Megatron's model, and its checkpoint is the first one."""

import contextlib
import io
import json
import os
import subprocess

import pytest
import torch

from tests import ROOT
from tests.decoding import LOGITS
from tests.ranks import run_on_ranks
from tests.tools.export.models import (
    MODELS,
    TOLERANCES,
    assert_megatrons_logits,
    assert_one_continuation,
    flags,
    in_transformers,
    round_trip,
    shaken,
)
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.tools.export.hf_folder import load_hf

_MODELS = {
    **{name: changes for name, changes in MODELS.items() if name not in ("dense bf16", "learned")},
    "convolution, learned": {**MODELS["learned"], "ultramem_query_conv_kernel": 5},
    "ranks": {
        "ultramem_spans": "3:4",
        "ultramem_num_keys": 9,
        "ultramem_topk": 7,
        "ultramem_tucker_rank": 4,
        "ultramem_heads": 3,
        "no_ultramem_share_query": True,
        "ultramem_rank_layout": "full",
        "ultramem_cores": 4,
        "ultramem_value_expansion": 9,
        "position_embedding_type": "none",
        "swiglu": True,
        "make_vocab_size_divisible_by": 4,
    },
    "bare": {
        "ultramem_spans": "2:2",
        "ultramem_num_keys": 12,
        "ultramem_topk": 6,
        "ultramem_value_expansion": 1,
        "no_ultramem_value_projection": True,
        "ultramem_value_dim": 32,
        "ultramem_qk_norm": "none",
        "ultramem_query_conv_kernel": 2,
    },
}

_PROMPT = "A memory layer does"


def _exported(folder):
    """Of each model, and of one of text; see `round_trip` and `_written`."""
    os.umask(0o027)  # in a process of its own
    return round_trip(folder, _MODELS, "hf"), _written(folder / "text")


def _written(folder):
    """A model of text, exported and made a checkpoint again: what that one writes."""
    from ultramem_megatron.data.tokenizer import save, train
    from ultramem_megatron.inference.generate import main as generate
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.folder import loaded_iteration, stored_args
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.__main__ import main

    save(train([(ROOT / "README.md").read_text()], 400), folder / "tokenizer")
    model, args = untrained_model(flags(_MODELS["convolution"]))
    shaken(model)
    with torch.no_grad():
        model.output_layer.weight[400:] = 0  # padding of the vocabulary, which training makes rare
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", "moved/tokenizer"
    save_weights(model, args, folder / "checkpoint")
    moved = ["--tokenizer-model", f"{folder}/tokenizer"]
    main(["--load", f"{folder}/checkpoint", "--to", "hf", f"{folder}/hf", *moved])
    main(["--from", "hf", f"{folder}/hf", "--save", f"{folder}/back"])
    assert stored_args(str(loaded_iteration(folder / "back"))).vocab_size is None
    out = io.StringIO()
    words = ["--load", f"{folder}/back", "--temperature", "0", "--tokens", "12"]
    with contextlib.redirect_stdout(out):
        generate([*words, "--prompt", _PROMPT])
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return folder, *run_on_ranks(1, _exported, folder)[0]


@pytest.fixture(scope="module")
def opened(exported, tmp_path_factory):
    """By transformers, every model, in a process that can import neither us nor Megatron."""
    scratch = tmp_path_factory.mktemp("results")
    return in_transformers(exported[0], scratch, *_MODELS, prompt=_PROMPT)


@pytest.mark.parametrize("name", _MODELS)
def test_transformers_gives_megatrons_logits(exported, opened, name):
    assert_megatrons_logits(exported[1][name], opened[name], TOLERANCES.get(name, LOGITS))


@pytest.mark.parametrize("name", [name for name in _MODELS if "bf16" not in name])
def test_continuations_are_the_same_with_a_cache_in_batches_and_beams(opened, name):
    assert_one_continuation(opened[name])


def test_the_folder_writes_what_the_checkpoint_made_of_it_writes(exported, opened):
    found, ours = opened["text"], exported[2]
    assert found["texts"][0] + "\n" == ours
    assert len(ours) > len(_PROMPT) + 12
    kept = exported[0] / "text/back/tokenizer"
    assert sorted(path.name for path in kept.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert found["padding"] == 0
    assert found["eos"] == (0, 0)
    assert found["room"] == 32
    assert found["suppressed"] == list(range(400, 512))
    assert found["pages"]
    assert all(0 < here <= of for here, of in found["pages"].values())


def test_what_picks_keys_stays_in_float32(opened):
    dtypes = opened["bf16"]["dtypes"]
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    memory = "model.layers.1.memory."
    names = ("query.common.mean", "query.common.updates", "retrieval.cores.u", "retrieval.cores.t")
    assert kept == {memory + name for name in names}


def test_the_folder_is_whole_and_may_be_read_by_the_group(exported):
    folder = exported[0] / "swiglu/hf"
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == ["UltraMemGPTForCausalLM"]
    assert content["dtype"] == "float32"
    assert content["megatron_tokenizer"]["tokenizer_type"] == "NullTokenizer"
    card = (folder / "README.md").read_text()
    assert "| memory: spans | 2:3 |" in card
    assert "No tokenizer: the model was trained on ids without a text (NullTokenizer)" in card
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    files = list(folder.iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    listed = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in files} - {"SHA256SUMS"}


@pytest.mark.long
def test_two_ranks_train_on_from_a_checkpoint_made_of_a_folder(exported):
    back, wanted = exported[0] / "convolution/back", load_hf(exported[0] / "convolution/hf")[0]
    changes = {**_MODELS["convolution"], "num_layers": 4, "train_iters": 2, "lr": 1e-9, "min_lr": 0}
    layout = {"tensor_model_parallel_size": 2, "ultramem_parallel_size": 2}
    start = {"load": back, "ckpt_format": "torch_dist", "finetune": True, **layout}
    run = run_pretrain(2, tiny_gpt(**changes, **start), initial_parameters=True)
    assert len(run.losses) == 2
    name = "layers.0.memory.value_proj.weight"
    ours = run.ranks[0].initial_parameters[f"module.decoder.{name}"]
    assert torch.equal(ours, wanted.state_dict()[name])
    tables = [
        rank.initial_parameters["module.decoder.layers.0.memory.values.weight"]
        for rank in run.ranks
    ]
    assert torch.equal(torch.cat(tables, 1), wanted.state_dict()["layers.0.memory.values.weight"])
