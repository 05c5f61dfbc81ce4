"""The README's performance tables and picture, from the newest results of each device under bench/results/.

    python -m bench.readme_table             rewrite them
    python -m bench.readme_table --check     say whether they differ

Nothing in them is typed: every figure is a median of raw samples of one run, or of their quotients round by round.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.benchmarks.plots import Ratio, draw, ratios, title

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ASSETS = ROOT / "docs" / "pages" / "assets"
RESULTS = ROOT / "bench" / "results"
#: Below this kdfast is called slower, above its inverse faster; between them, equal.
EVEN = 0.95
BASES = ("eager", "torch.compile")
#: What the README shows, by how a case's title begins, at the largest size measured, so that it stays a page; what
#: kdfast loses is listed whatever it is, and everything else stands in the results.
HEADLINES = (
    "losses: kd_kl_div",
    "losses: jsd_loss",
    "losses: dkd_loss",
    "denoise: DiT tail",
    "denoise: sampling without the network (scheduler DDIM",
    "feature: BN + squared error",
    "feature: branch recursion",
    "images: crop, flip, normalise, forward and backward",
    "images: batch-norm statistics, forward and backward",
    "replay: sample and update (capacity 50000, batch 256, row 3x32x32",
    "data: epoch of JPEG shards",
    "surrogate: shader programs",
    "synth: labels to images on disk",
    "distill: DM-KD step",
    "diffkd: training step",
    "kdiffusion: training step",
    "ssdkd: epoch",
)


def newest() -> dict[str, dict[str, Any]]:
    """For each device the newest date's parts, put together: ``{device: result}``."""
    found: dict[str, dict[str, Any]] = {}
    for device in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        dates = sorted(path for path in device.iterdir() if path.is_dir())
        if not dates:
            continue
        parts = [json.loads(path.read_text()) for path in sorted(dates[-1].glob("*/results.json"))]
        parts = [part for part in parts if not part["tiny"]]
        if parts:
            cases = [case for part in parts for case in part["cases"]]
            found[device.name] = {**parts[0], "cases": cases}
    return found


def headlines(result: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The result with one case a name: the last whose title begins so, which is the largest."""
    found = [next((c for c in reversed(result["cases"]) if title(c).startswith(n)), None) for n in names]
    return {**result, "cases": [case for case in found if case is not None]}


def tables(results: dict[str, dict[str, Any]], names: Sequence[str] = HEADLINES) -> str:
    """The README's section, between its marks."""
    lines: list[str] = []
    for device, result in results.items():
        found = list(ratios(headlines(result, names)))
        lines += [
            f"**{result['name']}** ({result['device']}, {result['started'][:10]}, torch "
            f"{result['environment']['packages']['torch']}; load {_load(result)}):",
            "",
            "| | kdfast takes | against eager | against `torch.compile` | against a library |",
            "|---|---|---|---|---|",
        ]
        for case in dict.fromkeys(ratio.case for ratio in found):
            own = [ratio for ratio in found if ratio.case == case]
            cells = [case, _time(own[0].ours), *(_cell(own, base) for base in BASES), _libraries(own)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"![Bars of those ratios](docs/pages/assets/bench-{device}.svg)", ""]
    return "\n".join(lines)


def slower(results: dict[str, dict[str, Any]]) -> str:
    """Every comparison that kdfast loses."""
    lines = ["| Where | against | kdfast is | on |", "|---|---|---|---|"]
    for result in results.values():
        lost = sorted((r for r in ratios(result) if r.speedup < EVEN), key=lambda r: r.speedup)
        for r in lost:
            lines.append(f"| {r.case} | {r.provider} | {r.speedup:.2f}× | {result['name']} |")
    return "\n".join(lines) + "\n"


def _cell(own: list[Ratio], provider: str) -> str:
    return next((_ratio(ratio) for ratio in own if ratio.provider == provider), "")


def _libraries(own: list[Ratio]) -> str:
    return ", ".join(f"{_ratio(ratio)} {ratio.provider}" for ratio in own if ratio.provider not in BASES)


def _ratio(ratio: Ratio) -> str:
    text = f"{ratio.speedup:.2f}×"
    return f"**{text}**" if ratio.speedup > 1 / EVEN else text


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _load(result: dict[str, Any]) -> str:
    loads = result["environment"].get("load_average")
    return f"{loads[0]} on {result['environment']['cpus']} CPUs" if loads else "unknown"


def rewritten(text: str) -> str:
    """A README with its generated parts as they should be."""
    results = newest()
    for name, content in (("performance", tables(results)), ("slower", slower(results))):
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m: f"{m[1]}{content}{m[2]}", text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"README.md: {count} places marked {name}; one is needed")
    return text


def pictures() -> dict[Path, str]:
    """Each device's bars."""
    drawn = {}
    for device, result in newest().items():
        with tempfile.TemporaryDirectory() as folder:
            draw(headlines(result, HEADLINES), Path(folder))
            drawn[ASSETS / f"bench-{device}.svg"] = (Path(folder) / "ratios.svg").read_text()
    return drawn


def differs(have: str, want: str) -> bool:
    """Whether a file says something else; of a picture its labels count, since lines depend on matplotlib's release."""
    if want.startswith("<svg"):
        return re.findall(r">([^<>]*×[^<>]*)<", have) != re.findall(r">([^<>]*×[^<>]*)<", want)
    return have != want


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    wanted = {README: rewritten(README.read_text())} | pictures()
    stale = [path for path, text in wanted.items() if not path.exists() or differs(path.read_text(), text)]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs from bench/results' if given.check else 'rewritten'}")
        if not given.check:
            path.write_text(wanted[path])
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
