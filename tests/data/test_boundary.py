"""Decision-boundary pairs: the invariants of every pair, on networks small enough to reason about."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kdfast.data.boundary as boundary
from kdfast.data import decision_boundary_pairs, random_targets


class Counting(nn.Module):
    """A small convolutional network with normalisation inside, that counts its passes."""

    def __init__(self, classes: int = 5, scale: float = 3.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 64, classes),
        )
        self.scale, self.passes = scale, 0
        # As a trained network would: outputs that tell classes apart, without favourites.
        self.eval()
        with torch.no_grad():
            logits = self.body(torch.rand(256, 3, 8, 8))
            spread = logits.std(0).mean()
            self.body[-1].weight.div_(spread)
            self.body[-1].bias.sub_(logits.mean(0)).div_(spread)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.scale * self.body(images)


@pytest.fixture
def attack() -> tuple[Counting, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = Counting().eval()
    images = torch.rand(64, 3, 8, 8)
    predictions = model(images).argmax(1)
    model.passes = 0
    return model, images, random_targets(predictions, 5, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_the_invariants_of_every_pair(
    attack: tuple[Counting, torch.Tensor, torch.Tensor], threshold: float
) -> None:
    model, images, targets = attack
    epsilon = 8 / 255
    pairs = decision_boundary_pairs(model, images, targets, epsilon=epsilon, threshold=threshold)
    count = int(pairs.success.sum())
    assert 10 < count < 64
    assert len(pairs.pre) == len(pairs.post) == count
    assert len(pairs.deeper) == 2 * count
    original, wanted = images[pairs.success], targets[pairs.success]
    for part, start in (
        (pairs.pre, original),
        (pairs.post, original),
        (pairs.deeper, torch.cat([original] * 2)),
    ):
        assert (part - start).abs().max() <= epsilon + 1e-6
        assert part.min() >= 0
        assert part.max() <= 1
        assert not part.requires_grad
    before, after = model(pairs.pre).softmax(1), model(pairs.post).softmax(1)
    assert (before.argmax(1) != wanted).all()
    assert (after.argmax(1) == wanted).all()
    assert before.max() < threshold
    assert after.max() < threshold
    # Neighbours: one step apart, and no step exceeds what ten successes make of the first.
    assert (pairs.pre - pairs.post).abs().max() <= 1.1**20 / 255 + 1e-6
    own = torch.cat([wanted, before.argmax(1)])
    shallow = torch.cat([after, before]).gather(1, own[:, None])
    deep = model(pairs.deeper).softmax(1).gather(1, own[:, None])
    assert (deep - shallow).mean() > 0


@pytest.mark.parametrize("scale, alpha", [(3.0, 1 / 255), (60.0, 4 / 255)])
def test_agrees_with_the_plain_algorithm_image_by_image(
    attack: tuple[Counting, torch.Tensor, torch.Tensor], scale: float, alpha: float
) -> None:
    model, images, targets = attack
    model, images, model.scale = model.double(), images[:24].double(), scale
    pairs = decision_boundary_pairs(model, images, targets[:24], alpha=alpha, threshold=0.7)
    if scale > 3:
        # A steep network crosses with confidence: steps are taken back, and other pairs are found than without.
        eager = decision_boundary_pairs(model, images, targets[:24], alpha=alpha, threshold=1.0)
        both = eager.success & pairs.success
        rows = [part.post[part.success.cumsum(0)[both] - 1] for part in (eager, pairs)]
        assert ((rows[0] - rows[1]).abs().flatten(1).max(1).values > 1e-3).sum() > 3
    row = 0
    for i in range(24):
        found = plain_attack(model, images[i : i + 1], int(targets[i]), 8 / 255, alpha, 20, 0.7)
        assert bool(pairs.success[i]) == (found is not None)
        if found is not None:
            torch.testing.assert_close(pairs.pre[row], found[0][0], rtol=0, atol=1e-12)
            torch.testing.assert_close(pairs.post[row], found[1][0], rtol=0, atol=1e-12)
            row += 1
    assert 3 < row < 24


def plain_attack(
    model: nn.Module,
    start: torch.Tensor,
    target: int,
    epsilon: float,
    step: float,
    steps: int,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The specification, word by word, for one image."""
    x = start
    if model(x).argmax() == target:
        return None
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        nn.functional.cross_entropy(model(leaf), torch.tensor([target])).backward()
        moved = x - step * leaf.grad.sign()
        moved = torch.minimum(torch.maximum(moved, start - epsilon), start + epsilon).clamp(0, 1)
        if model(moved).argmax() != target:
            x, step = moved, step * 1.1
        elif max(model(moved).softmax(1).max(), model(x).softmax(1).max()) >= threshold:
            step *= 0.5
        else:
            return x, moved
    return None


