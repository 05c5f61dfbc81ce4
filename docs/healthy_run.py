"""Draws what a healthy run of SSD-KD looks like: ``python docs/healthy_run.py runs/digits-ssdkd``.

Writes docs/pages/assets/ssdkd-healthy.svg from the run's metrics; the page says the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent / "pages" / "assets" / "ssdkd-healthy.svg"


def draw(run: Path, out: Path) -> dict[str, float]:
    """φ, priorities, agreement and accuracy over the steps, and what the buffer holds at the end, by class."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "eval"]
    metrics = json.loads((run / "metrics.json").read_text())
    counts = metrics["category_counts"]
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kdfast"}
    )
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.3), layout="constrained")
    steps = [line["step"] for line in train]
    for axis, name, title in (
        (axes[0], "phi", "φ of a round's images"),
        (axes[1], "priority", "priority w·KL"),
    ):
        axis.plot(steps, [line[name] for line in train], color="#3949ab", linewidth=1)
        axis.set(title=title, ylim=(0, None))
    axes[2].plot(
        steps, [line["agreement"] for line in train], color="#9fa8da", linewidth=1, label="agreement"
    )
    axes[2].plot(
        [line["step"] for line in tests],
        [line["accuracy"] for line in tests],
        color="#3949ab",
        label="held-out accuracy",
    )
    axes[2].set(title="student", ylim=(0, 1))
    axes[2].legend(frameon=False, loc="lower right")
    axes[3].bar(range(len(counts)), counts, color="#3949ab")
    axes[3].set(title="rows by class, at the end", xticks=range(len(counts)))
    for axis in axes[:3]:
        axis.set_xlabel("distillation step")
    figure.savefig(out, metadata={"Date": None})
    third = len(train) // 3
    shown = {
        f"{name}_{part}": sum(line[name] for line in chosen) / len(chosen)
        for name in ("phi", "priority", "importance", "agreement", "kl")
        for part, chosen in (("first", train[:third]), ("last", train[-third:]))
    }
    return {**shown, "least": min(counts), "most": max(counts), "accuracy": metrics["accuracy"]}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(draw(Path(sys.argv[1]), OUT), indent=1))
