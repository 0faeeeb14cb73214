"""Builds the C++ operators of recsys/native where torch and a compiler are; without, FBGEMM and PyTorch do the work."""

from setuptools import Extension, setup

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
    folder = "recsys/native"
    extensions = [
        Extension(
            f"recsys.native.{name}",
            sources=[f"{folder}/{name}.cpp"],
            depends=[f"{folder}/{part}" for part in (inlined, "bf16.h", "instructions.h")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            language="c++",
            extra_compile_args=flags,
            optional=True,
        )
        for name, inlined in {"tables": "rows.inl", "fused": "fused.inl"}.items()
    ]

setup(ext_modules=extensions, options={"build_ext": {"parallel": 2}})
