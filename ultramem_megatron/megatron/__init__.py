"""How memories stand in Megatron: flags, layers, pipeline, optimizer, checkpoints."""
