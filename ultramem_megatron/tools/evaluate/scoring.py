"""Log-probabilities of given continuations, the measure behind multiple-choice and cloze tasks.

B batch, S sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_megatron.tools.evaluate.perplexity import causal_mask


class Score(NamedTuple):
    """Of a continuation: log-probability in nats, and whether each token was the likeliest."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def continuation_scores(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, batch: int
) -> list[Score]:
    """Scores of (context, continuation) pairs of token ids, in their order.

    The context has one token at least. Of pairs longer than max_length + 1 tokens the beginning is
    left out; a continuation longer than max_length is scored by its end. All ranks call it.
    """
    scores: list[Score] = [Score(0.0, True)] * len(pairs)
    # Long ones first: little filling, and what does not fit into memory shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        for i, score in zip(
            chosen, _score(model, [pairs[i] for i in chosen], max_length), strict=True
        ):
            scores[i] = score
    return scores


def _score(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> list[Score]:
    wholes = [[*context, *continuation][-max_length - 1 :] for context, continuation in pairs]
    longest = max(map(len, wholes)) - 1
    device = next(model.parameters()).device
    # Filled up at the end, where nothing that counts can see it.
    tokens = torch.tensor([[*whole[:-1], *[0] * (longest + 1 - len(whole))] for whole in wholes])
    positions = torch.arange(longest, device=device).expand(len(wholes), -1)
    logits = model(
        tokens.to(device), positions, causal_mask(longest, device), runtime_gather_output=True
    )  # (B, S, V)
    return [
        _score_one(row[: len(whole) - 1], whole, len(continuation))
        for row, whole, (_, continuation) in zip(logits, wholes, pairs, strict=True)
    ]


def _score_one(logits: Tensor, whole: Sequence[int], continuation: int) -> Score:
    """logits: (S, V), of all tokens but the last; the last `continuation` tokens are scored."""
    count = min(continuation, len(logits))
    if count == 0:
        return Score(0.0, True)
    targets = torch.tensor(whole[-count:], device=logits.device)
    last = F.log_softmax(logits[-count:].float(), dim=-1)
    total = last.gather(1, targets.unsqueeze(1)).double().sum()
    return Score(float(total), bool((last.argmax(-1) == targets).all()))
