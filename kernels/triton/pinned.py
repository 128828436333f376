"""Copies from the host to a GPU that overlap with what it computes: pinned memory, a stream of their own.

NEVER RUN so far: nobody who wrote this had a GPU. It is kept to allocating, copying and events; everything around it
also runs without. Used by `triton_adapters`, only where CUDA graphs are switched on too.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class PinnedCopier:
    """One pinned buffer, as large as the largest copy so far, and one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._host = torch.empty(0, dtype=torch.uint8, pin_memory=True)

    def copy(self, num_bytes: int, fill: Callable[[Tensor], None]) -> Tensor:
        """uint8 [num_bytes] on the device, copied from what `fill` wrote into a host tensor of that size.

        The host does not wait for the copy; whatever is launched on the current stream after this call does.
        """
        self._done.synchronize()  # the buffer's last copy
        if self._host.numel() < num_bytes:
            self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        host = self._host[:num_bytes]
        fill(host)
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            block = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            block.copy_(host, non_blocking=True)
            self._done.record(self._stream)
        compute.wait_event(self._done)
        # The allocator must not give the memory away while kernels of that stream may read it.
        block.record_stream(compute)
        return block
