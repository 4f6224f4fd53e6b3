"""An UltraMem GPT for transformers: a decoder, its logits, loss and `generate`.

Written for `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, transformers
5.9 and later. B batch, S sequence, D hidden, V vocabulary, M the mask's length.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ultramem import UltraMemGPTConfig
from .hot_rows_ultramem import HotRows
from .layers_ultramem import UltraMemAttention, UltraMemDecoderLayer, UltraMemRouter, norm
from .mamba_ultramem import UltraMemMamba
from .mapped_ultramem import leave_on_disk, pages_in_memory
from .memory_ultramem import Pending, QueryConvolution, QueryMean, Shuffle, UltraMemMemory
from .quantized_ultramem import QuantizedTable
from .retrieval_ultramem import Cores, Keys
from .served_ultramem import serve_tables
from .values_ultramem import UltraMemTables, ValueTable


class UltraMemPreTrainedModel(PreTrainedModel):
    """What both models below share: names and what transformers may do with them."""

    config_class = UltraMemGPTConfig
    config: UltraMemGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UltraMemDecoderLayer", "UltraMemTables"]
    # Tables stay where they are: what is asked of them travels.
    _skip_keys_device_placement = ["past_key_values", "tables"]
    _keep_in_fp32_modules_strict = ["common", "cores.u", "cores.t", "values.scales"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UltraMemDecoderLayer, "attentions": UltraMemAttention}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As PreTrainedModel's; table_memory: see the configuration. Raises ValueError."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.check()  # arguments are set after it was made
        if model.config.table_memory == "disk":
            for name, tensor in model.table_tensors().items():
                leave_on_disk(name, tensor)
        return loaded

    def table_tensors(self) -> dict[str, Tensor]:
        """What the value tables consist of: their weights, or codes and scales."""
        return {
            f"{name}.{part}": tensor
            for name, module in self.named_modules()
            if isinstance(module, (ValueTable, QuantizedTable))
            for part, tensor in module.state_dict(keep_vars=True).items()
        }

    def table_pages(self) -> dict[str, tuple[int, int]]:
        """Pages of each that are in memory, and all of them, where files are mapped (Linux)."""
        return {name: pages_in_memory(tensor) for name, tensor in self.table_tensors().items()}

    def table_caches(self) -> dict[str, HotRows]:
        """The cache of each table on disk, where `table_cache_rows` is given: `reads`, `hits`."""
        return {
            name: module.hot
            for name, module in self.named_modules()
            if isinstance(module, (ValueTable, QuantizedTable)) and module.hot is not None
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of a model that is not loaded; to train one, start in Megatron."""
        super()._init_weights(module)
        if isinstance(module, QueryConvolution):
            init.zeros_(module.weight)
            init.ones_(module.weight[:, -1:])
        elif isinstance(module, Keys):
            init.normal_(module.weight, std=module.key_dim**-0.5)
        elif isinstance(module, (ValueTable, UltraMemRouter)):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, UltraMemMamba):
            module.initialize(init)
        elif isinstance(module, Cores):
            init.normal_(module.weight)
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if not loaded and not module.weight.is_meta:
                module.update()
        elif isinstance(module, QueryMean):
            init.zeros_(module.mean)
            init.zeros_(module.updates)
        elif isinstance(module, Shuffle):
            init.copy_(module.tables, torch.randint_like(module.tables, module.side))


