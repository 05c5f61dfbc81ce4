"""The benchmark harness: what it refuses to time, what it says of who is absent, and what its table computes."""

from __future__ import annotations

import copy
import json
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdfast.benchmarks import Absent, Case, Provider, Settings, Traffic, compare, environment, measure, run
from kdfast.benchmarks.case import peer
from kdfast.benchmarks.run import FAMILIES, SUITES, cases_of, line_of, make_settings, succeeded, write
from kdfast.benchmarks.table import case_table, markdown, spread
from kdfast.benchmarks.timing import check_replay, collect, speedup
from kdfast.errors import ConfigError
from tests.conftest import INTERPRETING

pytestmark = pytest.mark.skipif(INTERPRETING, reason="nothing here launches a kernel")
TRIAL = Settings("cpu", samples=3, sample_seconds=1e-4)
#: Suites that compile more than make test has time for.
WITHOUT_COMPILE = ("losses", "feature", "kdiffusion")


def case(*providers: Provider, turns: int = 2) -> Case:
    def check(name: str, result: Any) -> None:
        assert result == 0, f"{name} gave {result}"

    return Case("losses", "wait", {"n": 1}, turns, providers, check, items=4, unit="rows")


def sleeping(seconds: float) -> Any:
    def work(turn: int) -> int:
        time.sleep(seconds)
        return turn

    return lambda: work


def entry(row: dict[str, Any], name: str) -> dict[str, Any]:
    return next(provider for provider in row["providers"] if provider["name"] == name)


def absent() -> Any:
    raise Absent("the peer is not installed")


def broken() -> Any:
    raise RuntimeError("out of luck")


@pytest.fixture
def row() -> dict[str, Any]:
    return measure(
        case(
            Provider("eager", sleeping(4e-3), Traffic("26N", 26e6)),
            Provider("wrong", lambda: lambda turn: 7),
            Provider("gone", absent),
            Provider("raises", broken),
            Provider("kdfast", sleeping(1e-3)),
        ),
        TRIAL,
    )


def test_only_what_is_right_is_timed(row: dict[str, Any]) -> None:
    assert entry(row, "gone")["absent"] == "the peer is not installed"
    assert entry(row, "raises")["failed"] == "RuntimeError: out of luck"
    assert "wrong gave 7" in entry(row, "wrong")["wrong"]
    timed = [provider["name"] for provider in row["providers"] if "seconds" in provider]
    assert timed == ["eager", "kdfast"]


def test_times_are_seconds_a_call(row: dict[str, Any]) -> None:
    eager, ours = (entry(row, name)["seconds"]["wall"] for name in ("eager", "kdfast"))
    assert len(eager) == len(ours) == TRIAL.samples
    # A sleep is never too short, and on a busy machine anything may be long.
    assert min(eager) >= 4e-3
    assert 1e-3 <= min(ours) < min(eager) * 10


def test_providers_take_turns_and_inputs_rotate() -> None:
    seen: list[tuple[str, int]] = []

    def noting(name: str) -> Any:
        def work(turn: int) -> int:
            seen.append((name, turn))
            time.sleep(2e-4)
            return 0

        return lambda: work

    measure(case(Provider("a", noting("a")), Provider("b", noting("b")), turns=3), TRIAL)
    names = [name for name, _ in seen]
    # Checked, then warmed up: a change each. The samples go there and back: ab, ba, ab.
    assert sum(first != second for first, second in pairwise(names)) >= 2 + TRIAL.samples
    assert {turn for _, turn in seen} >= {0, 1, 2}


def test_samples_go_there_and_back() -> None:
    seen: list[str] = []

    def timer(name: str) -> Any:
        return {"wall": lambda: seen.append(name) or float(len(seen))}

    samples = collect({name: timer(name) for name in "abc"}, Settings("cpu", samples=3))
    assert "".join(seen) == "abccbaabc"
    assert samples == {"a": {"wall": [1, 6, 7]}, "b": {"wall": [2, 5, 8]}, "c": {"wall": [3, 4, 9]}}


@pytest.mark.parametrize(
    ("theirs", "rounds"),
    [
        ([1.0, 1.01, 0.99] * 20, 10),  # a draw, and settled
        ([1.0, 1.4, 0.7] * 20, 40),  # one that is not: as long as there is patience
        ([0.96, 1.3, 0.65] * 20, 40),  # the other way, too
        ([2.0, 2.8, 1.4] * 20, 10),  # no draw
    ],
)
def test_a_draw_on_a_cpu_is_looked_at_longer(theirs: list[float], rounds: int) -> None:
    def timers() -> Any:
        return {"eager": {"wall": iter(theirs).__next__}, "kdfast": {"wall": lambda: 1.0}}

    samples = collect(timers(), Settings("cpu", samples=10))
    assert len(samples["eager"]["wall"]) == len(samples["kdfast"]["wall"]) == rounds
    assert len(collect(timers(), Settings("cpu", samples=10, tiny=True))["kdfast"]["wall"]) == 10


