"""Small GPTs of the three kinds, and their logits by cached decoding and by one full forward."""

from typing import Any

import torch

from tests.training_runs import tiny_gpt

_TINY = {
    "num_layers": 4,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 32,
    # Large enough that logits differ between tokens, and the memory's part shows.
    "init_method_std": 0.2,
}

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {
        "num_experts": 4,
        "moe_router_topk": 2,
        "disable_bias_linear": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    },
    "ultramem": {"ultramem_spans": "1:3/4:4", "ultramem_num_keys": 12, "ultramem_topk": 6},
    "ultramem-conv": {
        "ultramem_spans": "1:2/3:4",
        "ultramem_num_keys": 12,
        "ultramem_topk": 6,
        "ultramem_query_conv_kernel": 4,
    },
    "ultramemv2": {
        "ultramem_spans": "full",
        "ultramem_num_keys": 12,
        "ultramem_topk": 9,
        "ultramem_side_topk": 5,
        "ultramem_heads": 1,
        "ultramem_values": "prevalued",
        "ultramem_pre_value_dim": 8,
        "ultramem_value_expansion": 1,
        "ultramem_key_expansion": 2,
        "ultramem_share_values": 2,
        "ultramem_rank_layout": "full",
        "ultramem_query_per_rank": True,
    },
    "pkm": {
        "ultramem_spans": "2:2",
        "ultramem_replace_mlp": True,
        "ultramem_num_keys": 12,
        "ultramem_topk": 6,
        "ultramem_retrieval": "pkm",
        "ultramem_softmax": True,
    },
}
KINDS["moe-ultramem"] = KINDS["moe"] | KINDS["ultramem"]
HYBRID = {
    "num_layers": None,
    "hybrid_layer_pattern": "*-*-",
    "ultramem_spans": "2:3/4:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 4,
}
"""No GPT: of kind "hybrid", beside KINDS."""
MAMBA = {
    **HYBRID,
    "hybrid_layer_pattern": "M-*M-/*-",  # heads for later tokens take no part
    "ultramem_spans": "2:4/5:5",
    "mamba_state_dim": 6,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
}
"""Likewise, of kind "mamba"."""


LOGITS = 16 * torch.finfo(torch.float32).eps
"""Between ways to compute the logits of such a model, relative: 1.9e-6.

All sums of four layers (some 1100 products) one after the other would allow four times as much by
`closeness.rounding`; but each layer adds to what it gets, so that most of a result has passed few
of them. The largest seen over all kinds and layouts is a quarter of it.
"""


class NumberTokenizer:
    """Text of decimal token numbers."""

    vocab_size, eod, bos = 512, 511, 510

    def tokenize(self, text: str) -> list[int]:
        """[3, 5] of "3 5"."""
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_: Any) -> str:
        """The inverse."""
        return " ".join(map(str, tokens))


def random_model(kind: str, layout: Any = None) -> tuple[Any, Any]:
    """A model of that kind and its flags; convolutions, which start inert, mix their taps.

    layout: an InferenceLayout; by default all ranks share everything.
    """
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.memory.layer import memory_layers

    model, args = untrained_model(flags_of(kind), layout)
    for layer in memory_layers(model):
        if layer.query.common is not None:  # a trained model's is not zero
            mean = layer.query.common.mean
            mean.copy_(torch.linspace(-1, 1, len(mean)))
        if layer.query.conv is not None:
            generator = torch.Generator().manual_seed(layer.layer_number)
            taps = layer.query.conv.weight
            taps.data = torch.randn(taps.shape, generator=generator)
    return model, args


def flags_of(kind: str) -> list[str]:
    """Megatron's flags for the small model of that kind."""
    return tiny_gpt(**{**_TINY, **{"hybrid": HYBRID, "mamba": MAMBA, **KINDS}[kind]})


@torch.no_grad()
def full_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(B, S, V) of tokens (B, S), in one forward pass."""
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    logits: torch.Tensor = model(tokens, positions, mask, runtime_gather_output=True)
    return logits


@torch.no_grad()
def cached_logits(model: Any, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits (B, S-prefill+1, V) from position prefill-1 on: the prompt at once, then one by one.

    Through the wrapper that Megatron's engines call.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.utils import InferenceMode

    batch, length = tokens.shape
    wrapper = GPTInferenceWrapper(model, StaticInferenceContext(batch, length))
    wrapper.prep_model_for_inference()
    inputs, logits = wrapper.prep_inference_input(tokens), []
    with InferenceMode.active():
        for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, length))]:
            window = wrapper.get_batch_for_context_window(inputs, start, end)
            logits.append(wrapper.run_one_forward_step(window)[:, -1])
            wrapper.inference_context.enable_decode_mode()
    return torch.stack(logits, dim=1)


@torch.no_grad()
def dynamic_logits(model: Any, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    """As `cached_logits`, by dynamic batching: row r joins at step 2*r and leaves when it is done.

    Steps mix prompts with single tokens; blocks are small, so that requests have several.
    """
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.utils import InferenceMode

    from ultramem_megatron.inference.dynamic_batching import dynamic_context

    batch, length = tokens.shape
    context = dynamic_context(model, batch, length, block_tokens=4)
    sampling = SamplingParams(num_tokens_to_generate=length - prefill + 1, termination_id=-1)
    found: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    step = 0
    with InferenceMode.active():
        while any(len(row) <= length - prefill for row in found):
            if step % 2 == 0 and step // 2 < batch:
                prompt = tokens[step // 2, :prefill].clone()
                context.add_request(
                    DynamicInferenceRequest(
                        request_id=step // 2, prompt_tokens=prompt, sampling_params=sampling
                    )
                )
            step += 1
            context.initialize_attention_state()
            packed, positions = context.current_input_and_position_ids()
            logits = model(
                packed, positions, None, inference_context=context, runtime_gather_output=True
            )
            rows = context.request_ids[context.paused_request_count : context.total_request_count]
            next_tokens, goes_on = [], []
            for at, row in enumerate(rows.tolist()):
                found[row].append(logits[0, at])
                end = prefill + len(found[row]) - 1
                goes_on.append(end < length)
                next_tokens.append(int(tokens[row, min(end, length - 1)]))
            context.update_requests(
                torch.tensor(goes_on, dtype=torch.int32), torch.tensor(next_tokens)
            )
    return torch.stack([torch.stack(row) for row in found])
