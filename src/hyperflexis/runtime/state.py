"""What a fleet remembers on disk: who runs, and the numbers that only ever grow.

``STATE_DIR/serve.lock`` is locked by the one ``serve`` of a fleet for as long as it lives; the kernel frees it however
``serve`` ends. ``STATE_DIR/state.json`` has the term of the controller, the epochs of the instances, and the processes
that run: each by pid, start time and boot id, since a pid alone may by now be another program's. What they were started
with is noted too, so that the next ``serve`` can tell whether they are what it would start itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import msgspec

from ..core.effects import Launch
from ..errors import HyperFlexisError

Role = Literal["gateway", "instance", "copy", "controller"]
VERSION = 1
# Linux's sun_path holds 108 bytes with the final zero, macOS's 104.
MAX_SOCKET_PATH = 100


class Running(msgspec.Struct, frozen=True):
    """A process. ``started`` and ``boot_id`` tell it from a later one of the same pid."""

    pid: int
    started: str
    boot_id: str


class RunningChild(Running, frozen=True):
    """A child process. ``number`` is the term or epoch it was started with, ``launch`` the controller's order for it;
    None: it is one that is kept running."""

    number: int
    role: Role = "instance"
    launch: Launch | None = None


class State(msgspec.Struct):
    """The content of state.json. ``started_with`` has what children read when they start, by its name in words;
    ``stopping`` the roles whose children were told to stop. ``launches`` counts those that the controller asked for,
    and numbers their epochs: each has a name of its own. ``asked``: how many instances people want of a model."""

    version: int = VERSION
    listen: str = ""
    serve: Running | None = None
    started_with: dict[str, str] = {}
    stopping: list[Role] = []
    term: int = 0
    epochs: dict[str, int] = {}
    launches: int = 0
    asked: dict[str, int] = {}
    children: dict[str, RunningChild] = {}


class StateFile:
    """The state of one fleet, written at each change. ``path`` is STATE_DIR/state.json."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "state.json"
        try:
            self.state = msgspec.json.decode(self.path.read_bytes(), type=State)
        except FileNotFoundError:
            self.state = State()
        except msgspec.DecodeError as error:
            raise HyperFlexisError(
                f"{self.path} is not a state file ({error}); if no fleet uses {state_dir}, remove that directory"
            ) from error
        if self.state.version != VERSION:
            raise HyperFlexisError(
                f"{self.path} is of another release (version {self.state.version}, this one writes {VERSION}): "
                f"stop its fleet and remove {state_dir}"
            )

    def save(self) -> None:
        """Replace the file as a whole, so that a crash leaves the old or the new one."""
        scratch = self.path.with_suffix(".tmp")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(self.state), indent=1) + b"\n")
        scratch.replace(self.path)

    def mint_term(self) -> int:
        """The next controller's term."""
        self.state.term += 1
        self.save()
        return self.state.term

    def mint_epoch(self, instance: str) -> int:
        """The instance's next epoch."""
        epoch = self.state.epochs[instance] = self.state.epochs.get(instance, 0) + 1
        self.save()
        return epoch

    def mint_launch(self) -> int:
        """The epoch of an instance that the controller asked for."""
        self.state.launches += 1
        self.save()
        return self.state.launches

    def record_serve(self, listen: str, started_with: Mapping[str, str]) -> None:
        """Note this process as the fleet's serve, where clients reach it, and what children start with from now on."""
        self.state.listen = listen
        self.state.started_with = dict(started_with)
        self.state.stopping = []
        self.state.serve = identify(os.getpid())
        self.save()

    def forget_all(self) -> None:
        """Note that serve ended, or was killed, and that nothing is left running."""
        self.state.serve = None
        self.state.stopping = []
        self.state.children = {}
        self.save()

    def begin_stop(self, role: Role) -> bool:
        """Note that the children of a role are told to stop. False when an earlier serve told them already."""
        if role in self.state.stopping:
            return False
        self.state.stopping.append(role)
        self.save()
        return True

    def record(self, child: str, role: Role, pid: int, number: int, launch: Launch | None = None) -> None:
        """Note that a child runs."""
        known = identify(pid)
        self.state.children[child] = RunningChild(known.pid, known.started, known.boot_id, number, role, launch)
        self.save()

    def note_launch(self, order: Launch) -> None:
        """Note the controller's later order for an instance that runs."""
        known = self.state.children.get(order.instance)
        if known is not None:
            self.state.children[order.instance] = msgspec.structs.replace(known, launch=order)
            self.save()

    def note_asked(self, model: str, instances: int | None) -> None:
        """Note how many instances a person wants; None: as many as it needs."""
        self.state.asked = {name: n for name, n in self.state.asked.items() if name != model}
        if instances is not None:
            self.state.asked[model] = instances
        self.save()

    def forget(self, child: str) -> None:
        """Note that a child is gone."""
        if self.state.children.pop(child, None) is not None:
            self.save()

    def survivors(self) -> dict[str, RunningChild]:
        """Children that an earlier serve left running."""
        return {name: child for name, child in self.state.children.items() if is_alive(child)}

    def why_replace(self, started_with: Mapping[str, str]) -> str | None:
        """Why a serve whose children start with this cannot adopt the survivors; None when it can."""
        if self.state.stopping:
            return "an earlier serve was ended while it stopped"
        changed = [what for what, now in started_with.items() if self.state.started_with.get(what) != now]
        return f"{' and '.join(changed)} changed" if changed else None


class Lock:
    """``with Lock(state_dir):`` -- this process is the fleet's only serve. Raises HyperFlexisError naming the other."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "serve.lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            file.close()
            raise HyperFlexisError(
                f"this fleet is already served by process {pid} (state in {self._path.parent}). "
                f"Stop that one (kill {pid}), or give this fleet a state_dir of its own"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()


def socket_dir(state_dir: Path) -> Path:
    """Where a fleet's Unix sockets go: ``STATE_DIR/run``, or, where that is too long for a socket's address, a
    directory of this user's under the system's temporary one. Made with access for this user alone.

    Raises HyperFlexisError when the short directory belongs to someone else.
    """
    path = state_dir / "run"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH - 20:  # 20: the longest file name put here
        digest = hashlib.blake2b(os.fsencode(state_dir), digest_size=6).hexdigest()
        path = Path(tempfile.gettempdir()) / f"hyperflexis-{os.getuid()}-{digest}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise HyperFlexisError(f"{path} belongs to another user; set a state_dir with a shorter path")
    return path


def identify(pid: int) -> Running:
    """What tells this process from a later one with its pid."""
    return Running(pid, _started(pid), _boot_id())


def is_alive(process: Running) -> bool:
    """Whether that very process still runs."""
    if process.boot_id != _boot_id():
        return False
    started = _started(process.pid)
    return bool(started) and started == process.started


def kill_group(leader: Running, number: signal.Signals) -> None:
    """Signal a process group, also one that its leader has just left, unless its pid is another process's by now."""
    # The system gives no pid away that is still a group's.
    if leader.boot_id == _boot_id() and _started(leader.pid) in ("", leader.started):
        # Either error says that the whole group is gone; macOS gives EPERM while a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader.pid, number)


def _started(pid: int) -> str:
    """The process's start time in the system's own words; empty when there is none, or only its zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return done.stdout.strip()
    except ProcessLookupError:
        return ""
    return "" if after_name[0] in "ZX" else after_name[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        done = subprocess.run(["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False)
        return done.stdout.strip()
