"""Whole layers: ours, the plain baseline, published packages, a dense MLP and Megatron's MoE."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.lookups import table_gradient
from launch.benchmarks.kernels.plain_layer import plain_layer
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.kernels.native.large_pages import ask_for_large_pages
from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.memory.layer import UltraMemLayer

_LAYERS = 12  # of the imagined model: it sets initial variances only
_COMPARED_ROWS = 4096
_ULTRA_MEM_CORES = 2  # what the package calls heads, by default
MOE_EXPERTS = 32
WITHOUT_MAIN_GRAD = "ours, dense gradient of its own"


def candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """Ours and the baseline; the reference first, the last without Megatron's `main_grad`."""
    layer = _layer(shape, device)
    x = _input(shape, device)
    table = layer.values.weight
    alone = table.detach().requires_grad_()
    leaves = [x, *layer.parameters(), alone]

    def candidate(
        name: str, forward: Callable[[], Tensor], kernels: str = "", leaf: Tensor = table
    ) -> Candidate:
        def gradients() -> dict[str, Tensor]:
            gradient = table_gradient(leaf, table.shape)
            touched = gradient[: 2**16].abs().sum(1).nonzero().flatten()[:_COMPARED_ROWS]
            assert x.grad is not None
            small = {n: p.grad for n, p in layer.named_parameters() if p is not table}
            return {
                "x": x.grad,
                "table": gradient[touched].sum(0),
                **{n: grad for n, grad in small.items() if grad is not None},
            }

        return Candidate(
            name=name, forward=forward, leaves=leaves, gradients=gradients, kernels=kernels
        )

    def outside_megatron() -> Tensor:
        out: Tensor = functional_call(layer, {"values.weight": alone}, (x,))
        return out

    names = implementations(device)
    found = [candidate(name, lambda: layer(x), name) for name in names]
    found.append(candidate("plain", lambda: plain_layer(layer, x)))
    found.append(candidate(WITHOUT_MAIN_GRAD, outside_megatron, names[-1], alone))
    return found


def others(shape: Shape, device: torch.device) -> list[Candidate]:
    """Layers of equal activated FLOPs, and packages that are installed; they compute other things.

    Says which are left out, and why.
    """
    x = _input(shape, device)
    builders: dict[str, Callable[[Shape], nn.Module]] = {
        "dense MLP, equal FLOPs": _mlp,
        f"Megatron MoE, top-2 of {MOE_EXPERTS}, equal FLOPs": _moe,
        "ultra-mem": _ultra_mem,
        "product-key-memory": _product_key_memory,
    }
    found = []
    for name, build in builders.items():
        try:
            module = build(shape).to(device, shape.dtype)
        except ImportError as error:
            print(f"  {name} left out: {error}")
            continue
        found.append(_other(name, module, x))
    return found


def widths_of_others(shape: Shape) -> list[int]:
    """Numbers in a row of the tables that `others` may build, each with as many rows as ours."""
    ultra_mem, product_key_memory = _ULTRA_MEM_CORES * shape.value_dim, shape.hidden
    return [ultra_mem, product_key_memory]


def _other(name: str, module: nn.Module, x: Tensor) -> Candidate:
    def forward() -> Tensor:
        out: Any = module(x.unsqueeze(1))  # (S, B, D)
        return out[0] if isinstance(out, tuple) else out

    return Candidate(name=name, forward=forward, leaves=[x, *module.parameters()])


def _layer(shape: Shape, device: torch.device) -> UltraMemLayer:
    """Ours, its table with the `main_grad` that Megatron's wrapper gives it."""
    with torch.device(device), _default_dtype(shape.dtype):
        layer = UltraMemLayer(shape.config(), hidden_size=shape.hidden, num_layers=_LAYERS)
    table = layer.values.weight
    table.main_grad = torch.empty(table.shape, device=device)
    ask_for_large_pages(table.main_grad)
    table.main_grad.zero_()
    return layer


def _input(shape: Shape, device: torch.device) -> Tensor:
    x = torch.randn(shape.tokens, shape.hidden, device=device, dtype=shape.dtype)
    return x.requires_grad_()


def _mlp(shape: Shape) -> nn.Module:
    inner = shape.layer_macs() // (2 * shape.hidden)
    return nn.Sequential(
        nn.Linear(shape.hidden, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, shape.hidden, bias=False),
    )


def _moe(shape: Shape) -> nn.Module:
    """Two experts of half the dense width each are active."""
    _initialize_megatron()
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        num_moe_experts=MOE_EXPERTS,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=shape.layer_macs() // (4 * shape.hidden),
        add_bias_linear=False,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=not on_gpu,
        params_dtype=shape.dtype,
        bf16=shape.dtype == torch.bfloat16,
    )
    build: Any = get_moe_module_spec(use_te=False, num_experts=MOE_EXPERTS)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer: nn.Module = build(config=config, pg_collection=groups)
    return layer


def _initialize_megatron() -> None:
    """Process groups of this one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        return
    open_process()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _ultra_mem(shape: Shape) -> nn.Module:
    """Its two heads are two cores, each with all picks; one table of value_dim per core."""
    package: Any = importlib.import_module("ultra_mem.ultra_mem")
    layer: nn.Module = package.UltraMem(
        shape.hidden,
        dim_values=shape.value_dim,
        num_memories=shape.values,
        topk=shape.topk,
        dim_queries_keys=shape.hidden // 4,
        value_expansion=shape.expansion,
        pre_query_causal_conv=False,
    )
    return layer


def _product_key_memory(shape: Shape) -> nn.Module:
    """Values are as wide as the hidden size."""
    package: Any = importlib.import_module("product_key_memory")
    layer: nn.Module = package.PKM(
        shape.hidden,
        heads=shape.heads,
        num_keys=shape.num_keys,
        topk=shape.topk,
        dim_head=shape.hidden // 4,
    )
    return layer


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
