"""Run code that a model wrote, and judge it from outside.

Every run is a fresh interpreter in an empty folder, shut in by what the kernel grants
(docs/sandbox.md says what that is and what it is not; `strength()` says what this machine
gives).  The program's process never holds the answers: it evaluates the calls and sends plain
data back, and this process compares.  So a program cannot pass by printing "passed", by leaving
with status 0, by objects that equal everything or by replacing the checker; it has to answer.
"""

from __future__ import annotations

import ast
import cmath
import json
import marshal
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from cl_graft.errors import CLGraftError
from cl_graft.processes import signal_name

CONSENT_VARIABLE = "CL_GRAFT_ALLOW_CODE_EXECUTION"
_CHILD = Path(__file__).with_name("_child.py")
_START = """import marshal
code, job = marshal.load(open(0, "rb", closefd=False))
names = {"__name__": "child"}
exec(code, names)
names["main"](job)
"""  # the child's code comes compiled: compiling it anew would cost a third of a run
_CUT_OFF, _TIMED_OUT, _SIGNALLED = 10, 11, 128  # the child's exit codes; _SIGNALLED + number
_GRACE = 10.0  # seconds beyond the limit for start and end, before this side kills by itself
_REPORT_BYTES = 1 << 17  # of results, in one run; also bounds what a hostile set costs to rebuild
_WALLS: tuple[str, ...] = (
    "namespaces",
    "user",
    "landlock",
)  # tests take some away to try the weaker ones
_BUILDERS = {"set", "frozenset", "tuple", "list", "dict", "sorted", "float", "complex", "bytes"}
_REASONS = {name: name for name in ("wrong answer", "error", "exit", "memory")}


class ConsentNeeded(CLGraftError):
    """Code written by a model was about to run and the user has not said that it may."""


class SandboxError(CLGraftError):
    """The sandbox itself could not do its work; never the program's fault."""


@dataclass(frozen=True)
class Limits:
    """What one run may use: wall seconds, MiB of memory per process, child tasks (threads count
    too), KiB per file (all files together: four times that) and KiB of printed text."""

    seconds: float = 5.0
    memory_mb: int = 256
    processes: int = 0
    file_kb: int = 1024
    output_kb: int = 64

    def __post_init__(self) -> None:
        counts = (self.processes, self.file_kb, self.output_kb)
        if not (0 < self.seconds <= 86400 and self.memory_mb >= 32 and min(counts) >= 0):
            raise SandboxError(
                f"{self} cannot be kept; seconds must be above 0 and at most 86400, memory_mb at "
                "least 32, and the others at least 0."
            )


@dataclass(frozen=True)
class Case:
    """One hidden test: an expression, and the literal (or closed expression) that it must equal."""

    call: str
    expected: str


@dataclass(frozen=True)
class Outcome:
    """The verdict.  `reason` is one of: passed, wrong answer, error (an exception), exit (it left
    before the tests were done), timeout, memory, output (printed or returned too much), killed
    (by a signal), tampered (the report was written to).  `detail` has at most 500 characters."""

    passed: bool
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class _Raw:
    """What came out of one child: report, exit code of its keeper, whether it wrote too much."""

    nonce: bytes
    report: bytes
    code: int
    flooded: bool


@dataclass(frozen=True)
class _Other:
    """Stands for a result that is no plain data; equals nothing that can be expected."""

    kind: str

    def __repr__(self) -> str:
        return f"a {self.kind} object"


def run_cases(program: str, cases: Sequence[Case], limits: Limits = Limits()) -> Outcome:
    """Execute `program`, evaluate each call in it, and compare here with what was expected.

    Equality is Python's on plain data (None, bool, int, float, complex, str, bytes, list, tuple,
    dict, set), except that floats may differ by 1e-9 of the larger and nan equals nan.
    An `expected` that is no literal is evaluated in a child of its own, without the program.
    Raises SandboxError if there is no case, a case is no expression, or no child can be started.
    """
    for number, case in enumerate(cases, 1):
        _parse(case.call, "eval", number)
    return _judge(program, "", cases, limits)


