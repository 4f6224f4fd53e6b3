"""A Megatron transformer layer with a memory."""
