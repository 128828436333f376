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
