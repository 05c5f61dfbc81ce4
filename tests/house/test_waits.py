"""No step waits for its GPU where nobody sees it: what makes the host wait is named here, with the reason, or refused.

A step that waits keeps host and GPU from working side by side; on a CPU nothing shows it. So the source is read: in the
rooms that a training or sampling step runs through, every call that copies to or from a device and blocks is either in
:data:`KNOWN` or a fault.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import kdfast

ROOT = Path(kdfast.__file__).parent
#: Files and folders of a step.
HOT = (
    "data/augment.py",
    "data/randaugment.py",
    "data/regimes.py",
    "data/loader.py",
    "data/torch_loader.py",
    "diffusion/loop.py",
    "diffusion/sampling.py",
    "diffusion/sources.py",
    "diffusion/schedulers",
    "functional",
    "methods",
    "ops",
    "replay/buffer.py",
    "constants.py",
)
#: Copies of host numbers to a device, from memory that is not pinned.
MAKERS = {"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor"}
#: Results that the host has to see.
READERS = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "unique", "masked_select", "synchronize"}

#: (file, function, call) -> why it may.
KNOWN: dict[tuple[str, str, str], str] = {
    ("constants.py", "constant", "tensor"): "once for each tuple of numbers",
    ("data/loader.py", "ShardLoader.labels", "unique"): "of the manifest's numpy array",
    ("data/randaugment.py", "host_generator", "numpy"): "a generator's state is known on the host",
    ("data/randaugment.py", "rand_augment", "nonzero"): "drawn on the host",
    ("data/torch_loader.py", "_Batches.__getitem__", "tolist"): "numpy, in a worker process",
    ("diffusion/loop.py", "StaticStep._allocate", "to"): "once for each size",
    ("diffusion/schedulers/base.py", "ScaledInput.scale_model_input", "tolist"): "of the host's σ alone",
    ("diffusion/schedulers/common.py", "TableCache.get", "to"): "once for each schedule",
    ("diffusion/schedulers/common.py", "row_of", "to"): "of a step that lies on another GPU",
    ("diffusion/schedulers/ddim.py", "ddim_table", "cpu"): "once for each schedule",
    ("diffusion/schedulers/ddpm.py", "DDPMScheduler._previous", "tolist"): "once for each set_timesteps",
    ("diffusion/schedulers/ddpm.py", "blind_rows", "nonzero"): "once for each schedule",
    ("diffusion/schedulers/ddpm.py", "ddpm_table", "cpu"): "once for each schedule",
    ("diffusion/schedulers/dpm.py", "dpm_table", "cpu"): "once for each schedule",
    ("diffusion/schedulers/euler.py", "EulerDiscreteScheduler._euler.build", "cpu"): "once for each schedule",
    ("diffusion/schedulers/euler.py", "ancestral_table", "cpu"): "once for each schedule",
    ("diffusion/schedulers/flow.py", "flow_table", "cpu"): "once for each schedule",
    ("diffusion/schedulers/lcm.py", "boundary", "cpu"): "once for each schedule",
    ("diffusion/schedulers/lcm.py", "lcm_table", "cpu"): "once for each schedule",
    ("diffusion/sources.py", "fingerprint", "cpu"): "once a run",
    ("diffusion/sources.py", "fingerprint", "numpy"): "once a run",
    ("functional/_checks.py", "as_number", "item"): "of host memory only",
    ("functional/feature.py", "reparam_middle_loss", "tolist"): "of host memory only",
    ("functional/images.py", "_check_draws", "tolist"): "of host memory only",
    ("functional/stored.py", "TopKTeacher.to", "to"): "what its caller asks for",
    ("functional/stored.py", "_own", "cpu"): "a teacher's logits on their way to a file",
    ("methods/baselines/features.py", "FitNet.prepare", "to"): "once, when layers are made",
    ("methods/diffkd/levels.py", "Level.places", "to"): "of features that are already there",
    ("methods/diffkd/method.py", "DiffKD._denoising", "to"): "once, when layers are made",
    ("methods/diffkd/schedule.py", "Schedule._apply", "to"): "when the module is moved",
    ("methods/kdiffusion/branches.py", "_bare", "to"): "when branches are made or merged",
    ("methods/kdiffusion/branches.py", "_carrier", "to"): "when branches are merged",
    ("methods/kdiffusion/method.py", "Kdiffusion.__init__", "to"): "once",
    ("methods/kdiffusion/method.py", "Kdiffusion._make_bridges", "to"): "once, when layers are made",
    ("methods/kdiffusion/schedule.py", "_ends", "tensor"): "once, when the method is made",
    ("methods/ssdkd/generator.py", "Generator.__init__", "to"): "once",
    ("methods/ssdkd/method.py", "SSDKD.load_state_dict", "cpu"): "when a checkpoint is read",
    ("methods/ssdkd/shards.py", "_held", "cpu"): "images on their way to a file",
    ("methods/surrogate.py", "SurrogateKD.normalise", "to"): "on the first batch of a device",
    ("ops/common/closed.py", "_Closed.backward", "item"): "of host memory only",
    (
        "ops/linear/chunks.py",
        "_counted",
        "nonzero",
    ): "one look at a mask saves the products of all rows that it leaves out",
    ("replay/buffer.py", "PrioritizedReplayBuffer._normalization", "to"): "once for each pair",
    (
        "replay/buffer.py",
        "PrioritizedReplayBuffer.extend",
        "to",
    ): "of rows that lie elsewhere: the caller's copy",
}


def waits(text: str) -> list[tuple[str, str]]:
    """(function, call) of everything in a module's source that may make the host wait."""
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            keywords = {keyword.arg for keyword in node.keywords}
            on_device = "device" in keywords or name == "new_tensor"
            if (name in MAKERS and on_device) or (name in READERS and not node.args):
                found.append((function, name))
            elif name == "to" and "non_blocking" not in keywords:
                moved = [*node.args, *(k.value for k in node.keywords if k.arg == "device")]
                if any("device" in ast.unparse(given) for given in moved):
                    found.append((function, "to"))
            elif name in ("nonzero", "unique", "where") and len(node.args) == 1:
                found.append((function, name))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(text), "")
    return found


def everywhere() -> Counter[tuple[str, str, str]]:
    found: Counter[tuple[str, str, str]] = Counter()
    for name in HOT:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            relative = str(file.relative_to(ROOT))
            found.update((relative, *call) for call in waits(file.read_text()))
    return found


def test_every_wait_is_known() -> None:
    new = sorted(set(everywhere()) - set(KNOWN))
    assert not new, (
        f"these may make the host wait for its GPU: {new}; see kdfast/constants.py, or say why in KNOWN"
    )


def test_what_is_known_is_still_there() -> None:
    assert not sorted(set(KNOWN) - set(everywhere()))


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("torch.tensor([1, 2], device=x.device)", ["tensor"]),
        ("x.new_tensor([1.0])", ["new_tensor"]),
        ("torch.as_tensor(values, device=device)", ["as_tensor"]),
        ("float(x.sum().item())", ["item"]),
        ("x.nonzero()", ["nonzero"]),
        ("torch.nonzero(x)", ["nonzero"]),
        ("labels.to(images.device)", ["to"]),
        ("labels.to(device=device)", ["to"]),
        ("labels.to(device, non_blocking=True)", []),
        ("x.to(torch.float32)", []),
        ("torch.full((2,), 0.5, device=device)", []),
        ("torch.tensor([1.0])", []),
    ],
)
def test_a_new_wait_is_seen(line: str, calls: list[str]) -> None:
    assert waits(f"def step(x):\n    return {line}\n") == [("step", call) for call in calls]
