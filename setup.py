"""Builds ``kdfast._C`` with pybind11 and ninja, and maps ``kernels/`` and ``recipes/`` into the package.

Everything declarative is in pyproject.toml. Without a compiler the build goes on and leaves the extension
out: everything but replay still works, and ``kdfast doctor`` says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")


class NinjaBuildExt(build_ext):
    """Compile each translation unit in parallel through ninja, then link."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build_with_ninja(ext)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("KDFAST_REQUIRE_EXTENSION") == "1":
                raise
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
        includes = [CSRC.resolve(), Path(pybind11.get_include()), *map(Path, self.compiler.include_dirs)]
        cflags = [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
        ]
        cflags += [f"-I{path}" for path in includes]
        cflags += os.environ.get("CXXFLAGS", "").split()
        ldflags = ["-shared", "-pthread", *os.environ.get("LDFLAGS", "").split()]
        if sys.platform == "darwin":
            ldflags += ["-undefined", "dynamic_lookup"]

        with open(build_dir / "build.ninja", "w") as handle:
            writer = ninja_syntax.Writer(handle, width=10_000)
            writer.variable("cxx", os.environ.get("CXX", "c++"))
            writer.rule(
                "compile", "$cxx -MMD -MF $out.d $cflags -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            writer.rule("link", "$cxx $in $ldflags -o $out")
            objects = []
            for source in ext.sources:
                objects += writer.build(
                    str(build_dir / (Path(source).stem + ".o")),
                    "compile",
                    str(Path(source).resolve()),
                    variables={"cflags": " ".join(cflags)},
                )
            writer.build(str(target), "link", objects, variables={"ldflags": " ".join(ldflags)})
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_dir)], check=True)


sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
setup(
    packages=[*find_packages(include=["kdfast", "kdfast.*"]), "kdfast.kernels", "kdfast.recipes"],
    package_dir={"kdfast.kernels": "kernels", "kdfast.recipes": "recipes"},
    package_data={
        "kdfast": ["py.typed", "report/templates/*"],
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
    cmdclass={"build_ext": NinjaBuildExt},
)