def run_asserts(
    program: str, asserts: Sequence[str], setup: str = "", limits: Limits = Limits()
) -> Outcome:
    """Execute `setup`, then `program`, then tests in the manner of MBPP: "assert f(2) == 4".

    An assert that compares with a literal, or with set(...), sorted(...) and the like of
    literals, becomes a Case and has run_cases' guarantee.  Any other statement (math.isclose,
    a HumanEval `check(candidate)`, ...) runs beside the program, which can see it, replace what
    it calls, or return objects that equal everything: there, only a program that does not set
    out to cheat is judged rightly.  Raises SandboxError as run_cases does.
    """
    steps = [_as_step(_parse(text, "exec", n), text) for n, text in enumerate(asserts, 1)]
    return _judge(program, setup, steps, limits)


def run_many(jobs: Sequence[Callable[[], Outcome]], workers: int) -> list[Outcome]:
    """The outcomes of `jobs` in their order, at most `workers` running at a time (threads)."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return list(pool.map(lambda job: job(), jobs))


def require_consent(allowed: bool, what: str) -> None:
    """Raise ConsentNeeded unless the flag was given or the environment variable is "1"."""
    if not allowed and os.environ.get(CONSENT_VARIABLE) != "1":
        raise ConsentNeeded(
            f"{what} runs code that a model wrote on this machine; if you accept that, pass "
            f"--allow-code-execution or set {CONSENT_VARIABLE}=1."
        )


def strength() -> dict[str, bool]:
    """Which walls this kernel and this user really get, measured by starting one child."""
    return dict(_value(_frames(_exchange("", "", [], Limits()))[1]["ready"]))


# -- judging ------------------------------------------------------------------------------------


def _parse(text: str, mode: str, number: int) -> ast.AST:
    try:
        return ast.parse(text, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SandboxError(
            f"test {number}, {text[:80]!r}, is not Python: {error}; mend it."
        ) from None


def _as_step(tree: ast.AST, text: str) -> Case | str:
    """The Case that says the same as an assert, where there is one; else the text itself."""
    match tree:
        case ast.Module(
            body=[ast.Assert(test=ast.Compare(left=a, ops=[ast.Eq()], comparators=[b]))]
        ):
            for call, answer in ((a, b), (b, a)):
                names = {node.id for node in ast.walk(answer) if isinstance(node, ast.Name)}
                if names <= _BUILDERS:
                    return Case(ast.unparse(call), ast.unparse(answer))
    return text


def _judge(program: str, setup: str, steps: Sequence[Case | str], limits: Limits) -> Outcome:
    if not steps:
        raise SandboxError("there is no test, so nothing could fail; give at least one.")
    wanted = iter(_expected([step.expected for step in steps if isinstance(step, Case)], limits))
    sent = [("call", step.call) if isinstance(step, Case) else ("exec", step) for step in steps]
    raw = _exchange(program, setup, sent, limits)
    if bad := _bad_end(raw, limits):
        return bad
    try:
        frames = _frames(raw)[2:]
        for step, frame in zip(steps, frames, strict=False):
            if "failed" in frame:
                reason, text = frame["failed"]
                return Outcome(False, _REASONS.get(reason, "tampered"), str(text)[:500])
            if isinstance(step, Case):
                got, want = _value(frame["value"]), next(wanted)
                if not _same(got, want):
                    text = f"{step.call[:150]} gave {_short(got)}, expected {_short(want)}"
                    return Outcome(False, "wrong answer", text)
            elif frame != {"held": True}:
                raise ValueError("no such frame for a statement")
        if len(frames) > len(steps):
            raise ValueError("more frames than tests")
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return Outcome(False, "tampered", "the report holds what the sandbox does not write")
    if len(frames) < len(steps):
        return Outcome(False, "exit", "the program left before the tests were done")
    return Outcome(True, "passed")


def _bad_end(raw: _Raw, limits: Limits) -> Outcome | None:
    """The outcome of a run whose end settles it, whatever it reported."""
    if raw.flooded:
        return Outcome(
            False, "output", f"more than {limits.output_kb} KiB printed, or 128 KiB returned"
        )
    if raw.code == _TIMED_OUT:
        return Outcome(False, "timeout", f"not done within {limits.seconds:g} s")
    if raw.code >= _SIGNALLED:
        return Outcome(False, "killed", f"ended by {signal_name(raw.code - _SIGNALLED)}")
    if raw.code != 0:
        return Outcome(False, "killed", f"the run was broken off (code {raw.code})")
    return None


def _expected(texts: Sequence[str], limits: Limits) -> list[Any]:
    """The expected values: literals read here, closed expressions evaluated in their own child."""
    values: dict[str, Any] = {}
    for text in texts:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values[text] = ast.literal_eval(text)
    rest = [text for text in dict.fromkeys(texts) if text not in values]
    if rest:
        limits = replace(limits, seconds=max(60.0, limits.seconds))  # they are no program's
        raw = _exchange("", "", [("call", text) for text in rest], limits)
        if bad := _bad_end(raw, limits):
            raise SandboxError(
                f"the expected values cannot be computed ({bad.detail}); write them as Python literals."
            )
        frames = _frames(raw)[2:]
        for text, frame in zip(rest, frames, strict=False):
            if "value" not in frame:
                raise SandboxError(
                    f"the expected value {text[:80]!r} cannot be computed ({frame.get('failed')}); "
                    "write it as a Python literal."
                )
            values[text] = _value(frame["value"])
            if isinstance(values[text], _Other):
                raise SandboxError(
                    f"the expected value {text[:80]!r} is {values[text]!r} and cannot be compared; "
                    "expect plain data."
                )
        if len(frames) < len(rest):
            raise SandboxError("the expected values ended their process; write them as literals.")
    return [values[text] for text in texts]


def _frames(raw: _Raw) -> list[dict[str, Any]]:
    """The report's frames, the keeper's and the worker's hello first.

    Raises ValueError where a line is not the sandbox's, SandboxError where nothing started.
    """
    lines = raw.report.split(b"\n")
    mark = raw.nonce + b" "
    if len(lines) < 3 or not all(line.startswith(mark) for line in lines[:2]):
        last = raw.report.decode(errors="replace").strip().rpartition("\n")[2]
        raise SandboxError(f"the sandbox could not start its child: {last or raw.code}.")
    if lines.pop() or not all(line.startswith(mark) for line in lines):
        raise ValueError("a line without the nonce")
    frames = [json.loads(line[len(mark) :]) for line in lines]
    if "broken" in frames[1]:
        raise SandboxError(f"the sandbox could not be set up: {frames[1]['broken']}.")
    if not all(isinstance(frame, dict) for frame in frames):
        raise ValueError("a frame is no object")
    return frames


def _value(data: Any) -> Any:
    """The plain value that a frame stands for; sets come back frozen, so that they can nest."""
    if isinstance(data, list):
        return [_value(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    readers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "bytes": bytes.fromhex,
        "complex": lambda parts: complex(*parts),
        "tuple": lambda items: tuple(map(_value, items)),
        "set": lambda items: frozenset(map(_value, items)),
        "dict": lambda pairs: {_value(key): _value(item) for key, item in pairs},
        "other": lambda name: _Other(str(name)[:80]),
    }
    return readers[kind](body)


def _same(got: Any, want: Any) -> bool:
    """Python's equality of plain data, with 1e-9 of relative room for floats; nan equals nan."""
    if isinstance(got, (list, tuple)) and isinstance(want, (list, tuple)):
        return type(got) is type(want) and len(got) == len(want) and all(map(_same, got, want))
    if isinstance(got, dict) and isinstance(want, dict):
        return len(got) == len(want) and all(k in got and _same(got[k], want[k]) for k in want)
    pair = (got, want)
    if all(isinstance(x, (int, float, complex)) for x in pair):
        if got == want:
            return True
        if any(isinstance(x, (float, complex)) for x in pair):
            with suppress(OverflowError):
                nan = all(cmath.isnan(complex(x)) for x in pair)
                return nan or cmath.isclose(complex(got), complex(want), rel_tol=1e-9)
        return False
    return bool(got == want)


