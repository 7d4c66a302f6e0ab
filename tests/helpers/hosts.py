"""Two hosts on one machine: network namespaces with host names, addresses and sshds of their own.

``ssh alpha`` and ``ssh beta`` work within both, without a password, as on a cluster; files are shared.
Everything lies in one folder and ends with the fixture; the machine's own network, ssh and host name stay as
they are.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.helpers.strict import LOST

HOSTS = {"alpha": "10.199.71.1", "beta": "10.199.71.2"}
"""Name and address of each."""
_PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "pdsh")
_START_SECONDS = 120.0

_SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/login_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv {environment}
"""
_SSH = """\
Host *
    IdentityFile {folder}/login_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
    BatchMode yes
"""
# Within new namespaces: the host's name, its view of /etc and /run, then its sshd.
_BECOME_HOST = """\
set -e
hostname {name}
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs none /run
mkdir -p /run/sshd
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd_config
"""


def what_is_missing() -> str:
    """Why there can't be two hosts here; empty where there can."""
    if missing := [name for name in _PROGRAMS if _find(name) is None]:
        return (
            f"{', '.join(missing)}: apt-get install iproute2 openssh-server pdsh (.ci/install-cluster-tools)"
        )
    if os.geteuid() != 0:
        return "root, for network namespaces"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return (
        "" if tried.returncode == 0 else f"network namespaces, which are not allowed: {tried.stderr.strip()}"
    )


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Hosts:
    """Use as a context manager; ``environment`` is what every login finds set."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Hosts":
        folder = self._folder
        for key in ("host_key", "login_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True, timeout=60
            )
        environment = " ".join(f'"{name}={value}"' for name, value in self._environment.items())
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder, environment=environment))
        (folder / "ssh_config").write_text(_SSH.format(folder=folder))
        names = [f"{address} {name}" for name, address in HOSTS.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        try:
            for name in HOSTS:
                self._boot(name)
            self._connect()
            for name in HOSTS:
                _wait_until(partial(self._can_log_in, name), f"ssh to {name}")
        except BaseException as error:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in folder.glob("*.out"))
            self.__exit__()
            raise RuntimeError(f"the hosts did not start\n{logs}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in self._daemons.values():
            # The namespaces end with their last process, the pair of interfaces with the namespaces.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
            daemon.wait(30)

    def run(self, host: str, command: Sequence[str | Path], cwd: Path, timeout: float) -> str:
        """What a command prints that is started on one of the hosts, as by a user who is logged in there."""
        done = subprocess.run(
            ["nsenter", f"--target={self._daemons[host].pid}", "--net", "--uts", "--mount",
             f"--wd={cwd}", *command],
            env=os.environ | self._environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        printed = done.stdout + done.stderr
        assert done.returncode == 0, f"exit code {done.returncode}\n{printed}"
        assert LOST not in printed, printed
        return printed

    def _boot(self, name: str) -> None:
        script = _BECOME_HOST.format(name=name, folder=self._folder, sshd=_find("sshd"))
        with open(self._folder / f"{name}.out", "wb") as out:
            self._daemons[name] = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )  # fmt: skip

    def _connect(self) -> None:
        """A cable between the two."""
        ip = _find("ip")
        assert ip is not None
        ends = dict(zip(HOSTS, (f"dga{os.getpid()}a", f"dga{os.getpid()}b"), strict=True))
        subprocess.run(
            [ip, "link", "add", ends["alpha"], "type", "veth", "peer", "name", ends["beta"]], check=True
        )
        for name, end in ends.items():
            pid = str(self._daemons[name].pid)
            _wait_until(partial(_is_apart, pid), f"network namespace of {name}")
            subprocess.run([ip, "link", "set", end, "netns", pid], check=True)
            for action in (
                ["link", "set", end, "name", "eth0"],
                ["address", "add", f"{HOSTS[name]}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
            ):
                subprocess.run(["nsenter", f"--target={pid}", "--net", ip, *action], check=True)

    def _can_log_in(self, name: str) -> bool:
        other = next(host for host in HOSTS if host != name)
        with contextlib.suppress(AssertionError):
            return self.run(other, ["ssh", name, "hostname"], self._folder, 30).strip() == name
        return False


def _is_apart(pid: str) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {_START_SECONDS:g} s")
        time.sleep(0.05)


if __name__ == "__main__":  # a look at it by hand: python -m tests.helpers.hosts FOLDER COMMAND...
    with Hosts(Path(sys.argv[1]), {"OMP_NUM_THREADS": "1"}) as hosts:
        print(hosts.run("alpha", sys.argv[2:], Path.cwd(), 600))