def test_a_speedup_forgets_what_slowed_a_whole_round() -> None:
    # Twice as fast in four rounds of five. The medians, 1 and 1, are of different rounds, and say "equal".
    theirs, ours = [1.0, 1.0, 1.0, 2.0, 2.0], [0.5, 0.5, 1.0, 1.0, 1.0]
    assert speedup(theirs, ours) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="shorter"):
        speedup(theirs, ours[:-1])


def test_table_computes_from_samples_and_never_against_the_missing() -> None:
    row = {
        "suite": "losses",
        "case": "kl",
        "params": {"shape": "2x3"},
        "items": 100,
        "unit": "rows",
        "providers": [
            {
                "name": "eager",
                "config": "",
                "formula": "26N",
                "bytes": 2.6e9,
                "seconds": {"wall": [1.0, 2.0, 9.0]},
            },
            {"name": "slow", "config": "", "seconds": {"events": [1.0]}},
            {"name": "gone", "config": "", "absent": "no GPU"},
            {"name": "kdfast", "config": "", "seconds": {"wall": [0.5, 0.5, 0.5]}},
        ],
    }
    compiled = {
        "name": "eager compiled",
        "config": "",
        "against": "kdfast compiled",
        "seconds": {"wall": [1.0]},
    }
    row["providers"].append(compiled)
    text = "\n".join(case_table(row, copy=2.6e9))
    # There is no kdfast compiled to compare it with.
    assert next(line for line in text.splitlines() if line.startswith("| eager compiled")).count("×") == 0
    assert "| eager | 2 s | ± 100.0 % | 50 rows/s | 26N | 1.3 | 50 % | 4.00× |" in text
    assert "gone did not take part: no GPU" in text
    # `slow` was timed another way than kdfast: a row, and no ratio.
    assert next(line for line in text.splitlines() if line.startswith("| slow")).count("×") == 0
    assert text.count("×") == 1


def test_a_provider_is_compared_with_the_one_configured_like_it() -> None:
    timed = {"kdfast": 1.0, "kdfast compiled": 0.5, "eager": 2.0, "eager compiled": 0.75}
    providers: list[dict[str, Any]] = [
        {"name": name, "config": "", "seconds": {"wall": [seconds]}} for name, seconds in timed.items()
    ]
    providers[3]["against"] = "kdfast compiled"
    row = {"suite": "s", "case": "c", "params": {}, "items": 1, "unit": "rows", "providers": providers}
    lines = {line.split(" | ")[0][2:]: line for line in case_table(row, copy=1.0)}
    assert "| 2.00× |" in lines["eager"]
    assert "| 1.50× |" in lines["eager compiled"]


def test_a_kill_costs_the_case_in_hand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.benchmarks import replay

    def stopped(settings: Settings) -> Any:
        yield case(Provider("kdfast", sleeping(1e-4)))
        assert (
            len(json.loads((tmp_path / "results.json").read_text())["cases"]) == 1
        )  # before the next is begun
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "cases", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(["replay"], TRIAL, say=len, out=tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["key"] for row in kept["cases"]] == ["losses/wait[n=1]"]
    assert "losses" in (tmp_path / "results.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_a_check_alone_times_nothing() -> None:
    calls: list[int] = []

    def counting() -> Any:
        return lambda turn: calls.append(turn) or 0

    found = measure(case(Provider("kdfast", counting), Provider("gone", absent)), TRIAL, timed=False)
    assert entry(found, "kdfast") == {"name": "kdfast", "config": "", "right": True}
    assert calls == [0, 0]
    assert "absent" in entry(found, "gone")
    assert "kdfast right, gone ABSENT" in line_of(found)


class TestReplay:
    """A captured graph is believed when it writes what the calls wrote."""

    def case(self) -> Case:
        def check(name: str, result: Any) -> None:
            torch.testing.assert_close(result[0], torch.arange(3.0))
            assert result[1].tolist() == [4, 5]

        return Case("losses", "graph", {}, 1, (), check)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(3.0).requires_grad_(), torch.tensor([4, 5])

    def test_one_that_writes_them_passes(self) -> None:
        outputs = self.outputs()

        def replay() -> None:
            with torch.no_grad():
                outputs[0].copy_(torch.arange(3.0))
                outputs[1].copy_(torch.tensor([4, 5]))

        check_replay(self.case(), "kdfast", replay, outputs)

    def test_one_that_recorded_nothing_does_not(self) -> None:
        """Its memory held the right numbers, from a call before."""
        with pytest.raises(AssertionError, match="as a captured graph"):
            check_replay(self.case(), "kdfast", lambda: None, self.outputs())

    def test_integers_count_too(self) -> None:
        outputs = self.outputs()

        def replay() -> None:
            with torch.no_grad():
                outputs[0].copy_(torch.arange(3.0))

        with pytest.raises(AssertionError, match="as a captured graph"):
            check_replay(self.case(), "kdfast", replay, outputs)


def test_nvidia_smi_is_asked_about_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It numbers all GPUs of the machine, and torch those that CUDA_VISIBLE_DEVICES names."""
    bare, named = SimpleNamespace(), SimpleNamespace(uuid="8a3c")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-77")
    assert environment.smi_id(named, 0) == "GPU-8a3c"
    assert environment.smi_id(bare, 0) == "3"
    assert environment.smi_id(bare, 1) == "GPU-77"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment.smi_id(bare, 1) == "1"


def test_a_copy_of_the_tree_says_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDFAST_COMMIT", raising=False)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "kdfast" / "benchmarks" / "environment.py"))
    assert environment.commit() is None
    (tmp_path / environment.REVISION).write_text("abc123+\n")
    assert environment.commit() == "abc123+"


def test_eager_jsd_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a tensor made of a number is a wait in each call, and no graph can be captured round it."""
    from kdfast.benchmarks import losses

    pair = [torch.randn(4, 7) for _ in range(2)]
    want = losses.eager_jsd(*pair)
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: pytest.fail("a copy from the host"))
    torch.testing.assert_close(losses.eager_jsd(*pair), want)