class UltraMemGPTModel(UltraMemPreTrainedModel):
    """The decoder without its output layer."""

    # So that a decoder saved alone has these files, too.
    _auto_class = "AutoModel"  # type: ignore[assignment]  # None is its value, not its type

    def __init__(self, config: UltraMemGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            UltraMemDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = norm(config, config.hidden_size)
        self.tables = nn.ModuleList(
            UltraMemTables(config.memory or {}, config.value_quantization)
            for _ in range(config.shared_tables)
        )
        for module in self.modules():
            if isinstance(module, (ValueTable, QuantizedTable)) and config.table_cache_rows:
                module.hot = HotRows(config.table_cache_rows)
        if config._attn_implementation == "vllm":
            serve_tables(self, config.table_memory)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, S) or inputs_embeds (B, S, D); attention_mask (B, M), 0 for padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give one of input_ids and inputs_embeds.")
        self._refuse_foreign_caches(past_key_values, kwargs)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        padding = (
            attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        )
        self._refuse_packed_texts(position_ids, padding)
        if position_ids is None:
            position_ids = _positions(hidden, padding, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(position_ids)
        rotation = _rotation(self.config, position_ids, hidden)
        real = None if padding is None else padding[:, -hidden.shape[1] :].bool()
        pending: Pending | None = None
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer: assistant_early_exit
            hidden, pending = layer(
                hidden,
                pending,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=rotation,
                real=real,
                tables=self.tables,
                **kwargs,
            )
        return BaseModelOutputWithPast(self.norm(hidden), past_key_values)

    def _refuse_foreign_caches(self, cache: Cache | None, kwargs: dict[str, Any]) -> None:
        """Raise ValueError where nobody keeps what convolutions and Mamba see of the past."""
        taps = (self.config.memory or {}).get("query_conv_kernel", 0)
        engines = ("vllm", "sglang")
        if self.config._attn_implementation in engines or "read_index" in kwargs:
            foreign = "in pages (vLLM, SGLang, generate_batch)"
        elif cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            foreign = "of a fixed size (static)"
        else:
            return
        if self._has_mamba:
            raise ValueError(
                f"layer_pattern is {self.config.layer_pattern}: caches {foreign} keep no state of "
                f"Mamba layers. Use `generate` with its own cache, which keeps it."
            )
        if taps > 1:
            raise ValueError(
                f"memory.query_conv_kernel is {taps}: caches {foreign} keep no inputs of the "
                f"convolution. Use `generate` with its own cache, which keeps them."
            )

    @property
    def _has_mamba(self) -> bool:
        return "M" in (self.config.layer_pattern or "")

    def _refuse_packed_texts(self, position_ids: Tensor | None, padding: Tensor | None) -> None:
        """Raise ValueError for texts one behind another in a row: Mamba would read on."""
        if not self._has_mamba or position_ids is None or padding is not None:
            return
        if (position_ids[:, 1:] < position_ids[:, :-1]).any():
            raise ValueError(
                f"layer_pattern is {self.config.layer_pattern}: Mamba layers know no ends of "
                f"texts within a row. Give each text a row of its own, with an attention_mask."
            )


class UltraMemGPTForCausalLM(UltraMemPreTrainedModel, GenerationMixin):
    """The decoder and its output layer: logits, a loss, and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UltraMemGPTConfig) -> None:
        super().__init__(config)
        self.model = UltraMemGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, V) and, with labels (B, S), their loss; in training with the penalty."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
            if self.training:
                loss = loss + self._penalty(labels, kwargs.get("num_items_in_batch")).to(loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _penalty(self, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """What memories add to the loss; once for all batches that have so many `items` together.

        items: None where the loss is the mean over this batch alone.
        """
        memories = (module for module in self.modules() if isinstance(module, UltraMemMemory))
        found = (memory.penalty() for memory in memories)
        penalty = sum(
            (p for p in found if p is not None), start=labels.new_zeros((), dtype=torch.float32)
        )
        return penalty if items is None else penalty * (labels[:, 1:] != -100).sum() / items


def _positions(hidden: Tensor, padding: Tensor | None, cache: Cache | None) -> Tensor:
    """Places (B or 1, S) of tokens in their texts; padding before a text has none."""
    length = hidden.shape[1]
    if padding is not None:
        return (padding.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(length, device=hidden.device) + past).unsqueeze(0)


def _rotation(
    config: UltraMemGPTConfig, position_ids: Tensor, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines (B or 1, 1, S, R) of the rotated first R channels of every head."""
    if config.position_embedding != "rope":
        return None
    rope = config.rope_parameters or {}
    width = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    angles = position_ids[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
