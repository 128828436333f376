"""The native CPU kernels (kernels/cpu/native), built when guanaco is installed; everything else is in pyproject.toml.

A plain shared library, loaded through ctypes: no Python headers are needed. `optional`: where it cannot be compiled,
guanaco installs all the same and runs on the reference kernels, which `guanaco serve` and `guanaco doctor` then say.
GUANACO_SANITIZE=address builds it for `make asan`.
"""

import os
from glob import glob

from setuptools import Extension, setup

sanitize = os.environ.get("GUANACO_SANITIZE")
flags = [f"-fsanitize={sanitize}", "-g", "-fno-omit-frame-pointer"] if sanitize else []

native = Extension(
    "guanaco.kernels.cpu._native",
    sources=sorted(glob("kernels/cpu/native/*.cpp")),
    depends=sorted(glob("kernels/cpu/native/*.h")),
    # No contraction: products and sums are fused where the source says so, and every ISA rounds alike elsewhere.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", *flags],
    extra_link_args=["-pthread", *flags],
    optional=True,
)
setup(ext_modules=[native])