def _short(value: Any) -> str:
    try:
        return repr(value)[:150]
    except ValueError:  # an int with more digits than Python prints
        return "a value too long to print"


# -- the child ----------------------------------------------------------------------------------


def _exchange(program: str, setup: str, steps: Sequence[tuple[str, str]], limits: Limits) -> _Raw:
    """Start one child, hand it the job, read until it ends or must end, and leave nothing."""
    if os.name != "posix":
        raise SandboxError("the sandbox needs Linux or macOS; run the evaluation there.")
    nonce = secrets.token_hex(16)
    folder = os.path.join(tempfile.gettempdir(), f"cl-graft-sandbox-{secrets.token_hex(8)}")
    job = {"nonce": nonce, "folder": folder, "walls": _WALLS, **vars(limits)}
    job |= {"setup": setup, "program": program, "steps": steps}
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-c", _START],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={k: v for k, v in os.environ.items() if k.endswith("LD_LIBRARY_PATH")},
        start_new_session=True,
    )
    deadline = time.monotonic() + limits.seconds + _GRACE
    report, flooded = bytearray(), True
    try:
        _write(child, marshal.dumps((_child_code(), job)))
        flooded = _drain(child, report, limits, deadline)
        if not flooded:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        code = _reap(child, report)
        if os.path.isdir(folder):  # made by the child where it had no better place
            _wipe(folder)
    return _Raw(nonce.encode(), bytes(report), code, flooded)


