"""One way to launch a kernel: every launch is counted, so that a test can tell which code ran.

What Triton does for each launch (bind, classify and hash all arguments) costs several times what a small kernel
takes. Here it does so once for each geometry: a :class:`Launch` keeps the compiled kernel, and runs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

from .keys import extension, launch_key

#: What CUDA allows along the second grid dimension; programs loop over what is beyond.
MAX_GRID_Y = 65535

#: Launches by kernel name since the process began (or since :func:`count_launches` was entered).
launch_counts: Counter[str] = Counter()
#: What Triton's hooks are by default: a chain that profilers add to.
_CHAIN = getattr(knobs, "HookChain", None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
    """Launch ``kernel`` on ``grid`` (any length up to 3); an empty grid launches nothing.

    Returns:
        What Triton compiled, None in its interpreter.
    """
    if 0 in grid:
        return None
    launch_counts[kernel.__name__] += 1
    return kernel[grid](*args, **kwargs)


class _Ready(NamedTuple):
    """A compiled kernel, and what stays the same from launch to launch."""

    compiled: Any
    run: Any
    programs: tuple[int, int, int]
    function: Any
    metadata: Any
    tail: tuple[Any, ...]  # arguments between those that vary and the further ones
    rest: tuple[Any, ...]  # arguments after those
    driver: Any
    knobs: tuple[Any, ...]


class Launch:
    """One kernel on one geometry, to be launched as often as wanted.

    The first launch is Triton's own. It compiles, and everything later is run as Triton would run it, without asking
    again what has been asked: on the current stream of the kernel's device, with the hooks of profilers. Whoever keeps
    a Launch answers for the arguments: types, dtypes, None, and which pointers are multiples of 16 must be those of the
    first launch. After a change of Triton's debug knobs or driver the next launch is Triton's own again.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Its programs.
        fixed: Arguments after those that vary.
        constants: Arguments by name, and the options of the launch.
        further: Names of parameters that vary, too: neighbours, among or after the fixed ones.
        device: Where it runs.
    """

    __slots__ = ("_direct", "_ready", "constants", "device", "fixed", "further", "grid", "kernel", "name")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        fixed: tuple[Any, ...],
        constants: dict[str, Any],
        device: torch.device,
        further: tuple[str, ...] = (),
    ) -> None:
        self.kernel, self.grid, self.fixed, self.constants = kernel, grid, fixed, constants
        self.further, self.name = further, kernel.__name__
        # Triton launches on the current device; -1: there is no other.
        self.device = device.index if device.type == "cuda" and device.index is not None else -1
        self._ready: _Ready | None = None
        #: The same in C++, where it was built: it does nothing and returns False where anything is out of the ordinary.
        self._direct: Callable[[tuple[Any, ...], tuple[Any, ...]], bool] | None = None

    def __call__(self, varying: tuple[Any, ...], further: tuple[Any, ...] = ()) -> None:
        """Launch with these values of the first parameters, and of those named ``further``."""
        if self._direct is not None and self._direct(varying, further):
            launch_counts[self.name] += 1
        else:
            self._run(varying, further)

    def _run(self, varying: tuple[Any, ...], further: tuple[Any, ...]) -> None:
        ready = self._ready
        if ready is None:  # before the driver is asked for: the interpreter has none
            with _guard(self.device):
                return self._by_triton(varying, further)
        active, device = driver.active, self.device
        if device >= 0 and active.get_current_device() != device:
            with _guard(device):
                return self._run(varying, further)
        compiled, run, (x, y, z), function, metadata, tail, rest, known, state = ready
        runtime = knobs.runtime
        # What makes Triton compile another kernel of the same arguments.
        now = runtime.debug, knobs.compilation.instrumentation_mode, runtime.add_stages_inspection_hook
        if known is not active or state != now or self.kernel.pre_run_hooks:
            return self._by_triton(varying, further)
        arguments = (*varying, *tail, *further, *rest)
        stream, about = active.get_current_stream(device if device >= 0 else 0), None
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if enter is leave is None or (
            type(enter) is type(leave) is _CHAIN and not enter.calls and not leave.calls
        ):
            enter = leave = None  # nobody listens
        else:
            about = compiled.launch_metadata(self.grid, stream, *arguments)
        launch_counts[self.name] += 1
        run(x, y, z, stream, function, metadata, about, enter, leave, *arguments)
        return None

    def _by_triton(self, varying: tuple[Any, ...], further: tuple[Any, ...]) -> None:
        named = dict(zip(self.further, further, strict=True))
        runtime = knobs.runtime
        state = runtime.debug, knobs.compilation.instrumentation_mode, runtime.add_stages_inspection_hook
        compiled = launch(self.kernel, self.grid, *varying, *self.fixed, **named, **self.constants)
        # The interpreter compiles nothing; ROCm's compiler also looks at how much memory a pointer leads to.
        if compiled is None or compiled.metadata.target.backend != "cuda":
            return
        given = dict(zip(self.kernel.arg_names, (*varying, *self.fixed)))
        given |= named | self.constants
        tail = tuple([given.get(p.name, p.default) for p in self.kernel.params[len(varying) :]])
        rest: tuple[Any, ...] = ()
        if self.further:
            at = [self.kernel.arg_names.index(name) for name in self.further]
            begin, end = at[0], at[0] + len(at)
            assert at == list(range(begin, end)), "neighbours, in their order"
            tail, rest = tail[: begin - len(varying)], tail[end - len(varying) :]
        x, y, z = (*self.grid, 1, 1)[:3]
        handles = compiled.run, (x, y, z), compiled.function, compiled.packed_metadata
        self._ready = _Ready(compiled, *handles, tail, rest, driver.active, state)
        self._direct = None if extension is None else extension.direct_launch(self._told(self._ready))

    def _told(self, ready: _Ready) -> dict[str, Any]:
        """What ``kdfast._C`` is told of a launch."""
        return {
            "driver": driver,
            "slot": "_active" if getattr(driver, "_active", None) is ready.driver else "active",
            "active": ready.driver,
            "runtime": knobs.runtime,
            "compilation": knobs.compilation,
            "kernel": self.kernel,
            "chain": _CHAIN,
            "run": ready.run,
            "state": ready.knobs,
            "programs": ready.programs,
            "compiled": (ready.function, ready.metadata),
            "tail": ready.tail,
            "rest": ready.rest,
            "device": self.device,
        }


def keeps(device: torch.device) -> bool:
    """Whether launches on ``device`` are kept by geometry: the interpreter's, and those for no device, never are."""
    return device.type == "cuda"


