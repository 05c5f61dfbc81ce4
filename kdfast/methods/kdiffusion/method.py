"""The method: branches in the student, taps on the teacher, and the loss between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.errors import KDFastError
from kdfast.functional import reparam_middle_loss
from kdfast.methods.kdiffusion.branches import Branches, convert, merge
from kdfast.methods.kdiffusion.config import KdiffusionConfig, Stage
from kdfast.methods.kdiffusion.schedule import linear_alpha_hat, reverse_coefficients, reverse_variances
from kdfast.methods.kdiffusion.stages import check_stages, undone_on_failure
from kdfast.models import FeatureTaps
from kdfast.models.layouts import Reading, reading_of
from kdfast.models.modes import evaluated
from kdfast.models.outputs import logits_of
from kdfast.models.roles import check_networks, still_evaluated
from kdfast.training.learning import OWN, Learning

__all__ = ["Kdiffusion"]


class Kdiffusion(Learning, nn.Module):
    """Converts the student in place, and adds the paper's losses to its task loss.

    Make it first and the optimizer then, over ``method.parameters()``: those are the student's, branches included,
    and the bridges'. The teacher is no submodule, and is left as it is.

    Args:
        student: Any module; changed in place, see :func:`convert`.
        teacher: Any module in evaluation mode whose parameters do not require grad.
        stages: One for a single-layer, several for a multi-layer distillation, shallow to deep: the last one's
            features are the guided loss's.
        images: Some inputs ``[B, …]`` for both networks, on their device: one pass finds out the features' shapes.
        config: Fields of the method.
        classifier: W of the guided loss, on the pooled last feature; by default the teacher's ``get_classifier()``.
            It gets no gradient.

    Example:
        >>> stages = [Stage("layer3.0.conv2", "layer3", "layer3.0.bn2")]
        >>> method = Kdiffusion(student, teacher.eval().requires_grad_(False), stages=stages, images=images)
        >>> optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
        >>> method.step((images, labels)).backward()
        >>> merge(student)  # the plain network again

    Raises:
        ValueError: The teacher requires grad or is in training mode, the student has nothing to learn, no stages, a
            layer that does not exist, channels that differ without a bridge, no classifier.
        TypeError: A layer that cannot be branched.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        stages: Sequence[Stage],
        images: Tensor,
        config: KdiffusionConfig | None = None,
        classifier: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or KdiffusionConfig()
        if not stages:
            raise ValueError("stages: got none; at least one is needed")
        check_networks(student, teacher)
        self._teacher = (teacher,)  # in a tuple: neither a submodule nor in the state dict
        self.student = student
        self.stages = tuple(stages)
        self._readings: dict[Stage, Reading] = {}
        with undone_on_failure(student, self.stages) as made:
            self._taps = made.enter_context(
                FeatureTaps(teacher, [stage.teacher for stage in stages], detach=True, every_call=True)
            )
            self._classifier = (self._guide(teacher, classifier),)
            check_stages(student, self.stages, images)
            self._branches: tuple[Branches, ...] = tuple(
                convert(student, stage.op, stage.norm, m=config.branches, init=config.init)
                for stage in stages
            )
            self.bridges = nn.ModuleList(self._make_bridges(images))
        schedule = linear_alpha_hat(config.steps, config.beta_start, config.beta_end)
        u, v = reverse_coefficients(schedule, config.branches)
        w = config.sigma * reverse_variances(schedule, config.branches).sqrt()
        for name, value in (("u", u), ("v", v), ("w", w)):
            self.register_buffer(name, value.to(images.device, torch.float32), persistent=False)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def _guide(self, teacher: nn.Module, classifier: nn.Linear | None) -> nn.Linear | None:
        if self.config.beta == 0:
            return None
        if classifier is None and hasattr(teacher, "get_classifier"):
            # A module's attribute is a tensor or a module to a type checker; this one is timm's method.
            find: Any = teacher.get_classifier
            classifier = find()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"classifier: got {type(classifier).__name__}; the guided loss needs the teacher's nn.Linear "
                "(or set beta to 0)"
            )
        return classifier

    @torch.no_grad()
    def _make_bridges(self, images: Tensor) -> list[nn.Module]:
        with evaluated(self.student):
            self.student(images)
        self.teacher(images)
        bridges: list[nn.Module] = []
        for stage, branches in zip(self.stages, self._branches, strict=True):
            stacked = branches.stacked
            assert stacked is not None
            x0, layout = self._taps[stage.teacher], self.config.teacher_layout
            self._readings[stage] = reading_of(self.teacher, stage.teacher, x0, layout, images)
            teacher_channels = self._target(stage).shape[1]
            if self.config.bridge:
                bridges.append(_Bridge(stacked.shape[2], teacher_channels).to(images.device))
                continue
            if stacked.shape[2] != teacher_channels:
                raise ValueError(
                    f"stages: {stage.op!r} has {stacked.shape[2]} channels, {stage.teacher!r} has "
                    f"{teacher_channels}; they must match with bridge=False"
                )
            bridges.append(nn.Identity())
        classifier = self._classifier[0]
        last = self._target(self.stages[-1]).shape[1]
        if classifier is not None and classifier.in_features != last:
            raise ValueError(
                f"classifier: takes {classifier.in_features} features; {self.stages[-1].teacher!r}, the last "
                f"stage's teacher layer, has {last} channels"
            )
        self._forget()
        return bridges

    def _target(self, stage: Stage) -> Tensor:
        """x0 of a stage, ``[B, C]`` or ``[B, C, H, W]``."""
        x0 = self._taps[stage.teacher]
        return x0 if x0.dim() == 2 else self._readings[stage](x0)

    def _features(self, at: int) -> tuple[Tensor, Tensor]:
        """Bridged branches ``[m, B, C, …]`` and target ``[B, C, …]`` of a stage, in one size."""
        stage, stacked = self.stages[at], self._branches[at].stacked
        if stacked is None:
            raise KDFastError(f"layer {stage.op!r} has not run yet; call the student first")
        x0 = self._target(stage)
        if stacked.shape[1] != x0.shape[0]:
            raise ValueError(
                f"student_out: {stacked.shape[1]} samples went through the student, {x0.shape[0]} through the teacher"
            )
        m = stacked.shape[0]
        if stacked.dim() == 3 and x0.dim() == 4:  # a linear layer against a map
            x0 = x0.mean((2, 3))
        elif stacked.dim() == 5 and x0.dim() == 2:
            stacked = stacked.mean((3, 4))
        if isinstance(self.bridges[at], nn.Identity) and stacked.shape[3:] == x0.shape[2:]:
            return stacked, x0  # strides as they are: nothing is copied
        flat = stacked.flatten(0, 1)
        if flat.dim() == 4:
            size = (min(flat.shape[2], x0.shape[2]), min(flat.shape[3], x0.shape[3]))
            if tuple(flat.shape[2:]) != size:
                flat = F.adaptive_avg_pool2d(flat, size)
            if tuple(x0.shape[2:]) != size:
                x0 = F.adaptive_avg_pool2d(x0, size)
        return self.bridges[at](flat).unflatten(0, (m, -1)), x0

    def forward(self, student_out: Any, target: Tensor | None = None) -> Tensor:
        """The loss of a batch that teacher and student have both just run on.

        Random numbers come from torch's global generator of the features' device, without a synchronisation.

        Args:
            student_out: The student's logits ``[B, classes]``, or an output that holds them.
            target: int64 labels ``[B]`` for the cross-entropy; None leaves it out, for a task loss of your own.

        Returns:
            A 0-d tensor: L_task + α·L_middle + β·L_guided. :attr:`parts` holds the three, detached.

        Raises:
            KDFastError: A network has not run.
            ValueError: The two ran on different batches, or the teacher is in training mode.
            TypeError: ``student_out`` has no logits.
        """
        config, m = self.config, self.config.branches
        if self._compares:
            still_evaluated(self.teacher)
        if self.training:
            self._look()
        student_out = logits_of(student_out)
        task = student_out.new_zeros((), dtype=torch.float32)
        if target is not None:
            task = F.cross_entropy(student_out.float(), target)
        middle, guided = torch.zeros_like(task), torch.zeros_like(task)
        for at in range(len(self.stages) if self._compares else 0):
            branches, x0 = self._features(at)
            last = at == len(self.stages) - 1 and self._classifier[0] is not None
            if config.objective == "average":
                mean = branches.mean(0)
                middle = middle + F.mse_loss(mean.float(), x0.float())
                estimate = mean if config.estimate == "mean" else branches[-1]
            else:
                order = torch.arange(m, device=branches.device)
                if config.shuffle:
                    order = torch.rand(m, device=branches.device).argsort()
                part, mean = self._middle(
                    branches, x0, order, mean_needs_grad=last and config.estimate == "mean"
                )
                middle = middle + part
                # u_m = 0 and v_m = 1: the last P is the branch that the last step took.
                estimate = mean if config.estimate == "mean" else branches.index_select(0, order[-1:])[0]
            if last:
                guided = self._guided(estimate, x0)
        self.parts = {"task": task.detach(), "middle": middle.detach(), "guided": guided.detach()}
        self._forget()
        loss: Tensor = task + config.alpha * middle + config.beta * guided
        return loss

    def _look(self) -> None:
        """Whether the optimizer has everything; the branches are the student's, but new."""
        branches = [p for branch in self._branches for p in branch.parameters()]
        among = {id(p) for p in branches}
        rest = (p for p in self.student.parameters() if id(p) not in among)
        self._watch(rest, {"the branches'": branches, OWN: self.bridges.parameters()})

    def _middle(
        self, branches: Tensor, x0: Tensor, order: Tensor, *, mean_needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        sampled = self.config.trajectory == "sampled"
        seed = torch.randint(2**62, (1,), device=branches.device) if sampled else 0
        u, v, w = self.get_buffer("u"), self.get_buffer("v"), self.get_buffer("w")
        return reparam_middle_loss(
            branches,
            x0,
            u,
            v,
            order,
            noise_scale=w if sampled else None,
            seed=seed,
            carry_gradient=self.config.carry_gradient,
            mean_needs_grad=mean_needs_grad,
        )

    def _guided(self, estimate: Tensor, x0: Tensor) -> Tensor:
        classifier = self._classifier[0]
        assert classifier is not None
        gap = estimate.float() - x0.float()
        pooled = gap.flatten(2).mean(2) if gap.dim() > 2 else gap
        return F.linear(pooled, classifier.weight.detach().float()).square().mean()

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The teacher's pass, the student's pass, the loss.

        Args:
            batch: Images on the networks' device, and int64 labels ``[B]``.
        """
        images, labels = batch
        if self._compares:
            with torch.no_grad():
                still_evaluated(self.teacher)(images)
        loss: Tensor = self(self.student(images), labels)
        return loss

    @property
    def _compares(self) -> bool:
        """Whether the teacher counts at all: with α = β = 0 it does not, and need not run (Table 5)."""
        return self.config.alpha > 0 or self.config.beta > 0

    def export(self) -> nn.Module:
        """The plain student in evaluation mode: a merged copy, with the state dict's names it had at first.

        What is being trained stays as it is.
        """
        held = copy.deepcopy(self.student)
        return merge(held).eval()

    @property
    def extra_parameters(self) -> int:
        """Parameters that training has beyond the plain student's: of further branches, and of bridges (Fig. 3)."""
        own = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return own - sum(p.numel() for p in self.export().parameters())

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Features of each stage in evaluation mode, for a look at them.

        Args:
            images: On the networks' device.

        Returns:
            By the student layer's name: the bridged branches ``[m, B, C, …]`` and the teacher's ``[B, C, …]``.
        """
        try:
            with evaluated(self):
                self.teacher(images)
                self.student(images)
                return {stage.op: self._features(at) for at, stage in enumerate(self.stages)}
        finally:
            self._forget()

    def close(self) -> None:
        """Take the taps off the teacher."""
        self._taps.close()

    def _forget(self) -> None:
        """Let go of activations, and of the graph that they hold."""
        self._taps.clear()
        for branches in self._branches:
            branches.stacked = None


class _Bridge(nn.Module):
    """A shared 1×1 convolution and batch norm, of maps ``[B, C, H, W]`` or of vectors ``[B, C]``."""

    def __init__(self, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, teacher_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            out: Tensor = self.norm(self.conv(x))
            return out
        out = self.norm(self.conv(x[:, :, None, None]))
        return out.flatten(1)
