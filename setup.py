"""Builds the C++ operators of recsys/native where torch and a compiler are; without, FBGEMM and PyTorch do the work."""

from setuptools import Extension, setup

try:
    from torch.utils.cpp_extension import include_paths, library_paths
except ImportError:  # an isolated build; the package works without
    extensions = []
else:
    extensions = [
        Extension(
            "recsys.native.operators",
            sources=["recsys/native/tables.cpp", "recsys/native/fused.cpp"],
            depends=[f"recsys/native/{name}" for name in ("instructions.h", "rows.inl", "fused.inl")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            language="c++",
            # OpenMP at compile time alone: the threads are torch's own, of the library that torch brings.
            # Sums may be reordered, so that they are vectorized; infinities and NaN stay what they are.
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
                *("-fno-signed-zeros", "-fassociative-math", "-Wno-psabi"),
            ],
            optional=True,
        )
    ]

setup(ext_modules=extensions)