#: Geometries that a family keeps: as many shapes as a training run has, not as many as a server sees.
MAX_KEPT = 512
_keeping = threading.Lock()
_all_kept: list[Kept] = []


class Kept(dict[Any, Any]):
    """What a family has planned, by geometry: the last :data:`MAX_KEPT`. It holds no tensor.

    Reading takes no lock: two threads that miss both plan, and one plan stays.
    """

    def __init__(self) -> None:
        super().__init__()
        _all_kept.append(self)

    def keep(self, key: Any, value: Any, device: torch.device) -> Any:
        """Keep ``value``, where launches on ``device`` are kept; whatever is kept then."""
        if not keeps(device):
            return value
        with _keeping:
            while len(self) >= MAX_KEPT:
                del self[next(iter(self))]
            return self.setdefault(key, value)


#: A grid, the arguments after those that vary, and the constants by name.
Planned = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]


class Launches:
    """The launches of one kernel, each planned once for its geometry.

    Args:
        kernel: A ``triton.jit`` function.
        plan: ``(*geometry)`` to what is planned.
        further: Names of parameters after the fixed ones that vary, too: numbers.
    """

    def __init__(
        self,
        kernel: Any,
        plan: Callable[..., Planned],
        further: tuple[str, ...] = (),
    ) -> None:
        self.kernel, self.plan, self.further = kernel, plan, further
        self.kept = Kept()

    def find(self, device: torch.device, geometry: tuple[Any, ...], varying: tuple[Any, ...]) -> Launch:
        """The launch of a geometry.

        Args:
            device: Where the tensors are.
            geometry: All that the plan depends on, hashable.
            varying: Values of the kernel's first parameters; memory made for this call may be left out.
        """
        key = (device, geometry, launch_key((), varying))
        found: Launch | None = self.kept.get(key)
        return self._keep(key, device, geometry) if found is None else found

    def find_by(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        varying: tuple[Any, ...],
        told: tuple[Any, ...],
        geometry: Callable[[], tuple[Any, ...]],
    ) -> Launch:
        """The same where ``geometry`` follows from ``tensors``, the first of them given, and ``told``."""
        key = (launch_key(tensors, varying), told)
        found: Launch | None = self.kept.get(key)
        if found is None:
            assert tensors[0] is not None
            return self._keep(key, tensors[0].device, geometry())
        return found

    def _keep(self, key: Any, device: torch.device, geometry: tuple[Any, ...]) -> Launch:
        grid, fixed, constants = self.plan(*geometry)
        made = Launch(self.kernel, grid, fixed, constants, device, self.further)
        self.kept.keep(key, made, device)
        return made

    def __call__(
        self,
        device: torch.device,
        geometry: tuple[Any, ...],
        varying: tuple[Any, ...],
        further: tuple[Any, ...] = (),
    ) -> None:
        """Launch once; ``further``: values of the parameters of that name."""
        self.find(device, geometry, varying)(varying, further)


