"""Buffers that casting a model to half precision leaves in float32."""

from typing import Any, ClassVar

import torch
from torch import nn


class PreciseBuffers(nn.Module):
    """A module some of whose buffers are never rounded to less than 32 bits."""

    precise: ClassVar[tuple[str, ...]]
    """Their names."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.precise}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = getattr(self, name)
            if torch.finfo(cast.dtype).bits < 32:
                setattr(self, name, buffer.to(cast.device))
        return self
