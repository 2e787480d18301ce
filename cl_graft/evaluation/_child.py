"""The far side of the sandbox: confine first, run the program second.  Started by sandbox.py only.

Two processes, standard library only and little of it: every import is paid for by every run
(json, signal, typing and enum would double it).  The *keeper* makes the namespaces, forks the
worker, watches the clock and kills; it never runs a line of the program.  The *worker* shuts
itself in, gives up its rights and only then compiles the program.  Every wall is an attempt:
what the kernel refuses is left out, and the worker's first frame says what was got.

In:  the job, by way of stdin, which then stays open: its end says that the caller is gone.
Out: lines "nonce JSON" on stderr; the program's own output on stdout; the keeper's exit code.
Sources: namespaces(7), user_namespaces(7), landlock(7), prctl(2), setrlimit(2).
"""

from __future__ import annotations

import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any
try:
    from _json import encode_basestring_ascii as quoted  # without the rest of json
except ImportError:
    from json.encoder import py_encode_basestring_ascii as quoted  # type: ignore[no-redef]

CUT_OFF, TIMED_OUT, SIGNALLED = 10, 11, 128  # the keeper's exit codes; SIGNALLED + signal number
NEWNS, NEWUTS, NEWIPC = 1 << 17, 1 << 26, 1 << 27
NEWUSER, NEWPID, NEWNET = 1 << 28, 1 << 29, 1 << 30
SIGKILL, SIGXCPU = 9, 24
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # alike on every architecture
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", sys.base_prefix + "/lib")
DEVICES = ("/dev/null", "/dev/urandom")


