"""The sandbox: honest programs are judged rightly, hostile ones neither pass nor do harm.

Every hostile program is run behind all walls, and again with the namespaces and then Landlock
taken away, which is what a kernel that refuses them leaves.  A program that would harm the
machine without a wall that is missing there is skipped.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft.errors import CLGraftError
from cl_graft.evaluation import _child, sandbox
from cl_graft.evaluation.sandbox import Case, Limits, SandboxError, run_asserts, run_cases

GRACE = 60.0  # seconds that a busy machine may need beyond a limit
SHORT = 0.3
ALL = ("namespaces", "user", "landlock")
RUNGS = {"all walls": ALL, "no namespaces": ("user", "landlock"), "no landlock": ("user",)}


@functools.cache
def strength_of(walls: tuple[str, ...]) -> dict[str, bool]:
    sandbox._WALLS = walls
    try:
        return sandbox.strength()
    finally:
        sandbox._WALLS = ALL


def processes_marked(mark: str) -> list[int]:
    """Living processes that were started with `mark` in their environment, and their forks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def descriptors() -> set[tuple[str, str]]:
    """Open ones, and what they are of."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@pytest.fixture(params=RUNGS, ids=lambda name: name.replace(" ", "-"))
def walls(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, bool]]:
    """One rung of the ladder; afterwards no folder, process, mount or descriptor may be left."""
    chosen = RUNGS[request.param]
    strength = strength_of(chosen)
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # some disks are slow to rmdir
    room = Path(tempfile.mkdtemp(prefix="test-sandbox-", dir=shm))  # tmp_path itself is private
    room.chmod(0o711)
    mark = f"/nowhere/{os.urandom(8).hex()}"
    monkeypatch.setattr(sandbox, "_WALLS", chosen)
    monkeypatch.setattr(sandbox, "_GRACE", GRACE)
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    monkeypatch.setenv("LD_LIBRARY_PATH", mark)  # the one variable that a child is started with
    linux = sys.platform == "linux"
    opened = descriptors() if linux else set()
    mounts = Path("/proc/self/mountinfo").read_text() if linux else ""
    yield strength
    assert list(room.iterdir()) == []
    room.rmdir()
    if linux:
        assert processes_marked(mark) == []
        assert Path("/proc/self/mountinfo").read_text() == mounts
        assert descriptors() <= opened  # garbage of other tests may have gone


def attack(program: str, call: str = "f(2)", expected: str = "4", **limits: Any) -> sandbox.Outcome:
    """Run a hostile program; it must end in time and must not pass."""
    bound = Limits(**{"seconds": 60.0, **limits})  # most end by themselves
    start = time.monotonic()
    outcome = run_cases(program, [Case(call, expected)], bound)
    assert time.monotonic() - start < bound.seconds + GRACE
    assert not outcome.passed, outcome
    assert len(outcome.detail) <= 500
    return outcome


# -- hostile programs that need no witness ------------------------------------------------------

WRONG = "def f(x): return 5\n"
HOSTILE: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "endless loop": ("while True: pass", {"seconds": SHORT}, {"timeout"}),
    "endless call": ("def f(x):\n while True: pass", {"seconds": SHORT}, {"timeout"}),
    "endless loop in C": ("def f(x): return sum(range(10**13))", {"seconds": SHORT}, {"timeout"}),
    "sleeps": ("import time\ntime.sleep(3600)", {"seconds": SHORT}, {"timeout"}),
    "swallows every exception and signal": (
        "import signal\n"
        "for n in range(1, 65):\n"
        " try: signal.signal(n, signal.SIG_IGN)\n"
        " except Exception: pass\n"
        "while True:\n"
        " try:\n"
        "  while True: pass\n"
        " except BaseException: pass",
        {"seconds": SHORT},
        {"timeout"},
    ),
    "stops itself": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n" + WRONG,
        {"seconds": SHORT},
        {"timeout", "wrong answer"},
    ),
    "closes its pipes and stays": (
        "import os, time\nos.closerange(0, 300)\ntime.sleep(3600)",
        {"seconds": SHORT},
        {"timeout"},
    ),
    "closes every descriptor": ("import os\nos.closerange(0, 300)\n" + WRONG, {}, {"exit"}),
    "one big block": ("x = bytearray(1 << 40)", {}, {"memory"}),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {}, {"memory"}),
    "endless printing": ("while True: print('x' * 1000)", {}, {"output"}),
    "endless stderr": ("import os\nwhile True: os.write(2, b'x' * 1000)", {}, {"output"}),
    "huge result": ("def f(x): return 'x' * 10**7", {}, {"output"}),
    "result that is slow to rebuild (equal hashes)": (
        "def f(x): return [{i * (2**61 - 1) for i in range(4000)}]",
        {},
        {"wrong answer"},
    ),
    "result that holds itself": ("def f(x):\n a = []\n a.append(a)\n return a", {}, {"error"}),
    "sys.exit(0)": ("import sys\nsys.exit(0)", {}, {"exit"}),
    "raise SystemExit": ("def f(x): raise SystemExit", {}, {"exit"}),
    "os._exit(0)": ("import os\nos._exit(0)", {}, {"exit"}),
    "os._exit with the keeper's codes": ("import os\ndef f(x): os._exit(11)", {}, {"exit"}),
    "deep recursion": ("def f(x): return f(x)", {}, {"error"}),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n def __repr__(self): return repr([self])\n"
        "def f(x): return repr(A())",
        {"seconds": 2.0},
        {"killed", "memory", "error", "timeout"},
    ),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {}, {"killed"}),
    "equal to everything": (
        "class E:\n"
        " __eq__ = lambda s, o: True\n"
        " __ne__ = lambda s, o: False\n"
        " __hash__ = lambda s: hash(4)\n"
        " __bool__ = lambda s: True\n"
        "def f(x): return E()",
        {},
        {"wrong answer"},
    ),
    "an int equal to everything": (
        "class I(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\n"
        "def f(x): return I(5)",
        {},
        {"wrong answer"},
    ),
    "prints success": (
        "import os, sys\nprint('passed')\nsys.stderr.write('{\"value\":4}\\n')\n"
        "os.write(1, b'{\"value\":4}\\n')\n" + WRONG,
        {},
        {"wrong answer"},
    ),
    "writes to every descriptor": (
        "import os\n"
        "for n in range(3, 64):\n"
        " try: os.write(n, b'0 {\"value\":4}\\n')\n"
        " except OSError: pass\n" + WRONG,
        {},
        {"tampered"},
    ),
    "replaces builtins and modules": (
        "import builtins, sys, os\n"
        "import json\n"
        "four = lambda *a, **k: '4'\n"
        "for n in ('repr', 'str', 'compile', 'eval', 'exec', 'isinstance', 'type', 'abs'):\n"
        " setattr(builtins, n, four)\n"
        "json.dumps = json.loads = four\n"
        "sys.modules.clear()\n" + WRONG,
        {},
        {"wrong answer", "error", "exit", "killed", "tampered"},
    ),
    "walks the frames and rewrites the checker": (
        "import sys\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        " for names in (frame.f_globals, frame.f_locals):\n"
        "  for n in list(names):\n"
        "   if n in ('plain', 'plain_all', 'failure', 'as_json', 'fail'):\n"
        "    names[n] = lambda *a: '6'\n"
        " frame = frame.f_back\n" + WRONG,
        {},
        {"wrong answer", "error", "exit", "tampered"},
    ),
    "forges a frame with the nonce": (
        "import sys, os\n"
        "frame = sys._getframe()\n"
        "while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
        "names = frame.f_locals\n"
        "os.write(names['report'], (names['nonce'] + ' {\"value\":4}\\n').encode())\n" + WRONG,
        {},
        {"tampered"},
    ),
    "reports a failure that is none": (
        "import sys, os\n"
        "frame = sys._getframe()\n"
        "while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
        "names = frame.f_locals\n"
        'line = \' {"failed":["passed","passed"]}\\n\'\n'
        "os.write(names['report'], (names['nonce'] + line).encode())\n"
        "os._exit(0)",
        {},
        {"tampered"},
    ),
    "an exception that cannot be printed": (
        "class E(Exception):\n def __str__(self): raise SystemExit(0)\nraise E",
        {},
        {"error"},
    ),
    "another program in its place": (
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo passed; exit 0'])",
        {},
        {"error", "exit"},
    ),
    "a huge file": (
        "with open('big', 'wb') as file:\n while True: file.write(bytes(1 << 16))",
        {"file_kb": 256},
        {"error"},
    ),
    "modules planted in the folder": (
        "import os\n"
        "for n in ('sitecustomize', 'usercustomize', 'heapq', 'fractions', 'json'):\n"
        " with open(n + '.py', 'w') as file: file.write('raise SystemExit(0)')\n"
        "import heapq, fractions\n"
        "def f(x): return heapq.nsmallest(1, [5, 6])[0]",
        {},
        {"wrong answer"},
    ),
    "odd things left in the folder": (
        "import os\n"
        "os.mkfifo('fifo'); os.symlink('loop', 'loop'); os.symlink('/', 'root')\n"
        "open('-rf', 'w').close(); open(b'\\xff', 'w').close()\n"
        "os.mkdir('closed'); open('closed/file', 'w').close(); os.chmod('closed', 0)\n"
        "try:\n"
        " for _ in range(3000): os.mkdir('deep'); os.chdir('deep')\n"
        "except OSError: pass\n"
        "os.chmod('.', 0)\n" + WRONG,
        {},
        {"wrong answer"},
    ),
    "moves its folder away": (
        "import os\n"
        "here = os.getcwd()\n"
        "for there in (here + '-moved', '/tmp/moved-' + str(os.getpid())):\n"
        " try: os.rename(here, there)\n"
        " except OSError: pass\n" + WRONG,
        {},
        {"wrong answer"},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_ends_without_passing(name: str, walls: dict[str, bool]) -> None:
    program, limits, reasons = HOSTILE[name]
    if "memory" in reasons and not walls["memory_limit"]:
        pytest.skip("this platform does not limit memory")
    outcome = attack(program, **limits)
    assert outcome.reason in reasons, outcome


# -- hostile programs whose harm has a witness --------------------------------------------------


@pytest.mark.parametrize("children", [0, 5])
def test_fork_bomb_stays_within_its_count_and_leaves_nobody(
    children: int, walls: dict[str, bool]
) -> None:
    if not walls["process_limit"]:
        pytest.skip("processes are not limited here, so this would harm the machine")
    # Counts the forks that succeeded; the children sleep, so that they all live at once.
    program = (
        "import os, time\n"
        "def f(x):\n"
        " n = 0\n"
        " while n < 50:\n"
        "  try:\n"
        "   if os.fork() == 0: time.sleep(3600)\n"
        "  except OSError: return n\n"
        "  n += 1\n"
        " return n"
    )
    outcome = run_cases(program, [Case("f(2)", str(children))], Limits(processes=children))
    if walls["own_user"] or walls["user_namespace"]:
        assert outcome.passed, outcome
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    assert attack(bomb, seconds=SHORT, processes=children).reason == "timeout"


def test_daemon_does_not_outlive_the_run(walls: dict[str, bool]) -> None:
    program = (
        "import os, signal, time\n"
        "def f(x):\n"
        " if os.fork() == 0:\n"
        "  os.setsid()\n"
        "  signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "  if os.fork() == 0:\n"
        "   os.closerange(0, 300)\n"
        "   time.sleep(3600)\n"
        "  os._exit(0)\n"
        " os.wait()\n"
        " return 5"
    )
    outcome = attack(program, processes=3)  # the fixture looks for what is left
    if walls["own_user"] or walls["user_namespace"]:
        assert outcome.reason == "wrong answer", outcome


def test_threads_that_never_end_do_not_hold_up_the_verdict(walls: dict[str, bool]) -> None:
    program = (
        "import threading, time\n"
        "def f(x):\n"
        " for _ in range(3): threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        " return 5"
    )
    outcome = attack(program, processes=3, seconds=20.0)
    assert outcome.reason in {"wrong answer", "error"}, outcome


@pytest.mark.parametrize("deed", ["unlink", "rmtree", "write", "truncate", "rename", "symlink"])
def test_files_outside_are_neither_deleted_nor_changed(
    deed: str, walls: dict[str, bool], tmp_path: Path
) -> None:
    if not (walls["private_files"] or walls["own_user"] or walls["landlock"]):
        pytest.skip("nothing keeps this user's files apart here")
    canary = tmp_path / "canary"
    canary.write_text("alive")
    deeds = {
        "unlink": f"os.unlink({str(canary)!r})",
        "rmtree": f"shutil.rmtree({str(tmp_path)!r})",
        "write": f"open({str(canary)!r}, 'w').write('dead')",
        "truncate": f"os.truncate({str(canary)!r}, 0)",
        "rename": f"os.rename({str(canary)!r}, 'mine')",
        # Lures whoever cleans the folder up into following a link.
        "symlink": f"os.symlink({str(tmp_path)!r}, 'link'); os.symlink({str(canary)!r}, 'l2')",
    }
    attack(f"import os, shutil\ntry: {deeds[deed]}\nexcept OSError: pass\n{WRONG}")
    assert canary.read_text() == "alive"
    assert list(tmp_path.iterdir()) == [canary]


def test_private_files_of_the_caller_cannot_be_read(walls: dict[str, bool], tmp_path: Path) -> None:
    if not (walls["private_files"] or walls["own_user"] or walls["landlock"]):
        pytest.skip("nothing keeps this user's files apart here")
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    secret.chmod(0o600)
    outcome = attack(f"def f(x): return open({str(secret)!r}).read()", expected="'s3cr3t'")
    assert outcome.reason == "error", outcome


def test_environment_of_the_caller_cannot_be_read(
    walls: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (walls["private_files"] or walls["own_user"] or walls["landlock"]):
        pytest.skip("nothing keeps this user's processes apart here")
    monkeypatch.setenv("CANARY", "s3cr3t-canary")
    # What this process was started with is in /proc too, and PATH is surely there.
    program = (
        "import os\n"
        "def f(path):\n"
        " seen = repr(os.environ)\n"
        f" for pid in ('self', os.getppid(), {os.getpid()}):\n"
        "  try: seen += open(f'/proc/{pid}/environ').read()\n"
        "  except OSError: pass\n"
        " return [word for word in ('s3cr3t-canary', path) if word in seen]"
    )
    outcome = run_cases(program, [Case(f"f({os.environ['PATH']!r})", "[]")])
    assert outcome.passed, outcome


def test_no_connection_reaches_a_listening_socket(walls: dict[str, bool]) -> None:
    if not walls["tcp_refused"]:
        pytest.skip("the network is not cut here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        program = (
            "import socket\n"
            "def f(x):\n"
            f" with socket.create_connection(('127.0.0.1', {port}), 1): return 4"
        )
        assert attack(program).reason == "error"
        with pytest.raises(BlockingIOError):
            server.accept()
        socket.create_connection(("127.0.0.1", port), 1).close()  # the witness can see
        server.settimeout(5)
        server.accept()[0].close()


def test_nobody_outside_can_be_signalled(walls: dict[str, bool]) -> None:
    if not walls["signals_kept_in"]:
        pytest.skip("nothing keeps signals in here, so this would kill the tests")
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    bystander = subprocess.Popen(["sleep", "60"])
    program = (
        "import os, signal\n"
        "def hit(kill, *who):\n"
        " try: kill(*who)\n"
        " except OSError: pass\n"
        f"for pid in (os.getppid(), {os.getpid()}, {bystander.pid}):\n"
        "  hit(os.kill, pid, signal.SIGUSR1); hit(os.kill, pid, signal.SIGKILL)\n"
        f"hit(os.killpg, {os.getpgid(0)}, signal.SIGKILL)\n"
        "hit(os.killpg, 0, signal.SIGUSR1)\n"
        "hit(os.kill, -1, signal.SIGKILL)\n" + WRONG
    )
    try:
        outcome = attack(program)
        assert outcome.reason in {"wrong answer", "killed"}, outcome
        assert got == []
        assert bystander.poll() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
        bystander.kill()
        bystander.wait()


def test_the_expected_value_is_nowhere_in_the_childs_process(walls: dict[str, bool]) -> None:
    token = f"{random.Random(7).getrandbits(64):016x}"
    program = (
        "import gc, os, sys\n"
        "def f(start):\n"
        " heap = [sys.stdin.read(), sys.argv, sys.orig_argv, dict(os.environ)]\n"
        " try: heap.append(os.read(0, 10**6))\n"
        " except OSError: pass\n"
        " frame = sys._getframe()\n"
        " while frame: heap += [dict(frame.f_locals), dict(frame.f_globals)]; frame = frame.f_back\n"
        " heap += gc.get_objects()\n"
        " import re\n"
        " for thing in heap:\n"
        "  if thing is not heap:\n"
        "   try: found = re.search(start + '[0-9a-f]{12}', repr(thing))\n"
        "   except BaseException: continue\n"
        "   if found: return found[0]\n"
        " return 'not found'"
    )
    start, call = token[:4], f"f({token[:4]!r})"
    assert "not found" in attack(program, call, repr(token), seconds=20.0).detail
    held = run_cases(
        f"kept = {token!r}\n{program}", [Case(call, repr(token))], Limits(seconds=20.0)
    )
    assert held.passed, f"the search itself must work, else it proves nothing: {start} {held}"


def test_closed_expression_is_evaluated_away_from_the_program(walls: dict[str, bool]) -> None:
    outcome = attack(
        "import builtins\nbuiltins.sorted = lambda *a: 5\n" + WRONG,
        expected="sorted([4])",
    )
    assert outcome.reason == "wrong answer"
    assert "expected [4]" in outcome.detail


def test_a_new_user_namespace_is_refused(walls: dict[str, bool]) -> None:
    if not walls["private_files"]:
        pytest.skip("no jail here")
    program = "import ctypes\ndef f(x): return ctypes.CDLL(None).unshare(x)"
    assert attack(program, f"f({1 << 28})", "0").reason == "wrong answer"


def test_the_jail_shows_the_interpreter_and_nothing_else(
    walls: dict[str, bool], tmp_path: Path
) -> None:
    if not walls["private_files"]:
        pytest.skip("no jail here")
    program = (
        "import os\n"
        "def f(x):\n"
        " try: open('/x', 'w')\n"
        " except OSError: pass\n"
        " else: return 'can write to the root'\n"
        f" paths = ['/etc/passwd', '/proc/self', '/sys/kernel', '/bin/sh', {str(tmp_path)!r}]\n"
        " return [os.getcwd(), os.listdir('.'), [p for p in paths if os.path.exists(p)]]"
    )
    outcome = run_cases(program, [Case("f(2)", "['/tmp', [], []]")])
    assert outcome.passed, outcome


def test_all_files_together_are_bounded(walls: dict[str, bool]) -> None:
    if not walls["private_files"]:
        pytest.skip("only a file's own size is limited here")
    program = (
        "def f(x):\n"
        " for n in range(100):\n"
        "  with open(str(n), 'wb') as file: file.write(bytes(64 << 10))"
    )
    assert "No space" in attack(program, file_kb=64).detail


def test_a_killed_caller_takes_the_run_with_it(walls: dict[str, bool], tmp_path: Path) -> None:
    code = (
        "from cl_graft.evaluation import sandbox as s\n"
        f"s._WALLS = {sandbox._WALLS!r}\n"
        "s.run_cases('while True: pass', [s.Case('1', '1')], s.Limits(seconds=60))"
    )
    root = Path(sandbox.__file__).parents[2]
    mark = f"/nowhere/{os.urandom(8).hex()}"
    env = {**os.environ, "LD_LIBRARY_PATH": mark, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        wait_for(lambda: len(processes_marked(mark)) >= 3)  # the caller, the keeper, the worker
    finally:
        caller.kill()
        caller.wait()
    wait_for(lambda: processes_marked(mark) == [])
    left = list(tmp_path.rglob("*"))  # at most an empty folder and the one that holds it
    assert all(path.is_dir() for path in left)
    assert len(left) <= (0 if walls["private_files"] else 2)


def test_a_keeper_that_hangs_does_not_hang_the_caller(
    walls: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, ahead, drain = os.environ["LD_LIBRARY_PATH"], [0.0], sandbox._drain
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr(sandbox, "time", clock)
    monkeypatch.setattr(sandbox, "_GRACE", 2.0)

    def stopped(child: Any, report: bytearray, limits: Limits, deadline: float) -> bool:
        # This process has the mark too, but not in the environment that it was started with.
        wait_for(lambda: len(processes_marked(mark)) == 2)
        os.kill(child.pid, signal.SIGSTOP)
        flooded = drain(child, report, limits, time.monotonic() + 0.5)
        ahead[0] = 1000.0  # the caller's deadline is over
        return flooded

    monkeypatch.setattr(sandbox, "_drain", stopped)
    assert attack("while True: pass", seconds=900.0).reason == "killed"
    wait_for(lambda: processes_marked(mark) == [])


@pytest.mark.parametrize("started", [1, 2], ids=["alone", "as soon as it has a worker"])
def test_a_keeper_that_dies_takes_its_worker_with_it(walls: dict[str, bool], started: int) -> None:
    mark = os.environ["LD_LIBRARY_PATH"]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            run = pool.submit(attack, "import time\ntime.sleep(60)", seconds=60.0)
            while len(found := processes_marked(mark)) < started:
                assert not run.done()
            os.kill(min(found), signal.SIGKILL)
            with suppress(sandbox.SandboxError):  # it could not start
                assert run.result().reason == "killed"
            wait_for(lambda: processes_marked(mark) == [])


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_program_that_dies_of_a_signal_without_a_name_is_judged(walls: dict[str, bool]) -> None:
    if walls["pid_namespace"]:
        pytest.skip("the first process of a namespace is deaf to its own signals")
    outcome = attack("import os, time\nos.kill(os.getpid(), 40)\ntime.sleep(60)")
    assert (outcome.reason, outcome.detail) == ("killed", "ended by signal 40")


def test_expected_values_that_are_too_much_are_the_tests_fault(walls: dict[str, bool]) -> None:
    with pytest.raises(
        SandboxError, match="cannot be computed .*128 KiB.*write them as Python lit"
    ):
        run_cases("def f(x): return 1", [Case("f(1)", "[0] * 70000")])


def test_the_callers_umask_is_no_wall(walls: dict[str, bool]) -> None:
    program = (
        "import tempfile\n"
        "def f(x):\n"
        " with tempfile.NamedTemporaryFile(dir=tempfile.gettempdir()) as file: return file.write(b'ab')"
    )
    before = os.umask(0o077)
    try:
        assert run_cases(program, [Case("f(1)", "2")]).passed
    finally:
        os.umask(before)


@pytest.mark.skipif(
    not (shutil.which("setpriv") and sys.platform == "linux" and os.geteuid() == 0),
    reason="only root can give up a right of root",
)
def test_root_that_may_not_end_what_another_runs_is_refused() -> None:
    words = "from cl_graft.evaluation import _child; _child.private_uid()"
    root = str(Path(sandbox.__file__).parents[2])
    made = subprocess.run(
        ["setpriv", "--bounding-set=-kill", sys.executable, "-c", words],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert "root that may not change its user or end its processes" in made.stderr


# -- honest programs ----------------------------------------------------------------------------

DOUBLE = "def f(x):\n    return x * 2\n"


def test_right_answer_passes(walls: dict[str, bool]) -> None:
    cases = [Case("f(3)", "6"), Case("f('ab')", "'abab'"), Case("f([1])", "[1, 1]")]
    assert run_cases(DOUBLE, cases) == sandbox.Outcome(True, "passed")


def test_standard_library_imports_work(walls: dict[str, bool]) -> None:
    program = (
        "import math, re, collections, heapq, itertools, functools, random, string, bisect\n"
        "import datetime, decimal, fractions, statistics, typing, dataclasses, copy, operator\n"
        "import hashlib, json, enum, tempfile\n"
        "@dataclasses.dataclass\n"
        "class Point:\n x: int\n y: 'int' = 0\n"
        "def f(x):\n"
        " with tempfile.TemporaryFile() as file: file.write(b'1')\n"
        " heap = [3, x]; heapq.heapify(heap)\n"
        " return (math.gcd(4, 6), re.findall('a.', 'abac'), heap[0], Point(x).x)"
    )
    outcome = run_cases(program, [Case("f(1)", "(2, ['ab', 'ac'], 1, 1)")])
    assert outcome.passed, outcome


def test_wrong_answer_names_call_answer_and_expectation() -> None:
    outcome = run_cases(DOUBLE, [Case("f(3)", "6"), Case("f(4)", "9")])
    assert (outcome.passed, outcome.reason) == (False, "wrong answer")
    assert outcome.detail == "f(4) gave 8, expected 9"


def test_errors_name_the_line() -> None:
    syntax = run_cases("x = 1\ndef f(:\n", [Case("f(3)", "6")])
    assert syntax.reason == "error"
    assert syntax.detail.startswith("SyntaxError") and syntax.detail.endswith("(line 2)")
    name = run_cases("def f(x):\n    y = 1\n    return z\n", [Case("f(3)", "6")])
    assert (name.reason, name.detail) == ("error", "NameError: name 'z' is not defined (line 3)")
    assert run_cases(DOUBLE, [Case("g(3)", "6")]).detail == "NameError: name 'g' is not defined"
    assert run_cases("x = '\0'", [Case("1", "1")]).reason == "error"


def test_an_assertion_that_the_program_raises_is_an_error_not_a_wrong_answer() -> None:
    assert run_cases("def f(x): assert x > 5, 'small'", [Case("f(3)", "6")]).reason == "error"


@pytest.mark.parametrize(
    ("result", "expected", "same"),
    [
        ("0.1 + 0.2", "0.3", True),
        ("0.1 + 0.2", "0.30001", False),
        ("[1, (2.0, {'a': 0.1 + 0.2})]", "[1, (2, {'a': 0.3})]", True),
        ("1e308 * 10", "float('inf')", True),
        ("float('nan')", "float('nan')", True),
        ("float('nan')", "0.0", False),
        ("10**400", "10**400", True),
        ("10**400", "1e300", False),
        ("[1, 2]", "(1, 2)", False),
        ("[1, 2]", "[1, 2, 3]", False),
        ("True", "1", True),
        ("'1'", "1", False),
        ("None", "False", False),
        ("{1: 2, 3: 4}", "{3: 4, 1: 2}", True),
        ("{1: 2}", "{1: 2, 3: 4}", False),
        ("frozenset([1])", "{1}", True),
        ("set()", "set()", True),
        ("{1: 2}.keys()", "{1}", True),
        ("bytearray(b'a')", "b'a'", True),
        ("1j * 1j", "-1", True),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}", True),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)", True),
        ("__import__('fractions').Fraction(1, 2)", "0.5", True),
        ("__import__('decimal').Decimal('3')", "3", True),
        ("iter([1])", "[1]", False),
        ("'\\ud800'", "'\\ud800'", True),
    ],
)
def test_equality_is_pythons_with_room_for_floats(result: str, expected: str, same: bool) -> None:
    outcome = run_cases(f"def f(): return {result}", [Case("f()", expected)])
    assert (outcome.passed, outcome.reason) == (same, "passed" if same else "wrong answer")


hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
data = st.recursive(
    hashable | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=4),
    max_leaves=12,
)


def exactly(value: Any) -> Any:
    """The value with types spelled out, so that 1, 1.0 and True, or 0.0 and -0.0, differ."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [exactly(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return ("set", sorted(map(repr, map(exactly, value))))
    if isinstance(value, dict):
        return ("dict", [(exactly(key), exactly(item)) for key, item in value.items()])
    return (type(value).__name__, repr(value))


