"""The parts of a campaign, most wanted first, and each one's share of the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["environment", "smoke", "check", "time", "ncu", "tests", "sanitizer"]
KERNELS = ("losses", "linear", "denoise", "replay", "feature", "images")
STEPS = ("distill", "kdiffusion", "ssdkd", "diffkd")
#: Processes that check and compile side by side; timing is alone.
CHECKERS = 12


@dataclass(frozen=True)
class Part:
    """One step of a campaign.

    Attributes:
        name: In the journal and the summary.
        seconds: Its share; what an earlier part leaves over is added, and at the end of it all of it is killed.
        kind: What it runs.
        suites: Whose cases, where it measures or checks.
        first: How keys of cases begin, most wanted first; all others come after these.
        only: No others.
        without: Words in the names of providers that take no part.
        processes: Side by side.
    """

    name: str
    seconds: float
    kind: Kind
    suites: Sequence[str] = ()
    first: Sequence[str] = ()
    only: bool = False
    without: Sequence[str] = ()
    processes: int = 1

    def order(self, keys: Iterable[str]) -> list[str]:
        """The keys that this part measures, in its order."""
        ranked = [(self._rank(key), at, key) for at, key in enumerate(keys)]
        return [key for rank, _, key in sorted(ranked) if rank < len(self.first) or not self.only]

    def _rank(self, key: str) -> int:
        return next((at for at, head in enumerate(self.first) if key.startswith(head)), len(self.first))


LOSSES = (
    "losses/kd_kl_div[shape=65536x1000, dtype=bfloat16",
    "losses/kd_kl_div[shape=256x1000,",
    "losses/kd_kl_div[shape=128x100,",
    "losses/kd_kl_div[shape=4096x32000,",
    "losses/kd_kl_div[shape=1024x128256,",
    "losses/kd_kl_div[shape=8x19x256x512, dtype=float32",
    "losses/jsd_loss",
    "losses/dkd_loss",
    "losses/kd_kl_div[shape=8192x16384,",
)
REPLAY = ("replay/sample[", "replay/update[", "replay/sample and update[")

#: The first eight minutes, which one command of nine holds; then what a second one, or more time, adds.
PARTS = (
    Part("environment", 12, "environment"),
    Part("smoke", 18, "smoke"),
    Part("warm", 60, "check", KERNELS, LOSSES, processes=CHECKERS),
    Part("losses", 45, "time", ("losses",), LOSSES),
    Part("denoise", 25, "time", ("denoise",), ("denoise/guided DDIM step", "denoise/DiT tail")),
    Part("replay", 20, "time", ("replay",), REPLAY),
    Part("feature", 40, "time", ("feature", "images"), ("feature/",)),
    Part("linear", 30, "time", ("linear",)),
    Part("ncu", 25, "ncu"),
    Part("tests", 105, "tests"),
    Part(
        "steps",
        80,
        "time",
        STEPS,
        (
            "distill/DM-KD step[teacher=wrn_40_2",
            "kdiffusion/",
            "ssdkd/inversion round",
            "ssdkd/distillation steps",
            "diffkd/logits alone",
            "distill/SurrogateKD step[teacher=wrn_40_2",
            "diffkd/training step",
        ),
        without=("compile",),
    ),
    Part("sanitizer", 20, "sanitizer"),
    # Beyond the eighth minute.
    Part("surrogate", 40, "time", ("surrogate",)),
    Part("data", 30, "time", ("data",)),
    Part("synth", 60, "time", ("synth",)),
    Part("compiled", 130, "time", STEPS, ("distill/DM-KD step[teacher=resnet50", "distill/", "kdiffusion/")),
)
#: Seconds that one command may take: a machine's limit is ten minutes, and nine of them are ours.
BUDGET = 540.0


def chosen(names: str) -> tuple[Part, ...]:
    """Parts by name, separated by blanks, in the plan's order; all of them where none is named.

    Raises:
        ValueError: One that is no part.
    """
    wanted = names.split()
    known = [part.name for part in PARTS]
    for name in wanted:
        if name not in known:
            raise ValueError(f"PARTS: got {name}; accepted: {' '.join(known)}")
    return tuple(part for part in PARTS if not wanted or part.name in wanted)