def test_surrogate_pictures_are_checked_once_a_case_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast.benchmarks import surrogate

    drawn: list[int] = []
    plain = surrogate.render_shaders

    def counting(codes: Any, values: Any, rates: Any, which: torch.Tensor, *rest: Any, **more: Any) -> Any:
        drawn.append(len(which))
        return plain(codes, values, rates, which, *rest, **more)

    monkeypatch.setattr(surrogate, "render_shaders", counting)
    row = surrogate._shaders(4, 12, 1, make_settings("cpu", quick=True, tiny=True))
    result = row.providers[-1].build()(0)
    drawn.clear()
    row.check("kdfast", result)
    row.check("eager", result)
    assert drawn == [surrogate.CHECKED]
    with pytest.raises(AssertionError, match="differ"):
        row.check("kdfast", result.flip(-1))


def test_spread_is_half_the_interquartile_distance() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def result_of(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "this machine",
        "device": "cpu",
        "tiny": False,
        "quick": True,
        "started": "now",
        "environment": {"kdfast": "0", "commit": None, "python": "3", "packages": {}, "cpu": "c", "cpus": 2},
        "copy_bytes_per_second": [1e9],
        "cases": list(rows),
        "errors": [],
    }


def test_success_needs_right_results(row: dict[str, Any]) -> None:
    good = copy.deepcopy(row)
    good["providers"] = [entry(good, name) for name in ("eager", "kdfast", "gone", "raises")]
    assert succeeded(result_of(good))
    assert not succeeded(result_of(row))
    entry(good, "kdfast")["failed"] = "RuntimeError"
    assert not succeeded(result_of(good))
    assert not succeeded(result_of() | {"errors": ["losses: stopped"]})


def test_compare_tells_moves_from_noise(tmp_path: Path) -> None:
    quiet = {"name": "kdfast", "config": "", "seconds": {"wall": [1.0, 1.01, 0.99, 1.0]}}
    noisy = {"name": "eager", "config": "", "seconds": {"wall": [1.0, 1.5, 0.6, 1.0]}}
    before = result_of({"key": "losses/kl", "providers": [quiet, noisy]})
    after = copy.deepcopy(before)
    for provider in after["cases"][0]["providers"]:
        provider["seconds"]["wall"] = [1.2 * value for value in provider["seconds"]["wall"]]
    found = compare.moves(before, after)
    assert [move.provider for move in found if move.beyond_noise] == ["kdfast"]
    assert found[0].change == pytest.approx(0.2)
    text = compare.markdown(found)
    assert "+20.0 %" in text
    assert text.endswith("1 of 2 moved beyond the noise.\n")
    assert not any(move.beyond_noise for move in compare.moves(before, before))


