"""Measuring tools of `scripts/benchmark.py`: interleaved timing, host reads, graphs, tables.

What is compared runs in one process, alternately and in random order, and ratios are formed within
each round: a machine that slows down for a while slows both sides of a ratio. The baseline runs
twice per round; its ratio to itself is the noise floor below which a difference means nothing.
"""

import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], object]
Timer = Callable[[Run], float]

# Operators whose result, or its shape, the host must wait for.
_WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
# Methods that read a tensor without any operator where the tensor is on the CPU already.
_READING_METHODS = ("tolist", "numpy", "cpu")


def time_on_cpu(run: Run) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_on_accelerator(run: Run) -> float:
    """Seconds from the first to the last kernel of one call, on the current accelerator.

    Untested: written for CUDA, never run on one.
    """
    torch.accelerator.synchronize()
    start, end = torch.Event(enable_timing=True), torch.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.accelerator.synchronize()
    return start.elapsed_time(end) / 1000


def timer_for(device: torch.device) -> Timer:
    """The timer that waits for the right device."""
    return time_on_cpu if device.type == "cpu" else time_on_accelerator


def time_interleaved(
    runs: Mapping[str, Run],
    rounds: int,
    *,
    warmup: int = 1,
    limit: float = math.inf,
    timer: Timer = time_on_cpu,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time several things alternately.

    Args:
        runs: What to run, by name.
        rounds: How often each is timed.
        warmup: Rounds before those, which are not counted.
        limit: Seconds after which no further round starts, but for the first three: a machine
            that is busy shall give wide quartiles, not a run without end.
        timer: Times one call.
        seed: Of the order, which is drawn anew in every round.

    Returns:
        Seconds of each name, one entry per round that was run.
    """
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    spent = 0.0
    for index in range(warmup + rounds):
        if spent > limit and index >= warmup + 3:
            break
        for name in generator.sample(list(runs), len(runs)):
            elapsed = timer(runs[name])
            spent += elapsed
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """Time of `name` by time of `baseline`, formed within each round."""
    pairs = zip(seconds[name], seconds[baseline], strict=True)
    return Spread.of([value / reference for value, reference in pairs])


def set_dtype(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cast parameters only, as FSDP's mixed precision does: rotary tables stay in float32."""
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def differentiate(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    """One forward and backward pass from fresh gradients, as every training step has them."""
    x.grad = None
    model.zero_grad(set_to_none=True)
    output = run(x)
    output.backward(torch.ones_like(output))


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device, also where host and device are one.

    A read shows as an operator (`.item()`, `bool()`, `nonzero`), as an index by a boolean mask,
    or, of a tensor that is on the CPU already, as a method that runs no operator (`.tolist()`,
    `.cpu()`, `.to("cpu")`, `.numpy()`). What an operator does inside counts as the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._methods = _MethodReads(self.reads)

    def __enter__(self) -> "HostReads":
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._methods.__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func)
        if any(waiting in name for waiting in _WAITING_OPS):
            self.reads.append(name)
        if name.startswith(("aten.index", "aten._index_put")) and len(args) > 1:
            indices = args[1] if isinstance(args[1], list | tuple) else ()
            masks = [x for x in indices if isinstance(x, Tensor) and x.dtype == torch.bool]
            self.reads.extend("boolean index" for _ in masks)
        # A custom operator's fallback for the CPU may read where the device's kernel would not.
        with _paused(self._methods):
            return func(*args, **(kwargs or {}))


class _MethodReads(TorchFunctionMode):
    """Counts calls of the reading methods that no operator stands for."""

    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads
        self.is_paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        reads_cpu = name == "to" and "cpu" in map(str, (*args[1:], *(kwargs or {}).values()))
        if not self.is_paused and (name in _READING_METHODS or reads_cpu):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _paused(mode: _MethodReads) -> Iterator[None]:
    before, mode.is_paused = mode.is_paused, True
    try:
        yield
    finally:
        mode.is_paused = before


def host_reads(run: Run) -> list[str]:
    """Names of all reads of the device by the host during one call."""
    with HostReads() as counter:
        run()
    return counter.reads


class _CountingBackend:
    """A backend of `torch.compile` that counts the graphs it is given and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def count_graphs(blocks: Iterable[nn.Module], steps: Iterable[Run]) -> tuple[int, int]:
    """Compile each block by itself, as training does; count graphs and graph breaks of the steps.

    Args:
        blocks: Blocks of a model, compiled in place (and run eagerly).
        steps: What to run, in turn; each may bring other shapes.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = _CountingBackend()
    for block in blocks:
        block.compile(backend=counter)
    for step in steps:
        step()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    torch._dynamo.reset()
    return counter.graphs, breaks


def has_cpp_compiler() -> bool:
    """Whether inductor finds a C++ compiler for CPU kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++"))


def time_lines(
    command: Sequence[str], marks: Mapping[str, str], environment: Mapping[str, str], limit: float
) -> dict[str, float]:
    """Run a command and note when it first prints what.

    Args:
        command: The command.
        marks: Name -> text of a line.
        environment: Variables to add.
        limit: Seconds after which it is stopped.

    Returns:
        Seconds from the start to the first line with each text and, as "exit", to its end.

    Raises:
        RuntimeError: The command failed, or a text never came.
    """
    seen: dict[str, float] = {}
    start = time.perf_counter()
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                # Else the child holds lines back and they are timed too late.
                env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            )
        )
        watchdog = threading.Timer(limit, process.kill)
        watchdog.start()
        stack.callback(watchdog.cancel)
        stdout = process.stdout
        assert stdout is not None
        lines = []
        for line in stdout:
            lines.append(line)
            for name, text in marks.items():
                if text in line:
                    seen.setdefault(name, time.perf_counter() - start)
    seen["exit"] = time.perf_counter() - start
    missing = [text for name, text in marks.items() if name not in seen]
    if process.returncode != 0 or missing:
        tail = "".join(lines[-20:])
        raise RuntimeError(f"{command} ended with {process.returncode}, without {missing}:\n{tail}")
    return seen


def machine_facts(device: torch.device) -> dict[str, object]:
    """What a reader must know to judge the numbers; nothing that names the machine."""
    accelerator = "none, CPU only"
    if device.type != "cpu":
        accelerator = torch.get_device_module(device).get_device_name(device)
    return {
        "measured on": "CPU only" if device.type == "cpu" else device.type,
        "accelerator": accelerator,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load average at start": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Table:
    """Rows of text under headings, printed in aligned columns and kept for JSON."""

    title: str
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    records: list[dict[str, object]] = field(default_factory=list)

    def add(self, *cells: object, **record: object) -> None:
        """Add a row: what is printed, and the plain numbers behind it."""
        assert len(cells) == len(self.columns)
        self.rows.append([str(cell) for cell in cells])
        self.records.append(record)

    def __str__(self) -> str:
        rows = [list(self.columns), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *lines, *self.notes])

    def as_json(self) -> dict[str, object]:
        """Title, notes and numbers."""
        return {"title": self.title, "notes": self.notes, "rows": self.records}


def judge(value: float, must: float, aim: float, floor: Spread | None = None) -> str:
    """Compare a cost with its targets; not if the floor, which should be 1, is over 3 % off."""
    if floor and max(floor.high - 1, 1 - floor.low) > 0.03:
        return "too noisy"
    return "aim met" if value <= aim else "met" if value <= must else "MISSED"


def startup_table(family: str, config: Path, must: float, aim: float) -> Table:
    """Time fresh processes until the first training step is logged, with and without torchrun."""
    marks = {"imports": "Starting job", "build": "Training starts", "first step": "step:  1 "}
    columns = ["variant", *marks, "total s", "must", "aim", ""]
    table = Table(f"{family} start-up: {config.stem} to its first step, seconds", columns)
    module = ["-m", "torchtitan_mixtures.train"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--tee=3"]
    launches = {"python": (module, {**rank, **rendezvous}), "torchrun": ([*torchrun, *module], {})}
    for variant, (launch, environment) in launches.items():
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                *("--config", str(config), "--job.dump_folder", folder),
                *("--training.steps", "1", "--lr_scheduler.warmup_steps", "1"),
                *("--metrics.log_freq", "1", "--validation.no-enable", "--checkpoint.no-enable"),
            ]
            command = [sys.executable, *launch, *arguments]
            seen = time_lines(command, marks, environment, limit=180)
        times = [seen[name] for name in marks]
        parts = [later - before for before, later in zip([0, *times], times, strict=False)]
        total = times[-1]
        table.add(
            *(variant, *(f"{part:.1f}" for part in parts), f"{total:.1f}", f"{must:g}", f"{aim:g}"),
            judge(total, must, aim),
            variant=variant,
            seconds=dict(zip(marks, parts, strict=True)),
            total=total,
        )
    table.notes.append("imports: from the launch to the job's first line, torchrun's own included")
    return table
