"""Copies from the host to a GPU while the GPU computes: through pinned memory, on a CUDA stream of their own.

NEVER RUN so far: nobody who wrote this had a GPU. That is why it only allocates, copies and records events; the code
around it is tested without a GPU. Used by `adapter_tables`, if the provider was made with `side_stream`.
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

        The host doesn't wait for the copy. Kernels that are launched on the current stream after this call do.
        """
        self._done.synchronize()  # wait until the last copy has left the buffer
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
        # Without this the allocator could give the memory away while kernels of that stream may still read it.
        block.record_stream(compute)
        return block
