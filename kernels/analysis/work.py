"""The work of one launch of each Triton kernel: its units, their bytes, and how to find them in machine code.

A unit is a weight, or an element of the KV cache, of an adapter's A, or of a row. Knows each kernel's arguments and
constants by name. Turns a recorded `Launch` into a `CompileCase`. Used by `guanaco bench kernels` and the tests.
"""

from collections.abc import Callable
from typing import Any

from guanaco.kernels.analysis.compile import CompileCase
from guanaco.kernels.analysis.launches import Launch

_GROUP = 64
# Twelve byte permutes look up and assemble eight weights.
_DECODE_MARK = ("PRMT", 1.5)


def case_of(launch: Launch) -> CompileCase:
    """The launch with the data that it must read and the work that it must do. KeyError for a kernel not described
    here."""
    described = _WORK[launch.kernel](launch)
    return CompileCase(
        kernel=launch.kernel, function=launch.function, rows=launch.rows, signature=launch.signature,
        constexprs=launch.constexprs, not_divisible=launch.not_divisible, num_warps=launch.num_warps,
        num_stages=launch.num_stages, max_registers=launch.options["maxnreg"], **{"has_loop": True, **described},
    )  # fmt: skip


def _size(launch: Launch, *names: str) -> int:
    """Bytes of one element of each of these tensors, summed."""
    return sum(launch.arguments[name].element_size() for name in names)


def _lora_text(c: Any) -> str:
    if not c["MAX_ACTIVE"] or not c["PARTS"]:
        return ""
    return f", {c['MAX_ACTIVE']} adapters up to rank {c['RANK']}" + ("" if c["ALIGNED"] else " unaligned")


def _lora_bytes(c: Any, n: int) -> int:
    """Bytes of B and t for all outputs."""
    return 2 * c["MAX_ACTIVE"] * c["RANK"] * n if c["PARTS"] else 0


def _scales_text(launch: Launch) -> str:
    return "" if launch.constexprs["DOUBLE_QUANT"] else ", float32 scales"


def _scale_bytes(launch: Launch, groups: int) -> int:
    return int(groups * (1 + 8 / 256)) if launch.constexprs["DOUBLE_QUANT"] else 4 * groups


# ---- products


