"""Builds ``kdfast._C`` with pybind11 and ninja, and maps ``kernels/`` and ``recipes/`` into the package.

Everything declarative is in pyproject.toml. Without a compiler the build goes on and leaves the extension
out: everything but replay still works, and ``kdfast doctor`` says so. Set ``KDFAST_REQUIRE_EXTENSION=1`` to
make a missing extension an error instead (as whoever builds wheels wants it). ``CXX``, ``CXXFLAGS`` and
``LDFLAGS`` are honoured.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

CSRC = Path("csrc")
# What the source distribution carries beside what setuptools finds on its own: whoever unpacks it can build,
# test, lint and read everything that a checkout can.
SDIST_DIRECTORIES = ("csrc", "kernels", "recipes", "tests", "bench", "docs", ".ci")
SDIST_FILES = ("Makefile", "CHANGELOG.md", ".clang-format", ".gitignore")
SDIST_SKIPPED = {"__pycache__", "site"}


class NinjaBuildExt(build_ext):
    """Compile each translation unit in parallel through ninja, then link."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build_with_ninja(ext)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("KDFAST_REQUIRE_EXTENSION") == "1":
                raise
            # A library left by an earlier build is of other sources: no extension is better than that one.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            print(
                f"kdfast: the C++ extension was not built ({error}). kdfast.replay will be unavailable; "
                "install a C++17 compiler and reinstall to get it.",
                file=sys.stderr,
            )

    def _build_with_ninja(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        # -ffp-contract=off: priorities must equal the GPU's bit for bit. No -march=native: wheels travel.
        # -fno-trapping-math, -fno-math-errno: GCC vectorises a comparison or a root no other way; values are the same.
        includes = [CSRC.resolve(), Path(pybind11.get_include()), *map(Path, self.compiler.include_dirs)]
        cflags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        cflags += [
            "-fno-trapping-math",
            "-fno-math-errno",
            "-Wall",
            "-Wextra",
            *(f"-I{shlex.quote(str(path))}" for path in includes),
        ]
        cflags += [os.environ.get("CXXFLAGS", "")]
        ldflags = ["-shared", "-pthread", os.environ.get("LDFLAGS", "")]
        if sys.platform == "darwin":
            ldflags += ["-undefined", "dynamic_lookup"]

        with open(build_dir / "build.ninja", "w") as handle:
            writer = ninja_syntax.Writer(handle, width=10_000)
            writer.variable("cxx", os.environ.get("CXX", "c++"))
            writer.variable("cflags", " ".join(cflags))
            writer.variable("ldflags", " ".join(ldflags))
            compile_line = "$cxx -MMD -MF $out.d $cflags -c $in -o $out"
            writer.rule("compile", compile_line, depfile="$out.d", deps="gcc")
            writer.rule("link", "$cxx $in $ldflags -o $out")
            objects = []
            for source in ext.sources:
                objects += writer.build(Path(source).stem + ".o", "compile", _escaped(Path(source).resolve()))
            writer.build(_escaped(target), "link", objects)
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)], check=True)


def _escaped(path: Path) -> str:
    from ninja import ninja_syntax

    return str(ninja_syntax.escape_path(str(path)))


class CompleteSdist(sdist):
    """A source distribution with headers, kernels, recipes, tests and docs, without a manifest template."""

    def make_distribution(self) -> None:
        found = [path for name in SDIST_DIRECTORIES for path in sorted(Path(name).rglob("*"))]
        self.filelist.extend([str(path) for path in found if path.is_file() and not _skipped(path)])
        self.filelist.extend([name for name in SDIST_FILES if Path(name).is_file()])
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


def _skipped(path: Path) -> bool:
    return not SDIST_SKIPPED.isdisjoint(path.parts) or path.suffix in {".pyc", ".so", ".pyd"}


sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
setup(
    packages=[
        *find_packages(include=["kdfast", "kdfast.*"]),
        "kdfast.kernels",
        *(f"kdfast.kernels.{family}" for family in find_packages("kernels")),
        "kdfast.recipes",
    ],
    package_dir={"kdfast.kernels": "kernels", "kdfast.recipes": "recipes"},
    include_package_data=False,
    package_data={
        "kdfast": ["py.typed", "report/templates/*", "dev/templates/*"],
        "kdfast.kernels": ["*.cu"],
        "kdfast.recipes": ["**/*.yaml"],
    },
    ext_modules=[
        Extension(
            "kdfast._C",
            sources=sources,
            depends=sorted(str(path) for path in CSRC.glob("*.hpp")),
            optional=True,
        )
    ]
    if sources
    else [],
    cmdclass={"build_ext": NinjaBuildExt, "sdist": CompleteSdist},
)
