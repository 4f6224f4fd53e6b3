"""A fact, as ids after a prompt, and what a model says of it.

S sequence, F tokens of the fact.
"""

from itertools import takewhile
from typing import Any, NamedTuple

import torch

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.export.opened_folder import OpenedFolder


class Fact(NamedTuple):
    """Ids of prompt and fact, as the model reads them one after the other."""

    ids: list[int]
    """(S,)"""
    start: int
    """Where the fact begins, at least 1."""

    @property
    def predicting(self) -> slice:
        """The F positions after which its tokens come."""
        return slice(self.start - 1, len(self.ids) - 1)


class Said(NamedTuple):
    """Of one model about a fact."""

    log_probability: float
    """Of the fact's tokens after the prompt, nats."""
    continuation: str
    """Of the prompt, each time the likeliest token."""


def read_fact(opened: OpenedFolder, prompt: str, fact: str) -> Fact:
    """As ids. Raises UltraMemError where either has none, or both together too many."""
    given = opened.ids(prompt, "--prompt")
    whole = opened.ids(prompt + fact, "--fact")
    # At the seam two pieces of text may be one token: the fact then begins with that.
    pairs = zip(given, whole, strict=False)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if start == 0:
        raise UltraMemError(
            f"--prompt {prompt!r:.80}: no token of its own. Give what stands before the fact."
        )
    if start >= len(whole):
        raise UltraMemError(f"--fact {fact!r:.80}: no tokens in it. Give what follows the prompt.")
    room = opened.model.config.max_position_embeddings
    if len(whole) > room:
        raise UltraMemError(
            f"--prompt and --fact are {len(whole)} tokens; the model has {room} positions. Give "
            f"shorter ones."
        )
    return Fact(whole, start)


@torch.no_grad()
def said(opened: OpenedFolder, fact: Fact, tokens: int) -> Said:
    """What the model makes of a fact; tokens: of the continuation, at most."""
    ids = torch.tensor([fact.ids])
    logits = opened.model(ids).logits[0, fact.predicting].float()
    found = logits.log_softmax(-1).gather(1, ids[0, fact.start :, None]).sum()
    prompt = ids[:, : fact.start]
    room = opened.model.config.max_position_embeddings - fact.start
    model: Any = opened.model  # `generate` is typed for others
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(tokens, room),
        do_sample=False,
    )
    return Said(float(found), opened.text(written[0, fact.start :].tolist()))
