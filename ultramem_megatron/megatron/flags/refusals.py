"""Flags of Megatron's that are refused before anything is built."""

from argparse import Namespace

from ultramem_megatron.errors import UltraMemError


def refuse_other_tasks(args: Namespace) -> None:
    """Raise for flags that ask for another task than pre-training a GPT.

    Raises:
        UltraMemError: names the flag and what to do.
    """
    foreign = {
        "--sft": args.sft,
        "--fim-data": args.fim_data,
        "--hybrid-layer-pattern": args.hybrid_layer_pattern is not None,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--logits-load-dir": args.logits_load_dir is not None,
    }
    for flag, is_set in foreign.items():
        if is_set:
            raise UltraMemError(
                f"{flag} is not supported by ultramem train (plain GPT pre-training); "
                f"remove the flag."
            )
