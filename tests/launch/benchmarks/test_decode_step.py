"""The decode benchmark's step: Megatron's own logits, in a form that a CUDA graph can hold."""

from unittest.mock import patch

import pytest
import torch

from tests.closeness import assert_close, assert_rounds_no_worse
from tests.decoding import LOGITS, flags_of, full_logits
from tests.ranks import run_on_ranks
from ultramem_megatron.errors import UltraMemError

_GROUPED = ("--group-query-attention", "--num-query-groups", "2")
_CASES = {
    "dense": ("dense", _GROUPED),
    "half rotated": ("dense", ("--rotary-percent", "0.5")),
    "learned positions": ("dense", ("--position-embedding-type", "learned_absolute")),
    "moe-grouped": ("moe", _GROUPED),
    "moe-gated": ("moe", ("--swiglu", "--moe-router-pre-softmax")),
    "ultramem": ("ultramem", _GROUPED),
    "ultramem-conv": ("ultramem-conv", ()),
}
_LENGTH, _ROWS, _LATE = 10, 3, 2
"""Tokens, sequences; and by how many steps each sequence is behind the one before it."""


def _model(case, *flags):
    from megatron.core.utils import unwrap_model

    from launch.benchmarks.grouped_experts import group_experts
    from ultramem_megatron.inference.loading import prepare_for_inference
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.memory.layer import memory_layers

    kind, more = _CASES[case]
    model, _ = untrained_model([*flags_of(kind), *more, *flags])
    for number, layer in enumerate(memory_layers(model)):
        if layer.query.conv is not None:  # starts inert
            taps, generator = layer.query.conv.weight, torch.Generator().manual_seed(number)
            taps.data = torch.randn(taps.shape, generator=generator).to(taps)
    prepare_for_inference(model)
    return model, lambda: case.startswith("moe-") and group_experts(unwrap_model(model))


def _logits(model, tokens, late):
    """Logits of (B, S) tokens, fed one by one to steps; sequence r starts r*late steps later."""
    from launch.benchmarks.decode_step import DecodeStep

    step = DecodeStep(model, [0] * len(tokens), 500, places=tokens.shape[1], one_cache=False)
    rows, found = torch.arange(len(tokens)), []
    for at in range(tokens.shape[1] + late * (len(tokens) - 1)):
        # One that waits feeds its first token again, one that is done its last.
        places = (at - late * rows).clamp(0, tokens.shape[1] - 1)
        step.requests.positions.copy_(places)
        step.tokens.copy_(tokens[rows, places].unsqueeze(1))
        found.append(step()[:, 0])
    return torch.stack(
        [torch.stack([found[p + late * r][r] for p in range(tokens.shape[1])]) for r in rows]
    )


@torch.inference_mode()
def _equality(cases, *flags):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tokens = torch.randint(500, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    results = {}
    for case in cases:
        model, group = _model(case, *flags)
        whole = full_logits(model, tokens)
        group()
        # A query convolution's past is kept for all sequences at once, so these go together.
        late = 0 if case == "ultramem-conv" else _LATE
        with patch.object(CudaRNGStatesTracker, "fork", side_effect=AssertionError("forks")):
            results[case] = _logits(model, tokens, late), whole
    return results


@torch.inference_mode()
def _in_bfloat16(cases):
    """Logits of steps and of a full forward in bfloat16, and of the same weights in float32."""
    tokens = torch.randint(500, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    results = {}
    for case in cases:
        model, group = _model(case, "--bf16")
        exact, _ = _model(case)
        exact.load_state_dict(model.module.state_dict())
        whole = full_logits(model, tokens)
        group()
        results[case] = _logits(model, tokens, _LATE), whole, full_logits(exact, tokens)
    return results


def _refusals():
    from megatron.core.utils import unwrap_model

    from launch.benchmarks.decode_step import DecodeStep
    from launch.benchmarks.grouped_experts import group_experts

    def of(act):
        with pytest.raises(UltraMemError) as caught:
            act()
        return str(caught.value)

    dense, _ = _model("dense", "--qk-layernorm")
    shared, _ = _model("moe-grouped", "--moe-shared-expert-intermediate-size", "24")
    return of(lambda: DecodeStep(dense, [1], 500)), of(lambda: group_experts(unwrap_model(shared)))


@pytest.fixture(scope="module")
def logits():
    return run_on_ranks(1, _equality, list(_CASES))[0]


@pytest.mark.parametrize("case", _CASES)
def test_steps_give_the_logits_of_a_full_forward(logits, case):
    """Sequences of different lengths beside each other."""
    found, whole = logits[case]
    assert_close(found, whole, LOGITS, case)


def test_in_bfloat16_steps_round_no_worse_than_a_full_forward():
    """Of what chooses, experts or values, a full forward differs from float32 by other choices."""
    cases = ["dense", "moe-grouped", "ultramem"]
    for case, (found, whole, exact) in run_on_ranks(1, _in_bfloat16, cases)[0].items():
        assert_rounds_no_worse(found, whole, exact.double(), torch.finfo(torch.bfloat16).eps, case)


def test_what_the_step_cannot_do_is_refused():
    attention, experts = run_on_ranks(1, _refusals)[0]
    assert attention.startswith("--qk-layernorm (True): the decode benchmark's attention")
    assert "no shared experts" in experts
