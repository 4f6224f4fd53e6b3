"""Decoding with a KV cache gives what a forward pass over the whole text gives."""

import argparse
import os
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.closeness import assert_close
from tests.decoding import LOGITS, NumberTokenizer
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt

_FLAGS = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 4,
    "ckpt_format": "torch_dist",
    "save_interval": 2,
    "train_iters": 2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = tiny_gpt(
        **_FLAGS, save=folder, tensor_model_parallel_size=2, use_distributed_optimizer=True
    )
    run_pretrain(2, flags)
    return folder


@torch.no_grad()
def _decode(folder):
    """Logits of 12 positions: all at once, and 5 at first, then one by one from the cache."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    from ultramem_megatron.inference.loading import load_for_inference

    model = load_for_inference(str(folder)).model
    tokens = torch.randint(500, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, -1)

    def mask(length):
        return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    whole = model(tokens, positions, mask(12))
    context, cached = StaticInferenceContext(2, 12), []
    with InferenceMode.active():
        for start, end in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
            logits = model(
                tokens[:, start:end],
                positions[:, start:end],
                mask(end) if start == 0 else None,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.sequence_len_offset = end
            context.enable_decode_mode()
            cached.append(logits[:, -1])
    return whole[:, 4:], torch.stack(cached, dim=1)


def test_cached_decoding_equals_the_full_forward(checkpoint):
    whole, cached = run_on_ranks(1, _decode, checkpoint)[0]
    assert whole.norm() > 0
    assert_close(cached, whole, LOGITS)


def _loaded_values(folder):
    from ultramem_megatron.inference.loading import load_for_inference

    loaded = load_for_inference(str(folder))
    return {name: p.detach() for name, p in loaded.model.named_parameters()}, loaded.args


def test_a_tensor_parallel_checkpoint_loads_whole(checkpoint):
    parameters, args = run_on_ranks(1, _loaded_values, checkpoint)[0]
    assert parameters["decoder.layers.0.mlp.linear_fc1.weight"].shape == (128, 32)
    assert parameters["decoder.layers.2.memory.values.weight"].shape == (144, 16)
    assert args.tensor_model_parallel_size == 1


def _generate(*argv):
    from ultramem_megatron.inference.generate import main

    main(argv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--load", "nowhere"], "--load nowhere: no checkpoint there"),
        (["--ckpt-step", "7"], "iter_0000007 is not there; found: iter_0000002"),
        (["--tokens", "0"], "--tokens is 0; it must be a whole number >= 1"),
        (["--temperature", "-1"], r"--temperature is -1.0; it must be a number >= 0"),
        (["--top-p", "0"], r"--top-p is 0.0; it must be a number > 0 and <= 1"),
        (["--tokens", "30"], "exceeds the model's 32 positions"),
        (["--prompt", ""], "--prompt '' has no tokens"),
        (["--prompt", "hello"], "--prompt 'hello' cannot be read with NullTokenizer"),
        (["--prompt", "1 9999"], "'1 9999' has the id 9999; .* from 0 to 511"),
        (["--top-k", "5000"], "--top-k is 5000; the model's vocabulary has 512 ids"),
        (["--temperature", "inf"], r"--temperature is inf; it must be a number >= 0"),
        (["--seed", "-1"], "--seed is -1; it must be a whole number from 0"),
        ([], "trained with NullTokenizer, as mock data are"),
    ],
)
def test_wrong_requests_are_refused(changes, message, checkpoint):
    argv = ["--load", str(checkpoint), "--prompt", "1 2 3", "--tokens", "5", *changes]
    with pytest.raises(RanksFailed, match=message):
        run_on_ranks(1, _generate, *argv)


def _sampled(folder, batching, seeds):
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.sampling import generate

    loaded = load_for_inference(str(folder))._replace(tokenizer=NumberTokenizer())
    settings = {"tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batching": batching}
    return [
        generate(loaded, ["1 2 3"], argparse.Namespace(**settings, seed=seed)) for seed in seeds
    ]


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_the_seed_decides_what_is_sampled(batching, checkpoint):
    ((first, again, other),) = run_on_ranks(1, _sampled, checkpoint, batching, [1, 1, 2])
    assert first == again
    assert first != other


def _print_texts(folder):
    """Greedy texts of static batching by PyTorch's kernels, of dynamic batching by Triton's."""
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.sampling import generate

    loaded = load_for_inference(str(folder))._replace(tokenizer=NumberTokenizer())
    settings = {"tokens": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1}
    for kernels, batching in (("torch", "static"), ("triton", "dynamic")):
        os.environ["ULTRAMEM_KERNELS"] = kernels
        made = generate(loaded, ["1 2 3"], argparse.Namespace(**settings, batching=batching))
        print("text:", *made[0].split())


@pytest.mark.long
def test_dynamic_batching_by_our_kernels(tmp_path):
    """As a GPU without flash-attn would: attention with a window, memories, all in Triton."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    run_pretrain(1, tiny_gpt(**_FLAGS, save=tmp_path, window_size="2,0"))
    program = f"from tests.inference.test_generate import _print_texts as f; f({str(tmp_path)!r})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    texts = [line for line in run.stdout.splitlines() if line.startswith("text:")]
    assert len(texts) == 2, run.stderr[-3000:]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) == 1 + 6
