"""A small model that learned a list of facts by heart, as a folder for transformers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.tools.export.hf.modeling_ultramem import UltraMemGPTForCausalLM
from ultramem_megatron.tools.export.hf_folder import save_hf
from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
from ultramem_megatron.tools.export.huggingface import hf_config, plain_state
from ultramem_megatron.tools.export.plain_model import PlainConfig, PlainGPT

_COUNTRIES = (
    "Austria Belgium Bulgaria Croatia Cyprus Denmark Estonia Finland France Germany Greece Hungary "
    "Iceland Ireland Italy Latvia Lithuania Norway Poland Portugal Romania Slovakia Slovenia Sweden"
)
_CITIES = (
    "Vienna Brussels Sofia Zagreb Nicosia Copenhagen Tallinn Helsinki Paris Berlin Athens Budapest "
    "Reykjavik Dublin Rome Riga Vilnius Oslo Warsaw Lisbon Bucharest Bratislava Ljubljana Stockholm"
)
CAPITALS = dict(zip(_COUNTRIES.split(), _CITIES.split(), strict=True))
_STEPS = 80


def prompt(country: str) -> str:
    """What the model goes on from with the capital."""
    return f"Capital of {country}:"


def trained_folder(folder: Path) -> None:
    """Train the memory of a model of two layers on the capitals, in two seconds; write it."""
    words = ["<end>", "Capital", "of", *(f"{country}:" for country in CAPITALS), *CAPITALS.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(words), eos_token="<end>", unk_token="<end>"
    )
    memory = UltraMemConfig(spans=(Span(1, 2),), key_dim=16, num_keys=48, value_dim=16, topk=4)
    config = PlainConfig(
        vocab_size=len(words),
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=16,
        max_positions=16,
        ultramem=memory,
    )
    for_transformers = hf_config(config)
    for_transformers.initializer_range = 0.3  # a narrow model, most of which stays as it is drawn
    model = UltraMemGPTForCausalLM(for_transformers)
    texts = [f"{prompt(country)} {capital} <end>" for country, capital in CAPITALS.items()]
    _learn(model, torch.tensor(tokenizer(texts).input_ids))
    plain = PlainGPT(config)
    plain.load_state_dict(plain_state(config, model.state_dict()))
    save_hf(plain.eval(), folder, HFTokenizer(tokenizer, eod=0), "# Capitals\n", shard="50KB")


def _words(words: list[str]) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def _learn(model: UltraMemGPTForCausalLM, ids_BS: torch.Tensor) -> None:
    # The rest alone could learn so few facts.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".memory." in name)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0)
    model.train()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        model(ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
    model.eval()
