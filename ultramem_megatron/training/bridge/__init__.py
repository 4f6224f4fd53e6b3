"""Memory layers in Megatron-Bridge: a model provider and a recipe."""
