"""Models built from flags as training builds them, rank by rank, on the meta device.

Tensors on the meta device have shapes and no storage, and collectives of a fake process group move
nothing: any rank of any layout can be built in one process, whatever its size.
"""

import contextlib
import dataclasses
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags import machine_flags
from ultramem_megatron.megatron.flags.layout_flags import lay_on_one_rank
from ultramem_megatron.megatron.flags.parse import parse_words
from ultramem_megatron.megatron.flags.table_flags import settings_from_args
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.patches import registry
from ultramem_megatron.presets.flags import flags as preset_flags

# Used where the flags do not say otherwise. 50277 is the GPT-NeoX tokenizer, which the paper uses.
_DEFAULTS = {
    "--micro-batch-size": "1",
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": "50277",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Flags, parsed and checked for a number of ranks, and what they make."""

    args: Namespace
    transformer: Any
    """Megatron's TransformerConfig."""
    ultramem: UltraMemConfig | None
    tables: TableSettings

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return int(self.args.pipeline_model_parallel_size)

    @property
    def tables_on_host(self) -> bool:
        """Whether value tables are trained in host memory."""
        return self.ultramem is not None and self.args.ultramem_table_memory == "host"


def command_line(preset: str | None, given: Sequence[str]) -> list[str]:
    """The preset's flags, the given ones, and defaults; of a flag given twice the last counts."""
    words = preset_flags(preset, model=True, training=True) if preset else []
    words = [*words, *given]
    missing = {flag: value for flag, value in _DEFAULTS.items() if flag not in words}
    return [*words, *(word for pair in missing.items() for word in pair)]


def parse(words: Sequence[str], world_size: int | None = None) -> Run:
    """Check flags as training does. world_size: ranks; None takes the flags as one rank's.

    Raises UltraMemError for what we or Megatron refuse.
    """
    from megatron.training import arguments

    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.megatron.flags.refusals import refuse_unsupported_flags
    from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses
    from ultramem_megatron.megatron.hybrid.refusals import refuse_pattern
    from ultramem_megatron.megatron.model_from_flags import transformer_from_args
    from ultramem_megatron.megatron.pipeline.layout import check_pipeline, check_shared_tables

    args = _parse_only(words)
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        raise UltraMemError(
            "--use-torch-fsdp2, --use-megatron-fsdp: a plan counts weights that are whole on every "
            "data-parallel rank. Drop the flag; --use-distributed-optimizer comes nearest."
        )
    _without_transformer_engine(args)
    args.rank, args.world_size = 0, world_size or 1
    if world_size is None:
        memory = args.ultramem_table_memory  # other flags need it
        lay_on_one_rank(args)
        args.ultramem_table_memory = memory
    with megatron_refuses():
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ):
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # a launcher's business, not a plan's
            arguments.validate_args(args)
        transformer = transformer_from_args(args)
    transformer.init_model_with_meta_device = True
    transformer.perform_initialization = False
    if args.num_experts:
        # Experts with equal numbers of tokens: shapes that do not depend on data.
        transformer.moe_token_dispatcher_type = "alltoall"
        transformer.moe_expert_capacity_factor = 1.0
        transformer.moe_pad_expert_input_to_capacity = True
    ultramem = config_from_args(args)
    refuse_unsupported_flags(args, ultramem)
    refuse_pattern(args, ultramem)
    if ultramem is None:
        return Run(args, transformer, None, TableSettings(args.expert_model_parallel_size))
    check_pipeline(ultramem.spans, transformer)
    check_shared_tables(ultramem, transformer)
    return Run(args, transformer, ultramem, settings_from_args(args, ultramem))


def smallest_world(words: Sequence[str]) -> int:
    """Ranks that the flags need at least: what their groups divide without remainder."""
    args = _parse_only(words)
    return int(
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * math.lcm(args.expert_model_parallel_size, args.context_parallel_size)
    )


def _parse_only(words: Sequence[str]) -> Namespace:
    """Unchecked. Flags of a bare machine come last, so that a plan is the same on every one."""
    registry.apply_all()  # before anything of Megatron is built
    bare = machine_flags.needed_flags(bare=True).items()
    return parse_words([*words, *(word for flag, values in bare for word in (flag, *values))])


def _without_transformer_engine(args: Namespace) -> None:
    # These need Transformer Engine, and change neither sizes nor what is kept or sent.
    args.moe_grouped_gemm = args.tp_comm_overlap = False
    args.ultramem_overlap = False  # sends the same at other times
    args.fp8 = args.fp4 = None  # planned as the bf16 they stand beside
    args.fp8_param_gather = args.fp4_param_gather = False


@contextlib.contextmanager
def built_stage(run: Run, stage: int = 0) -> Iterator[list[Any]]:
    """Model chunks of the first rank of a pipeline stage, on the meta device.

    Ranks of a stage hold parts of equal size (number-wise tables: to within a row). Raises
    UltraMemError for what Megatron refuses only when it builds.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses

    world_size = run.args.world_size
    rank = stage * (world_size // run.stages)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            run.args.tensor_model_parallel_size,
            run.stages,
            run.args.virtual_pipeline_model_parallel_size,
            context_parallel_size=run.args.context_parallel_size,
            expert_model_parallel_size=run.tables.size,
            expert_tensor_parallel_size=1 if run.ultramem else run.args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(run.args.seed)
        with (
            mock.patch("torch.cuda.current_device", return_value="meta"),
            mock.patch.dict(os.environ),  # Megatron leaves its choice of attention there
        ):
            with megatron_refuses():
                chunks = _chunks(run)
            yield chunks
    finally:
        destroy_moe_metrics_tracker()  # it remembers the number of layers
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _chunks(run: Run) -> list[Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from ultramem_megatron.megatron.model import UltraMemGPTModelConfig
    from ultramem_megatron.megatron.model_from_flags import fill
    from ultramem_megatron.megatron.train_only import freeze_untrained

    config = fill(run.args, run.transformer, run.ultramem, run.tables)
    if run.ultramem is None and isinstance(config, UltraMemGPTModelConfig):
        config.transformer_layer_spec = _plain_spec
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = run.args.virtual_pipeline_model_parallel_size
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        chunks = [
            builder.build_model(groups, vp_stage=vp_stage).to(run.transformer.params_dtype).train()
            for vp_stage in ([None] if virtual is None else range(virtual))
        ]
    freeze_untrained(chunks, config)
    return chunks


def _plain_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own spec; its plain torch norms, which refuse sequence parallelism, are ours."""
    from megatron.training.models.gpt import default_layer_spec

    from ultramem_megatron.megatron.layer.specs import with_memory

    nothing = UltraMemConfig(spans=(), num_keys=1, key_dim=1, value_dim=1)
    return with_memory(default_layer_spec(config, vp_stage), nothing, config.transformer, vp_stage)
