"""Run tests marked ``gpu`` without a GPU, and fail on accesses out of bounds, races between programs, unwritten memory.

    python -m pytest -p tests.sanitizer.plugin --sanitize 90 -m "gpu and not slow" tests/kernels

ttsem executes the IR that Triton compiles, program after program, on CPU tensors that say they are on a GPU, and keeps
a log of every access. This plugin opens its session (in each worker, under xdist), answers the questions to
``torch.cuda`` that it leaves open, tells it what tickets order (order.py), leaves out what needs a real device, and
sums up by kernel and line.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from tests.sanitizer import fragments
from tests.sanitizer.machine import MULTIPROCESSORS, pretend
from tests.sanitizer.order import respecting_tickets

ROOT = Path(__file__).parents[2]
#: Test names that say: this needs torch's CUDA build, and a device that captures, compiles or copies beside the host.
NEEDS_A_DEVICE = (
    "opcheck",
    "compile",
    "make_fx",
    "captur",
    "graph",
    "stream",
    "sync",
    "nothing_waits",
    "autocast",
    "memory",
    "never_exist",
)
#: Dtypes that add nothing here: float64 runs the reference, and half precisions differ in conversions only.
SAME_ACCESSES = ("float64", "float16")
#: Tests of a hundred thousand rows, or of bits that every layout shares: minutes each where a lane is a Python number.
TOO_LONG = (
    "test_a_hundred_thousand_rows_of_random_operations",
    "test_any_layout_gives_the_same_step",
    "-66000-",  # as many programs, of one row each; the 70,000 slots of test_three_levels have as many levels
    "test_offsets_beyond_32_bits",  # gigabytes of logits; tests/kernels/test_widths.py follows the integers instead
    "shape1-1-dtype1-class_tuple",  # 40 classes of one pixel each in a program: 20 GB of unrolled IR
)
#: Tests whose launches others make as well: values that no address depends on, and the one launch that a count needs.
LAUNCHED_BEFORE = (
    "test_empty_input",
    "test_the_kernel_is_what_ran",
    "tests/kernels/test_peers.py",
    "tests/kernels/test_edges.py",
    "_grid[",
    "test_logits_of_ten_thousand",
)
#: Of the divergences' kinds, which are one kernel's arithmetic, those that run in every dtype and layout.
EVERY_KIND = ("test_layouts_do_not_change_the_result", "test_near_equal_logits_keep_their_digits")
KINDS = ("forward_kl", "jsd", "skew_reverse_kl_long", "pixels", "weighted")
#: Loads beside another program's store that cannot tell before from after: (kernel, buffer) -> why.
EXPLAINED = {
    (
        "replay_update",
        "leaves",
    ): "rows that lose their slot look whether it is empty; nothing empties or fills one here",
}
#: Bytes that a process may map: what outgrows it fails in Python, and not by the machine's own judgement.
MEMORY = 16 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sanitizer")
    group.addoption("--sanitize", type=int, metavar="CC", help="compute capability: 80, 90 or 100")
    group.addoption("--sanitize-thorough", action="store_true", help="with every dtype, and the long ones")


def pytest_configure(config: pytest.Config) -> None:
    capability = config.getoption("--sanitize")
    if capability is None:
        raise pytest.UsageError("--sanitize: a compute capability is needed: 80, 90 or 100")
    if capability not in MULTIPROCESSORS:
        raise pytest.UsageError(f"--sanitize: got {capability}; accepted: {sorted(MULTIPROCESSORS)}")
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(None), "sanitizer-summary")
        return  # the workers run the tests
    os.environ["KDFAST_MACHINE"] = machine_text(capability)  # of processes that a test starts
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    stack = contextlib.ExitStack()
    state = stack.enter_context(session(capability))
    config.pluginmanager.register(Summary(state), "sanitizer-summary")
    config.add_cleanup(stack.close)


@contextlib.contextmanager
def session(capability: int) -> Iterator[Any]:
    """While open, every launch of this process is executed and checked, planned for that GPU."""
    from ttsem import harness, sanitize

    from kdfast.kernels import launch
    from kdfast.kernels.machine import use_machine
    from kdfast.reference.replay import ReplayState

    fragments.register()
    finder = respecting_tickets(sanitize.pidraces.find_race)
    with (
        patch.object(sanitize.pidraces, "find_race", finder),
        patch.object(harness, "_compile_asm", first_stage_only(harness)),
        sanitize.session(capability, "<pytest>", races="record") as state,
        contextlib.ExitStack() as stack,
    ):
        state.races = Races(sanitize.KernelFault)
        stack.callback(pretend(capability))
        # Inside autograd's functions tensors say that they are on a CPU, where a plan kept from outside would look for
        # a GPU: none is kept, and what is planned there is planned for this machine, too.
        stack.enter_context(use_machine(machine_text(capability)))
        stack.enter_context(patch.object(launch, "keeps", lambda device: False))
        stack.enter_context(patch.object(ReplayState, "on_host", copied_to_the_host(ReplayState.on_host)))
        yield state


def first_stage_only(harness: Any) -> Callable[..., dict[str, str]]:
    """``harness._compile_asm`` that ends with the IR that is executed: no layouts, LLVM or ptxas; each kernel once."""
    made: dict[str, str] = {}

    def compiled(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> dict[str, str]:
        harness.mlir.enable_generic_printing()
        key = repr((fn.cache_key, fn.fn.__qualname__, harness._specialize(fn, args, kwargs, target), target))
        if key not in made:
            launch = SimpleNamespace(fn=fn, fn_name=fn.__name__, args=args, kwargs=kwargs)
            made[key] = harness._stage_text(launch, "ttir", target)
        return {"ttir": made[key]}

    return compiled


class Races(list[Any]):
    """What a session records: a race that is not explained stops the launch, as a fault of any other kind does."""

    def __init__(self, fault: type[Exception]) -> None:
        super().__init__()
        self.fault = fault

    def append(self, race: Any) -> None:
        if (race.kernel, race.buffer) not in EXPLAINED or "(read-write)" not in race.detail:
            raise self.fault(race)
        super().append(race)


def copied_to_the_host(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``ReplayState.on_host`` whose copy knows that it is on the host, although its tensors say otherwise."""

    @contextlib.contextmanager
    def on_host(self: Any) -> Iterator[Any]:
        with plain(self) as host:
            host.__dict__["on_cpu"] = True  # a cached property
            yield host

    return on_host


