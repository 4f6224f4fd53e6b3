"""One decode step of a Megatron model with a filled KV cache, ready to be repeated and timed."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from launch.benchmarks.decode_attention import Requests, cached_attentions

_LEAST_REPEATS, _MOST_REPEATS = 5, 50
_WARM_UP = 2


class Timing(NamedTuple):
    """Milliseconds: median, 20th and 80th percentile; and how many steps they are of."""

    median: float
    p20: float
    p80: float
    repeats: int


class DecodeStep:
    """Feeds one token of each sequence after those in the cache, which holds random numbers."""

    def __init__(
        self,
        model: Any,
        lengths: Sequence[int],
        vocabulary: int,
        *,
        places: int | None = None,
        one_cache: bool = True,
    ) -> None:
        """lengths: tokens of each sequence that are in the cache. places: of the cache, by default
        those of the longest and the new token.

        one_cache: all layers use the same, so that large batches fit: it is far larger than a
        processor's own caches, so that reading it takes as long. Raises UltraMemError.
        """
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.utils import unwrap_model

        self.model = model
        inner = unwrap_model(model)
        batch, places = len(lengths), places or max(lengths) + 1
        self.requests = Requests(inner, lengths, places)
        self.context = StaticInferenceContext(batch, places)  # a query convolution's past
        self.context.enable_decode_mode()
        self.context.sequence_len_offset = max(1, min(lengths))
        config, device = inner.config, self.requests.positions.device
        shape = (batch, places, config.num_query_groups, config.kv_channels)
        attentions = cached_attentions(inner)
        self.cache_bytes = 0
        """Read in a step: by every layer, if it is one cache."""
        for number, attention in enumerate(attentions):
            if number == 0 or not one_cache:
                keys, values = (
                    torch.empty(shape, dtype=config.params_dtype, device=device).normal_()
                    for _ in range(2)
                )
            attention.attend_to(self.requests, keys, values)
            self.cache_bytes += keys.nbytes + values.nbytes
        self._graph: torch.cuda.CUDAGraph | None = None
        self.tokens = torch.randint(vocabulary, (batch, 1), device=device)

    def __call__(self) -> torch.Tensor:
        """Logits (B, 1, vocabulary)."""
        self.requests.begin()
        logits: torch.Tensor = self.model(
            self.tokens,
            self.requests.positions.unsqueeze(1),
            None,
            inference_context=self.context,
            runtime_gather_output=True,
        )
        return logits

    def capture(self) -> None:
        """Make what `measure` repeats the replay of one CUDA graph: no launches from the host.

        Raises RuntimeError if something in the step waits for the GPU, as Megatron's experts do.
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

    def measure(self, seconds: float) -> Timing:
        """Wall time of a step, after warm-up: of as many steps as take so long, 5 to 50."""
        for _ in range(_WARM_UP):
            self._timed()
        times = [self._timed() for _ in range(_LEAST_REPEATS)]
        while len(times) < _MOST_REPEATS and sum(times) < seconds * 1e3:
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
