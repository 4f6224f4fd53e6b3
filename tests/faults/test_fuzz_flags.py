"""Whatever flags are made up: `ultramem check` says what they are, or refuses them in one line."""

import contextlib
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.fuzzing import TIMES, drawn
from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt
from ultramem_megatron.errors import UltraMemError

_EXAMPLES = 100
_ODD = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "nan",
        "inf",
        "1e308",
        "1e-300",
        "x",
        "4.5",
        "\u0661",
        "\uff11",
        "1_0",
        "9" * 5000,
    ]
)
_SMALL = st.integers(1, 9).map(str)
_SIZE = st.sampled_from(["8", "12", "16", "32", "48", "64"])
_RATE = st.floats(0, 2).map(str)
_FLAGS: dict[str, st.SearchStrategy[str]] = {
    "--ultramem-spans": st.one_of(
        st.sampled_from(["1:2", "2:1", "1:1/2:2", "full", "1:2/2:3", "1:", "/", "0:1", "1:\u0662"]),
        st.text("0123456789:/ ", max_size=12),
    ),
    "--ultramem-num-keys": st.one_of(_SMALL, _SIZE, st.just("70000")),
    "--ultramem-key-dim": st.one_of(_SMALL, _SIZE),
    "--ultramem-value-dim": st.one_of(_SMALL, _SIZE),
    "--ultramem-topk": _SMALL,
    "--ultramem-heads": _SMALL,
    "--ultramem-tucker-rank": _SMALL,
    "--ultramem-cores": _SMALL,
    "--ultramem-value-expansion": _SMALL,
    "--ultramem-retrieval": st.sampled_from(["tdqkr", "pkm", "none"]),
    "--ultramem-rank-layout": st.sampled_from(["split", "full"]),
    "--ultramem-qk-norm": st.sampled_from(["layernorm", "rmsnorm", "none"]),
    "--ultramem-query-conv-kernel": _SMALL,
    "--ultramem-aux-loss-weight": _RATE,
    "--ultramem-value-lr-mult": _RATE,
    "--ultramem-value-lr-decay": _RATE,
    "--ultramem-parallel-size": _SMALL,
    "--ultramem-partition": st.sampled_from(["number", "dimension", "grid", "auto"]),
    "--ultramem-node-size": _SMALL,
    "--ultramem-preset": st.sampled_from(["ultramem-151m-x12", "huge"]),
    "--ultramem-train-rows": _SMALL,
    "--ultramem-train-only": st.sampled_from(["memory", "values"]),
    "--ultramem-background-reads": st.sampled_from(["", "nowhere", "/dev/null", "."]),
    "--ultramem-seed": _SMALL,
    "--num-layers": _SMALL,
    "--hidden-size": _SIZE,
    "--num-attention-heads": _SMALL,
    "--num-query-groups": _SMALL,
    "--kv-channels": _SMALL,
    "--seq-length": _SIZE,
    "--max-position-embeddings": _SIZE,
    "--vocab-size": _SIZE,
    "--micro-batch-size": _SMALL,
    "--global-batch-size": _SIZE,
    "--train-iters": _SMALL,
    "--lr": _RATE,
    "--min-lr": _RATE,
    "--lr-warmup-iters": _SMALL,
    "--hidden-dropout": _RATE,
    "--tensor-model-parallel-size": _SMALL,
    "--pipeline-model-parallel-size": _SMALL,
    "--context-parallel-size": _SMALL,
    "--expert-model-parallel-size": _SMALL,
    "--num-experts": _SMALL,
    "--moe-router-topk": _SMALL,
    "--normalization": st.sampled_from(["LayerNorm", "RMSNorm"]),
    "--position-embedding-type": st.sampled_from(["rope", "learned_absolute", "none"]),
    "--rotary-percent": _RATE,
    "--split": st.sampled_from(["1,1,1", "98,2,0", "a,b", "1", "-1,2,3"]),
    "--data-path": st.sampled_from(["", "nowhere", "/dev/null", "1 nowhere"]),
    "--load": st.sampled_from(["", "nowhere", "/dev/null"]),
    "--save": st.sampled_from(["", "/dev/null/below", "/nowhere/save"]),
    "--ckpt-format": st.sampled_from(["torch_dist", "torch", "zarr"]),
    "--ckpt-step": _SMALL,
    "--tokenizer-type": st.sampled_from(["NullTokenizer", "HuggingFaceTokenizer", "TikTokenizer"]),
    "--optimizer": st.sampled_from(["adam", "sgd", "muon", "lion"]),
    "--gpus": _SMALL,
    "--ultramem-table-moments": st.sampled_from(["float32", "int8", "factored", "int4"]),
    "--ultramem-table-main-params": st.sampled_from(["float32", "none", "bfloat16"]),
}
_SWITCHES = [
    "--ultramem-softmax",
    "--no-ultramem-share-query",
    "--no-ultramem-value-projection",
    "--ultramem-row-adam",
    "--use-distributed-optimizer",
    "--swiglu",
    "--squared-relu",
    "--sequence-parallel",
    "--group-query-attention",
    "--multi-latent-attention",
    "--untie-embeddings-and-output-weights",
    "--bf16",
    "--fp16",
    "--recompute-activations",
    "--add-qkv-bias",
    "--qk-layernorm",
    "--unknown-flag",
]


@st.composite
def _flag_sets(draw: Any) -> list[str]:
    words = tiny_gpt(ultramem_spans="1:2", ultramem_num_keys=12, ultramem_topk=6)
    for name in draw(st.lists(st.sampled_from(sorted(_FLAGS)), max_size=6, unique=True)):
        odd = draw(st.integers(0, 5)) == 0
        words += [name, draw(_ODD if odd else _FLAGS[name])]
    return words + draw(st.lists(st.sampled_from(_SWITCHES), max_size=3, unique=True))


def _check_flags(times: int) -> dict[int, int]:
    from ultramem_megatron.tools.check import main

    ends = {0: 0, 2: 0}

    @drawn(_EXAMPLES * times)
    @given(_flag_sets())
    def fuzz(words: list[str]) -> None:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                status = main(words)
        except UltraMemError:
            status = 2
        lines = printed.getvalue().splitlines()
        assert all(line[12:].startswith(("ok ", "REFUSED ")) for line in lines), lines
        ends[status] += 1

    fuzz()
    return ends


@pytest.mark.parametrize("times", TIMES)
def test_flags(times, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (ends,) = run_on_ranks(1, _check_flags, times, timeout=600)
    print(f"{ends[0]} would train, {ends[2]} refused")
    assert ends[0] >= 5 * times
    assert ends[2] >= 50 * times
    assert {path.name for path in tmp_path.iterdir()} <= {".hypothesis"}  # its list of constants
