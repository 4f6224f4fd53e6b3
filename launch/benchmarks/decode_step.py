"""One decode step of a Megatron model with a filled KV cache, ready to be repeated and timed."""

import statistics
import time
from typing import Any, NamedTuple

import torch

_SECONDS_PER_POINT = 2.0
_LEAST_REPEATS, _MOST_REPEATS = 5, 50
_WARM_UP = 2


class Timing(NamedTuple):
    """Milliseconds: median, 20th and 80th percentile; and how many steps they are of."""

    median: float
    p20: float
    p80: float
    repeats: int


class DecodeStep:
    """Feeds one token of each of `batch` sequences, after `cache_length` tokens in the cache.

    The cache holds random numbers, and all layers use the same one, so that large batches fit: it
    is far larger than a processor's own caches, so that reading it takes as long.
    """

    def __init__(self, model: Any, batch: int, cache_length: int, vocabulary: int) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
            GPTInferenceWrapper,
        )

        self.context = StaticInferenceContext(batch, cache_length + 1)
        self.wrapper = GPTInferenceWrapper(model, self.context)
        self.wrapper.prep_model_for_inference()
        config, device = self.wrapper.config, next(model.parameters()).device
        shape = (cache_length + 1, batch, config.num_query_groups, config.kv_channels)
        keys, values = (
            torch.empty(shape, dtype=config.params_dtype, device=device).normal_() for _ in range(2)
        )
        for layer in range(1, config.num_layers + 1):
            self.context.key_value_memory_dict[layer] = (keys, values)
        self.context.enable_decode_mode()
        self.cache_length = cache_length
        self.cache_bytes = config.num_layers * (keys.nbytes + values.nbytes)
        """Read in a step: every layer reads the one cache."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self.inputs = {
            "tokens": torch.randint(vocabulary, (batch, 1), device=device),
            "position_ids": torch.full((batch, 1), cache_length, device=device),
            "attention_mask": None,
        }

    def __call__(self) -> torch.Tensor:
        """Logits (B, 1, vocabulary)."""
        self.context.sequence_len_offset = self.cache_length
        logits: torch.Tensor = self.wrapper.run_one_forward_step(self.inputs)
        return logits

    def capture(self) -> None:
        """Make what `measure` repeats the replay of one CUDA graph: no launches from the host.

        Raises RuntimeError if something in the step waits for the GPU, as experts do.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        self._graph = graph

    def measure(self) -> Timing:
        """Wall time of a step, after warm-up."""
        for _ in range(_WARM_UP):
            self._timed()
        times = [self._timed() for _ in range(_LEAST_REPEATS)]
        while len(times) < _MOST_REPEATS and sum(times) < _SECONDS_PER_POINT * 1e3:
            times.append(self._timed())
        p20, _, _, p80 = statistics.quantiles(times, n=5)
        return Timing(statistics.median(times), p20, p80, len(times))

    def _timed(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        if self._graph is None:
            self()
        else:
            self._graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3
