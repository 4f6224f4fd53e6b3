"""What Megatron-FSDP saved is the model that it trained, to whoever loads it without it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.decoding import LOGITS
from tests.ranks import RanksFailed, run_on_ranks
from tests.tools.test_evaluate import _evaluate
from tests.training_runs import Trained, TrainingRun, run_pretrain, tiny_gpt
from tests.whole_model import train, whole
from ultramem_megatron.data import indexed

_FSDP = {
    "use_megatron_fsdp": True,
    "ckpt_format": "fsdp_dtensor",
    "data_parallel_sharding_strategy": "optim_grads_params",
    "train_iters": 1,
    "save_interval": 1,
}
_MEMORY = {
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 11,
    "ultramem_topk": 6,
    "ultramem_value_dim": 16,
}
_SIZES = {"num_layers": 4, "num_attention_heads": 4}
_SHARED = {"swiglu": True, "ultramem_share_values": 2, **_MEMORY}
_EXPERTS = {"num_experts": 2, "disable_bias_linear": True, **_SHARED}
_EXPERTS["moe_router_load_balancing_type"] = "none"
_LATENT = {
    "multi_latent_attention": True,
    "disable_bias_linear": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "v_head_dim": 12,
    "qk_pos_emb_head_dim": 4,
    **_MEMORY,
}
_TOKENS = torch.arange(17)
_long = pytest.mark.long


def _loaded(folder: str, layout: Any) -> dict[str, Tensor]:
    from megatron.core.utils import unwrap_model

    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import load_model

    model, _ = load_model(folder, layout=InferenceLayout(*layout))
    return {name: weight.data for name, weight in unwrap_model(model).named_parameters()}


def _logits(folder: str, layout: Any) -> Tensor:
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import load_model

    return _forward(load_model(folder, layout=InferenceLayout(*layout))[0])


def _own_logits(trained: Trained) -> Tensor:
    return _forward(trained.model[0].eval())


@torch.no_grad()
def _forward(model: Any) -> Tensor:
    tokens = _TOKENS[:-1].reshape(2, 8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    logits: Tensor = model(tokens, torch.arange(8).expand(2, -1), mask, runtime_gather_output=True)
    return logits.float()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(_SHARED, id="gated MLPs, shared tables"),
        pytest.param(_MEMORY, id="plain", marks=_long),
        pytest.param({**_EXPERTS, "bf16": True}, id="experts, half precision", marks=_long),
        pytest.param({**_MEMORY, "tensor_model_parallel_size": 2}, id="TP2", marks=_long),
    ],
)
def test_weights_are_those_that_were_trained(tmp_path: Path, flags: dict[str, Any]) -> None:
    run = train(2, tiny_gpt(**_SIZES, **_FSDP, **flags, save=tmp_path))
    (loaded,) = run_on_ranks(1, _loaded, str(tmp_path), ())
    _assert_same(loaded, _bare(run, "parameters"))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(_SHARED, id="shards of all"),
        pytest.param({**_SHARED, "data_parallel_sharding_strategy": "no_shard"}, id="no shards"),
        pytest.param({**_MEMORY, "ultramem_overlap": True}, id="overlap"),
        pytest.param({**_MEMORY, "tensor_model_parallel_size": 2}, id="TP2"),
        pytest.param({**_EXPERTS, "expert_model_parallel_size": 2}, id="experts over ranks"),
        pytest.param(_LATENT, id="latent attention"),
    ],
)
@_long
def test_it_answers_as_the_model_that_was_trained(tmp_path: Path, flags: dict[str, Any]) -> None:
    folder = tmp_path / "checkpoint"
    run = run_pretrain(
        2, tiny_gpt(**{**_SIZES, **_FSDP, **flags}, save=folder), on_finish=_own_logits
    )
    own = run.ranks[0].finished
    (logits,) = run_on_ranks(1, _logits, str(folder), ())
    assert_close(logits, own, LOGITS)
    indexed.write(tmp_path / "data", [_TOKENS.tolist()], 512)
    data = ("--data", str(tmp_path / "data"), "--window", "8")
    ((evaluated,),) = run_on_ranks(1, _evaluate, tmp_path, *data)
    loss = torch.nn.functional.cross_entropy(own.flatten(0, 1), _TOKENS[1:])
    assert evaluated["loss"] == pytest.approx(float(loss), rel=LOGITS)


@_long
def test_ranks_that_decode_take_their_parts(tmp_path: Path) -> None:
    train(2, tiny_gpt(**_SIZES, **_FSDP, **_EXPERTS, save=tmp_path))
    (one,) = run_on_ranks(1, _logits, str(tmp_path), ())
    for logits in run_on_ranks(2, _logits, str(tmp_path), (2, 1)):
        assert_close(logits, one, LOGITS)


@_long
def test_memories_are_added_to_a_dense_model_over_stages(tmp_path: Path) -> None:
    dense = train(2, tiny_gpt(**_SIZES, **_FSDP, swiglu=True, save=tmp_path))
    flags = tiny_gpt(
        **_SIZES,
        **_MEMORY,
        swiglu=True,
        ultramem_upcycle=tmp_path,
        pipeline_model_parallel_size=2,
        train_iters=1,
    )
    run = train(2, flags, initial_parameters=True)
    _assert_same(_bare(run, "initial_parameters"), _bare(dense, "parameters"))


@_long
def test_what_it_cannot_be_read_for_is_refused(tmp_path: Path) -> None:
    sizes = tiny_gpt(**_SIZES, **_FSDP, **_MEMORY, save=tmp_path)
    run_pretrain(2, sizes)
    with pytest.raises(RanksFailed, match=r"--table-memory disk: .* is in fsdp_dtensor"):
        run_on_ranks(1, _loaded, str(tmp_path), (None, None, "auto", "disk"))
    with pytest.raises(RanksFailed, match=r"ultramem export .* --from OUT --save NEW"):
        run_pretrain(1, tiny_gpt(**_SIZES, **_MEMORY, load=tmp_path))
    _leave_out_a_file(tmp_path)
    with pytest.raises(RanksFailed, match=r"iter_0000001 is damaged: FileNotFoundError"):
        run_on_ranks(1, _loaded, str(tmp_path), ())


def _leave_out_a_file(folder: Path) -> None:
    (folder / "iter_0000001" / "__1_0.distcp").unlink()


def _bare(run: TrainingRun, kind: str) -> dict[str, Tensor]:
    """By the names that one rank has for them."""
    own = {"module.": "", "experts.experts.": "experts.local_experts."}
    named = whole(run, kind).items()
    return {functools.reduce(lambda n, a: n.replace(a, own[a]), own, n): t for n, t in named}


def _assert_same(loaded: dict[str, Tensor], trained: dict[str, Tensor]) -> None:
    assert trained.keys() <= loaded.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(loaded[name], weight.to(loaded[name].dtype), rtol=0, atol=0)