def _simt(launch: Launch) -> dict[str, Any]:
    c, rows = launch.constexprs, launch.arguments["rows"]
    n, k = c["N"], c["K"]
    passes = -(-rows // c["ROWS"])
    has_loop = k // _GROUP >= 2 * c["GROUPS"]
    width = n // 2 if c["EPILOGUE"] == "silu_mul" else n
    moved = rows * (2 * k + width * _size(launch, "y") * (2 if c["EPILOGUE"] == "add" else 1))
    return {
        "config": f"{n}x{k} {c['EPILOGUE']} {launch.signature['y'][1:]}, tile {c['BLOCK_N']}x{c['ROWS']}, "
        f"{c['GROUPS']} groups, {launch.num_warps} warps{_lora_text(c)}{_scales_text(launch)}",
        # A short row runs only the kernel's tail.
        "units_per_iteration": c["BLOCK_N"] * (c["GROUPS"] * _GROUP if has_loop else k),
        "loaded_units": c["BLOCK_N"] * c["GROUPS"] * _GROUP,
        "marker": _DECODE_MARK,
        "units": n * k * passes,
        "bytes_floor": n * k // 2 + _scale_bytes(launch, n * k // _GROUP) + moved + _lora_bytes(c, n),
        "bytes_per_unit": 0.5,
        "has_loop": has_loop,
        "loop_turns": {-1: float(c["BLOCK_N"] * k)},
    }


def _dot(launch: Launch) -> dict[str, Any]:
    c, rows, n = launch.constexprs, launch.arguments["rows"], launch.arguments["n"]
    k, splits = c["K"], launch.arguments["partial"].shape[0]
    return {
        "config": f"{n}x{k}, tile {c['BLOCK_N']}x{c['COLUMNS']}, {c['GROUPS']} groups, {launch.num_warps} warps, "
        f"{launch.num_stages} stages{_scales_text(launch)}",
        "units_per_iteration": c["BLOCK_N"] * _GROUP * c["GROUPS"],
        "marker": _DECODE_MARK,
        "units": n * k,
        "bytes_floor": n * k // 2 + _scale_bytes(launch, n * k // _GROUP) + 2 * rows * k + 4 * splits * rows * n,
        "bytes_per_unit": 0.5,
        "loop_turns": {-1: float(c["BLOCK_N"] * k // splits)},
    }


def _finish(launch: Launch) -> dict[str, Any]:
    """A unit is an element of the product. Every block is counted as using all adapters, which is the worst case."""
    c, n, rows = launch.constexprs, launch.arguments["n"], launch.arguments["rows"]
    halves = 2 if c["EPILOGUE"] == "silu_mul" else 1
    outputs, columns = (c["BLOCK_N"], rows) if "SPLITS" in c else (c["OUTPUTS"], c["COLUMNS"])
    splits = c.get("SPLITS", 1)
    shares = f"{splits} shares, " if splits > 1 else ""
    units = outputs * columns * halves
    return {
        "config": f"n {n}, {shares}{c['EPILOGUE']} {launch.signature['y'][1:]}, tile {outputs}x{c['COLUMNS']}, "
        f"{c['PARTS']} parts{_lora_text(c)}",
        "units_per_iteration": units,
        "marker": ("bytes", 4.0),
        "units": n * rows,
        "bytes_floor": rows * n * (4 * splits + _size(launch, "y") // halves) + _lora_bytes(c, n),
        "bytes_per_unit": 4.0 * splits,
        "has_loop": False,
        "loop_turns": {-1: float(units), **_expand_turns(c)},
    }


def _expand_turns(c: Any) -> dict[int, float]:
    """Turns of the loops over adapters, each around a loop over the rank, for every part. One adapter alone has no
    loop."""
    if not c["PARTS"] or not c["MAX_ACTIVE"]:
        return {}
    chunks = float(-(-c["RANK"] // 32))
    if c["MAX_ACTIVE"] == 1:
        return dict.fromkeys(range(c["PARTS"]), chunks)
    return {i: float(c["MAX_ACTIVE"]) if i % 2 == 0 else chunks for i in range(2 * c["PARTS"])}


def _dequant(launch: Launch) -> dict[str, Any]:
    c = launch.constexprs
    weights = _GROUP * launch.arguments["num_groups"]
    return {
        "config": f"{weights} weights to {launch.signature['out'][1:]}{_scales_text(launch)}",
        "units_per_iteration": _GROUP * c["GROUPS"],
        "marker": _DECODE_MARK,
        "units": weights,
        "bytes_floor": weights // 2 + weights * _size(launch, "out") + _scale_bytes(launch, weights // _GROUP),
        "bytes_per_unit": 0.5,
        "has_loop": False,
    }


def _shrink(launch: Launch) -> dict[str, Any]:
    """A unit is an element of A."""
    c, rows = launch.constexprs, launch.arguments["rows"]
    active, k = launch.arguments["active"].shape[0], c["K"]
    elements = active * c["PARTS"] * c["RANK"] * k
    has_loop = k >= 16 * c["LANES"] * c["UNROLL"]
    return {
        "config": f"{c['PARTS']} parts, k {k}, {active} adapters up to rank {c['RANK']}, tile {c['BLOCK_RANK']}x"
        f"{c['BLOCK_ROWS']} of {c['ROWS']}, {c['LANES']} lanes" + ("" if c["ALIGNED"] else ", unaligned"),
        "units_per_iteration": c["BLOCK_RANK"] * (c["LANES"] * 8 if has_loop else k),
        "marker": ("bytes", 2.0 * (1 + c["BLOCK_ROWS"] / c["BLOCK_RANK"])),
        "units": elements,
        "bytes_floor": 2 * elements + 2 * rows * k,
        "bytes_per_unit": 2.0,
        "has_loop": has_loop,
        "loop_turns": {-1: float(c["BLOCK_RANK"] * k)},
    }


def _shrink_prompt(launch: Launch) -> dict[str, Any]:
    """A unit is an element of x. All rows are counted as read by every adapter, which is the worst case."""
    c, rows = launch.constexprs, launch.arguments["rows"]
    active, k = launch.arguments["active"].shape[0], c["K"]
    tiles = active * c["PARTS"] * -(-c["RANK"] // c["BLOCK_RANK"])
    return {
        "config": f"{c['PARTS']} parts, k {k}, {active} adapters up to rank {c['RANK']}",
        "units_per_iteration": c["BLOCK_ROWS"] * c["BLOCK_K"],
        "marker": ("bytes", 2.0 * (1 + c["BLOCK_RANK"] / c["BLOCK_ROWS"])),
        "units": rows * k * tiles,
        "bytes_floor": 2 * rows * k + active * c["PARTS"] * c["RANK"] * (2 * k + 4 * rows),
        "bytes_per_unit": 2.0,
        "loop_turns": {-1: float(c["BLOCK_ROWS"] * k)},
    }


# ---- attention


def _attention(launch: Launch) -> dict[str, Any]:
    """A unit is an element of K or V, read once for every tile of queries."""
    c, a = launch.constexprs, launch.arguments
    kv_heads, head_dim = a["k_cache"].shape[2], c["HEAD_DIM"]
    group = c["HEADS"] // kv_heads
    positions = a["tables"].shape[1] * c["BLOCK_SIZE"]
    elements = 2 * a["contexts"].shape[0] * positions * kv_heads * head_dim
    size, splits = _size(launch, "k_cache"), c.get("SPLITS", 1)
    tiles = 1 if "SPLITS" in c else max(1, a["q"].shape[0] * group // c["BLOCK_M"] // a["contexts"].shape[0])
    return {
        "config": f"{c['HEADS']}/{kv_heads} heads of {head_dim}, {launch.signature['k_cache'][1:]} cache, "
        f"{positions} positions, {splits} splits, tile {c.get('BLOCK_M', 1)}x{c['BLOCK_N']}, {launch.num_warps} warps",
        "units_per_iteration": 2 * c["BLOCK_N"] * head_dim,
        "marker": ("bytes", float(size)),
        "units": elements * tiles,
        "bytes_floor": elements * size,
        "bytes_per_unit": float(size),
        "loop_turns": {-1: 2.0 * positions * head_dim / splits},
    }


def _reduce(launch: Launch) -> dict[str, Any]:
    c, a = launch.constexprs, launch.arguments
    units = c["SPLITS"] * c["HEAD_DIM"]
    kind = launch.signature["out"][1:]
    config = f"{c['HEADS']} heads of {c['HEAD_DIM']}, {c['SPLITS']} splits, tile {c['BLOCK_N']}, {kind}"
    return _straight(config, units, a["partial"].numel(), 4)


# ---- kernels without a loop


def _straight(config: str, units: int, all_units: int, read: float, written: int = 2) -> dict[str, Any]:
    """A program handles `units` units; each reads `read` bytes from memory and writes `written`."""
    return {
        "config": config,
        "units_per_iteration": units,
        "marker": ("bytes", read),
        "units": all_units,
        "bytes_floor": int(all_units * (read + written)),
        "bytes_per_unit": read,
        "has_loop": False,
    }


def _rows(*names: str, result: str = "y") -> Callable[[Launch], dict[str, Any]]:
    """The case of a kernel that handles rows of WIDTH; names: the operands with such rows."""

    def work(launch: Launch) -> dict[str, Any]:
        c = launch.constexprs
        read = [n for n in names if n != "residual" or c["HAS_RESIDUAL"]]
        types = " ".join(f"{n} {launch.signature[n][1:]}" for n in (*read, result))
        how = ", scaled" if c.get("SCALED") else ""
        units, width = min(c["WIDTH"], c["BLOCK"]), c["WIDTH"]
        return _straight(
            f"{width}, {types}{how}", units, launch.rows * width, _size(launch, *read), _size(launch, result)
        )

    return work


def _rope(launch: Launch) -> dict[str, Any]:
    """Counts both sides of the kernel's branch: queries, and keys with values."""
    c, size = launch.constexprs, _size(launch, "q")
    heads = c["HEADS"] + 2 * c["KV_HEADS"]
    return _straight(
        f"{c['HEADS']}/{c['KV_HEADS']} heads of {c['HEAD_DIM']}, {launch.signature['q'][1:]} to "
        f"{launch.signature['k_cache'][1:]}",
        3 * c["BLOCK_HEADS"] * c["HEAD_DIM"], launch.rows * heads * c["HEAD_DIM"], size, _size(launch, "k_cache"),
    )  # fmt: skip


def _argmax_part(launch: Launch) -> dict[str, Any]:
    block, vocab = launch.constexprs["BLOCK"], launch.arguments["vocab"]
    return _straight(f"vocabulary {vocab}", block, vocab, 4, 0)


def _argmax(launch: Launch) -> dict[str, Any]:
    parts = launch.arguments["parts"]
    return _straight(f"{parts} parts", parts, parts, 4, 0)


def _draw(launch: Launch) -> dict[str, Any]:
    """The main loop is one of the passes over a row of logits."""
    vocab, block = launch.arguments["vocab"], launch.constexprs["BLOCK"]
    straight = _straight(f"vocabulary {vocab}", block, vocab, 4, 0)
    return straight | {"has_loop": True, "loop_turns": {-1: float(vocab)}}


_WORK: dict[str, Callable[[Launch], dict[str, Any]]] = {
    "nf4_simt": _simt,
    "nf4_dot": _dot,
    "nf4_dot_finish": _finish,
    "nf4_dequant": _dequant,
    "nf4_dequant_finish": _finish,
    "lora_shrink": _shrink,
    "lora_shrink_prompt": _shrink_prompt,
    "decode_vector": _attention,
    "decode_dot": _attention,
    "prefill": _attention,
    "decode_reduce": _reduce,
    "rms_norm": _rows("x", "residual", "weight"),
    "silu_mul": _rows("gate", "up"),
    "scale_rows": _rows("x"),
    "embedding": _rows("table"),
    "rope_and_cache": _rope,
    "argmax_part": _argmax_part,
    "argmax": _argmax,
    "draw": _draw,
}
