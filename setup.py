"""Builds the CPU kernels; everything else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("torchrec_qr/ops/csrc")


class BuildLibrary(build_ext):
    """A plain shared library, loaded with ctypes: no Python headers, and a name without Python's version."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "torchrec_qr.ops._kernels",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            # No fast-math of any kind, neither here nor at the link: loading such a library makes the whole process
            # flush subnormals to zero. These two only let loops with roots and comparisons become vector code.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"),
                *("-fopenmp", "-fvisibility=hidden", "-Wno-psabi"),
            ],
            extra_link_args=["-fopenmp"],
            # Without a compiler the install succeeds, and PyTorch takes the place of the kernels.
            optional=True,
        )
    ],
)