def forget() -> None:
    """Plan everything anew: after a change of what plans depend on beside the geometry."""
    with _keeping:
        for kept in _all_kept:
            kept.clear()


@contextlib.contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count the launches of a block: ``with count_launches() as counts: ...``."""
    global launch_counts
    outer, launch_counts = launch_counts, Counter()
    try:
        yield launch_counts
    finally:
        outer.update(launch_counts)
        launch_counts = outer


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``tensor``'s GPU current, since Triton launches on the current one; nothing on a CPU."""
    return _guard(tensor.device.index if tensor.device.type == "cuda" else -1)


def _guard(index: int) -> contextlib.AbstractContextManager[Any]:
    if index >= 0 and index != torch.cuda.current_device():
        return torch.cuda.device(index)
    return contextlib.nullcontext()


class _Compiled(threading.local):
    """Whether a registered op runs on this thread."""

    fresh = False


_compiled = _Compiled()


class fresh_counters:
    """Keep no counter inside a block: for registered ops, whose first run a compiler may direct into the memory pool of
    a CUDA graph (torch.compile with mode="reduce-overhead"). Nothing in there may outlive the call.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before, _compiled.fresh = _compiled.fresh, True

    def __exit__(self, *_: object) -> None:
        _compiled.fresh = self._before


_counters: dict[tuple[int | None, int], torch.Tensor] = {}
_Memory = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
#: Of each stream: how many floats and counters there are, and the memory.
_reductions: dict[tuple[int | None, int], tuple[int, int, _Memory]] = {}
#: More partial sums than this are memory of one launch.
MAX_PARTIALS = 1 << 18
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(device: torch.device) -> int:
    """The handle of the current stream; torch's own object of it takes microseconds to make."""
    if _raw_stream is not None and device.index is not None:
        return int(_raw_stream(device.index))
    return int(torch.cuda.current_stream(device).cuda_stream)


def _lasting(device: torch.device) -> bool:
    """Whether memory may be kept for later launches."""
    return keeps(device) and not _compiled.fresh and not torch.cuda.is_current_stream_capturing()


#: Counters of a device that captured calls take for good, in int32: 256 KB, 16 bytes a call at least.
GRAPH_COUNTERS = 1 << 16
_graph_counters: dict[int | None, torch.Tensor] = {}  # what is left of them
_taking = threading.Lock()


def _captured_counter(device: torch.device, count: int) -> torch.Tensor | None:
    """Zeros that no other call has or will have, None where there are none left.

    A graph shares them with nothing but its own next replay, which begins after this one, and finds the zeros that
    kernels leave. So no graph has to fill them, branches of one graph may run side by side, and so may two graphs.
    """
    size = -(-count // 4) * 4  # of an address that 16 divides, as memory of its own would be
    with _taking:
        left = _graph_counters.get(device.index)
        if left is None or left.numel() < size:
            return None
        _graph_counters[device.index] = left[size:]
        return left[:count]


def arrival_counter(device: torch.device, count: int = 1) -> torch.Tensor:
    """Zeros, at least ``count``, that kernels count their finished programs in, and leave at zero.

    One set a stream, since launches of two streams may overlap. A call that a graph captures takes one for good, out of
    memory that the first eager call on the device has put aside; with nothing left of it, and in a registered op
    (:func:`fresh_counters`), it is a fresh one, which costs a launch that fills it: memory of a graph's pool must not
    outlive it in a cache.
    """
    if not _lasting(device):
        found = None
        if keeps(device) and torch.cuda.is_current_stream_capturing():
            found = _captured_counter(device, count)
        return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
    key = (device.index, _stream(device))
    found = _counters.get(key)
    if found is None or (count > 1 and found.numel() < count):
        found = _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
        with _taking:
            if device.index not in _graph_counters:
                _graph_counters[device.index] = torch.zeros(GRAPH_COUNTERS, dtype=torch.int32, device=device)
    return found


def reduction(device: torch.device, partials: int, counters: int = 1) -> _Memory:
    """(float32 memory, arrival counters, what memory for one sum is like), for launches that sum.

    There are ``partials`` floats and ``counters`` counters at least. All are kept for a stream's next launch, which
    cannot begin before this one has summed.
    """
    if partials > MAX_PARTIALS or not _lasting(device):
        partial = torch.empty(partials, dtype=torch.float32, device=device)
        return partial, arrival_counter(device, counters), partial[0]
    key = (device.index, _stream(device))
    found = _reductions.get(key)
    if found is None or found[0] < partials or found[1] < counters:
        size, count = (1024, 1) if found is None else found[:2]
        size, count = max(size, 1 << (partials - 1).bit_length()), max(count, counters)
        held = torch.empty(size, dtype=torch.float32, device=device)
        found = _reductions[key] = size, count, (held, arrival_counter(device, count), held[0])
    return found[2]
