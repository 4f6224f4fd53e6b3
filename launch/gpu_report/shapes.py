"""Shapes that several parts look at: the paper's, and a small one for a CPU."""

import torch

from launch.benchmarks.kernels.shapes import Shape

OF_1600M = Shape(hidden=1600, num_keys=1789, topk=42, value_dim=1024, dtype=torch.bfloat16)
OF_227M = Shape(hidden=384, num_keys=808, topk=80, value_dim=384, dtype=torch.bfloat16)
TINY = Shape(hidden=32, num_keys=40, topk=6, value_dim=16)
