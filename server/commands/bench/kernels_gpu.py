"""The part of `guanaco bench kernels` that needs an NVIDIA GPU: times beside bitsandbytes and a torch product.

NEVER RUN on a GPU so far. So it does as little as possible: it launches, times with CUDA events, and divides.
"""

import importlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from guanaco.kernels import load_ops, nf4
from guanaco.kernels.analysis.cards import CARDS

_SIDE = 4096  # rows and columns of the matrix
_PRODUCTS = ("nf4_simt", "nf4_dot")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_WARM_UPS = 10
_ROUNDS = 50
_FLUSH_BYTES = 256 << 20  # more than any L2 cache, so that every launch reads its weights from memory


def add_times(entries: list[dict[str, Any]]) -> None:
    """Add microseconds and shares of the roofline to the entries of this GPU's target whose kernel is a product."""
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    ours = [e for e in entries if e["target"] == f"sm_{major}{minor}" and e["kernel"] in _PRODUCTS]
    times = {found["rows"]: found for found in product_times(sorted({e["rows"] for e in ours}))}
    for e in ours:
        e.update(times[e["rows"]])


def product_times(rows: Sequence[int] = _ROWS) -> list[dict[str, Any]]:
    """For each number of rows: the microseconds of a product with one square matrix by our kernel, by bitsandbytes and
    by torch in 16 bits, and our share of the roofline."""
    device = torch.device("cuda")
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(_SIDE, _SIDE))
    found: list[dict[str, Any]] = []
    for count in rows:
        times: dict[str, Any] = {"rows": count, **_times(count, weight, device, dtype)}
        times["roofline_share"] = roofline_share(weight.num_bytes + 4 * count * _SIDE, times["microseconds"] * 1e-6)
        found.append(times)
    return found


def roofline_share(num_bytes: float, seconds: float) -> float | None:
    """The share of the memory's bandwidth that was used, 0 to 1; None if the bandwidth is not known."""
    known = bandwidth(torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0))
    return None if known is None else round(num_bytes / seconds / known, 3)


def bandwidth(name: str, properties: Any) -> float | None:
    """The memory's bandwidth in bytes/s; None if it is not known.

    It comes from the memory clock (kHz) and bus width (bits) that the driver states, because these differ between a
    card's variants. If the driver states neither, it comes from the data sheet of the card with this name."""
    clock, width = (getattr(properties, key, 0) for key in ("memory_clock_rate", "memory_bus_width"))
    if clock and width:
        return float(2 * clock * 1e3 * width / 8)
    words = name.replace("-", " ").split()
    for card in CARDS:
        if all(word in words for word in card.name.split() if word not in ("SXM", "80", "GB")):
            return card.bandwidth_bytes
    return None


def _times(rows: int, weight: nf4.Nf4Weight, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    x = torch.randn(rows, _SIDE, device=device, dtype=dtype)
    ops = load_ops("triton", device=device, dtype=dtype)
    handle = ops.prepare(weight.to(device), None)
    dense = weight.to(device).dequantize(dtype)
    return {
        "microseconds": microseconds(lambda: ops.linear(x, handle, None, 0)),
        "torch_bf16_microseconds": microseconds(lambda: torch.nn.functional.linear(x, dense)),
        "bitsandbytes_microseconds": _bitsandbytes(x, dense),
    }


def _bitsandbytes(x: torch.Tensor, dense: torch.Tensor) -> float | None:
    """Microseconds of bitsandbytes' fused product with the same matrix, double-quantised; None if it is not
    installed."""
    if find_spec("bitsandbytes") is None:
        return None
    # It is not a dependency; only this comparison imports it.
    functional = importlib.import_module("bitsandbytes.functional")
    autograd = importlib.import_module("bitsandbytes.autograd._functions")
    packed, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    return microseconds(lambda: autograd.matmul_4bit(x, packed.t(), quant_state=state))


def microseconds(launch: Callable[[], Any]) -> float:
    """The median time of launches in microseconds. They are replayed from a CUDA graph, each after the L2 cache was
    overwritten."""
    for _ in range(_WARM_UPS):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(_ROUNDS):
        flush.zero_()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(started.elapsed_time(ended) * 1e3)
    return float(round(sorted(times)[len(times) // 2], 2))
