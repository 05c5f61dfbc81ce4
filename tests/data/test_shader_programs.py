"""Random shader programs: as values and as files, the grammar, the filter, breeding, and that they differ."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.data import load_dataset, surrogate
from kdfast.data.surrogate import Instruction, Program
from kdfast.data.surrogate.grammar import draw_program
from kdfast.data.surrogate.programs import MAX_INSTRUCTIONS, OPERATIONS, table
from kdfast.errors import DataError
from tests.support.shader_programs import PROGRAMS

SIZE = (16, 16)


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    return surrogate.random_programs(64, seed=0)


def test_a_program_depends_on_seed_and_number_alone(programs: list[Program]) -> None:
    assert surrogate.random_programs(3, seed=0, start=40) == programs[40:43]
    assert surrogate.random_programs(3, seed=1) != programs[:3]
    assert surrogate.random_programs(0, seed=0) == []


def test_programs_use_the_whole_grammar() -> None:
    drawn = [draw_program(np.random.default_rng(i)) for i in range(300)]
    used = {op for program in drawn for op in program.structure}
    assert used == set(OPERATIONS)
    assert {len(program.layers) for program in drawn} == {1, 2, 3, 4}
    assert len({program.structure for program in drawn}) > 290
    for program in drawn:  # a program is layers that start at the pixel and end in paint
        assert all(layer[0].op == "view" for layer in program.layers)
        assert all("paint" in [instruction.op for instruction in layer] for layer in program.layers)


def test_saved_programs_come_back_and_draw_the_same(programs: list[Program], tmp_path: Path) -> None:
    path = surrogate.save_programs(programs, tmp_path / "programs.json")
    back = surrogate.load_programs(path)
    assert back == programs
    before, after = (
        surrogate.shaders(8, SIZE, programs=lot, antialias=1) for lot in (programs[:8], back[:8])
    )
    assert torch.equal(before, after)
    assert json.loads(path.read_text())["format"] == "kdfast-shaders"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(OPERATIONS)), st.data())
def test_any_instruction_survives_json(op: str, data: st.DataObject) -> None:
    numbers = st.floats(1, 1.5, width=32)  # within every range
    count = len(OPERATIONS[op])
    values = tuple(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    program = Program((Instruction(op, values),))
    assert Program.from_dict(json.loads(json.dumps(program.as_dict()))) == program
    image = surrogate.shaders(1, (4, 4), programs=[program], antialias=1)
    assert image.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("extreme", [-4096.0, -0.0, 1e-30, 0.3, 4096.0])
@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_no_numbers_overflow(op: str, extreme: float) -> None:
    """The furthest that a program may go is still finite, between 0 and 1."""
    from kdfast.data.surrogate.programs import RANGED
    from kdfast.functional import render_shaders

    values = [min(max(extreme, low), high) for low, high in _bounds(RANGED, op)]
    step = Instruction(op, tuple(values))
    paint = PROGRAMS[0].instructions
    lot = table([Program((paint[0], *((step,) * times), *paint)) for times in (1, 20)])
    image = render_shaders(
        lot.codes, lot.values, lot.rates, torch.arange(2), torch.zeros(2), (5, 5), dtype=torch.float32
    )
    assert bool(image.isfinite().all())
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def _bounds(ranged: Any, op: str) -> list[tuple[float, float]]:
    return [ranged.get((op, name), (-4096.0, 4096.0)) for name in OPERATIONS[op]]


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_number_alone() -> None:
    whole = surrogate.shaders(9, SIZE, programs=4, antialias=1)
    assert torch.equal(whole[5:], surrogate.shaders(4, SIZE, programs=4, start=5, antialias=1))
    assert not torch.equal(whole[0], whole[4])  # program 0 again, at another time
    assert not torch.equal(whole, surrogate.shaders(9, SIZE, programs=4, seed=1, antialias=1))
    assert not torch.equal(whole, surrogate.shaders(9, SIZE, programs=4, antialias=2))
    assert torch.equal(whole[:4], surrogate.shaders(4, SIZE, programs=4096, antialias=1))
    assert surrogate.shaders(0, SIZE).shape == (0, 3, *SIZE)


def test_all_images_have_something_to_show(programs: list[Program]) -> None:
    assert bool(surrogate.usable(surrogate.shaders(128, (32, 32), programs=programs, antialias=1)).all())


def test_a_frame_that_shows_nothing_is_taken_at_another_time() -> None:
    """A disc that has left the picture by the end of its loop."""
    fade = Instruction("gradient", (0.0, 0.0, -2.0, 1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, -3.0, 0.0, 0.0, 0.0))
    paint = (1.0, 0.0, 0.0, *(0.5,) * 3, *(0.4,) * 3, 0.0, 0.3, 0.6, 0.0, 40.0, 0.0, 1.0)
    program = Program((fade, Instruction("paint", paint)))
    from kdfast.data.surrogate import shaders as module
    from kdfast.functional import render_shaders

    lot, none = table([program]), torch.zeros(1, dtype=torch.int64)
    late = render_shaders(lot.codes, lot.values, lot.rates, none, torch.tensor([0.618]), (24, 24))
    assert surrogate.usable(late).tolist() == [False]
    images = surrogate.shaders(6, (24, 24), programs=[program], antialias=1)
    assert surrogate.usable(images).tolist() == [True] * 6
    assert callable(module)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_filter(dtype: torch.dtype) -> None:
    ramp = torch.arange(400, dtype=torch.float32).view(20, 20).expand(3, -1, -1) / 399
    two = (ramp > 0.5).float()
    spot = torch.zeros(3, 20, 20)
    spot[:, 0, :7] = torch.linspace(0.2, 1, 7)  # 1.75 %
    enough = spot.clone()
    enough[:, 1, 0] = 0.9  # 2 %
    faint = 0.5 + 0.01 * ramp  # several values, one colour to the eye
    lot = torch.stack([ramp, two, spot, enough, faint, torch.full_like(ramp, 0.3)])
    images = (lot * 255).round().to(torch.uint8) if dtype == torch.uint8 else lot
    assert surrogate.usable(images).tolist() == [True, False, False, True, False, False]
    if dtype.is_floating_point:
        broken = ramp.clone()
        broken[1, 3, 3] = float("nan")
        assert surrogate.usable(broken[None]).tolist() == [False]
    assert surrogate.usable(images[:0]).shape == (0,)


# --- breeding --------------------------------------------------------------------------------------------------------


def test_children_are_new_usable_and_determined(programs: list[Program]) -> None:
    children = surrogate.widen(programs, 40, seed=3)
    assert children == surrogate.widen(programs, 40, seed=3)
    assert children != surrogate.widen(programs, 40, seed=4)
    assert not set(children) & set(programs)
    assert len(set(children)) == 40
    images = surrogate.shaders(40, (32, 32), programs=children, antialias=1)
    assert bool(surrogate.usable(images).all())
    assert len({image.numpy().tobytes() for image in images}) == 40


def test_mutants_differ_in_one_thing(programs: list[Program]) -> None:
    changes = set()
    for seed in range(60):
        mutant = surrogate.mutate(programs[5], seed=seed)
        assert mutant == surrogate.mutate(programs[5], seed=seed)
        changes.add(len(mutant.instructions) - len(programs[5].instructions))
    assert {-1, 0, 1} <= changes


def test_a_child_has_layers_of_both_parents(programs: list[Program]) -> None:
    first, second = (next(p for p in programs[k:] if len(p.layers) >= 3) for k in (0, 30))
    assert first != second
    for seed in range(10):
        child = surrogate.crossover(first, second, seed=seed)
        assert child.layers[0] == first.layers[0]
        assert set(child.layers) & set(second.layers)
        assert set(child.layers) <= set(first.layers) | set(second.layers)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_breeding_stays_within_the_grammar(seed: int) -> None:
    """Long lines of descent: every child is a program that a device accepts."""
    rng = np.random.default_rng(seed)
    program, other = draw_program(rng), draw_program(rng)
    for step in range(8):
        program = surrogate.mutate(surrogate.crossover(program, other, seed=step), seed=step)
        assert len(program.instructions) <= MAX_INSTRUCTIONS
        assert Program.from_dict(program.as_dict()) == program


# --- that programs differ --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    """A network that tells digits apart: what it sees in a picture is what counts as different."""
    from torch import nn

    train, test = (load_dataset("digits", split, image_size=16) for split in ("train", "test"))
    torch.manual_seed(0)
    widths, layers = (3, 12, 24, 32), []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * widths[-1], 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for _ in range(5):
        for rows in torch.randperm(len(train.labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(train.images[rows].float() / 255), train.labels[rows]
            ).backward()
            optimizer.step()
    found = model.eval()(test.images.float() / 255).argmax(1)
    # Chance is 0.1; 0.967 … 0.989 over 11 seeds and 4 roundings, 17 runs.
    assert (found == test.labels).float().mean() > 0.8
    return model


def features(teacher: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the classifier reads, standardised over the set: ``[N, C]``."""
    seen: list[torch.Tensor] = []
    last = [module for module in teacher.modules() if isinstance(module, torch.nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(1)))
    with torch.no_grad():
        for part in images.split(256):
            teacher(part.float() / 255)
    handle.remove()
    found = torch.cat(seen)
    return (found - found.mean(0)) / (found.std(0) + 1e-6)


