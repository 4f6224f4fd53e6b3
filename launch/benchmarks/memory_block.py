"""A transformer block with one memory, its table cut over all ranks: the smallest thing to overlap.

S sequence, B batch, D hidden.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.memory.spans import Span

_SPAN = Span(2, 5)


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes of the block; the table is cut `partition`-wise ("number" or "dimension")."""

    layers: int = 6
    span: Span = _SPAN
    hidden_size: int = 256
    sequence: int = 512
    batch: int = 1
    num_keys: int = 128
    topk: int = 16
    partition: str = "dimension"


def initialize() -> torch.device:
    """Process groups for one table over all ranks, on GPUs if each rank has one; the device."""
    open_process()
    from megatron.core import parallel_state, tensor_parallel

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=dist.get_world_size(), expert_tensor_parallel_size=1
    )
    device = torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return device


def build(shape: BlockShape, *, overlap: bool) -> nn.Module:
    """The block, the same on every rank and in every call but for `overlap`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

    from ultramem_megatron.megatron.layer.specs import with_memory
    from ultramem_megatron.memory.config import UltraMemConfig

    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=4,
        use_cpu_initialization=not on_gpu,
        hidden_dropout=0,
        attention_dropout=0,
        params_dtype=torch.bfloat16 if on_gpu else torch.float32,
        bf16=on_gpu,
    )
    ultramem = UltraMemConfig(
        spans=(shape.span,),
        num_keys=shape.num_keys,
        topk=shape.topk,
        key_dim=shape.hidden_size // 2,
        value_dim=shape.hidden_size // 2,
        init="official",
    )
    torch.manual_seed(1)
    spec = with_memory(
        get_gpt_layer_local_spec(), ultramem, config, partition=shape.partition, overlap=overlap
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    block: nn.Module = TransformerBlock(config, spec, pg_collection=groups)
    return block.cuda() if on_gpu else block


def inputs(shape: BlockShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's hidden states (S, B, D) and the gradient of the block's output."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = (2, shape.sequence, shape.batch, shape.hidden_size)
    x, grad = torch.randn(size, generator=generator).to(device)
    return (x, grad) if device.type == "cpu" else (x.bfloat16(), grad.bfloat16())


def step(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Forward and backward; the output and every gradient by name."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    length = len(x)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    output: Tensor = block(x, future.view(1, 1, length, length))
    output.backward(grad)
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "input gradient": x.grad, **gradients}
