"""Builds the CPU kernels and the operators of served models; everything else is in pyproject.toml."""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("torchrec_qr/ops/csrc")
SERVING = SOURCES / "serving"
# No fast-math of any kind, neither here nor at the link: loading such a library makes the whole process flush
# subnormals to zero. These two only let loops with roots and comparisons become vector code.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
]


class BuildLibrary(build_ext):
    """A plain shared library, loaded by its path: no Python headers, and a name without Python's version."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class LibraryWheel(bdist_wheel):
    """A wheel for every Python 3: for this platform if a library was built, else for any."""

    def get_tag(self) -> tuple[str, str, str]:
        libraries = self.get_finalized_command("build_ext").get_outputs()
        self.root_is_pure = not any(Path(library).exists() for library in libraries)
        _, _, platform = super().get_tag()
        return "py3", "none", platform


kernels = Extension(
    "torchrec_qr.ops._kernels",
    sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
    depends=sorted(str(path) for path in SOURCES.glob("*.h")),
    language="c++",
    extra_compile_args=[*COMPILE_ARGS, "-fopenmp"],
    extra_link_args=["-fopenmp"],
    # Without a compiler the install succeeds, and PyTorch takes the place of the kernels.
    optional=True,
)


def serving() -> list[Extension]:
    """The operators by PyTorch's stable ABI, if PyTorch's headers are installed: PyTorch itself is not imported."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return []
    home = Path(torch.origin).parent
    return [
        Extension(
            "torchrec_qr.ops._serving",
            sources=sorted(str(path) for path in SERVING.glob("*.cpp")),
            depends=sorted(str(path) for folder in (SOURCES, SERVING) for path in folder.glob("*.h")),
            language="c++",
            # The oldest PyTorch that the library runs on, whatever the headers' version; and no path of this machine
            # in its messages.
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000ULL")],
            include_dirs=[str(home / "include")],
            # Products and sums are rounded one by one, so that all instruction sets give the same bits.
            extra_compile_args=[*COMPILE_ARGS, "-ffp-contract=off", f"-ffile-prefix-map={home / 'include'}=."],
            # The process has loaded PyTorch by then, so that no path to it is stored.
            extra_link_args=[
                f"-L{home / 'lib'}",
                "-Wl,--no-as-needed",
                "-ltorch_cpu",
                f"-Wl,--version-script={SERVING / 'local.map'}",
            ],
            optional=True,
        )
    ]


setup(cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel}, ext_modules=[kernels, *serving()])