def main(job: dict[str, Any]) -> None:
    libc = load_libc()
    uid = private_uid() if "user" in job["walls"] else None
    given = {"user_namespace": False, "pid_namespace": False}
    if "namespaces" in job["walls"]:
        if uid is None:
            given["user_namespace"] = attempt(enter_user_namespace, libc)
        given["pid_namespace"] = attempt(call, libc, "unshare", NEWPID)
    attempt(call, libc, "prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tie, go = os.pipe()  # holds the worker back until its number is reported; ends with the keeper
    worker = os.fork()
    if worker == 0:
        try:
            os.close(go)  # else it would hold up its own end
            os.dup2(tie, 0)
            if os.read(0, 1):
                work(job, libc, uid, given)
        finally:
            os._exit(3)
    os.write(2, f'{job["nonce"]} {{"worker":{worker}}}\n'.encode())
    os.write(go, b"!")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # so that the end of the worker is the end of both pipes
    os.dup2(null, 2)
    code = keep(worker, job["seconds"])
    if not given["pid_namespace"]:
        sweep(uid)
    os._exit(code)


# -- the keeper ---------------------------------------------------------------------------------


def keep(worker: int, seconds: float) -> int:
    """Wait for the worker, at most `seconds` or until stdin ends; kill it then; an exit code."""
    deadline, cause = time.monotonic() + seconds, 0
    watched, pause = [0], 0.005
    if hasattr(os, "pidfd_open") and attempt(os.pidfd_open, worker):
        watched, pause = [0, os.pidfd_open(worker)], seconds
    while True:
        pid, status, usage = os.wait4(worker, 0 if cause else os.WNOHANG)
        if pid:
            break
        left = deadline - time.monotonic()
        if left <= 0:
            cause = TIMED_OUT
        elif 0 in select.select(watched, [], [], min(left, pause))[0]:
            cause = CUT_OFF
        if cause:
            os.kill(worker, SIGKILL)
    if cause or not os.WIFSIGNALED(status):
        return cause
    number = os.WTERMSIG(status)
    spent = usage.ru_utime + usage.ru_stime >= seconds and number == SIGKILL
    return TIMED_OUT if spent or number == SIGXCPU else SIGNALLED + number


def sweep(uid: int | None) -> None:
    """Kill what the worker left behind: everything of its private user, orphans come to us."""
    for _ in range(400):
        if uid is not None:
            sweeper = os.fork()
            if sweeper == 0:
                attempt(os.setuid, uid)
                if os.getuid() == uid:
                    attempt(os.kill, -1, SIGKILL)
                os._exit(0)
            os.waitpid(sweeper, 0)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


# -- the walls ----------------------------------------------------------------------------------


def confine(job: dict[str, Any], libc: Any, uid: int | None, given: dict[str, bool]) -> None:
    """Raise every wall the kernel grants, in the one order that works; note each in `given`."""
    walls = job["walls"]
    os.umask(0o022)  # the caller's may keep another user out of every folder that is made here
    spaces = {"mount_namespace": NEWNS, "network_cut": NEWNET, "ipc_namespace": NEWIPC | NEWUTS}
    for name, flag in spaces.items():
        given[name] = "namespaces" in walls and attempt(call, libc, "unshare", flag)
    jailed = given["mount_namespace"] and attempt(enter_jail, libc, job["file_kb"])
    given["private_files"] = jailed
    if not jailed:
        enter_folder(job["folder"], uid)
    os.environ.clear()  # what is left of it: the variables the interpreter needed to start
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
    rules, abi = build_rules(libc) if "landlock" in walls else (-1, 0)
    given["own_user"] = uid is not None
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if libc is not None:
        drop_capabilities(libc)  # no attempt: a jail is none for one who may undo it
    # After the change of user, which clears it.
    attempt(call, libc, "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    given["no_new_privileges"] = attempt(call, libc, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    given["landlock"] = abi > 0 and attempt(call, libc, "syscall", LANDLOCK_RESTRICT, rules, 0)
    given["tcp_refused"] = given["network_cut"] or (given["landlock"] and abi >= 4)
    given["signals_kept_in"] = (
        given["pid_namespace"] or given["own_user"] or (given["landlock"] and abi >= 6)
    )
    if rules >= 0:
        os.close(rules)
    set_limits(job, given)


def enter_user_namespace(libc: Any) -> None:
    """Become all-powerful in a namespace that holds one user: ourselves, under the same number."""
    uid, gid = os.getuid(), os.getgid()
    call(libc, "unshare", NEWUSER)
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_jail(libc: Any, file_kb: int) -> None:
    """A root that holds the interpreter's libraries, read-only, a small /tmp, and nothing else.

    Only this process sees it.  It is built upon /sys: every Linux has that folder, no library
    lives there, and nothing misses it if the building fails halfway; so nothing is ever undone.
    """

    def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
        words = (source, target, kind)
        first = (word.encode() if word is not None else None for word in words)
        call(libc, "mount", *first, flags, options.encode() or None)

    def bind(path: str, flags: int) -> None:
        mount(path, jail + path, None, MS_BIND | MS_REC)
        kept = os.statvfs(path).f_flag & MS_NOEXEC  # a flag that may not be taken away here
        mount("none", jail + path, None, MS_REMOUNT | MS_BIND | flags | kept)

    top, jail = "/sys", "/sys/jail"
    mount("none", "/", None, MS_REC | MS_PRIVATE)  # first: no later mount may reach the machine
    mount("none", top, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=256k")
    for name in ("/dev", "/tmp"):
        os.makedirs(jail + name)
    bound: list[str] = []
    for path in readable_folders():
        if not any(path.startswith(done + "/") for done in bound):
            os.makedirs(jail + path)
            bind(path, MS_RDONLY | MS_NOSUID | MS_NODEV)
            bound.append(path)
    for path in DEVICES:
        os.close(os.open(jail + path, os.O_CREAT | os.O_WRONLY))
        bind(path, MS_NOSUID | MS_NOEXEC)
    size = f"mode=0777,size={4 * file_kb}k,nr_inodes=256"
    mount("none", jail + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    mount("none", top, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    # A chroot below the root of the mount namespace: without CAP_SYS_CHROOT there is no way out,
    # and the kernel refuses a new user namespace (which would give it back) to the chrooted.
    os.chroot(jail)
    os.chdir("/tmp")


def enter_folder(path: str, uid: int | None) -> None:
    """Work in path/work; `path` is the caller's, so that a program cannot move its folder away."""
    os.mkdir(path, 0o711)
    os.mkdir(path + "/work", 0o700)
    if uid is not None:
        os.chown(path + "/work", uid, uid)
        keep_library_in_reach()
    os.chdir(path + "/work")


def build_rules(libc: Any) -> tuple[int, int]:
    """(ruleset fd, Landlock ABI), or (-1, 0): read the libraries, use the folder, execute nothing.

    From ABI 4 no TCP; from ABI 6 no signal and no abstract socket to anyone outside.
    """
    if libc is None:
        return -1, 0
    abi = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if abi < 1:
        return -1, 0
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    execute, read_write_file, read = 0x1, 0x6, 0xC
    wanted = struct.pack("=QQQ", every, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = libc.syscall(LANDLOCK_CREATE, wanted, len(wanted), 0)
    grants = [(path, read) for path in readable_folders()] + [(".", every & ~execute)]
    grants += [(path, read_write_file) for path in DEVICES]
    for path, access in grants:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, fd), 0)
            os.close(fd)
    return rules, abi


def readable_folders() -> list[str]:
    """What an import may need, each folder before the folders inside it."""
    return sorted({p for p in (*LIBRARIES, *sys.path) if p[:1] == "/" and os.path.isdir(p)})


def keep_library_in_reach() -> None:
    """Name the standard library by descriptor where the next user cannot walk down to it.

    A caller that is root often has its interpreter below /root, which others may not enter.
    """
    for index, path in enumerate(list(sys.path)):
        if not os.path.isdir(path) or not os.path.isdir("/proc/self/fd"):
            continue
        link = f"/proc/self/fd/{os.open(path, os.O_RDONLY | os.O_DIRECTORY)}"
        sys.path[index] = link
        for module in list(sys.modules.values()):
            spots = getattr(module, "__path__", None)
            if isinstance(spots, list):
                spots[:] = [s.replace(path, link, 1) if s.startswith(path) else s for s in spots]


def private_uid() -> int | None:
    """A random user number that nobody holds, if we are root; None if we are an ordinary user.

    Root in a user namespace that holds one user is ordinary; real root that may not change its
    user, or not end what another runs, is refused (PermissionError), for neither files nor fork
    bombs could be held off.
    """
    if os.geteuid() != 0:
        return None
    rows, rights = [[0, 0, 1 << 31]], -1
    if os.path.exists("/proc/self/uid_map"):
        with open("/proc/self/uid_map") as file:
            rows = [[int(word) for word in line.split()] for line in file]
        with open("/proc/self/status") as file:
            rights = [int(line.split()[1], 16) for line in file if line.startswith("CapEff")][0]
    start, _, count = max(rows, key=lambda row: row[2])
    half = min(count, 1 << 31) // 2
    needed = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 7  # CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID
    if half > 1000 and rights & needed == needed:
        return start + half + int.from_bytes(os.urandom(4), "big") % half
    if any(first == outside == 0 for first, outside, _ in rows):
        raise PermissionError(
            "root that may not change its user or end its processes; run as an ordinary user"
        )
    return None


def drop_capabilities(libc: Any) -> None:
    call(libc, "capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


def set_limits(job: dict[str, Any], given: dict[str, bool]) -> None:
    """Resource limits; `given` notes those of memory and processes, which can be refused."""
    memory, cpu, children = job["memory_mb"] << 20, int(job["seconds"]) + 1, job["processes"]
    # RLIMIT_NPROC counts every task of the user: the private user's own, or those in our user
    # namespace (the keeper is one); where it would count the caller's too, no child is allowed.
    tasks = 1 + children if given["own_user"] else 2 + children if given["user_namespace"] else 0
    wanted = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_FSIZE": (job["file_kb"] << 10,) * 2,
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_AS": (memory, memory),
        "RLIMIT_NPROC": (tasks, tasks),
    }
    done = {name: attempt(limit, name, *pair) for name, pair in wanted.items()}
    given["memory_limit"] = done["RLIMIT_AS"]
    given["process_limit"] = done["RLIMIT_NPROC"]


def limit(name: str, soft: int, hard: int) -> None:
    which = getattr(resource, name, None)
    if which is None:
        raise OSError(f"no {name} here")
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


# -- the worker ---------------------------------------------------------------------------------


def work(job: dict[str, Any], libc: Any, uid: int | None, given: dict[str, bool]) -> None:
    """Become the sandbox, run the job's steps, send a frame for each, and leave at once.

    Stdin is the tie to the keeper until the kernel has promised to end the worker with it.
    """
    os.setsid()
    report = os.dup(2)
    os.closerange(3, report)
    os.closerange(report + 1, 256)
    os.dup2(1, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    # Bound here, because the program may replace every name it can reach.
    write, leave, nonce, as_json, fail = os.write, os._exit, job["nonce"], plain, failure

    def send(kind: str, text: str) -> None:
        rest = f'{nonce} {{"{kind}":{text}}}\n'.encode()
        while rest:
            rest = rest[write(report, rest) :]

    try:
        confine(job, libc, uid, given)
    except BaseException as error:
        send("broken", as_json(repr(error)))
        return
    if select.select([0], [], [], 0)[0]:  # the keeper died before that promise
        return
    os.dup2(null, 0)
    os.close(null)
    send("ready", as_json(given))
    module = type(sys)("program")
    sys.modules["program"] = module  # dataclasses and typing look their module up
    names, step = module.__dict__, "program"
    try:
        for source in ("setup", "program"):
            exec(compile(job[source], f"<{source}>", "exec", 0, True), names)
        for step, text in job["steps"]:
            if step == "call":
                value = eval(compile(text, "<test>", "eval", 0, True), names)
                send("value", as_json(value))
            else:
                exec(compile(text, "<test>", "exec", 0, True), names)
                send("held", "true")
    except BaseException as error:
        frame = fail(error, step)
        error.__traceback__ = None  # lets go of the frames that may hold all the memory
        send("failed", frame)
    leave(0)  # not sys.exit: threads and atexit hooks of the program get no further say


def plain(value: Any) -> str:
    """The value as JSON with its type kept; the caller rebuilds and compares it."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, int):
        return f'{{"int":"{value:x}"}}' if abs(value) >> 53 else f"{value:d}"
    if isinstance(value, list):
        return plain_all(value)
    if isinstance(value, (bytes, bytearray)):
        return f'{{"bytes":"{value.hex()}"}}'
    if isinstance(value, complex):
        return f'{{"complex":{plain_all((value.real, value.imag))}}}'
    if isinstance(value, dict):
        return f'{{"dict":{plain_all(list(pair) for pair in value.items())}}}'
    if isinstance(value, tuple):
        return f'{{"tuple":{plain_all(value)}}}'
    if isinstance(value, (set, frozenset, type({}.keys()), type({}.items()))):
        return f'{{"set":{plain_all(value)}}}'
    if hasattr(value, "as_integer_ratio"):  # Fraction, Decimal
        over, under = value.as_integer_ratio()
        return plain(over if under == 1 else float(value))
    return f'{{"other":{quoted(type(value).__name__)}}}'


def plain_all(values: Iterable[Any]) -> str:
    return "[" + ",".join([plain(value) for value in values]) + "]"


def failure(error: BaseException, step: str) -> str:
    """The frame's text for an exception: [reason, what it says and on which line]."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<program>":
            line = trace.tb_lineno
        trace = trace.tb_next
    reason = "error"
    for kind, name in ((SystemExit, "exit"), (MemoryError, "memory")):
        reason = name if isinstance(error, kind) else reason
    if isinstance(error, AssertionError) and step == "exec":
        reason = "wrong answer"
    try:
        if isinstance(error, SyntaxError) and error.filename == "<program>":
            line = error.lineno
        text = str(error.msg if isinstance(error, SyntaxError) else error)[:300]
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    except BaseException:  # an exception whose __str__ raises
        text = "an exception that cannot be printed"
    return plain_all([reason, text + (f" (line {line})" if line else "")])


# -- small things -------------------------------------------------------------------------------


def attempt(function: Callable[..., object], *arguments: Any) -> bool:
    """Try something; False where the kernel or the platform refuses."""
    try:
        function(*arguments)
    except (OSError, ValueError, AttributeError):
        return False
    return True


def load_libc() -> Any:
    if sys.platform != "linux":
        return None
    try:
        import ctypes
    except ImportError:
        return None
    return ctypes.CDLL(None, use_errno=True)


def call(libc: Any, name: str, *arguments: Any) -> None:
    """Make one C call by name; raises OSError unless it returns 0."""
    if libc is None:
        raise OSError(f"no {name} here")
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(f"{name} was refused")
