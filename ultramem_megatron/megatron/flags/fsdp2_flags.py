"""What memory layers refuse beside --use-torch-fsdp2; the rest is refused by Megatron itself."""

from argparse import Namespace

from ultramem_megatron.errors import UltraMemError

_REASONS = {
    "cuda_graph_impl": "graphs hold the addresses of weights, which come and go with each layer",
    "ultramem_train_rows": "rows are chosen by gradients in the buffers of Megatron's DDP",
}


def refuse_beside_fsdp2(args: Namespace) -> None:
    """Raise UltraMemError for flags that need another wrapper than FSDP2's."""
    if not args.use_torch_fsdp2:
        return
    if "M" in (args.hybrid_layer_pattern or ""):
        raise UltraMemError(
            "--use-torch-fsdp2 with Mamba layers (M in --hybrid-layer-pattern): Megatron cannot "
            "store their weights in shards. Drop the flag, or use another pattern."
        )
    for name, reason in _REASONS.items():
        if getattr(args, name, None) not in (None, False, "none"):
            raise UltraMemError(
                f"--{name.replace('_', '-')} cannot be combined with --use-torch-fsdp2: {reason}. "
                f"Drop one of the two."
            )


def refuse_torch_dcp(args: Namespace) -> None:
    """Raise UltraMemError for checkpoints that Megatron writes and cannot load, memories or not."""
    if args.ckpt_format == "torch_dcp" and (args.save or args.load or args.pretrained_checkpoint):
        raise UltraMemError(
            "--ckpt-format torch_dcp: Megatron saves in it, but fails to load it again (it asks "
            "the optimizer for a state that it does not have, checkpointing.py). Use --ckpt-format "
            "torch_dist, which --use-torch-fsdp2 takes as well."
        )