@cache
def _child_code() -> CodeType:
    return compile(_CHILD.read_text(encoding="utf-8"), _CHILD.name, "exec")


def _write(child: subprocess.Popen[bytes], data: bytes) -> None:
    assert child.stdin is not None
    rest = memoryview(data)
    with suppress(BrokenPipeError):  # it died at the start; its last words tell why
        while rest:
            rest = rest[os.write(child.stdin.fileno(), rest) :]


def _drain(
    child: subprocess.Popen[bytes], report: bytearray, limits: Limits, deadline: float
) -> bool:
    """Read both pipes to their end into `report` and nowhere; True if one of them held too much."""
    room = {child.stderr: _REPORT_BYTES, child.stdout: limits.output_kb << 10}
    with selectors.DefaultSelector() as selector:
        for pipe in (child.stdout, child.stderr):
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ, pipe)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                part = os.read(key.fd, 1 << 16)
                if not part:
                    selector.unregister(key.fileobj)
                elif key.data is child.stderr:
                    report += part
                room[key.data] -= len(part)
                if room[key.data] < 0:
                    return True
    return False


def _reap(child: subprocess.Popen[bytes], report: bytearray) -> int:
    """The exit code.  The end of stdin makes the keeper kill; if that fails, we kill both."""
    for pipe in (child.stdin, child.stdout, child.stderr):
        assert pipe is not None
        pipe.close()
    try:
        return child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        hello = bytes(report).partition(b"\n")[0].partition(b" ")[2]
        with suppress(OSError, ValueError):
            os.kill(int(json.loads(hello)["worker"]), signal.SIGKILL)
        child.kill()
        return child.wait(_GRACE)


def _wipe(top: str) -> None:
    """Delete a tree of any depth and any mode, going by descriptors one level at a time."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    here = os.open(top, flags)
    folders = [_unlink_files(here)]  # those still to go, one list a level
    while folders[0]:
        if folders[-1]:
            os.chmod(folders[-1][-1], 0o700, dir_fd=here)
            there = os.open(folders[-1][-1], flags, dir_fd=here)
            folders.append(_unlink_files(there))
        else:
            there = os.open("..", flags, dir_fd=here)
            folders.pop()
            os.rmdir(folders[-1].pop(), dir_fd=there)
        os.close(here)
        here = there
    os.close(here)
    os.rmdir(top)


def _unlink_files(folder: int) -> list[str]:
    """Unlink what is no folder; the names of the folders."""
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    for name in [name for name in names if not names[name]]:
        os.unlink(name, dir_fd=folder)
    return [name for name in names if names[name]]
