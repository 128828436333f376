"""Triton's interpreter, made to patch its language once: a third of its time goes into doing it for every call.

It replaces the functions of `triton.language` for each launch, and again for each call of a @triton.jit function from
another (those it never puts back). In a process that only interprets, they can stay replaced.
"""

from importlib.util import find_spec
from typing import Any


class _Kept:
    """A scope that restores nothing."""

    def restore(self) -> None:
        pass


def install() -> None:
    """Do nothing without Triton; safe to call again."""
    if find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    if original.__module__ == __name__:
        return
    patched: set[int] = set()

    def patch_once(function: Any) -> _Kept:
        modules = {id(v) for v in function.__globals__.values() if v is language or v is language.core}
        if not modules <= patched:
            original(function)
            patched.update(modules)
        return _Kept()

    interpreter._patch_lang = patch_once
    _remember_dtypes(interpreter, language)
    _remember_shapes(language.core)


def _remember_dtypes(interpreter: Any, language: Any) -> None:
    """It writes the table of numpy's names down anew for every tensor."""
    original = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        if isinstance(scalar, language.pointer_type):
            return original(scalar)
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = numpy_dtype


def _remember_shapes(core: Any) -> None:
    """Every tensor wraps each number of its shape anew, and every type writes its name: the same few each time."""
    tensors: dict[int, tuple[Any, Any, Any]] = {}  # by identity of the shape, which is kept with it
    types: dict[tuple[Any, ...], tuple[Any, int, str]] = {}
    original_tensor, original_type = core.tensor.__init__, core.block_type.__init__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in tensors:
            original_tensor(self, handle, type)
            tensors[id(shape)] = shape, self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = tensors[id(shape)]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in shape))
        if key not in types:
            original_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = types[key]

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type