def jittered(programs: list[Program], share: float) -> list[Program]:
    """The same programs with all their numbers off by about so much: what a cheat would count as new ones."""
    rng, found = np.random.default_rng(0), []
    for program in programs:
        steps = []
        for step in program.instructions:
            moved = [
                v if v == round(v) else v * (1 + share * float(rng.standard_normal())) for v in step.values
            ]
            steps.append(Instruction(step.op, tuple(moved), step.rates))
        found.append(Program(tuple(steps)))
    return found


def distinct(teacher: torch.nn.Module, count: int) -> tuple[int, int, float]:
    """Different pictures, programs that the teacher tells apart, and the distance that counts as apart.

    Apart is further than the median of a program and its copy with numbers off by 1 %. Programs are taken in order,
    each that is apart from all that were taken before it.
    """
    programs = surrogate.random_programs(count, seed=0)
    images = surrogate.shaders(count, SIZE, programs=programs, antialias=1)
    sample = programs[: min(count, 200)]
    copies = surrogate.shaders(len(sample), SIZE, programs=jittered(sample, 0.01), antialias=1)
    both = features(teacher, torch.cat([images, copies]))
    seen, moved = both[:count], both[count:]
    threshold = float((seen[: len(sample)] - moved).norm(dim=1).median())
    near = torch.cdist(seen, seen) <= threshold
    taken = torch.zeros(count, dtype=torch.bool)
    for i in range(count):
        taken[i] = not bool((near[i] & taken).any())
    return len({image.numpy().tobytes() for image in images}), int(taken.sum()), threshold


