"""One memory layer: torch only, no Megatron, no ranks of its own."""
