"""Memories in a HybridModel: attention, MLP, experts and Mamba by a pattern."""
