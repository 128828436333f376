"""`guanaco quantize`: converts a checkpoint to a bitsandbytes-format NF4 checkpoint."""

from pathlib import Path

from rich.console import Console

from guanaco.models.loading.quantize import quantize_checkpoint
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.bootstrap.progress import reporting


def run_quantize(src: Path, dst: Path, *, double_quant: bool) -> None:
    """Quantise, show the progress and print the result. Raises ModelError if either directory can't be used."""
    console = Console(stderr=True, highlight=False)
    with reporting(console, "quantise") as report:
        done = quantize_checkpoint(src, dst, double_quant=double_quant, progress=report)
    before, after = human_bytes(done.source_bytes), human_bytes(done.written_bytes)
    print(f"{dst}: {done.num_quantized} matrices in NF4, {done.num_dense} tensors kept, {before} → {after}")
    if done.ignored:
        print(f"ignored, since they are no part of this architecture: {', '.join(done.ignored)}")
