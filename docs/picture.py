"""Draws the README's picture from a finished demo: ``python docs/picture.py out/demo``.

Writes docs/pages/assets/demo.png and, beside it, the metrics it shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent / "pages" / "assets"
GRIDS = {
    "samples-1-real.png": "real digits\n(the teacher's)",
    "samples-2-synthetic.png": "synthetic digits\n(the student's)",
    "samples-3-noise.png": "noise\n(for comparison)",
}
BARS = {
    "teacher_accuracy": "teacher, on real digits",
    "student_accuracy": "student, synthetic digits,\nsoft labels",
    "student_hard_label_accuracy": "student, synthetic digits,\nhard labels",
    "student_noise_accuracy": "student, noise,\nsoft labels",
}
SHOWN = (*BARS, "images", "settings")


def draw(demo: Path, out: Path) -> None:
    """Sample grids on the left, accuracies on held-out real digits on the right."""
    metrics = json.loads((demo / "metrics.json").read_text())
    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.bottom": False}
    )
    figure, axes = plt.subplots(
        1, 4, figsize=(11, 2.1), width_ratios=[1.25, 1.25, 1.25, 1], layout="constrained"
    )
    for axis, (name, title) in zip(axes, GRIDS.items(), strict=False):
        axis.imshow(plt.imread(demo / name))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    values = [100 * metrics[key] for key in BARS]
    colours = ["#9fa8da", "#3949ab", "#c5cae9", "#c5cae9"]
    bars = axes[-1].barh(list(BARS.values()), values, color=colours, height=0.65)
    axes[-1].bar_label(bars, [f"{value:.1f} %" for value in values], padding=3)
    axes[-1].set(xlim=(0, 118), xticks=[])
    axes[-1].set_title("accuracy on held-out real digits", fontsize=9)
    axes[-1].tick_params(length=0)
    axes[-1].invert_yaxis()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "demo.png", dpi=130, facecolor="white", metadata={"Software": ""})
    shown = {key: metrics[key] for key in SHOWN}
    (out / "demo.json").write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), ASSETS)
