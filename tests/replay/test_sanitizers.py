"""csrc/ built with sanitizers: memory and undefined behaviour, and data races; and for registers of other widths."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("what", ["replay_stress", "loops_stress", "channels_stress"])
def test_stress_and_fuzz_under_sanitizers(what: str, sanitizers: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread"]
    # One copy of each loop: sanitizers cannot run while the loader chooses between copies.
    flags += [
        "-DKDFAST_NO_CLONES",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        f"-I{ROOT / 'csrc'}",
    ]
    program = tmp_path / "stress"
    source = ROOT / "tests" / "cpp" / f"{what}.cpp"
    subprocess.run([str(COMPILER), *flags, str(source), "-o", str(program)], check=True)
    # The thread sanitizer ends children of a process with threads unless told otherwise, and misses their threads.
    settings = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0:report_thread_leaks=0:halt_on_error=1"}
    done = subprocess.run([str(program), str(tmp_path)], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_registers_of_every_width_give_the_same_bits(tmp_path: Path) -> None:
    """Copies for what this machine has, the oldest x86 alone, and vectors in parts as other machines have them."""
    said = set()
    for index, layout in enumerate(
        ([], ["-DKDFAST_NO_CLONES"], ["-DKDFAST_NO_CLONES", "-DKDFAST_SMALL_PARTS"])
    ):
        program = tmp_path / f"stress{index}"
        flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}", *layout]
        subprocess.run(
            [str(COMPILER), *flags, str(ROOT / "tests" / "cpp" / "loops_stress.cpp"), "-o", str(program)],
            check=True,
        )
        done = subprocess.run([str(program)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said.add(done.stdout)
    assert len(said) == 1
    assert "checksum" in said.pop()