def test_costs_one_pass_a_step_and_one_for_deeper(
    attack: tuple[Counting, torch.Tensor, torch.Tensor],
) -> None:
    model, images, targets = attack
    decision_boundary_pairs(model, images, targets, steps=7)
    assert model.passes == 7 + 1 + 1


def test_zero_successes_give_empty_batches(attack: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    model, images, targets = attack
    pairs = decision_boundary_pairs(model, images, targets, threshold=0.01)
    assert not pairs.success.any()
    assert pairs.pre.shape == pairs.post.shape == pairs.deeper.shape == (0, 3, 8, 8)


def test_an_image_that_is_there_already_does_not_succeed(
    attack: tuple[Counting, torch.Tensor, torch.Tensor],
) -> None:
    model, images, _ = attack
    pairs = decision_boundary_pairs(model, images, model(images).argmax(1))
    assert not pairs.success.any()


@pytest.mark.parametrize("count", [0, 1])
def test_small_batches(attack: tuple[Counting, torch.Tensor, torch.Tensor], count: int) -> None:
    model, images, targets = attack
    pairs = decision_boundary_pairs(model, images[:count], targets[:count])
    assert pairs.success.shape == (count,)


@pytest.mark.parametrize("classes", [2, 100])
def test_any_number_of_classes(classes: int) -> None:
    model = Counting(classes, scale=1.0).eval()
    images = torch.rand(32, 3, 8, 8)
    predictions = model(images).argmax(1)
    targets = random_targets(predictions, classes, torch.Generator().manual_seed(0))
    pairs = decision_boundary_pairs(model, images, targets, epsilon=0.2, alpha=0.02)
    assert pairs.success.any()
    assert (model(pairs.post).argmax(1) == targets[pairs.success]).all()


def test_leaves_the_model_as_it_was() -> None:
    model = Counting()
    model.train()
    model.body[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with torch.inference_mode():
        images = torch.rand(8, 3, 8, 8)
        pairs = decision_boundary_pairs(model, images, torch.zeros(8, dtype=torch.int64))
    assert pairs.success.dtype == torch.bool
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_takes_any_callable(attack: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    model, images, targets = attack
    direct = decision_boundary_pairs(model, images, targets)
    wrapped = decision_boundary_pairs(lambda x: model(x), images, targets)
    assert torch.equal(direct.post, wrapped.post)


def test_random_targets_are_uniform_over_the_others() -> None:
    predictions = torch.arange(5).repeat(4000)
    targets = random_targets(predictions, 5, torch.Generator().manual_seed(0))
    assert (targets != predictions).all()
    counts = torch.bincount(predictions * 5 + targets, minlength=25).view(5, 5)
    others = counts[~torch.eye(5, dtype=torch.bool)]
    # 1000 expected, 27 a standard deviation.
    assert others.min() > 860
    assert others.max() < 1140
    with pytest.raises(ValueError, match="num_classes: got 1"):
        random_targets(predictions, 1, torch.Generator())


GOOD = {"images": torch.rand(2, 3, 8, 8), "targets": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"images": torch.rand(3, 8, 8)}, ValueError, r"images: got shape \[3, 8, 8\]"),
        ({"images": GOOD["images"].byte()}, TypeError, "images: got torch.uint8"),
        (
            {"targets": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"targets: got shape \[3\] for 2 images",
        ),
        ({"targets": torch.zeros(2)}, TypeError, "targets: got torch.float32"),
        ({"epsilon": 8.0}, ValueError, "epsilon: got 8.0"),
        ({"alpha": 0.0}, ValueError, "alpha: got 0.0"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"threshold": 0.0}, ValueError, "threshold: got 0.0"),
    ],
)
def test_refusals(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decision_boundary_pairs(Counting(), **{**GOOD, **change})


@pytest.mark.gpu
def test_the_walk_never_waits_for_the_device(attack: tuple[Counting, torch.Tensor, torch.Tensor]) -> None:
    model, images, targets = attack
    model, images, targets = model.cuda(), images.cuda(), targets.cuda()
    decision_boundary_pairs(model, images, targets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.enable_grad():
            boundary._walk(model, images, targets, images - 0.03, images + 0.03, 1 / 255, 5, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
