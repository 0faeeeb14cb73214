"""Builds the C++ operators of recsys/native where torch and a compiler are; without, FBGEMM and PyTorch do the work."""

import sys
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("recsys/native")
sys.path.insert(0, str(FOLDER))

from sources import digest  # noqa: E402  (without torch, which an isolated build has not)

try:
    from torch.utils.cpp_extension import include_paths, library_paths
except ImportError:  # an isolated build; the package works without
    extensions = []
else:
    # OpenMP at compile time alone: the threads are torch's own, of the library that torch brings. Sums may be
    # reordered, so that they are vectorized; infinities and NaN stay what they are.
    flags = [
        *("-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
        *("-fno-signed-zeros", "-fassociative-math", "-Wno-psabi"),
    ]
    extensions = [
        Extension(
            f"recsys.native.{name}",
            sources=[f"{FOLDER}/{name}.cpp"],
            depends=[f"{FOLDER}/{part}" for part in (inlined, "bf16.h", "instructions.h")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            define_macros=[("RECSYS_SOURCES", f'"{digest(FOLDER)}"')],
            language="c++",
            extra_compile_args=flags,
            optional=True,
        )
        for name, inlined in {"tables": "rows.inl", "fused": "fused.inl"}.items()
    ]

setup(ext_modules=extensions, options={"build_ext": {"parallel": 2}})
