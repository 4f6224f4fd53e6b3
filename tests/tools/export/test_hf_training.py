"""A model trained in transformers goes the same way as ours, and comes back as a checkpoint."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close, rounding
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.tools.export.hf_folder import hf_model, load_hf, save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.export.huggingface import hf_state
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

_STEPS, _BATCHES = 3, 2
_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 16,
    "max_positions": 32,
}
_MEMORY: dict[str, Any] = {
    "num_keys": 8,
    "key_dim": 16,
    "value_dim": 16,
    "topk": 5,
    "aux_loss_weight": 0.5,
}
_MEMORIES = {
    "tdqkr": UltraMemConfig(spans=(Span(1, 2), Span(3, 3)), **_MEMORY, query_conv_kernel=3),
    "pkm": UltraMemConfig(
        spans=(Span(2, 3),), **_MEMORY, retrieval="pkm", tucker_rank=1, cores=1, softmax=True
    ),
}
_EVERY = (Span(1, 1), Span(2, 2), Span(3, 3))
_MEMORIES |= {
    "ultramemv2": UltraMemConfig(
        spans=_EVERY,
        **_MEMORY,
        heads=1,
        values="prevalued",
        pre_value_dim=8,
        value_expansion=1,
        key_expansion=2,
        share_values=3,
        side_topk=3,
        rank_layout="full",
        query_per_rank=True,
    ),
    "memory+": dataclasses.replace(
        _MEMORIES["pkm"],
        spans=_EVERY,
        values="gated",
        projection_bias=True,
        share_values=3,
        share_order="same",
    ),
    "peer": UltraMemConfig(
        spans=(Span(2, 2),),
        **{**_MEMORY, "value_dim": 32},
        retrieval="pkm",
        tucker_rank=1,
        cores=1,
        value_expansion=1,
        values="prevalued",
        pre_value_activation="gelu",
        value_projection=False,
        relu_scores=True,
        values_per_head=True,
    ),
}


def small_model(name: str) -> PlainGPT:
    """A PlainGPT with these memories and weights of no special value."""
    plain = PlainGPT(PlainConfig(**_SIZES, ultramem=_MEMORIES[name], activation="swiglu"))
    generator = torch.Generator().manual_seed(4)
    for path, tensor in plain.named_parameters():
        if ".memory." not in path and tensor.dim() > 1:
            tensor.data.normal_(std=0.3, generator=generator)
        elif ".memory." not in path:
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return plain


def _texts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(61, (_STEPS, _BATCHES, 2, 12), generator=generator)


def _train_ours(plain: PlainGPT) -> None:
    """As Megatron does: the penalty, the mean and the filter once a step."""
    plain.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for step in _texts():
        for texts in step:
            logits = plain(texts)[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, texts[:, 1:].flatten()) / _BATCHES
            loss.backward()
        for layer in memory_layers(plain):
            penalty = layer.auxiliary_loss()
            if penalty is not None:
                penalty.backward()
            layer.end_batch()
        optimizer.step()
        optimizer.zero_grad()
        for layer in memory_layers(plain):
            layer.after_step()
    plain.eval()


def _train_theirs(model: torch.nn.Module) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in _texts():
        for texts in step:
            (model(texts, labels=texts).loss / _BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


_OWN = {
    "ultramemv2": ("tables.0.pre_values.weight", "pre_proj.weight"),
    "memory+": ("tables.0.values.weight", "gate.weight", "gate.bias", "value_proj.bias"),
    "peer": ("pre_values.weight",),
}


@pytest.mark.parametrize(
    ("name", "recomputed"),
    [
        *((name, "") for name in _MEMORIES),
        *((name, "again") for name in ("tdqkr", "pkm", "ultramemv2")),
        ("tdqkr", "reentrant"),
    ],
)
def test_steps_in_transformers_are_ours(name, recomputed):
    plain = small_model(name)
    model = hf_model(copy.deepcopy(plain))
    if recomputed:
        how = {"use_reentrant": recomputed == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    before = {path: tensor.clone() for path, tensor in hf_state(plain).items()}
    _train_ours(plain)
    _train_theirs(model)
    trained, wanted = model.state_dict(), hf_state(plain)
    for path, tensor in wanted.items():
        # Adam's first steps turn rounding of small gradients into steps.
        assert_close(trained[path].float(), tensor.float(), 2e-3, path)
    moved = [path for path, tensor in wanted.items() if not torch.equal(tensor, before[path])]
    for part in ("common.mean", "values.weight", "keys.weight", "proj.weight", *_OWN.get(name, ())):
        assert any(path.endswith(part) for path in moved), part


def test_the_loss_is_of_the_next_tokens_and_in_training_has_the_penalty():
    plain = small_model("tdqkr")
    model = hf_model(plain)
    texts = _texts()[0, 0]
    logits = plain(texts)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, texts[:, 1:].flatten())
    penalty = sum(layer.auxiliary_loss() for layer in memory_layers(plain))
    assert penalty > 1e-3
    tolerance = rounding(torch.float32, 1000)
    assert_close(model(texts, labels=texts).loss, loss, tolerance)
    assert_close(model.train()(texts, labels=texts).loss, loss + penalty, tolerance)
    # As Trainer asks where several batches make a step: one of two, of 22 tokens each.
    half = model(texts, labels=texts, num_items_in_batch=44).loss
    assert_close(half, (loss + penalty) / 2, tolerance)


def test_what_transformers_saves_after_training_comes_back(tmp_path):
    plain = small_model("tdqkr")
    save_hf(plain, tmp_path / "out", HFTokenizer(), "card")
    model = hf_model(plain)
    _train_theirs(model)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(UltraMemError, match="is not as SHA256SUMS says: damaged, or written since"):
        load_hf(tmp_path / "out")
    (tmp_path / "out/SHA256SUMS").unlink()
    back, _ = load_hf(tmp_path / "out")
    texts = _texts()[0, 0]
    assert back.config == plain.config
    assert_close(back(texts), model(texts).logits, rounding(torch.float32, 1000))


def test_padding_leaves_no_trace_in_the_mean_of_queries():
    texts, mask = _texts()[0, 0], torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    means = []
    for filling in (0, 7):
        model = hf_model(small_model("tdqkr")).train()
        model(texts.masked_fill(mask == 0, filling), attention_mask=mask).logits.sum().backward()
        state = model.state_dict()
        means.append(state["model.layers.0.memory.query.common.mean"])
    assert torch.equal(*means)
    assert means[0].any()
