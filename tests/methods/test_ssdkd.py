"""SSD-KD: a round of inversion against a plain re-implementation, priorities and re-scoring against the equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import CheckpointError, ConfigError
from kdfast.methods import SSDKD, SSDKDConfig
from kdfast.methods.ssdkd import Generator
from tests.support.ssdkd import CLASSES, MEAN, SHAPE, STD, TINY, Net, frozen, method, run, trained, trajectory

#: Views that are the images themselves, so that a test can compute what a step saw.
PLAIN: dict[str, Any] = {"padding": 0, "flip": False}


def normalised(images: Tensor) -> Tensor:
    return (images.double() - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )


def bn_inputs(net: Net, x: Tensor) -> list[tuple[nn.BatchNorm2d, Tensor]]:
    first = net.conv1(x)
    second = net.conv2(torch.relu(net.norm1(first)))
    return [(net.norm1, first), (net.norm2, second)]


def expected_loss(
    made: SSDKD,
    images: Tensor,
    targets: Tensor,
    counts: Tensor,
    *,
    adversarial: bool,
    average: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """bn·L_BN + oh·mean(φ·CE) − adv·mean(mask·KL), in float64, from the equations."""
    config = made.config
    teacher, student = (copy.deepcopy(net).double().eval() for net in (made.teacher, made.student))
    x = normalised(images)
    bn = x.new_zeros(())
    for number, (norm, entered) in enumerate(bn_inputs(teacher, x)):
        mean, var = entered.mean((0, 2, 3)), entered.var((0, 2, 3), unbiased=False)
        if average is not None:
            keep = config.bn_momentum
            mean = (1 - keep) * mean + keep * average[number][0]
            var = (1 - keep) * var + keep * average[number][1]
        bn = bn + (norm.running_mean - mean).norm() + (norm.running_var - var).norm()
    logits = teacher(x)
    p, c = logits.softmax(1).max(1)
    share = counts.double()[c] / max(int(counts.sum()), 1)
    phi = (1 - share) * (1 - p) ** config.gamma
    loss = config.bn * bn + config.oh * (phi * F.cross_entropy(logits, targets, reduction="none")).mean()
    if adversarial:
        out = student(x)
        kl = (logits.softmax(1) * (logits.log_softmax(1) - out.log_softmax(1))).sum(1)
        loss = loss - config.adv * (kl * (out.argmax(1) == logits.argmax(1))).mean()
    return loss


def oracle(made: SSDKD, counts: Tensor, meta: str) -> tuple[Tensor, Generator]:
    """A round in plain, slow PyTorch: best images, and the meta-generator afterwards."""
    config, inversion = made.config, made.inversion
    rng = torch.Generator()
    rng.set_state(made._rng.get_state())
    z = torch.randn(config.synthesis_batch, config.latent, generator=rng).requires_grad_()
    targets = torch.empty(config.synthesis_batch, dtype=torch.int64).random_(0, CLASSES, generator=rng)
    origin, clone = (
        Generator(config.latent, SHAPE, width=config.generator_width, upsamplings=1) for _ in range(2)
    )
    origin.load_state_dict(inversion.origin.state_dict())
    clone.load_state_dict(inversion.origin.state_dict())
    groups = [{"params": clone.parameters()}, {"params": [z], "lr": config.lr_z}]
    optimizer = torch.optim.Adam(groups, lr=config.lr_g, betas=(0.5, 0.999))
    meta_optimizer = torch.optim.Adam(
        origin.parameters(), lr=config.lr_g * config.inversion_steps, betas=(0.5, 0.999)
    )
    sums = [torch.zeros_like(p) for p in clone.parameters()]
    best, best_loss = None, float("inf")
    for _ in range(config.inversion_steps):
        images = clone(z)
        loss = expected_loss(made, images, targets, counts, adversarial=True)
        if loss.item() < best_loss:
            best, best_loss = images.detach(), loss.item()
        optimizer.zero_grad()
        loss.backward()
        for total, parameter in zip(sums, clone.parameters()):
            total += parameter.grad
        optimizer.step()
    for parameter, adapted, total in zip(origin.parameters(), clone.parameters(), sums):
        parameter.grad = total if meta == "fomaml" else 67 * (parameter - adapted).detach()
    meta_optimizer.step()
    assert best is not None
    return best, origin


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_a_round_is_the_algorithm(meta: str) -> None:
    made = method(**PLAIN, meta=meta, inversion_steps=4, lr_z=0.2)
    counts = torch.tensor([5, 0, 2, 1])
    made.inversion.rounds = 1
    images, origin = oracle(made, counts, meta)
    got = made.inversion.run(made.student, counts)
    torch.testing.assert_close(got, images, rtol=1e-4, atol=1e-4)
    wanted = dict(origin.named_parameters())
    for name, ours in made.inversion.origin.named_parameters():
        if (
            name != "convolutions.0.bias"
        ):  # before a batch norm: its gradient is rounding, and Adam makes ±lr of it
            torch.testing.assert_close(ours, wanted[name], rtol=1e-3, atol=2e-4)


def test_the_loss_is_the_equation_and_statistics_are_averaged_over_rounds() -> None:
    made = method(**PLAIN, inversion_steps=1)
    average: list[tuple[Tensor, Tensor]] | None = None
    for number in range(3):
        counts = torch.tensor([3, 1, 0, number])
        images = made.inversion.run(made.student, counts).clone()
        want = expected_loss(made, images, made.inversion._targets, counts, adversarial=True, average=average)
        torch.testing.assert_close(
            made.inversion.means["inversion_loss"].double(), want, rtol=1e-4, atol=1e-4
        )
        now = [
            (x.mean((0, 2, 3)).double(), x.var((0, 2, 3), unbiased=False).double())
            for _, x in bn_inputs(made.teacher, normalised(images).float())
        ]
        average = (
            now
            if average is None
            else [(0.9 * a + 0.1 * b, 0.9 * c + 0.1 * d) for (a, c), (b, d) in zip(average, now)]
        )


def test_the_mask_counts_only_what_both_agree_on() -> None:
    made = method()
    teacher = torch.tensor([[2.0, 0, 0, 0], [2.0, 0, 0, 0]])
    student = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], requires_grad=True)
    loss = made.inversion._disagreement(student, teacher)
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(loss, kl[0] / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0].abs().sum() > 0
    assert not gradient[1].any()
    torch.testing.assert_close(method(adv_mask=False).inversion._disagreement(student, teacher), kl.mean())


def test_the_best_step_is_kept() -> None:
    made = method(**PLAIN, inversion_steps=6, lr_z=20.0, lr_g=1.0)
    seen = []
    keep = made.inversion._keep
    made.inversion._keep = lambda images, loss: (  # type: ignore[method-assign]
        seen.append((float(loss), images.detach().clone())),
        keep(images, loss),
    )
    best = made.inversion.run(made.student, torch.zeros(CLASSES, dtype=torch.int64))
    losses = [loss for loss, _ in seen]
    lowest = losses.index(min(losses))
    assert lowest != len(losses) - 1  # else the last would do
    assert torch.equal(best, seen[lowest][1])


def test_the_adversarial_term_begins_one_round_before_distillation() -> None:
    made = method(fill_epochs=3, adv_mask=False)
    seen = []
    for _ in range(5):
        seen.append((made.ready, float(made.synthesize()[0, 0, 0, 0]) >= 0, float(made.parts["adv"])))
    assert [term > 0 for _, _, term in seen] == [False, False, True, True, True]
    assert [ready for ready, _, _ in seen] == [False] * 4 + [True]


def test_inversion_touches_neither_network_and_leaves_no_hooks() -> None:
    made = method()
    made.student.train()
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    made.synthesize()
    made.synthesize()
    assert made.student.training
    assert not made.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in made.student.state_dict().items())
    assert all(
        parameter.grad is None for net in (made.teacher, made.student) for parameter in net.parameters()
    )
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made.teacher.modules())


def test_hooks_and_modes_are_put_back_after_a_failure() -> None:
    made = method(act=0.1)
    made.student.train()
    made.inversion._optimizer.step = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        made.synthesize()
    assert made.student.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made.teacher.modules())


def test_the_first_layer_is_drawn_again_once() -> None:
    made = method(fill_epochs=1, reset_round=2, generator_width=8)
    drawn = []
    reset = made.inversion.origin.reset_first_layer
    made.inversion.origin.reset_first_layer = lambda rng: (reset(rng), drawn.append(made.rounds))  # type: ignore[method-assign]
    for _ in range(5):
        made.synthesize()
    assert drawn == [2]  # the rounds before it: 1 + 2 − 1
    generator = Generator(64, SHAPE)
    generator.reset_first_layer(torch.Generator().manual_seed(0))
    assert generator.linear.weight.detach().std() == pytest.approx(0.02, rel=0.02)
    assert not generator.linear.bias.any()


@pytest.mark.parametrize(
    ("shape", "upsamplings"), [((3, 32, 32), 2), ((1, 16, 16), 1), ((3, 30, 18), 2), ((3, 7, 5), 3)]
)
def test_a_generator_makes_images_of_any_size(shape: tuple[int, int, int], upsamplings: int) -> None:
    generator = Generator(10, shape, width=4, upsamplings=upsamplings, rng=torch.Generator().manual_seed(0))
    images = generator(torch.randn(3, 10))
    assert images.shape == (3, *shape)
    assert images.min() >= 0
    assert images.max() <= 1
    twin = Generator(10, shape, width=4, upsamplings=upsamplings, rng=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), twin.parameters()))
    assert not [name for name, _ in generator.named_buffers()]


def test_fast_datafrees_generator() -> None:
    """Linear 256→128·8·8, then 128→128, 128→64 and 64→3, with a batch norm before each but the last."""
    generator = Generator(256, (3, 32, 32))
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "linear.weight": (8192, 256),
        "norm.weight": (128,),
        "convolutions.0.weight": (128, 128, 3, 3),
        "convolutions.1.weight": (64, 128, 3, 3),
        "norms.0.weight": (128,),
        "norms.1.weight": (64,),
        "last.weight": (3, 64, 3, 3),
    }


def kl_of(made: SSDKD, rows: Tensor, *, training: bool) -> Tensor:
    x = normalised(rows / 255).float()
    with torch.no_grad():
        student = made.student.train(training)(x).double()
        teacher = made.teacher(x).double()
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)


def test_new_rows_are_scored_as_they_are_stored() -> None:
    made = method(**PLAIN)
    images = made.synthesize()
    assert images.dtype == torch.uint8
    state = made.buffer.state_dict()
    assert torch.equal(state["rows"], images)
    torch.testing.assert_close(
        state["delta"][:6].double(), kl_of(made, images, training=False), rtol=1e-4, atol=1e-6
    )
    predicted = made.teacher(normalised(images / 255).float()).argmax(1)
    assert torch.equal(state["labels"][:6].long(), predicted)
    assert torch.equal(made.contents.class_counts(), predicted.bincount(minlength=CLASSES))


def test_counts_follow_evictions() -> None:
    made = method(capacity=10)
    for _ in range(5):
        made.synthesize()
    assert int(made.contents.class_counts().sum()) == 10
    assert torch.equal(made.contents.class_counts(), made.buffer.class_counts())
    assert int(made.contents.difficulty_counts().sum()) == 10


def test_a_step_rescores_only_what_it_drew_by_weight_times_kl() -> None:
    made = method(**PLAIN, batch_size=4)
    made.synthesize()
    made.synthesize()
    before = made.buffer.state_dict()
    made.student.train()
    twin = method(**PLAIN, batch_size=4)
    twin.load_state_dict(made.state_dict())
    drawn = twin.buffer.sample(4)
    x = normalised(drawn.samples / 255).float()
    student = {name: value.clone() for name, value in made.student.state_dict().items()}
    loss = made.step()
    made.student.load_state_dict(student)
    log_q = (made.student(x).double() / 20).log_softmax(1)
    want = 400 * F.kl_div(log_q, (made.teacher(x).double() / 20).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    made.student.load_state_dict(student)
    priority = drawn.weight.double() * kl_of(made, drawn.samples, training=True)
    after = made.buffer.state_dict()
    for index, value in zip(drawn.index.tolist(), priority.tolist()):
        if drawn.index.tolist().count(index) == 1:
            assert float(after["delta"][index]) == pytest.approx(value, rel=1e-3)
    untouched = torch.ones(len(before["delta"]), dtype=torch.bool)
    untouched[drawn.index] = False
    assert torch.equal(before["delta"][untouched], after["delta"][untouched])
    assert not torch.equal(before["delta"][drawn.index], after["delta"][drawn.index])


def test_importance_weights_count_in_the_loss_only_when_asked() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    weight = torch.tensor([2.0, 1, 1, 1, 1])
    plain, weighted = method(), method(weight_in_loss=True)
    assert torch.equal(plain(student, teacher, weight=weight), plain(student, teacher))
    rows = torch.stack([plain(s[None], t[None]) for s, t in zip(student, teacher)])
    torch.testing.assert_close(weighted(student, teacher, weight=weight), (rows * weight).mean())


@pytest.mark.parametrize(
    "removed",
    [
        {"diversity": False, "difficulty": False},
        {"sampling": "uniform"},
        {"bn": 0.0},
    ],
    ids=["phi", "priority sampling", "batch norm"],
)
def test_removing_a_piece_changes_the_trajectory(removed: dict[str, Any]) -> None:
    whole, without = trajectory(), trajectory(**removed)
    assert whole.shape == without.shape
    assert not torch.equal(whole, without)


BASELINES: dict[str, dict[str, Any]] = {
    "fast": {"diversity": False, "difficulty": False, "sampling": "uniform"},
    "deepinversion": {
        **{"generator": "pixels", "diversity": False, "difficulty": False, "sampling": "uniform"},
        **{"tv": 2.5e-5, "l2": 3e-8, "adv": 0.0, "bn": 1.0, "oh": 1.0, "target": "random"},
    },
    "dafl": {
        **{"generator": "persistent", "diversity": False, "difficulty": False, "sampling": "uniform"},
        **{
            "replay": False,
            "target": "teacher",
            "bn": 0.0,
            "oh": 1.0,
            "adv": 0.0,
            "act": 1e-3,
            "balance": 20.0,
        },
    },
    "dfq": {
        **{"generator": "persistent", "diversity": False, "difficulty": False, "sampling": "uniform"},
        **{"replay": False, "target": "teacher", "bn": 1.0, "oh": 1.0, "adv": 1.0, "balance": 20.0},
    },
}


@pytest.mark.parametrize("name", BASELINES)
def test_the_predecessors_run_in_the_same_loop(name: str) -> None:
    seen = trajectory(**BASELINES[name])
    assert seen.isfinite().all()
    assert not torch.equal(seen, trajectory())


def test_without_replay_every_step_sees_new_images() -> None:
    made = method(**BASELINES["dafl"])
    made.synthesize()
    seen = []
    made.teacher.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    made.step()
    made.step()
    assert made.buffer is None
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    "values",
    [{}, {"generator": "persistent"}, {"generator": "scratch"}, {"generator": "pixels"}, BASELINES["dfq"]],
)
def test_a_restored_run_goes_on_exactly(values: dict[str, Any]) -> None:
    made = method(**values)
    run(made, 3)
    saved, student = made.state_dict(), {k: v.clone() for k, v in made.student.state_dict().items()}
    want = run(made, 2)
    other = method(**values, seed=9)
    other.load_state_dict(saved)
    other.student.load_state_dict(student)
    assert torch.equal(run(other, 2), want)


def test_what_cannot_work_is_refused() -> None:
    teacher, common = frozen(trained(1)), {"image_shape": SHAPE, "mean": MEAN, "std": STD}
    config = SSDKDConfig(**TINY)
    with pytest.raises(ValueError, match=r"image_shape: got \(3, 8\)"):
        SSDKD(None, teacher, config=config, image_shape=(3, 8), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="with 2 values of mean"):
        SSDKD(None, teacher, config=config, image_shape=SHAPE, mean=(0.0, 0.0), std=STD)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        SSDKD(None, teacher, config=config, batch_size=0, **common)
    with pytest.raises(ValueError, match=r"teacher: gives shape \[2, 192, 1\]"):
        SSDKD(None, nn.Sequential(nn.Flatten(), nn.Unflatten(1, (192, 1))).eval(), config=config, **common)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval().requires_grad_(False)
    with pytest.raises(
        ConfigError,
        match=r"bn: got 10\.0, accepted: 0 for this teacher \(network: got Sequential without batch norms",
    ):
        SSDKD(None, plain, config=config, **common)
    with pytest.raises(ConfigError, match=r"act: the teacher has no get_classifier\(\)"):
        SSDKD(trained(2), plain, config=SSDKDConfig(**TINY, bn=0.0, act=1.0), **common).synthesize()
    with pytest.raises(ValueError, match="student: got None"):
        SSDKD(None, teacher, config=config, **common).synthesize()
    with pytest.raises(ValueError, match=r"step: nothing to learn from; call synthesize\(\) first"):
        method().step()
    with pytest.raises(CheckpointError, match="replay differs"):
        method().load_state_dict(method(**BASELINES["dafl"]).state_dict())
    with pytest.raises(CheckpointError, match="capacity is 10, this buffer's is 12"):
        method().load_state_dict(method(capacity=10).state_dict())