@settings(max_examples=100, deadline=None)
@given(data)
def test_plain_data_crosses_the_pipe_unchanged(value: Any) -> None:
    assert exactly(sandbox._value(json.loads(_child.plain(value)))) == exactly(value)


@settings(max_examples=100, deadline=None)
@given(data, data)
def test_sameness_agrees_with_python_where_no_float_is_near(a: Any, b: Any) -> None:
    assert sandbox._same(a, a)
    if a == b:
        assert sandbox._same(a, b)
    assert sandbox._same(a, b) == sandbox._same(b, a)


# -- asserts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("assert f(2) == 4", Case("f(2)", "4")),
        ("assert 4 == f(2), 'message'", Case("f(2)", "4")),
        ("assert f(2) == [-1, (2.5, 'a')]", Case("f(2)", "[-1, (2.5, 'a')]")),
        ("assert f(2) == True", Case("f(2)", "True")),
        ("assert set(f(2)) == set([1, 2])", Case("set(f(2))", "set([1, 2])")),
        ("assert f(2) == f(3)", None),
        ("assert f(2) == math.pi", None),
        ("assert math.isclose(f(2), 4.0)", None),
        ("assert f(2)", None),
        ("assert f(2) != 4", None),
        ("assert 1 < f(2) == 4", None),
        ("check(f)", None),
        ("assert f(2) == 4\nassert f(3) == 6", None),
    ],
)
def test_which_asserts_become_cases(text: str, case: Case | None) -> None:
    assert sandbox._as_step(sandbox._parse(text, "exec", 1), text) == (case or text)


