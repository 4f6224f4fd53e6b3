"""README.md of an exported folder: what the model is and how it is used, as far as known."""

import dataclasses
import math
from argparse import Namespace

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.value_table import names_a_table
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- ultramem
- memory-layers
---

# UltraMem GPT

A decoder-only language model{memories},
trained with NVIDIA Megatron and `ultramem_megatron`, exported by `ultramem export --to hf`.

```python
from transformers import {imports}

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True){tokenizer}
```

`trust_remote_code=True` runs the eleven `*_ultramem.py` files of this folder: read them first. They
need torch and transformers (5.9 or later) only.
"""
_TOKENIZER = "\ntokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)"
_LIMITS = """
## Limits

- At most {positions} positions in a text.{tokenizer}
- The checkpoint does not say what it was trained on, how well it does, or for whom it is meant:
  write it here before you share the folder (`ultramem evaluate` gives perplexities and tasks).
- A model of text repeats what it was trained on, errors and prejudice included.
"""


def model_card(plain: PlainGPT, args: Namespace, iteration: str, tokenizer: HFTokenizer) -> str:
    """The text. iteration: of training, as the checkpoint's folder is called."""
    config = plain.config
    head = _HEAD.format(
        memories=f" with memory layers ({_member(config.ultramem)})" if config.ultramem else "",
        imports="AutoModelForCausalLM" + ("" if tokenizer.missing else ", AutoTokenizer"),
        tokenizer="" if tokenizer.missing else _TOKENIZER,
    )
    missing = "" if tokenizer.missing is None else f"\n- No tokenizer: {tokenizer.missing}."
    limits = _LIMITS.format(positions=config.max_positions, tokenizer=missing)
    training = f"\n## Training\n\nCheckpoint {iteration}, sequences of {args.seq_length} tokens.\n"
    return head + _sizes(plain) + _settings(config) + training + limits


def _member(memory: UltraMemConfig) -> str:
    """Which of the published memories these are, with its paper."""
    if memory.values == "gated":
        name, paper = "Memory+", "2412.09764"
    elif memory.values == "prevalued" and memory.value_projection:
        name, paper = "UltraMemV2", "2508.18756"
    elif memory.values == "prevalued":
        name, paper = "PEER", "2407.04153"
    else:
        name, paper = "UltraMem", "2411.12364"
    return f"[{name}](https://arxiv.org/abs/{paper})"


def _sizes(plain: PlainGPT) -> str:
    config = plain.config
    counts = dict.fromkeys(("values", "experts", "embeddings", "small", "dense"), 0)
    for name, parameter in plain.named_parameters():
        counts[_kind(name, parameter.dim())] += parameter.numel()
    used = counts["dense"]
    if config.num_experts:
        used += counts["experts"] * config.expert_topk // config.num_experts
    memory = config.ultramem
    if memory is not None:
        used += len(memory.spans) * memory.picks * sum(memory.row_widths)
    rows = {
        "parameters": sum(counts.values()),
        "of them in value tables": counts["values"],
        "of them in experts": counts["experts"],
        "of them in embeddings and output": counts["embeddings"],
        "matrix elements that one token uses": used,
        "FLOPs per token, forward": 2 * used,
    }
    lines = "".join(f"| {name} | {count:,} |\n" for name, count in rows.items())
    note = "FLOPs without attention scores and embeddings, a multiply and an add counting as two."
    return f"\n## Sizes\n\n| | |\n|---|---|\n{lines}\n{note}\n"


def _kind(name: str, dimensions: int) -> str:
    if names_a_table(name):
        return "values"
    if ".mlp.experts." in name:
        return "experts"
    if name.startswith(("embedding.", "position_embedding.", "output.")):
        return "embeddings"
    return "small" if dimensions < 2 or ".router." in name else "dense"


def _settings(config: PlainConfig) -> str:
    fields = dataclasses.asdict(config)
    memory = fields.pop("ultramem")
    if memory is not None and config.ultramem is not None:
        spans = "/".join(map(str, config.ultramem.spans))
        fields |= {f"memory: {name}": value for name, value in {**memory, "spans": spans}.items()}
    unused: tuple[str, ...] = () if config.num_experts else ("expert", "router")
    if not config.mamba_num_heads:
        unused += ("mamba",)
    shown = {
        name: value
        for name, value in fields.items()
        if value is not None and not name.startswith(unused)
    }
    lines = "".join(f"| {name} | {_text(value)} |\n" for name, value in shown.items())
    return f"\n## Design\n\n| | |\n|---|---|\n{lines}"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
