"""KD, DKD, DIST, FitNet, AT and RKD against plain formulas; every field; every refusal. The training options beside."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import ConfigError
from kdfast.experiments.common.augmentation import Augmentation, color_jitter
from kdfast.methods import baselines
from kdfast.methods.baselines.features import angle_loss, attention_map, distance_loss
from kdfast.training.mixing import MixedBatch, mix_batch, task_loss
from kdfast.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate_factor
from tests.support.diffkd import Net, batch, networks

CLASSES = {name: getattr(baselines, name) for name in ("AT", "DIST", "DKD", "FitNet", "KD", "RKD")}


def make(name: str, **config: Any) -> Any:
    torch.manual_seed(3)
    student, teacher = networks()
    method = CLASSES[name]
    return method(student, teacher, config=method.CONFIG(**config), images=batch()[0])


def outputs(method: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and last features of both networks, as the method's own step sees them."""
    images = batch()[0].double()
    maps = [net.last(net.stem(images)) for net in (method.student, method.teacher)]
    logits = [net.fc(x.mean((2, 3))) for net, x in zip((method.student, method.teacher), maps)]
    return logits[0], logits[1], maps[0], maps[1]


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    own = F.one_hot(target, student.shape[1]).bool()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    pt, qt = p[own], q[own]
    tckd = (pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()).mean()
    rest = [x.masked_fill(own, -math.inf) / temperature for x in (student, teacher)]
    q, p = (x.log_softmax(1).masked_fill(own, 0) for x in rest)
    nckd = ((p.exp() * (p - q)).masked_fill(own, 0)).sum(1).mean()
    return temperature**2 * tckd, temperature**2 * nckd


def dist(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        # The authors' ε, which counts where probabilities hardly differ.
        return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    return temperature**2 * apart(q, p), temperature**2 * apart(q.T, p.T)


def rkd_distances(x: Tensor) -> Tensor:
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / d[d > 0].mean()


def test_terms_are_the_papers_formulas() -> None:
    images, labels = batch()[0].double(), batch()[1]
    expected: dict[str, Any] = {
        "KD": lambda s, t, a, b, m: 0.9 * kl(s, t, 4.0) + 0.1 * F.cross_entropy(s, labels),
        "DKD": lambda s, t, a, b, m: (
            sum(w * x for w, x in zip((1, 8), dkd(s, t, labels, 4.0))) + F.cross_entropy(s, labels)
        ),
        "DIST": lambda s, t, a, b, m: 2 * sum(dist(s, t, 4.0)) + F.cross_entropy(s, labels),
        "FitNet": lambda s, t, a, b, m: 100 * F.mse_loss(m.regressors[0](a), b) + F.cross_entropy(s, labels),
        "AT": lambda s, t, a, b, m: (
            1000 * (attention_map(a) - attention_map(b)).pow(2).mean() + F.cross_entropy(s, labels)
        ),
        "RKD": lambda s, t, a, b, m: (
            25 * distance_loss(a.mean((2, 3)), b.mean((2, 3)))
            + 50 * angle_loss(a.mean((2, 3)), b.mean((2, 3)))
            + F.cross_entropy(s, labels)
        ),
    }
    for name, formula in expected.items():
        method = make(name).double()
        method.teacher.double()
        loss, parts = method(images, labels)
        want = formula(*outputs(method), method)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5, msg=name)
        weight = 0.1 if name == "KD" else 1.0
        torch.testing.assert_close(parts["kd"] + weight * parts["task"], loss.detach(), msg=name)
        loss.backward()
        assert all(p.grad is not None for p in method.parameters()), name


def test_attention_maps_have_length_one() -> None:
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    energy = (x**2).mean(1).flatten(1)
    torch.testing.assert_close(attention_map(x), energy / energy.norm(dim=1, keepdim=True))


def test_relations_are_pairs_and_triplets() -> None:
    s, t = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(distance_loss(s, t), F.smooth_l1_loss(rkd_distances(s), rkd_distances(t)))
    cosines = []
    for x in (s, t):
        table = torch.zeros(5, 5, 5, dtype=torch.float64)
        for j in range(5):
            for i in range(5):
                for k in range(5):
                    if i != j and k != j:
                        table[j, i, k] = F.cosine_similarity(x[i] - x[j], x[k] - x[j], 0)
        cosines.append(table)
    torch.testing.assert_close(angle_loss(s, t), F.smooth_l1_loss(*cosines))
    assert torch.autograd.gradcheck(lambda x: distance_loss(x, t), s.clone().requires_grad_())
    same = torch.ones(4, 3, requires_grad=True)  # two samples of one feature have no direction, and no NaN
    (distance_loss(same, t[:4].float()) + angle_loss(same, t[:4].float())).backward()
    assert bool(same.grad.isfinite().all())  # type: ignore[union-attr]