def test_compare_refuses_another_machine_and_another_file(tmp_path: Path) -> None:
    here = result_of()
    with pytest.raises(ConfigError, match="cannot be compared"):
        compare.moves(here, here | {"name": "another"})
    with pytest.raises(ConfigError, match="No such file"):
        compare.load(tmp_path / "none.json")
    made = json.dumps({"format": compare.FORMAT, "name": "x", "cases": ["ROW"]})
    rows = (
        "3",
        '{"key": 3, "providers": []}',
        '{"key": "k", "providers": 3}',
        '{"key": "k", "providers": [{"name": []}]}',
        '{"key": "k", "providers": [{"name": "n", "seconds": 3}]}',
        '{"key": "k", "providers": [{"name": "n", "seconds": {"wall": []}}]}',
        '{"key": "k", "providers": [{"name": "n", "seconds": {"wall": [0]}}]}',
        '{"key": "k", "providers": [{"name": "n", "seconds": {"wall": ["1"]}}]}',
    )
    documents = ("{", "[]", '{"format": 99, "cases": []}', '{"format": ' + "[" * 100_000)
    for text in (*documents, made.replace('"x"', "3"), *(made.replace('"ROW"', bad) for bad in rows)):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"other\.json"):
            compare.load(path)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"suite: got fast; accepted: losses"):
        run(["fast"], TRIAL)
    with pytest.raises(ConfigError, match="device: got 'tpu'"):
        run(["losses"], Settings("tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            run(["losses"], Settings("cuda"))


def test_an_absent_peer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_peer.py").write_text("import what_it_needs")
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match="no_such_peer is not installed"):
        peer("no_such_peer.part")
    with pytest.raises(Absent, match="needy_peer cannot be imported: it needs what_it_needs"):
        peer("needy_peer")
    with pytest.raises(Absent, match="OSError: undefined symbol"):
        peer("broken_peer")


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in WITHOUT_COMPILE])
def test_suites_run_and_agree_on_the_cpu(suite: str, tmp_path: Path) -> None:
    """Every provider of a suite that is installed is right; a trial of the smallest sizes."""
    lines: list[str] = []
    result = run([suite], make_settings("cpu", quick=True, tiny=True), say=lines.append)
    assert succeeded(result), lines
    assert len(lines) == len(result["cases"]) > 0
    for row in result["cases"]:
        assert entry(row, "kdfast")["seconds"]["wall"]
        assert not [provider for provider in row["providers"] if "failed" in provider]
    paths = write(result, tmp_path / "out")
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    assert text == markdown(result)
    assert "these times mean nothing" in text
    assert "CUDA device" not in text


@pytest.mark.parametrize("suite", WITHOUT_COMPILE)
def test_what_is_compiled_too_agrees_with_the_eager_form_on_the_cpu(suite: str) -> None:
    """torch.compile left out: it takes longer than all the others."""
    from dataclasses import replace

    for row in import_module(f"kdfast.benchmarks.{suite}").cases(make_settings("cpu", quick=True, tiny=True)):
        kept = tuple(provider for provider in row.providers if provider.name != "torch.compile")
        measured = measure(replace(row, providers=kept), TRIAL)
        assert {p["name"] for p in measured["providers"] if "seconds" in p} == {"eager", "kdfast"}
        assert all("wrong" not in provider for provider in measured["providers"])


def test_a_wrong_loss_is_caught() -> None:
    """The check that stands before timing notices a gradient that is 1 % off."""
    from dataclasses import replace

    from kdfast.benchmarks import losses

    row = next(iter(losses.cases(make_settings("cpu", quick=True, tiny=True))))
    right = next(provider for provider in row.providers if provider.name == "kdfast")

    def off() -> Any:
        work = right.build()
        return lambda turn: (work(turn)[0], 1.01 * work(turn)[1])

    measured = measure(replace(row, providers=(replace(right, build=off),)), TRIAL)
    assert "the gradient is off by 1.00e-02" in entry(measured, "kdfast")["wrong"]


def test_every_suite_is_named_once_and_documented() -> None:
    assert len(set(SUITES)) == len(SUITES)
    page = (Path(__file__).parents[2] / "docs" / "pages" / "benchmarks.md").read_text()
    assert [name for name in SUITES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_has_a_pytest_file(suite: str) -> None:
    """Of its family, or of its suite where it is of none; and FAMILIES names the suites that a family is in."""
    bench = Path(__file__).parents[2] / "bench"
    for found in import_module(f"kdfast.benchmarks.{suite}").cases(
        make_settings("cpu", quick=True, tiny=True)
    ):
        name = found.family or suite
        assert (bench / f"test_{name}.py").is_file(), f"{found.key}: bench/test_{name}.py is missing"
        assert not found.family or suite in FAMILIES.get(found.family, ()), (
            f"{found.key}: FAMILIES in kdfast/benchmarks/run.py does not say that {suite} has cases of {name}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_case(family: str) -> None:
    found = list(cases_of(family, make_settings("cpu", quick=True, tiny=True)))
    assert found, f"no case of {family}; docs/pages/benchmarks.md#adding-a-case"
    assert {case.suite for case in found} == set(FAMILIES[family])


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="family: got speed; accepted: kl, pair"):
        list(cases_of("speed", TRIAL))
