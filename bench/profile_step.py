"""A few training steps of each method, in careful eager PyTorch and with kdfast: what bench/profile.sh looks at.

python bench/profile_step.py [--device cpu|cuda] [--steps N] [--tiny]
"""

from __future__ import annotations

import argparse

import torch

from kdfast.benchmarks import make_settings
from kdfast.benchmarks.distill import cases
from kdfast.profiling import phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="the smallest networks and batches")
    given = parser.parse_args()
    for case in cases(make_settings(given.device, quick=True, tiny=given.tiny)):
        for provider in case.providers:
            if provider.name not in ("eager", "kdfast"):
                continue
            work = provider.build()
            work(0)  # kernels compile, memory is found
            for turn in range(given.steps):
                with phase(f"{case.name}, {provider.name}"):
                    work(turn)
                    if given.device == "cuda":
                        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
