"""Hosts on one machine: network namespaces joined by a bridge, each with an sshd, a /tmp and a process table of its own.

Nothing of it reaches another network: the bridge stands in a namespace of its own, and the machine's has no address on
it. It needs root, and of Debian's packages iproute2, openssh-server, openssh-client and pdsh; `lacking` says what is
missing. To make two by hand and get a shell on the first: `python -m tests.hosts.network FOLDER`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PROGRAMS = ("ip", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "pdsh")
SSHD = "/usr/sbin/sshd"
NAMES = ("alpha", "beta", "gamma")
NETWORK = "10.99.7"

# What the first process of a host does: it hides what hosts do not share, and then it is the sshd.
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/shared
mount --bind "$SHARED" /run/shared
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$SHARED"
mount --bind /run/shared "$SHARED"
for folder in $PRIVATE; do mkdir -p "$folder"; mount -t tmpfs tmpfs "$folder"; done
mount --bind "$SHARED/network/hosts" /etc/hosts
mount --bind "$SHARED/network/ssh_config" /etc/ssh/ssh_config
hostname "$NAME"
exec /usr/sbin/sshd -D -f "$SHARED/network/sshd_config"
"""

SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
"""


def lacking() -> str:
    """Why hosts cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if Path(SSHD).exists() else ["sshd"]
    if missing:
        return f"hosts in network namespaces need programs not installed here: {', '.join(missing)}"
    name = f"cl-graft-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here ({tried.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@dataclass
class Host:
    """One host; its processes all end with the process `first`, its sshd."""

    name: str
    address: str
    space: str  # the network namespace
    first: int

    folder: Path  # where its commands begin

    def command(self, *words: object) -> list[str]:
        """The words as a command of this host."""
        spaces = ["--net", "--mount", "--uts", "--pid", f"--wdns={self.folder}"]
        return ["nsenter", f"--target={self.first}", *spaces, *map(str, words)]

    def run(
        self, *words: object, timeout: float = 300, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host and wait for it; the text of stdout and stderr together is in `stdout`."""
        return subprocess.run(
            self.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,  # type: ignore[call-overload]
        )

    def start(self, *words: object, out: Path, **options: object) -> subprocess.Popen[bytes]:
        """Start a command on the host, whose output goes to the file `out`."""
        with out.open("wb") as file:
            return subprocess.Popen(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                **options,  # type: ignore[call-overload]
            )

    def processes(self, words: str) -> list[psutil.Process]:
        """Processes of the host whose command line has these words."""
        found, table = [], _table(self.first)
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if _table(process.pid) == table and words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def switch_off(self) -> None:
        """End the host as if its power had gone: no process of it says goodbye."""
        with suppress(psutil.Error):
            first = psutil.Process(self.first)
            subprocess.run(["ip", "-n", self.space, "link", "set", "eth0", "down"], check=False)
            first.kill()
            first.wait(10)


class Hosts:
    """Hosts that see one folder under one path, and each other by name.

    private: folders that each host has for itself, empty at first.
    """

    def __init__(self, shared: Path, count: int = 2, private: Sequence[Path] = ()):
        self.shared, self.private = shared.resolve(), [p.resolve() for p in private]
        self.prefix = f"cl-graft-{os.getpid()}"
        self.hosts: list[Host] = []
        self.names = NAMES[:count]
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._write_configuration()
            _ip("netns", "add", self._space("switch"))
            _ip("-n", self._space("switch"), "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._space("switch"), "link", "set", "bridge", "up")
            for name in self.names:
                self.boot(name)
            return self
        except BaseException:
            self._take_down()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._take_down()

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    def boot(self, name: str) -> Host:
        """Switch on a host, one that was switched off or that was not there."""
        if name in {host.name for host in self.hosts}:
            _ip("-n", self._space("switch"), "link", "delete", f"to-{name}")
            _ip("netns", "delete", self._space(name))
        self.hosts = [host for host in self.hosts if host.name != name]
        self.hosts.append(self._boot(name, f"{NETWORK}.{NAMES.index(name) + 1}"))
        return self.hosts[-1]

    def _space(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _write_configuration(self) -> None:
        folder = self.shared / "network"
        folder.mkdir(parents=True)
        for name in ("key", "host_key"):
            made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(made, check=True)
        lines = [f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(NAMES)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))

    def _boot(self, name: str, address: str) -> Host:
        space, switch = self._space(name), self._space("switch")
        _ip("netns", "add", space)
        peer = {"name": f"to-{name}", "netns": switch}
        # the address of its card is the host's for good: its peers remember it while it is off
        card = f"02:00:00:00:00:{NAMES.index(name):02}"
        link = ["link", "add", "eth0", "address", card, "type", "veth", "peer", *_flat(peer)]
        _ip("-n", space, *link)
        _ip("-n", switch, "link", "set", f"to-{name}", "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        outer = subprocess.Popen(
            ["ip", "netns", "exec", space, *own, "sh", "-c", BOOT],
            env={
                **os.environ,
                "NAME": name,
                "SHARED": str(self.shared),
                "PRIVATE": " ".join(map(str, self.private)),
            },
            stdin=subprocess.DEVNULL,
            stderr=(self.shared / "network" / f"{name}.log").open("wb"),
        )
        self._children.append(outer)
        return Host(name, address, space, _first(outer), self.shared)

    def _take_down(self) -> None:
        for host in self.hosts:
            host.switch_off()
        for child in self._children:
            child.kill()
            child.wait()
        for name in (*NAMES, "switch"):
            subprocess.run(
                ["ip", "netns", "delete", self._space(name)], capture_output=True, check=False
            )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _table(pid: int) -> str:
    """The table of processes that a process is in."""
    return os.readlink(f"/proc/{pid}/ns/pid")


def _flat(words: dict[str, str]) -> list[str]:
    return [word for pair in words.items() for word in pair]


def _first(outer: subprocess.Popen[bytes]) -> int:
    """The host's first process, once it is its sshd."""
    until = time.monotonic() + 20
    while time.monotonic() < until and outer.poll() is None:
        with suppress(psutil.Error):
            for process in psutil.Process(outer.pid).children(recursive=True):
                if process.name() == "sshd":
                    return process.pid
        time.sleep(0.05)
    raise RuntimeError("a host did not start; its log in the folder `network` says why")


if __name__ == "__main__":
    with Hosts(Path(sys.argv[1])) as made:
        subprocess.run(made.hosts[0].command("bash"), check=False)
