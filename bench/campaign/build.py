"""The C++ extension, with the compiler and torch's own copy of pybind11: python -m bench.campaign.build STAGE."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from torch.utils import cpp_extension


def main() -> int:
    stage = Path(sys.argv[1])
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        print(f"no C++ compiler ({compiler}): kdfast.replay is left out")
        return 1
    folders = [stage / "csrc", *cpp_extension.include_paths(), sysconfig.get_path("include")]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    fresh, target = stage / "kdfast" / "_C.new", stage / "kdfast" / f"_C{suffix}"
    options = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-pthread",
    ]
    sources = sorted(map(str, (stage / "csrc").glob("*.cpp")))
    words = [compiler, *options, *(f"-I{folder}" for folder in folders), *sources, "-o", str(fresh)]
    code = subprocess.run(words, check=False).returncode
    if code == 0:
        fresh.replace(target)
        print(f"built {target.name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
