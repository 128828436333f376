"""The native library behind the `cpu` provider: where it is, its C structs, its functions with their types.

Knows no tensors. The structs mirror kernels/cpu/native/types.h field by field. Only `kernels.cpu` calls the functions;
`guanaco doctor` asks for `available_isas`.
"""

import ctypes
import importlib.util
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache

from guanaco.kernels.ops import CPU_ISAS, NativeUnavailable

NF4_TILED, NF4_FLAT, DENSE = range(3)
FLOAT32, FLOAT16, BFLOAT16 = range(3)


class Linear(Structure):
    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int32),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
    )


class LoraPair(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("rank", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
        ("unused", c_int32),
    )


class Lora(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("slots", c_void_p),
        ("scales", c_void_p),
        ("pairs", c_void_p),
        ("num_entries", c_int32),
        ("num_slots", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
    )


class Cache(Structure):
    _fields_ = (("k", c_void_p), ("v", c_void_p))


class Batch(Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("table_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("cu_seqlens_q", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("block_size", c_int32),
        ("cache_dtype", c_int32),
    )


class Draw(Structure):
    _fields_ = (
        ("uniform", c_double),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
    )


_STRUCTS = (Linear, LoraPair, Lora, Layer, Model, Cache, Batch, Draw)
_P, _I32, _I64, _F32 = c_void_p, c_int32, c_int64, c_float
# name → result and argument types. An int32 result is 0 for success and −1 if memory ran out; that of
# guanaco_nf4_layout is a layout's number.
_FUNCTIONS = {
    "guanaco_isa_name": (c_char_p, (_I32,)),
    "guanaco_struct_bytes": (None, (_P,)),
    "guanaco_create": (_P, (_I32, _I32, _P)),
    "guanaco_destroy": (None, (_P,)),
    "guanaco_nf4_bytes": (_I64, (_I64, _I64)),
    "guanaco_nf4_layout": (_I32, (_P,)),
    "guanaco_nf4_repack": (_I32, (_P, _P, _P, _I64, _I64, _P)),
    "guanaco_nf4_quantize": (_I32, (_P, _P, _I32, _I64, _P, _P, _P)),
    "guanaco_decode_rows": (_I32, (_P, _P, _I64, _I64, _P, _I32)),
    "guanaco_linear": (_I32, (_P, _P, _P, _P, _I32, _I64, _P, _I32)),
    "guanaco_rms_norm": (_I32, (_P, _P, _I32, _P, _F32, _I64, _I64, _P, _I32)),
    "guanaco_silu_mul": (_I32, (_P, _P, _P, _I32, _I64, _I64, _P, _I32)),
    "guanaco_rope_and_cache": (_I32, (_P, _P, _P, _I64, _I64, _I64, _P, _P, _P, _I32, _P)),
    "guanaco_attention": (_I32, (_P, _P, _P, _I64, _I64, _I64, _F32, _P, _I32, _P)),
    "guanaco_draw": (_I32, (_P, _P, _I64, _I64, _P, _P)),
    "guanaco_decode": (_I32, (_P, _P, _P, _P, _P, _P, _I32, _P, _I32)),
}


@cache
def library() -> ctypes.CDLL:
    """The library, with the types of its functions set. The first call loads it; later calls return the same object.

    Raises NativeUnavailable if it was not built, can't be loaded, lacks a function, or has structs of other sizes than
    the ones here. The last two show that it was built from other sources; other differences are not noticed.
    """
    spec = importlib.util.find_spec("guanaco.kernels.cpu._native")
    if spec is None or spec.origin is None:
        raise NativeUnavailable(
            "the native CPU kernels were not built when guanaco was installed: install a C++ compiler "
            "(Debian: apt install g++), then install guanaco again"
        )
    try:
        lib = ctypes.CDLL(spec.origin)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the native CPU kernels cannot be loaded ({error}): install guanaco again") from error
    sizes = (c_int32 * len(_STRUCTS))()
    lib.guanaco_struct_bytes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in _STRUCTS]:
        raise NativeUnavailable(f"{spec.origin} was built from other sources than this: install guanaco again")
    return lib


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build has and this processor runs, best first. Raises NativeUnavailable."""
    return tuple(name for i, name in enumerate(CPU_ISAS) if library().guanaco_isa_name(i) is not None)


class Context:
    """One set of threads and one instruction set. Closing or dropping it ends the threads."""

    _handle: int | None = None

    def __init__(self, isa: str, threads: int, team: int | None = None) -> None:
        """isa: a name in CPU_ISAS, or "auto" for the best that runs here. team: the address of another library's
        `GOMP_parallel`, whose threads then do the work; None for threads of its own.

        Raises NativeUnavailable without the library or the ISA, and MemoryError if the threads can't be started.
        """
        self._lib = library()
        known = available_isas()
        if isa == "auto":
            isa = known[0]
        if isa not in known:
            raise NativeUnavailable(f"this processor (or build) has no {isa!r} kernels; it has: {', '.join(known)}")
        self.isa = isa
        self.threads = threads
        self._handle = self._lib.guanaco_create(CPU_ISAS.index(isa), threads, team)
        if self._handle is None:
            raise MemoryError(f"the native kernels could not start {threads} threads")

    def nf4_bytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] weight repacked for the CPU."""
        return int(self._lib.guanaco_nf4_bytes(n, k))

    @property
    def layout(self) -> int:
        """Number of the order in which a repacked weight stores its codes; only kernels with the same number can read
        it."""
        return int(self._lib.guanaco_nf4_layout(self._handle))

    def call(self, name: str, *arguments: object) -> None:
        """Run `guanaco_<name>` in this context; other Python threads go on meanwhile. Raises MemoryError if memory runs
        out."""
        if getattr(self._lib, f"guanaco_{name}")(self._handle, *arguments) != 0:
            raise MemoryError(f"the native kernel {name} ran out of memory")

    def close(self) -> None:
        """End the threads. Call nothing on this context afterwards."""
        if self._handle is not None:
            self._lib.guanaco_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
