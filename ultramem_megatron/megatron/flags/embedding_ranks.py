"""Which ranks of a pipeline hold the word embedding: what `pretrain()` asks of a GPT task."""

from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args


def get_embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Ranks of one pipeline that hold the word embedding: first, last if tied, and those of MTP."""
    args = get_args()
    holders = {pipeline_ranks[0]}
    if len(pipeline_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            holders.add(pipeline_ranks[-1])
        holders.update(get_mtp_ranks(pipeline_ranks, core_transformer_config_from_args(args)))
    return sorted(holders)