def test_programs_are_distinct_to_the_eye_and_to_a_teacher(teacher: torch.nn.Module) -> None:
    pictures, apart, threshold = distinct(teacher, 300)
    assert pictures == 300
    assert threshold > 0
    # 274 … 286 with 11 teachers and 4 roundings, 17 runs.
    assert apart >= 240


@pytest.mark.slow
def test_four_thousand_programs_are_distinct(teacher: torch.nn.Module) -> None:
    pictures, apart, threshold = distinct(teacher, 5200)
    assert pictures == 5200
    assert apart >= 4000, (apart, threshold)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "match, call",
    [
        ("op: got 'spin'; accepted: view", lambda: Instruction("spin", ())),
        ("values: swirl got 1 numbers; it takes 4: turns", lambda: Instruction("swirl", (1.0,))),
        ("rates: swirl got 1 numbers", lambda: Instruction("swirl", (1.0,) * 4, (1.0,))),
        ("values: swirl got turns=nan", lambda: Instruction("swirl", (float("nan"), 1, 1, 1))),
        ("values: swirl got narrow=-1", lambda: Instruction("swirl", (1, -1, 1, 1))),
        (
            "rates: swirl got narrow=1.0; narrow cannot move",
            lambda: Instruction("swirl", (1,) * 4, (0, 1.0, 0, 0)),
        ),
        ("values: fold got rounds=17", lambda: Instruction("fold", (17, *(0,) * 7))),
        ("values: swirl got turns=5000", lambda: Instruction("swirl", (5000, 1, 1, 1))),
        ("instructions: got 0", lambda: Program(())),
        ("instructions: got 65", lambda: Program((Instruction("swirl", (1,) * 4),) * 65)),
        ("n, start, seed: got -1", lambda: surrogate.random_programs(-1, seed=0)),
        ("n, start, seed", lambda: surrogate.shaders(1, SIZE, start=-1)),
        (r"shape: got \(0, 4\)", lambda: surrogate.shaders(1, (0, 4))),
        ("programs: got 0", lambda: surrogate.shaders(1, SIZE, programs=0)),
        ("programs: got 0", lambda: surrogate.shaders(1, SIZE, programs=[])),
        ("programs: got none", lambda: table([])),
        ("programs: got none", lambda: surrogate.widen([], 1, seed=0)),
        ("n, seed: got 1, -1", lambda: surrogate.widen(PROGRAMS, 1, seed=-1)),
        ("seed: got -1", lambda: surrogate.mutate(PROGRAMS[0], seed=-1)),
        ("images: got shape", lambda: surrogate.usable(torch.zeros(2, 4, 4))),
    ],
)
def test_refusals(match: str, call: Any) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "cannot be read"),
        ("[]", "is not a file of shader programs"),
        ('{"format": "kdfast-shaders", "version": 9}', "has version 9; this kdfast reads version 1"),
        ('{"format": "kdfast-shaders", "version": 1, "programs": []}', "holds no programs"),
        ('{"format": "kdfast-shaders", "version": 1, "programs": [7]}', "program 0: a program is an object"),
        (
            '{"format": "kdfast-shaders", "version": 1, "programs": [[{"op": "spin", "values": {}}]]}',
            "op: got 'spin'",
        ),
        (
            '{"format": "kdfast-shaders", "version": 1, "programs": [[{"op": "swirl", "values": {"turns": 1}}]]}',
            "program 0: values: swirl got 'turns'; it takes turns, narrow",
        ),
        (
            '{"format": "kdfast-shaders", "version": 1, "programs": [[{"op": "swirl", "values": '
            '{"turns": "a", "narrow": 1, "centre_x": 0, "centre_y": 0}}]]}',
            "got 'a'; numbers are needed",
        ),
        (
            '{"format": "kdfast-shaders", "version": 1, "programs": [[{"op": "swirl", "rates": {"x": 1}, "values": '
            '{"turns": 1, "narrow": 1, "centre_x": 0, "centre_y": 0}}]]}',
            "rates: swirl got",
        ),
    ],
)
def test_files_that_are_not_programs(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "programs.json").write_text(text)
    with pytest.raises(DataError, match=match):
        surrogate.load_programs(tmp_path / "programs.json")
