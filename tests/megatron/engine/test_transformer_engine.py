"""Memories in Megatron's spec for Transformer Engine, with its own Python: parts, names, loads."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests import ROOT

pytestmark = pytest.mark.long

_VERSION = "2.20.2"
_READING = (0, 2)  # of four layers, in launch/own_loop.py


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What case.py found."""
    folder = tmp_path_factory.mktemp("engine")
    wanted = f"transformer-engine=={_VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if subprocess.run([*pip, wanted], timeout=120).returncode:
        pytest.skip(f"{wanted} cannot be had from the package index here")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    command = [sys.executable, "-m", "tests.megatron.engine.case", str(folder), _VERSION]
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_memory_gets_the_normed_input_where_one_reads(built):
    fused = ["megatron.IdentityOp", "megatron.TELayerNormColumnParallelLinear"]
    apart = ["transformer_engine.LayerNorm", "megatron.TEColumnParallelLinear"]
    expected = [apart if number in _READING else fused for number in range(4)]
    assert built["layers"] == expected


def test_checkpoints_name_the_dense_weights_as_those_of_a_dense_model(built):
    dense, memory = map(set, built["sharded"])
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in dense
    assert any(name.endswith("_extra_state") for name in dense)
    assert dense <= memory
    state = "decoder.layers.{}.mlp.linear_fc1.layer_norm__extra_state"  # empty
    others = {name for name in memory - dense if ".memory." not in name}
    assert others == {state.format(layer) for layer in _READING}


def test_a_plain_state_dict_names_the_norm_that_was_taken_out(built):
    dense, memory = map(set, built["keys"])
    fused = {
        f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_{kind}"
        for layer in _READING
        for kind in ("weight", "bias")
    }
    apart = {name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.") for name in fused}
    assert dense - memory == fused
    states = {f"decoder.layers.{layer}.pre_mlp_layernorm._extra_state" for layer in _READING}
    assert {name for name in memory - dense if ".memory." not in name} == apart | states


def test_a_dense_checkpoint_is_upcycled(built):
    assert built["differ after upcycling"] == []


def test_memories_are_built_without_numbers(built):
    assert built["meta"] == ["meta"]


def test_in_fp8_and_fp4_recipes_memories_are_built_of_bf16(built):
    """Weights are made on no device: here is nothing that could quantise them."""
    assert len(built["recipes"]) == 5
    for recipe, found in built["recipes"].items():
        linear = {"linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"}
        assert linear <= set(found["in low precision"]), recipe
        assert found["in a memory"] == [], recipe
        assert found["dtypes of memories"] == ["torch.bfloat16"], recipe
        assert found["kinds of parameters"] == ["Parameter"], recipe
