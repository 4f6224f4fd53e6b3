"""What lets Megatron run without CUDA."""