def test_asserts_of_both_kinds(walls: dict[str, bool]) -> None:
    asserts = [
        "assert f(2) == 4",
        "assert math.isclose(f(0.1), 0.2, rel_tol=1e-6)",
        "assert set(f([1, 2])) == set([2, 1])",
        "assert f(2)",
    ]
    assert run_asserts(DOUBLE, asserts, setup="import math").passed
    wrong = run_asserts(DOUBLE, ["assert f(2) == 4", "assert not f(2), 'two'"])
    assert (wrong.reason, wrong.detail) == ("wrong answer", "AssertionError: two")


def test_a_humaneval_check_function() -> None:
    check = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == {}\n"
    assert run_asserts(DOUBLE, [check.format(6) + "check(f)"]).passed
    assert run_asserts(DOUBLE, [check.format(7) + "check(f)"]).reason == "wrong answer"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return False",
        "import os\nfor n in range(3, 64):\n try: os.write(n, b'x {\"held\":true}\\n')\n"
        " except OSError: pass\nos._exit(0)",
    ],
)
def test_a_statement_passes_only_if_it_was_run(program: str, walls: dict[str, bool]) -> None:
    assert not run_asserts(program, ["assert f(2)"]).passed


# -- the rest of the interface ------------------------------------------------------------------


def test_run_many_keeps_the_order() -> None:
    jobs = [functools.partial(run_cases, DOUBLE, [Case("f(1)", str(n % 3))]) for n in range(9)]
    assert [o.passed for o in sandbox.run_many(jobs, 4)] == [n % 3 == 2 for n in range(9)]


