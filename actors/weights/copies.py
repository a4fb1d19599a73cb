"""Memory that copies of weights are written to again and again."""

from __future__ import annotations

import torch


class CopyBuffers:
    """A buffer in main memory for each of a model's tensors, overwritten by the next copy of the same tensor.

    Training waits for these copies. Memory that was just allocated is several times slower to write than memory in use, since
    the kernel hands it out page by page; of a tensor on a GPU the buffer is pinned, which doubles the rate of the transfer.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.Tensor, torch.Tensor] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Contiguous copy of `tensor`, which holds until `tensor` is copied again."""
        buffer = self._buffers.get(tensor)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[tensor] = buffer
        return buffer.copy_(tensor.detach())
