from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from hyperflexis.core.effects import Launch
from hyperflexis.errors import HyperFlexisError
from hyperflexis.runtime.state import MAX_SOCKET_PATH, Lock, StateFile, identify, is_alive, kill_group, socket_dir


@pytest.fixture
def child() -> subprocess.Popen[bytes]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        yield process
        process.kill()


def test_terms_and_epochs_only_grow_over_restarts(tmp_path: Path) -> None:
    first = StateFile(tmp_path)
    assert [first.mint_term(), first.mint_term()] == [1, 2]
    assert [first.mint_epoch("a"), first.mint_epoch("b"), first.mint_epoch("a")] == [1, 1, 2]
    second = StateFile(tmp_path)
    assert (second.mint_term(), second.mint_epoch("a")) == (3, 3)


def test_what_was_launched_and_asked_for_is_remembered(tmp_path: Path) -> None:
    first = StateFile(tmp_path)
    assert [first.mint_launch(), first.mint_launch()] == [1, 2]
    order = Launch("m-1", "m", "disk", True, None, (), "a shell is to wait")
    first.record("m-1", "instance", os.getpid(), 2, order)
    first.note_launch(replace(order, shell=False))
    first.note_launch(replace(order, instance="m-9"))
    first.note_asked("m", 3)
    second = StateFile(tmp_path)
    assert second.mint_launch() == 3
    assert second.survivors()["m-1"].launch == replace(order, shell=False)
    assert second.state.asked == {"m": 3} and "m-9" not in second.state.children
    second.note_asked("m", None)
    assert StateFile(tmp_path).state.asked == {}


def test_what_an_earlier_serve_left_is_found_and_can_be_ended(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    StateFile(tmp_path).record("a", "gateway", child.pid, 7)
    later = StateFile(tmp_path)
    found = later.survivors()["a"]
    assert (found.number, found.role) == (7, "gateway")
    kill_group(later.survivors()["a"], signal.SIGKILL)
    child.wait(10)
    assert later.survivors() == {}


def test_a_later_process_of_the_same_pid_is_not_taken_for_the_child(child: subprocess.Popen[bytes]) -> None:
    real = identify(child.pid)
    assert is_alive(real)
    for other in (msgspec.structs.replace(real, started="0"), msgspec.structs.replace(real, boot_id="another boot")):
        assert not is_alive(other)
        kill_group(other, signal.SIGKILL)
    child.communicate(b"\n", timeout=10)
    assert child.returncode == 0, "it ended by itself"


def test_a_process_that_ended_but_was_not_waited_for_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as process:
        seen = identify(process.pid)
        assert process.stdout is not None
        process.stdout.read()  # until it ends; it stays a zombie until wait()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(seen)


def test_a_child_of_other_origin_is_replaced_and_the_reason_is_said(tmp_path: Path) -> None:
    basis = {"the release": "1", "the fleet file": "x"}
    assert StateFile(tmp_path).why_replace(basis) == "the release and the fleet file changed"
    StateFile(tmp_path).record_serve("127.0.0.1:1", basis)
    assert StateFile(tmp_path).why_replace(basis) is None
    assert StateFile(tmp_path).why_replace({**basis, "the fleet file": "y"}) == "the fleet file changed"
    assert StateFile(tmp_path).why_replace({**basis, "the key file": ""}) == "the key file changed"


def test_a_stop_that_was_begun_is_known_to_the_next_serve_until_it_begins_itself(tmp_path: Path) -> None:
    StateFile(tmp_path).record_serve("127.0.0.1:1", {})
    assert StateFile(tmp_path).begin_stop("gateway")
    later = StateFile(tmp_path)
    assert "stopped" in (later.why_replace({}) or "")
    assert (later.begin_stop("gateway"), later.begin_stop("instance")) == (False, True)
    later.record_serve("127.0.0.1:1", {})
    assert StateFile(tmp_path).why_replace({}) is None


def test_a_state_file_without_roles_and_origin_can_be_read(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    known = msgspec.to_builtins(identify(child.pid))
    old = {"version": 1, "listen": "", "serve": {**known, "number": 0}, "children": {"a": {**known, "number": 3}}}
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(old))
    state = StateFile(tmp_path)
    assert state.survivors()["a"].number == 3
    assert state.why_replace({"the release": "1"}) is not None


def test_a_second_lock_is_refused_with_the_pid_and_the_remedy(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with Lock(tmp_path), pytest.raises(HyperFlexisError, match=rf"process {os.getpid()} .*state_dir"):
        lock.__enter__()
    with Lock(tmp_path):
        pass  # free again


def test_a_damaged_state_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(HyperFlexisError, match=r"state\.json.*remove"):
        StateFile(tmp_path)
    (tmp_path / "state.json").write_text('{"version": 99}')
    with pytest.raises(HyperFlexisError, match="version 99"):
        StateFile(tmp_path)


def test_sockets_of_a_deep_state_dir_have_short_paths(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    assert socket_dir(deep) == socket_dir(deep) != socket_dir(tmp_path / ("y" * 100))
    for path in (socket_dir(deep), socket_dir(tmp_path / ("y" * 100))):
        assert len(os.fsencode(path)) < MAX_SOCKET_PATH - 20
        assert path.stat().st_mode & 0o077 == 0
        path.rmdir()
