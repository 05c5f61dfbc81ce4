"""DiffKD against its equations: the schedule, the start, the steps, and who gets gradients."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.errors import ConfigError, KDFastError
from kdfast.methods.diffkd import (
    DiffKD,
    DiffKDConfig,
    Pair,
    Schedule,
    activation_memory,
    saliency,
    student_steps,
)
from kdfast.methods.diffkd.blocks import Bottleneck, FeatureDenoiser, LogitDenoiser, NoiseAdapter
from kdfast.methods.diffkd.denoising import Denoising
from kdfast.methods.diffkd.schedule import alpha_bars
from kdfast.models import create_model
from tests.support.diffkd import Net, batch, gradients, make, networks

TABLE = {  # t: ᾱ, c1, c2
    400: (0.193572, 1.426701, -0.502744),
    300: (0.394011, 1.290662, -0.418500),
    200: (0.656347, 1.167829, -0.360785),
    100: (0.895141, 1.056896, -0.332243),
    0: (0.999900, 1.000050, -0.010001),
}


def one(**config: Any) -> Denoising:
    """A pair of maps in double precision, 3 to 4 channels, without an autoencoder."""
    torch.manual_seed(0)
    dense = config.pop("dense", True)
    made = DiffKDConfig(latent_channels=None, **config)
    kind = "mse" if dense else "kl"
    return Denoising(3, 4, dense=dense, latent=None, distance=kind, config=made).double()


def maps(size: int = 5, count: int = 6) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(count, 3, size, size, dtype=torch.float64),
        torch.randn(count, 4, size, size, dtype=torch.float64),
    )


def test_the_table_of_coefficients() -> None:
    bars, taken = alpha_bars(), student_steps()
    assert [t for t, _, _ in taken] == list(TABLE)
    for t, c1, c2 in taken:
        torch.testing.assert_close((float(bars[t]), c1, c2), TABLE[t], rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_the_steps_keep_the_signal(steps: int) -> None:
    """c1·√ᾱ_t = √ᾱ_prev: the share of x0 in z after a step is what the schedule says."""
    bars, taken = alpha_bars(), student_steps(steps)
    assert len(taken) == steps
    assert taken[-1][0] == 0
    after = [float(bars[t]) for t, _, _ in taken[1:]] + [1.0]
    for (t, c1, c2), bar in zip(taken, after):
        assert c1 * math.sqrt(float(bars[t])) == pytest.approx(math.sqrt(bar), abs=1e-12)
        # An exact ε̂ leaves exactly the noise of the next step.
        assert c1 * math.sqrt(1 - float(bars[t])) + c2 == pytest.approx(math.sqrt(1 - bar), abs=1e-12)


def test_the_steps_are_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    z, noise = torch.randn(2, 3), torch.randn(2, 3)
    for (t, c1, c2), expected in zip(student_steps(), scheduler.timesteps[5:]):
        assert t == int(expected)
        theirs = scheduler.step(noise, expected, z).prev_sample
        torch.testing.assert_close(c1 * z + c2 * noise, theirs, rtol=1e-5, atol=1e-5)


def test_an_oracle_of_the_noise_recovers_the_feature() -> None:
    module, (_, x0) = one().eval(), maps()
    bar = float(alpha_bars()[400])
    noise = torch.randn_like(x0)
    z = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * noise
    module.denoiser.norm = None
    module.denoiser.forward = lambda _: noise  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(module.clean(z), x0, rtol=1e-9, atol=1e-9)


def test_the_schedule_stays_exact_whatever_the_module_is_cast_to() -> None:
    schedule = Schedule()
    expected = alpha_bars().float()
    for cast in (Schedule.bfloat16, Schedule.half, Schedule.float):
        cast(schedule)
        assert schedule.bars.dtype == torch.float32
        torch.testing.assert_close(schedule.bars, expected, rtol=0, atol=0)
    assert schedule.double().bars.dtype == torch.float64
    torch.testing.assert_close(schedule.bars, alpha_bars(), rtol=0, atol=0)
    assert float(schedule.bars[0]) < 1.0
    assert list(schedule.state_dict()) == []
    assert len(schedule) == 1000


def test_the_modules_have_the_published_shapes() -> None:
    names = {name: tuple(p.shape) for name, p in FeatureDenoiser(16).named_parameters()}
    assert names["embedding.weight"] == (1280, 16)
    assert names["block1.conv1.weight"] == (4, 16, 1, 1)
    assert names["block2.conv2.weight"] == (4, 4, 3, 3)
    assert names["out.bias"] == (16,)
    names = {name: tuple(p.shape) for name, p in LogitDenoiser(5).named_parameters()}
    assert [names[f"{layer}.weight"][:2] for layer in ("fc1", "fc2", "fc3", "out")] == [
        (20, 5),
        (5, 20),
        (20, 5),
        (5, 20),
    ]
    assert NoiseAdapter(16, dense=True).block.conv1.weight.shape == (2, 16, 1, 1)
    assert NoiseAdapter(5, dense=False).fc1.weight.shape == (10, 5, 1, 1)
    assert Bottleneck(3, 8).conv1.weight.shape == (1, 3, 1, 1)


def test_the_bottleneck_is_its_formula() -> None:
    """BN and ReLU twice, BN, the input added, no ReLU after it."""
    block, x = Bottleneck(4, 2).double(), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    plain = copy.deepcopy(block)
    hidden = F.relu(plain.bn1(plain.conv1(x)))
    hidden = F.relu(plain.bn2(plain.conv2(hidden)))
    expected = plain.bn3(plain.conv3(hidden)) + x
    torch.testing.assert_close(block(x), expected)
    assert (expected < 0).any()
    for ours, theirs in zip(block.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dense", [True, False])
def test_gamma_is_a_share_and_one_means_no_noise(dense: bool) -> None:
    module, (student, _) = one(dense=dense), maps(5 if dense else 1)
    z, gamma = module.start(student)
    assert gamma.shape == (6,)
    assert bool(((gamma > 0) & (gamma < 1)).all())
    assert not torch.allclose(z, module.trans(student))
    assert module.adapter is not None
    with torch.no_grad():
        module.adapter.out.bias.copy_(torch.tensor([1e4, -1e4]))
    z, gamma = module.start(student)
    assert bool((gamma == 1).all())
    torch.testing.assert_close(z, module.trans(student), rtol=0, atol=0)


def test_the_start_is_equation_8() -> None:
    """Linear in γ, with fresh unit noise: z − γ·trans(s) = (1 − γ)·ε."""
    module = one()
    student = torch.randn(64, 3, 9, 9, dtype=torch.float64)
    z, gamma = module.start(student)
    share = gamma.double()[:, None, None, None]
    noise = (z - share * module.trans(student)) / (1 - share)
    assert float(noise.mean().detach()) == pytest.approx(0, abs=0.03)
    assert float(noise.std().detach()) == pytest.approx(1, abs=0.03)
    other, _ = module.start(student)
    assert not torch.allclose(z, other)


def test_in_training_the_students_path_does_not_depend_on_t() -> None:
    """Whatever is added to all samples alike, the next batch norms cancel: so it is not added at all."""
    for dense in (True, False):
        module, (student, _) = one(dense=dense), maps(5 if dense else 1)
        z = module.trans(student)
        c1, c2 = 1.2, -0.4
        for t in (0, 400):
            seen = z + module.denoiser.embedding.weight[t, :, None, None]
            pred = module.denoiser(seen)
            pred = pred if module.denoiser.norm is None else module.denoiser.norm(pred)
            expected = c1 * z + c2 * pred
            torch.testing.assert_close(module._step(z, t, c1, c2), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_in_evaluation_a_student_is_cleaned_as_in_training(dense: bool) -> None:
    """By running statistics of passes without E[t]; with it they were of something else."""
    torch.manual_seed(0)
    module, (student, _) = one(dense=dense), maps(5 if dense else 1)
    with torch.no_grad():
        module.denoiser.embedding.weight.mul_(3)
        z = module.trans(student)
        for _ in range(200):
            trained = module._step(z, 400, 1.0, -0.5)
        # Running variances are unbiased, those of a batch of six are not.
        assert float((module.eval()._step(z, 400, 1.0, -0.5) - trained).abs().mean()) < 0.05


def test_the_diffusion_loss_is_the_papers() -> None:
    """E over t and ε: an untrained denoiser is off by about var(ε̂) + 1, one that answers 0 by exactly E[ε²]."""
    module = one()
    latent = torch.randn(256, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        module.denoiser.norm.weight.zero_()  # type: ignore[union-attr]
        module.denoiser.norm.bias.zero_()  # type: ignore[union-attr]
    assert float(module.diffusion(latent).detach()) == pytest.approx(1.0, abs=0.05)


def test_gradients_reach_exactly_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = DiffKDConfig(latent_channels=5)
    module = Denoising(3, 4, dense=True, latent=5, distance="mse", config=config)
    student, teacher = (x.float() for x in maps())
    student.requires_grad_()
    reached = {}
    for term in ("diffusion", "autoencoder", "kd"):
        module.zero_grad()
        student.grad = None
        getattr(module(student, teacher), term).backward()
        found = {
            name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()
        }
        reached[term] = found | ({"student"} if student.grad is not None and student.grad.any() else set())
    assert reached["diffusion"] == {"denoiser"}
    assert reached["autoencoder"] == {"autoencoder"}
    assert reached["kd"] == {"student", "trans", "adapter", "denoiser", "proj", "proj_norm"}


def test_kd_flows_through_all_five_steps() -> None:
    module, (student, teacher) = one(), maps()
    calls = []
    module.denoiser.register_full_backward_hook(lambda *_: calls.append(1))
    module(student.requires_grad_(), teacher).kd.backward()
    assert len(calls) == 5


def test_teacher_and_student_have_passes_of_their_own() -> None:
    """Statistics of batch norm are per call: six passes of one batch each, never one of two."""
    module, (student, teacher) = one(), maps()
    seen: list[int] = []
    module.denoiser.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[0]))
    module(student, teacher)
    assert seen == [6] * 6


def test_gradients_are_those_of_differences() -> None:
    """The whole pair in double precision, with the noise held still."""
    module, (student, teacher) = one(steps=2), maps(2, 3)
    state = torch.random.get_rng_state()

    def loss(feature: Tensor) -> Tensor:
        torch.random.set_rng_state(state)
        return copy.deepcopy(module)(feature, teacher).kd

    assert torch.autograd.gradcheck(loss, student.requires_grad_(), eps=1e-6, atol=1e-4, rtol=1e-3)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    images, labels = batch()
    method = make(
        task_weight=2.0, diffusion_weight=3.0, autoencoder_weight=5.0, feature_weight=7.0, logits_weight=11.0
    )
    loss, parts = method(images, labels)
    assert set(parts) == {
        *("task", "kd_feature", "kd_logits", "diffusion_feature", "diffusion_logits"),
        *("autoencoder_feature", "gamma_feature", "gamma_logits"),
    }
    expected = (
        2 * parts["task"]
        + 3 * (parts["diffusion_feature"] + parts["diffusion_logits"])
        + 5 * parts["autoencoder_feature"]
        + 7 * parts["kd_feature"]
        + 11 * parts["kd_logits"]
    )
    torch.testing.assert_close(loss.detach(), expected)
    assert not any(value.requires_grad for value in parts.values())


def test_a_loop_of_ones_own_gets_what_step_gives() -> None:
    images, labels = batch()
    first, second, third = make(), make(), make()
    torch.manual_seed(5)
    ours = first.step((images, labels))
    torch.manual_seed(5)
    logits = second.student(images)
    second.teacher(images)
    theirs = second.loss() + F.cross_entropy(logits, labels)
    torch.testing.assert_close(ours, theirs)
    torch.manual_seed(5)
    alone = third.step(images)
    torch.testing.assert_close(alone, theirs - F.cross_entropy(logits, labels))


def test_the_optimizer_sees_the_methods_parameters() -> None:
    method = make()
    own = {id(p) for p in method.own_parameters()}
    assert len(own) > 40
    assert own.isdisjoint(map(id, method.student.parameters()))
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=0.0), lr=0.1, weight_decay=1e-4)
    assert method.check_optimizer(optimizer) == []
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method.step(batch()).backward()
    optimizer.step()
    still = [name for name, p in method.named_parameters() if torch.equal(p, before[name])]
    # Biases and scales that a later batch norm cancels may stay at rest; no matrix does.
    assert [name for name in still if method.get_parameter(name).dim() > 1] == []
    with pytest.warns(UserWarning, match="lacks .* parameters .*method.parameters"):
        missing = method.check_optimizer(torch.optim.SGD(method.student.parameters(), 0.1))
    assert all(name.startswith("denoising.") for name in missing)


def test_an_optimizer_that_forgot_the_method_is_noticed_while_training() -> None:
    for parameters, warned in ((lambda m: m.student.parameters(), 1), (lambda m: m.parameters(), 0)):
        method = make()
        optimizer = torch.optim.AdamW(parameters(method), 1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(4):
                method.step(batch()).backward()
                optimizer.step()
        assert len([w for w in caught if "none of the method's" in str(w.message)]) == warned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_finite(dtype: torch.dtype) -> None:
    """The second iteration is where a schedule that was cast along became NaN."""
    images, labels = batch(8)
    method = make()
    optimizer = torch.optim.SGD(method.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = method.step((images, labels))
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
        assert all(bool(p.isfinite().all()) for p in method.parameters())
    cast = make().to(torch.bfloat16)
    cast.teacher.to(torch.bfloat16)
    assert bool(cast.step((images.bfloat16(), labels)).isfinite())


def test_checkpointing_gives_the_same_step_for_less_memory() -> None:
    images, labels = batch()
    plain, saving = make(), make(checkpoint=True)
    for method in (plain, saving):
        torch.manual_seed(5)
        method.step((images, labels)).backward()
    for (name, ours), theirs in zip(gradients(saving).items(), gradients(plain).values()):
        torch.testing.assert_close(ours, theirs, msg=name)
    for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, msg=name)  # running statistics are counted once
    kept = {method: activation_memory(method, images) for method in (plain, saving)}
    assert 0 < kept[saving] < 0.6 * kept[plain]


def test_counting_memory_changes_nothing_and_scales_with_the_batch() -> None:
    method = make()
    before = copy.deepcopy(method.state_dict())
    state = torch.random.get_rng_state()
    small, large = (activation_memory(method, batch(count)[0]) for count in (4, 8))
    assert 1.7 * small < large < 2.1 * small
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_exported_student_is_clean() -> None:
    student, _ = networks()
    keys, images = sorted(student.state_dict()), batch()[0]
    expected = student.eval()(images)
    method = make(student=student.train())
    torch.testing.assert_close(method.student.eval()(images), expected, rtol=0, atol=0)
    method.train().step(batch()).backward()
    trained = method.eval().student(images)
    exported = method.export()
    assert exported is student
    assert sorted(exported.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in exported.modules())
    torch.testing.assert_close(exported(images), trained, rtol=0, atol=0)
    Net(4).load_state_dict(exported.state_dict())


def test_a_moving_average_shares_the_teacher() -> None:
    from torch.optim.swa_utils import AveragedModel

    method = make()
    average = AveragedModel(method)
    assert average.module.teacher is method.teacher
    assert average.module.student is not method.student
    assert bool(average.module.step(batch()).isfinite())
    assert not any("teacher" in key for key in method.state_dict())


def test_pictures_show_what_the_paper_shows() -> None:
    feature = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = 20 * (feature.mean(1).flatten(1) / 0.5).softmax(1)
    torch.testing.assert_close(saliency(feature), expected.view(2, 4, 5))
    torch.testing.assert_close(saliency(feature).mean((1, 2)), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(saliency(feature, 1.0), saliency(feature))
    with pytest.raises(ValueError, match="feature: got shape"):
        saliency(feature[0])
    with pytest.raises(ValueError, match="temperature: got 0"):
        saliency(feature, 0)
    method = make()
    found = method.maps(batch()[0])
    assert {name: set(parts) for name, parts in found.items()} == {
        name: {"student", "cleaned", "teacher"} for name in ("feature", "logits")
    }
    assert {tuple(x.shape) for x in found["feature"].values()} == {(4, 8, 4, 4)}
    assert method.training


def test_networks_of_this_package_need_no_pairs() -> None:
    for student, teacher in (("resnet8", "resnet14"), ("mobilenet_v2", "resnet20")):
        made = DiffKD(
            create_model(student, 5),
            create_model(teacher, 5).eval().requires_grad_(False),
            config=DiffKDConfig(latent_channels=8),
        )
        assert bool(made.step(batch(4, 16)).isfinite())


A_MAP = Pair("last")


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "did you mean last", lambda: make(Pair("lost"))),
        (ValueError, "no layer 'stim'; did you mean stem", lambda: make(Pair("last", "stim"))),
        (ValueError, "require grad", lambda: make(teacher=Net(6))),
        (ValueError, "at least one is needed", lambda: DiffKD(*networks(), pairs=[])),
        (
            ValueError,
            "more than once; give each a name",
            lambda: make(Pair("last", name="a"), Pair("stem", name="a")),
        ),
        (
            ValueError,
            "5 classes, the teacher's 7",
            lambda: make(teacher=Net(6, 7).eval().requires_grad_(False)),
        ),
        (ValueError, "needs at least 2 values a channel", lambda: make(distill="logits").loss_of(1)),
        (KDFastError, "has not run yet", lambda: make().loss()),
        (ConfigError, "steps: got 0", lambda: DiffKDConfig(steps=0)),
        (ConfigError, "train_steps: got 9", lambda: DiffKDConfig(train_steps=9)),
        (ConfigError, "train_steps: got 2000", lambda: DiffKDConfig(train_steps=2000)),
        (ConfigError, "latent_channels: got 0", lambda: DiffKDConfig(latent_channels=0)),
        (ConfigError, "temperature: got 0", lambda: DiffKDConfig(temperature=0)),
        (ConfigError, "logits_distance: got 'l1'", lambda: DiffKDConfig(logits_distance="l1")),  # type: ignore[arg-type]
        (ConfigError, "distill: got 'all'", lambda: DiffKDConfig(distill="all")),  # type: ignore[arg-type]
        (ConfigError, "diffusion_weight: got -1", lambda: DiffKDConfig(diffusion_weight=-1)),
        (ConfigError, "beta_start, beta_end", lambda: DiffKDConfig(beta_start=0.5, beta_end=0.1)),
        (ConfigError, "mixup_alpha: got 0", lambda: DiffKDConfig(mixup_alpha=0)),
        (ConfigError, "label_smoothing: got 1", lambda: DiffKDConfig(label_smoothing=1)),
        (ConfigError, "kind: got 'map'", lambda: Pair("last", kind="map")),  # type: ignore[arg-type]
        (ConfigError, "distance: got 'kl', accepted for a feature", lambda: Pair("last", distance="kl")),
        (ConfigError, "weight: got -1", lambda: Pair("last", weight=-1)),
    ],
)
def test_refusals_name_the_argument(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], match: str, call: Any
) -> None:
    monkeypatch.setattr(DiffKD, "loss_of", lambda method, count: method.step(batch(count)), raising=False)
    with pytest.raises(error, match=match):
        call()


def test_a_teacher_that_trains_and_batches_that_differ_are_refused() -> None:
    method, (images, labels) = make(), batch()
    method.student(images)
    method.teacher(images[:2])
    with pytest.raises(ValueError, match="4 samples went through the student, 2"):
        method.loss()
    method.teacher.train()
    with pytest.raises(ValueError, match=r"call teacher\.eval"):
        method.step((images, labels))


def test_one_map_is_a_batch_and_keeps_its_dimension() -> None:
    """B = 1 with h·w > 1 has enough values a channel."""
    student, teacher = networks()
    student.eval()  # its own batch norm is no business of this test
    made = DiffKD(student, teacher, pairs=[A_MAP], config=DiffKDConfig(latent_channels=8), images=batch()[0])
    made.denoising.train()
    student(batch(1)[0])
    made.teacher(batch(1)[0])
    assert bool(made.loss().isfinite())
