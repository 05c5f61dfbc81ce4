"""What the numbers of a data report mean, in words: findings with grades, and one verdict.

The bounds are argued from "What Makes a Good Dataset for Knowledge Distillation?", whose Tables 1 and 3 give, for 36
pairs of teacher and set, how evenly the teacher's predictions spread and what a student learned from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kdfast.report.page import Finding

# (relative entropy of the ResNet-50 teacher's predictions [Table 3], student's over teacher's accuracy [Table 1,
# ResNet-18]); teachers of CIFAR-10, CIFAR-100, Tiny ImageNet, FGVC-Aircraft, Pets, EuroSAT, in this order.
_TEACHERS = (95.48, 77.45, 65.66, 91.27, 91.39, 97.80)
_ENTROPY = {
    "the teacher's own data": (0.999, 0.999, 0.997, 0.957, 0.999, 0.994),
    "best other photographs": (0.994, 0.983, 0.905, 0.805, 0.991, 0.896),
    "worst other photographs": (0.116, 0.631, 0.539, 0.322, 0.514, 0.664),
    "photographs of food": (0.711, 0.834, 0.658, 0.544, 0.542, 0.776),
    "OpenGL shaders": (0.939, 0.918, 0.909, 0.854, 0.928, 0.954),
    "dead leaves": (0.801, 0.808, 0.526, 0.572, 0.668, 0.653),
}
_ACCURACY = {
    "the teacher's own data": (95.98, 78.35, 67.14, 89.62, 86.80, 98.60),
    "best other photographs": (94.80, 76.66, 59.44, 83.91, 90.65, 98.55),
    "worst other photographs": (11.39, 23.01, 11.31, 7.17, 6.49, 59.00),
    "photographs of food": (93.24, 71.45, 40.08, 70.54, 60.92, 97.55),
    "OpenGL shaders": (94.02, 73.27, 56.89, 69.21, 72.59, 98.45),
    "dead leaves": (92.08, 66.02, 28.03, 40.71, 42.19, 98.05),
}
PAPER_POINTS: Mapping[str, list[tuple[float, float]]] = {
    name: [(entropy, got / had) for entropy, got, had in zip(_ENTROPY[name], _ACCURACY[name], _TEACHERS)]
    for name in _ENTROPY
}

EVEN, UNEVEN = 0.85, 0.67  # relative entropy: at least EVEN is good, below UNEVEN poor
COPIES_FAIR, COPIES_POOR = 0.01, 0.2  # share of images that are copies of others
THIN = 20  # distinct images that a predicted class should have at least
# Times an equal share, 1 in as many as there are classes: a class that takes MOST of them, or half of what all the
# others would have, or less than LEAST, makes a set uneven whatever its entropy, which hardly notices one class of few.
MOST, LEAST = 2.5, 0.2
NARROW = 0.05  # of the directions beyond the first: a set that spreads over less is one clump to the teacher
NEAR = 0.25  # share of images from which a boundary can be reached


def _narrow(m: Mapping[str, Any]) -> bool:
    return bool(m["effective_directions"] < min(2.0, 1 + NARROW * (m["feature_dimensions"] - 1)))


def evenness(entropy: float) -> str:
    """Grade of a relative entropy."""
    return "good" if entropy >= EVEN else "fair" if entropy >= UNEVEN else "poor"


def worst_class(m: Mapping[str, Any]) -> str:
    """What is said of the class that is farthest from an equal share; empty where none is far from it."""
    equal = 1 / m["classes"]
    if m["largest_share"] > min(MOST * equal, 0.5 + equal / 2):
        return f"one class{_named(m, 'largest_class')} takes {100 * m['largest_share']:.0f} % of the images"
    least = m.get("smallest_share", equal)
    if least < LEAST * equal:
        share = "none" if least == 0 else f"{100 * least:.1f} %"
        return f"one class{_named(m, 'smallest_class')} has {share} of the images"
    return ""


def _named(m: Mapping[str, Any], key: str) -> str:
    return f" ({m[key]})" if m.get(key) else ""


def reachable_entropy(classes_predicted: int, num_classes: int) -> float:
    """Relative entropy of a set that is balanced over so many classes."""
    return (
        math.log(classes_predicted) / math.log(num_classes) if num_classes > 1 and classes_predicted else 0.0
    )


def findings(m: Mapping[str, Any]) -> list[Finding]:
    """One judgement for each criterion, from the numbers in ``metrics.json``."""
    found = [_coverage(m), _selection(m), _augmentation(m), _boundary(m), _variety(m), _copies(m)]
    if m["faults"]:
        text = f"{m['faults']:,} records or shards are damaged and were left out: {m['first_fault']}."
        found.append(Finding("poor", "Damage", text))
    return found


def verdict(m: Mapping[str, Any]) -> tuple[str, str, str]:
    """Grade, headline and advice."""
    seen, classes = m["classes_predicted"], m["classes"]
    now, after = evenness(m["relative_entropy_raw"]), evenness(m["relative_entropy_supported"])
    narrow, worst = _narrow(m), worst_class(m)
    if seen == 1:
        return (
            "poor",
            "Not usable for this teacher",
            "It sees one single class in every image: nothing can be learned of the others, and nothing "
            "can be balanced. "
            "Check image size and normalisation; if they are right, take other images, or attack: true.",
        )
    if narrow:
        advice = "To the teacher all images are variations of one. Take more varied ones."
        return "poor", "Too narrow for this teacher", advice
    if now == "good" and worst:
        better = "kdfast select makes it even" if after == "good" else "add images of the others"
        advice = f"{_cover(seen, classes)}, but {worst}; {better}. {_push(m)}"
        return "fair", "Good once it is selected from" if after == "good" else "Usable, with gaps", advice
    if now == "good" and m["duplicate_share"] < COPIES_POOR:
        return "good", "A good set for this teacher", f"{_cover(seen, classes)} evenly. {_push(m)}"
    if now == "good":
        advice = f"{_cover(seen, classes)} evenly, but with many copies: its images count for less than their number."
        return "fair", "Even, but repetitive", f"{advice} {_push(m)}"
    if after == "good":
        return (
            "fair",
            "Good once it is selected from",
            f"The teacher finds {_of(seen, classes)} in it, unevenly. kdfast select makes it even; "
            f"then it should serve. {_push(m)}",
        )
    if after == "fair":
        advice = (
            f"The teacher finds {_of(seen - m['thin_classes'], classes)} in it more than a few times. "
            "Select, and add images of "
            f"the missing kinds. {_push(m)}"
        )
        return "fair", "Usable, with gaps", advice
    advice = (
        f"The teacher finds {_of(seen - m['thin_classes'], classes)} in it more than a few times: the "
        "others go untaught, "
        "however the images are chosen. Add images of another kind, or let the attack look for the missing "
        "classes "
        "(attack: true)."
    )
    return "poor", "Weak for this teacher", advice


def _cover(seen: int, classes: int) -> str:
    return (
        f"Its images cover all {classes} classes"
        if seen == classes
        else f"Its images cover {seen} of {classes} classes"
    )


def _of(seen: int, classes: int) -> str:
    return f"all {classes} classes" if seen == classes else f"{seen} of {classes} classes"


def _push(m: Mapping[str, Any]) -> str:
    if m["boundary_reachable"] >= NEAR:
        return "Many images lie near decision boundaries, so attack: true finds pairs for most of them."
    return "Few images lie near decision boundaries: soft targets and mixup matter."


def _kept(low: float, high: float) -> list[float]:
    return sorted(kept for group in PAPER_POINTS.values() for entropy, kept in group if low <= entropy < high)


def _coverage(m: Mapping[str, Any]) -> Finding:
    entropy, seen, classes = m["relative_entropy_raw"], m["classes_predicted"], m["classes"]
    text = (
        f"The teacher's predictions have a relative entropy of {entropy:.3f} (1: all classes alike, 0: one "
        "class). It "
        f"predicts {_of(seen, classes)}; the most frequent takes {100 * m['largest_share']:.0f} % of the "
        "images."
    )
    high, middle, low = _kept(EVEN, 2), _kept(UNEVEN, EVEN), _kept(0, UNEVEN)
    why = (
        f"Good from {EVEN}: the paper's {len(high)} sets there kept {100 * high[0]:.0f} to "
        f"{100 * high[-1]:.0f} % of the "
        f"teacher's accuracy. Poor below {UNEVEN}: its {len(low)} sets there kept {100 * low[0]:.0f} % at "
        "worst, "
        f"{100 * low[len(low) // 2]:.0f} % in the middle. The {len(middle)} between them kept "
        f"{100 * middle[0]:.0f} to {100 * middle[-1]:.0f} %."
    )
    grade = evenness(entropy)
    if worst := worst_class(m):
        grade = "fair" if grade == "good" else grade
        text += (
            f" By its worst class it is uneven: {worst}, where {100 / classes:.1f} % would be an equal share."
        )
    return Finding(grade, "Coverage of the classes", text, why)


def _selection(m: Mapping[str, Any]) -> Finding:
    reached, thin = m["relative_entropy_balanced"], m["thin_classes"]
    supported = m["relative_entropy_supported"]
    text = f"kdfast select would bring the relative entropy to {reached:.3f}."
    if m["relative_entropy_raw"] > reached - 0.03:
        text = f"kdfast select has nothing to add: the relative entropy could be {reached:.3f}."
    if thin:
        text += (
            f" {thin} of the predicted classes {'has' if thin == 1 else 'have'} fewer than {THIN} images of "
            f"{'its' if thin == 1 else 'their'} own, so it would repeat them; without such classes it is "
            f"{supported:.3f}. Render or collect more."
        )
    grade = evenness(supported)
    why = "Selection replicates the images of rare classes; what a class never shows, no copy of another image does."
    return Finding(grade, "What selection can do", text, why)


def _augmentation(m: Mapping[str, Any]) -> Finding:
    before, after, mixed = (m[f"relative_entropy_{name}"] for name in ("sample", "augmented", "mixup"))
    change = "raises" if after > before + 0.02 else "lowers" if after < before - 0.02 else "leaves"
    text = (
        f"Augmentation ({m['regime']}) {change} the relative entropy of a sample from {before:.3f} to "
        f"{after:.3f}; with "
        f"mixup it is {mixed:.3f}."
        if change != "leaves"
        else f"Augmentation ({m['regime']}) leaves the relative entropy at {after:.3f}; with mixup it is {mixed:.3f}."
    )
    if after < before - 0.1:
        text += " A milder regime may serve better: here the changed images look alike to the teacher."
        return Finding("fair", "Under augmentation", text)
    return Finding("note", "Under augmentation", text)


def _boundary(m: Mapping[str, Any]) -> Finding:
    near = m["boundary_reachable"]
    text = (
        f"The teacher is less than 90 % sure of {100 * m['unsure_share']:.0f} % of the images. From "
        f"{100 * near:.0f} % of a sample the boundary to the runner-up is crossed within ε = 8/255."
    )
    why = (
        "No grade: own data lies far from the boundaries and teaches well, noise lies on them and does "
        "not. What other "
        "data lacks in variety, pairs at the boundaries can give back (the paper's Table 6: 11 → 88 % for "
        "the worst set)."
    )
    return Finding("note", "Decision boundaries", text, why)


def _variety(m: Mapping[str, Any]) -> Finding:
    directions, spread = m["effective_directions"], m["class_spread"]
    text = (
        f"In the teacher's {m['feature_dimensions']}-dimensional features the images spread over "
        f"{directions:.1f} "
        "directions"
    )
    text += f"; images of one class lie {spread:.2f} times as far apart as the classes do." if spread else "."
    grade = "poor" if _narrow(m) else "note"
    why = (
        "Directions: effective rank of the features' covariance. They tell a clump from a cloud; they do "
        "not rank sets, "
        "as noise is varied too."
    )
    return Finding(grade, "Variety", text, why)


def _copies(m: Mapping[str, Any]) -> Finding:
    share = m["duplicate_share"]
    grade = "good" if share < COPIES_FAIR else "fair" if share < COPIES_POOR else "poor"
    text = f"{100 * share:.1f} % of the images repeat another one" + (
        f", the most frequent {m['largest_duplicate_group']} times." if share else "."
    )
    why = (
        f"Fair from {100 * COPIES_FAIR:.0f} %, poor from {100 * COPIES_POOR:.0f} %: a copy costs a step and "
        "teaches little."
    )
    return Finding(grade, "Copies", text, why)