def test_consent_needs_the_flag_or_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sandbox.CONSENT_VARIABLE, raising=False)
    with pytest.raises(CLGraftError, match=r"--allow-code-execution.*ALLOW_CODE_EXECUTION=1"):
        sandbox.require_consent(False, "scoring task 'mbpp'")
    sandbox.require_consent(True, "scoring")
    monkeypatch.setenv(sandbox.CONSENT_VARIABLE, "yes")
    with pytest.raises(sandbox.ConsentNeeded):
        sandbox.require_consent(False, "scoring")
    monkeypatch.setenv(sandbox.CONSENT_VARIABLE, "1")
    sandbox.require_consent(False, "scoring")


def test_strength_reports_every_wall(walls: dict[str, bool]) -> None:
    assert all(isinstance(held, bool) for held in walls.values())
    assert sandbox._WALLS != ("user",) or not (walls["landlock"] or walls["network_cut"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: run_cases(DOUBLE, []), "no test"),
        (lambda: run_cases(DOUBLE, [Case("f(", "1")]), "not Python"),
        (lambda: run_cases(DOUBLE, [Case("f(1)", "nowhere")]), "cannot be computed"),
        (lambda: run_cases(DOUBLE, [Case("f(1)", "object()")]), "cannot be compared"),
        (lambda: run_asserts(DOUBLE, ["assert ("]), "not Python"),
        (lambda: Limits(seconds=0), "seconds"),
        (lambda: Limits(seconds=math.nan), "seconds"),
        (lambda: Limits(memory_mb=1), "memory_mb"),
        (lambda: Limits(processes=-1), "at least 0"),
    ],
)
def test_mistakes_of_the_caller_are_named(run: Any, message: str) -> None:
    with pytest.raises(sandbox.SandboxError, match=message):
        run()
