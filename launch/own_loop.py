"""A training loop of one's own on megatron.core, with memory layers: an example to copy from.

    torchrun --nproc-per-node 2 -m launch.own_loop --table-ranks 2 --steps 20 --save DIR

It uses nothing of megatron.training, so it runs on megatron-core 0.17, 0.18 and 0.19 alike: groups,
a GPT whose layer spec went through `with_memory`, Megatron's DDP, optimizer, pipeline schedule and
distributed checkpoints. The five places that memories need are marked.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import parse_spans

VOCABULARY, LENGTH, LAYERS, HIDDEN = 64, 16, 4, 32
TRAINING_STEPS, LEARNING_RATE = 1000, 1e-3
MICRO_BATCH, GLOBAL_BATCH = 2, 8
ULTRAMEM = UltraMemConfig(
    spans=parse_spans("1:2/3:4", LAYERS), num_keys=12, key_dim=16, value_dim=16, topk=6
)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train on random tokens, each sequence repeated; returns the losses, the same on all ranks."""
    options = _parse(argv)
    open_process()  # memories 1: upstream's defects mended, and a CPU in the place of CUDA
    _initialise(options)
    model, optimizer = _build(options)
    first = _load(options, model, optimizer) if options.load else 0
    scheduler = _scheduler(optimizer)
    scheduler.step(first)
    losses = []
    for step in range(first, options.steps):
        losses.append(_step(model, optimizer, step))
        scheduler.step(1)
    if options.save:
        _save(options, model, optimizer)
    if dist.get_rank() == 0:
        print(" ".join(f"{loss:.6f}" for loss in losses), flush=True)
    return losses


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.own_loop", description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tensor-ranks", type=int, default=1)
    parser.add_argument("--table-ranks", type=int, default=1, help="ranks that share a table")
    parser.add_argument("--partition", choices=("number", "dimension"), default="dimension")
    parser.add_argument("--save", type=Path, help="folder for a checkpoint of the last step")
    parser.add_argument("--load", type=Path, help="folder to go on from")
    return parser.parse_args(argv)


def _initialise(options: argparse.Namespace) -> None:
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tensor_ranks,
        expert_model_parallel_size=options.table_ranks,  # memories 2: the ranks of a table
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def _build(options: argparse.Namespace) -> tuple[list[Any], Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    from ultramem_megatron.megatron.layer.specs import with_memory
    from ultramem_megatron.megatron.optimizer.auxiliary_loss import finalize_with_auxiliary_loss
    from ultramem_megatron.megatron.optimizer.value_learning_rate import value_overrides

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=options.tensor_ranks,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        # Layers with and without memory differ: names in checkpoints say which layer it is.
        hetereogenous_dist_checkpoint=True,
    )
    config.finalize_model_grads_func = finalize_with_auxiliary_loss  # memories 3
    spec = with_memory(  # memories 4
        get_gpt_layer_local_spec(), ULTRAMEM, config, partition=options.partition
    )
    gpt = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = [DistributedDataParallel(config, ddp, gpt.to(_device()))]
    adam = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE, params_dtype=torch.float32, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(adam, model, config_overrides=value_overrides(ULTRAMEM))
    return model, optimizer


def _scheduler(optimizer: Any) -> Any:
    """A constant rate; the tables' begins at a multiple of it. Its unit is optimizer steps."""
    from ultramem_megatron.megatron.optimizer.value_learning_rate import ValueLearningRateScheduler

    return ValueLearningRateScheduler(  # memories 5: Megatron's own ignores the tables' multiple
        optimizer,
        init_lr=0.0,
        max_lr=LEARNING_RATE,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=TRAINING_STEPS,
        lr_decay_style="constant",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=TRAINING_STEPS,
        wd_incr_style="constant",
        value_lr_decay=ULTRAMEM.value_lr_decay,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(step: int) -> Iterator[Tensor]:
    """This data-parallel rank's micro-batches of a global batch, int64 (B, LENGTH + 1)."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    generator = torch.Generator().manual_seed(step % 4)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
    yield from tokens.to(_device())[rank::ranks].split(MICRO_BATCH)


def _forward(batches: Iterator[Tensor], model: Any) -> Any:
    tokens = next(batches)
    positions = torch.arange(LENGTH, device=tokens.device).expand(len(tokens), -1)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)
    losses = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def _step(model: list[Any], optimizer: Any, step: int) -> float:
    """One optimizer step; the loss of the global batch."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=_batches(step),
        model=model,
        num_microbatches=len(list(_batches(step))),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    optimizer.step()
    loss = torch.stack([report["loss"] for report in reports]).mean()
    dist.all_reduce(loss, dist.ReduceOp.AVG, group=parallel_state.get_data_parallel_group())
    return loss.item()


def _state(model: list[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    parts = {"model": model[0].module.sharded_state_dict(metadata=_METADATA)}
    return {
        **parts,
        "optimizer": optimizer.sharded_state_dict(parts["model"], is_loading, metadata=_METADATA),
    }


_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _save(options: argparse.Namespace, model: list[Any], optimizer: Any) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        options.save.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(
        {**_state(model, optimizer, is_loading=False), "step": options.steps}, str(options.save)
    )


def _load(options: argparse.Namespace, model: list[Any], optimizer: Any) -> int:
    """The step to go on with."""
    from megatron.core import dist_checkpointing

    wanted = {**_state(model, optimizer, is_loading=True), "step": 0}
    loaded = dist_checkpointing.load(wanted, str(options.load))
    model[0].module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded["step"])


if __name__ == "__main__":
    main()
