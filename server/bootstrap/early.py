"""Makes the imports at a start quick: threads do other work beside them, and Python's garbage collector is off.

Imports nothing that is slow, since it is imported first. Called by the command line.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# The libraries that torch opens first, in torch's order and with its flags. The first one is opened RTLD_GLOBAL, so
# that libraries opened later find its symbols.
_LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL))


def begin_loading_torch() -> threading.Thread | None:
    """Open torch's libraries on another thread, beside the imports that come before torch's.

    Returns the thread; None where torch is loaded already, or is not installed as a folder with these libraries. Then
    `import torch` opens them itself, as it does if they cannot be opened here.
    """
    if "torch" in sys.modules:
        return None
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    paths = [(Path(found.origin).parent / "lib" / name, flags) for name, flags in _LIBRARIES]
    if not all(path.is_file() for path, _ in paths):
        return None
    thread = threading.Thread(target=_open, args=(paths,), name="guanaco-libraries")
    thread.start()
    return thread


def _open(paths: list[tuple[Path, int]]) -> None:
    # Called as a foreign function, since `ctypes.CDLL` would hold the interpreter's lock meanwhile.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.restype, dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for path, flags in paths:
        if dlopen(os.fsencode(path), os.RTLD_NOW | flags) is None:
            return


def begin_checks(model: str | None, cache_dir: Path) -> None:
    """Begin the work that needs no torch, on other threads: check the model's files, and start the process for its chat
    template.

    Loading waits for the results, and reports what is wrong. model: as in the settings; None: the demo.
    """
    from guanaco.models.loading import demo
    from guanaco.models.text import template_renderer, tokenizer_check

    if model is None:
        demo.begin_check(cache_dir)
        path = demo.demo_path(cache_dir)
    else:
        path = Path(os.path.expanduser(model))
    tokenizer_check.begin_check(path)
    template_renderer.shared_renderer().begin_start()


@contextlib.contextmanager
def undisturbed_imports() -> Iterator[None]:
    """Imports inside run without the garbage collector, and later collections skip the objects that they made.

    Modules live as long as the process. The collector would walk through all of them again and again while their number
    grows, which takes a tenth of a start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