OTHER: dict[str, Any] = {
    "temperature": 2.0,
    "weight": 0.5,
    "task_weight": 2.0,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "alpha": 3.0,
    "beta": 3.0,
    "gamma": 3.0,
    "kd_weight": 1.0,
    "regressor": False,
    "student_layers": ("stem",),
    "teacher_layers": ("stem",),
    "student_layout": "channels_last",
    "teacher_layout": "channels_last",
    "distance_weight": 1.0,
    "angle_weight": 1.0,
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_changes_the_loss(name: str) -> None:
    def value(**config: Any) -> float:
        method = make(name, **config)
        torch.manual_seed(5)
        return float(method(*batch())[0].detach())

    for field in fields(CLASSES[name].CONFIG):
        if field.name == "ignore_index" or (name, field.name) in (
            ("DKD", "mixup_alpha"),
            ("DKD", "cutmix_alpha"),
        ):
            continue
        needs: dict[str, Any] = {}
        if name == "FitNet" and field.name == "temperature":
            needs = {"kd_weight": 1.0}
        if field.name == "regressor":
            with pytest.raises(ValueError, match="regressor: got False, and the layers have 4 and 6"):
                make(name, regressor=False)
            continue
        assert value(**needs) == value(**needs)
        assert value(**needs) != value(**needs, **{field.name: OTHER[field.name]}), field.name


def test_dense_students_learn_too() -> None:
    class Dense(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = self.fc(self.last(self.stem(x)).movedim(1, -1)).movedim(-1, 1)
            return F.interpolate(logits, size=x.shape[-2:])

    masks = torch.randint(5, (4, 8, 8))
    masks[:, 0] = 255
    for name in CLASSES:
        torch.manual_seed(0)
        method = CLASSES[name](Dense(4), Dense(6).eval().requires_grad_(False), images=batch()[0])
        loss, parts = method(batch()[0], masks)
        logits = method.student(batch()[0])
        expected = F.cross_entropy(logits, masks, ignore_index=255)
        torch.testing.assert_close(parts["task"], expected.detach())
        assert bool(loss.isfinite())


def test_a_regressor_may_be_a_convolution_alone() -> None:
    """DiffKD's MSE baseline: a 1×1 convolution and the error, with nothing of the logits."""
    method = make("FitNet", regressor="conv", weight=2.0, task_weight=0.0)
    (regressor,) = method.regressors
    assert [type(layer).__name__ for layer in regressor] == ["Conv2d"]
    loss = method.step(batch())
    with torch.no_grad():
        own, other = (network.last(network.stem(batch()[0])) for network in (method.student, method.teacher))
    assert float(loss.detach()) == pytest.approx(
        2 * float(F.mse_loss(regressor(own), other).detach()), rel=1e-3
    )
    with pytest.raises(ConfigError, match="regressor: got 'linear', accepted: true, false, conv"):
        baselines.FitNetConfig(regressor="linear")  # type: ignore[arg-type]


def test_a_regressor_is_trained_and_not_exported() -> None:
    method = make("FitNet")
    assert len(list(method.own_parameters())) == 4
    assert sorted(method.student.state_dict()) == sorted(Net(4).state_dict())
    assert list(make("KD").own_parameters()) == []
    torch.manual_seed(0)
    same = baselines.FitNet(
        Net(4),
        Net(4).eval().requires_grad_(False),
        config=baselines.FitNetConfig(regressor=False),
        images=batch()[0],
    )
    assert list(same.own_parameters()) == []
    assert bool(same.step(batch()).isfinite())
    same.close()
    assert not any(m._forward_hooks for m in same.student.modules())


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "require grad", lambda: baselines.KD(Net(4), Net(4))),
        (ValueError, "did you mean last", lambda: make("AT", student_layers=("lost",))),
        (ConfigError, "temperature: got 0", lambda: baselines.KDConfig(temperature=0)),
        (ConfigError, "weight: got -1", lambda: baselines.KDConfig(weight=-1)),
        (ConfigError, "label_smoothing: got 1.0", lambda: baselines.KDConfig(label_smoothing=1.0)),
        (ConfigError, "cutmix_alpha: got 0", lambda: baselines.KDConfig(cutmix_alpha=0)),
        (
            ConfigError,
            "teacher_layers: got 1",
            lambda: baselines.ATConfig(student_layers=("a", "b"), teacher_layers=("a",)),
        ),
        (ValueError, "teacher_layers: got 1; as many", lambda: make("AT", student_layers=("stem", "last"))),
        (ValueError, "DKD is defined for one class", lambda: make("DKD", mixup_alpha=1.0)),
        (ValueError, "DKD needs labels", lambda: make("DKD").step(batch()[0])),
    ],
)
def test_refusals_name_the_argument(error: type[Exception], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def test_mixing_and_its_task_loss() -> None:
    images, labels = batch(8)
    assert mix_batch(images).images is images
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        mixed = mix_batch(images, labels, mixup=0.8, cutmix=1.0)
        assert mixed.partner is not None
        assert mixed.lam is not None
        assert len(set(mixed.lam.tolist())) == 1  # one share a batch
        lam = mixed.lam[0]
        blended = torch.allclose(mixed.images, lam * images + (1 - lam) * images[mixed.partner], atol=1e-6)
        kinds.add(blended)
        if not blended:
            own = (mixed.images == images).all(1)
            assert bool((own | (mixed.images == images[mixed.partner]).all(1)).all())
    assert kinds == {True, False}
    logits = torch.randn(8, 5, dtype=torch.float64)
    onehot = mixed.lam.double()[:, None] * F.one_hot(labels, 5) + (
        1 - mixed.lam.double()[:, None]
    ) * F.one_hot(labels[mixed.partner], 5)
    found = task_loss(logits, labels, mixed, label_smoothing=0.1)
    torch.testing.assert_close(
        found, F.cross_entropy(logits, onehot, label_smoothing=0.1), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(task_loss(logits, labels, MixedBatch(images)), F.cross_entropy(logits, labels))


def test_rmsprop_damps_as_tensorflows_does_at_rest() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer([weight], OptimizerConfig("rmsprop", lr=0.1, weight_decay=0.0, momentum=0.0))
    weight.grad = torch.tensor([1e-6])
    optimizer.step()
    # A vanishing gradient moves by lr·g/√ε, not by lr as an ε of 1e-8 would have it.
    assert float((1 - weight).detach()) == pytest.approx(0.1 * 1e-6 / math.sqrt(1e-3), rel=0.05)
    with pytest.raises(ConfigError, match="accepted: sgd, adamw, rmsprop"):
        build_optimizer([weight], OptimizerConfig("adam"))  # type: ignore[arg-type]


def test_schedules_by_step_and_by_power() -> None:
    step = ScheduleConfig("step", gamma=0.97, every=2.4)
    assert learning_rate_factor(step, 23, 10, 1000) == 1
    assert learning_rate_factor(step, 24, 10, 1000) == pytest.approx(0.97)
    assert learning_rate_factor(step, 240, 10, 1000) == pytest.approx(0.97**10)
    poly = ScheduleConfig("poly")
    assert learning_rate_factor(poly, 250, 10, 1000) == pytest.approx(0.75**0.9)
    assert learning_rate_factor(poly, 1000, 10, 1000) == 0
    with pytest.raises(ConfigError, match="every: got 0"):
        ScheduleConfig("step", every=0)


def test_strong_augmentations_do_what_their_names_say() -> None:
    images = torch.rand(16, 3, 12, 12)
    generator = torch.Generator().manual_seed(0)
    for name in ("rand_augment", "color_jitter", "erase"):
        found = Augmentation((name,), 12)(images, generator)
        assert found.shape == images.shape
        assert not torch.equal(found, images)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    erased = Augmentation(("erase",), 12)(images, generator)
    assert 0 < float((erased != images).flatten(1).any(1).float().mean()) < 1
    torch.testing.assert_close(color_jitter(images, generator, strength=0.0), images)
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    jittered = color_jitter(grey, generator)
    torch.testing.assert_close(jittered[:, 0], jittered[:, 1])  # grey stays grey
