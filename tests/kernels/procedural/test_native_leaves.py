"""Dead leaves in C++: the bits of the operators, at every size, seed and limit."""

from __future__ import annotations

import pytest
import torch

from kdfast.functional import render_leaves
from kdfast.reference.native import extension
from kdfast.reference.procedural import leaves as reference
from tests.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel"),
    pytest.mark.skipif(extension() is None, reason="the extension was not built"),
]


@pytest.mark.parametrize(
    ("height", "width", "limit", "seed"),
    [
        (32, 32, 5000, 0),
        (1, 1, 5000, 1),
        (1, 40, 5000, 2),
        (37, 5, 5000, 3),
        (48, 64, 5000, 2**64 - 1),
        (16, 16, 0, 4),
        (16, 16, 1, 4),
        (24, 24, 40, 5),  # the limit comes before the last bare pixel
        (120, 110, 5000, 2**33 + 6),  # large enough to be painted by the operators, too
    ],
)
def test_the_same_bits(height: int, width: int, limit: int, seed: int) -> None:
    index = torch.tensor([0, 1, 7, 2**31, 2**32 + 3, 2**53 + 1][: 2 if height > 100 else 6])
    got = reference.render(seed, index, height, width, limit)
    assert torch.equal(got, reference.by_operators(seed, index, height, width, limit))


def test_every_kind_of_leaf_alone() -> None:
    """One leaf on each image, of hundreds: circles, squares, rectangles, triangles and free shapes among them."""
    index = torch.arange(400)
    table = reference.draw(9, index, 0, 1, 40, 40)
    circles = (table[:, 0, 3:15].reshape(-1, 4, 3)[:, :, :2] == 0).all((1, 2))
    assert 30 < int(circles.sum()) < 110
    got = reference.render(9, index, 40, 40, 1)
    assert torch.equal(got, reference.by_operators(9, index, 40, 40, 1))


def test_it_is_what_runs_and_without_it_the_operators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.arange(3)
    want = render_leaves(index, (12, 12), seed=3)
    monkeypatch.setattr(
        reference, "by_operators", lambda *args: (_ for _ in ()).throw(AssertionError("operators"))
    )
    assert torch.equal(render_leaves(index, (12, 12), seed=3), want)
    monkeypatch.undo()
    monkeypatch.setattr(reference, "extension", lambda: None)
    assert torch.equal(render_leaves(index, (12, 12), seed=3), want)


def test_no_images_and_laws_that_do_not_fit() -> None:
    assert reference.render(3, torch.empty(0, dtype=torch.int64), 8, 9, 10).shape == (0, 3, 8, 9)
    radii, law = (table.numpy() for table in reference.radius_law())
    index = torch.arange(1).numpy()
    with pytest.raises(ValueError, match="radii, cumulative"):
        extension().dead_leaves(0, index, 4, 4, 5, radii[1:], law)
    with pytest.raises(ValueError, match="height, width"):
        extension().dead_leaves(0, index, -1, 4, 5, radii, law)