def machine_text(capability: int) -> str:
    """That GPU, as KDFAST_MACHINE says it."""
    return f"{capability}:{MULTIPROCESSORS[capability]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thorough = config.getoption("--sanitize-thorough")
    kept, left = [], []
    for item in items:
        real = any(word in item.name.partition("[")[0] for word in NEEDS_A_DEVICE)
        (left if real or (not thorough and dispensable(item)) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def dispensable(item: pytest.Item) -> bool:
    """Whether a test would take long, or launch what another does: as many programs on the same addresses."""
    function, _, parameters = item.name.rstrip("]").partition("[")
    words = parameters.split("-")
    if any(name in item.nodeid for name in (*TOO_LONG, *LAUNCHED_BEFORE)) or set(words) & set(SAME_ACCESSES):
        return True
    if function == "test_layouts_do_not_change_the_result" and not moves(item):
        return True
    other_kind = item.path.name == "test_divergence.py" and not set(words) & set(KINDS)
    return other_kind and ("bfloat16" in words or function in EVERY_KIND)


def moves(item: Any) -> bool:
    """Whether the layout of a test is another than the plain one, for some argument of its case."""
    import torch

    from tests.support.conformance import relayout  # not before pytest rewrites its assertions

    case, layout = item.callspec.params["case"], item.callspec.params["layout"]
    inputs = case.inputs(case.shapes[0], torch.float32, "cpu")
    return any(relayout(x, layout) is not x for name, x in inputs.items() if name in case.cast)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    fault = getattr(error, "fault", None)
    if fault is not None:
        report.user_properties.append(("fault", (fault.kind, place(fault), fault.kernel)))
    return report


def place(fault: Any) -> str:
    """File and line of a fault; of one in an inlined function, its own and not the caller's."""
    inlined = re.search(r'callsite\("([^"]+)":(\d+)', fault.op)
    file, line = inlined.groups() if inlined else (fault.source_file, fault.source_line)
    source = Path(file)
    return f"{source.relative_to(ROOT) if source.is_relative_to(ROOT) else source}:{line}"


class Summary:
    """Counts launches and faults, across workers too, and prints them last."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.launches = self.unchecked = self.explained = 0
        self.faults: Counter[tuple[str, str, str]] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "fault":
                self.faults[tuple(value)] += 1  # type: ignore[index]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.state is not None:
            self.launches, self.unchecked = self.state.launches, self.state.races_unchecked
            self.explained = len(self.state.races)
            output = getattr(session.config, "workeroutput", None)
            if output is not None:
                output["sanitizer"] = [self.launches, self.unchecked, self.explained]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        launches, unchecked, explained = getattr(node, "workeroutput", {}).get("sanitizer", (0, 0, 0))
        self.launches += launches
        self.unchecked += unchecked
        self.explained += explained

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("sanitizer")
        terminalreporter.write_line(
            f"{self.launches} launches executed, {self.unchecked} of them too large to search for races, "
            f"{self.explained} with a race that is explained (EXPLAINED in tests/sanitizer/plugin.py)"
        )
        for (kind, where, kernel), count in sorted(self.faults.items()):
            terminalreporter.write_line(f"{kind}: {where} in {kernel} ({count} tests)")
        if not self.faults:
            terminalreporter.write_line("no access out of bounds, no other race, no read of unwritten memory")
