from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hyperflexis.cli import main
from hyperflexis.errors import HyperFlexisError
from hyperflexis.make_model import num_bytes
from hyperflexis.transfer_bench import parse_size, recipe_for


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("256MiB", 256 << 20), ("1.5KB", 1500), ("7", 7), ("2 MB", 2_000_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1TiBx", "1gib"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(HyperFlexisError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("size", [8 << 20, 64 << 20, 100 << 20, 256 << 20, 1 << 30, 4 << 30])
def test_a_model_is_found_for_each_size(size: int) -> None:
    assert num_bytes(recipe_for(size, 0)) == pytest.approx(size, rel=0.1)


def test_too_small_a_size_is_an_error() -> None:
    with pytest.raises(HyperFlexisError, match="too little"):
        recipe_for(1000, 0)


def test_a_disk_without_room_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the bench needs PyTorch")
    assert main(["transfer", "bench", "--size", "9000GiB", "--scratch", str(tmp_path)]) == 2
    assert "GB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 1 MiB: the same error path as a full disk's."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from hyperflexis.cli import main
sys.exit(main(["make-model", {str(tmp_path / "m")!r}, "--size", "1m"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "is the disk full?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_measures_and_says_so_in_json(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the bench needs PyTorch")
    words = ["transfer", "bench", "--size", "8MiB", "--rounds", "1", "--receivers", "2", "--weights-only"]
    # A process of its own: the receivers' processes import its main module.
    done = subprocess.run(
        [sys.executable, "-m", "hyperflexis", *words, "--scratch", str(tmp_path), "--json", "-"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"paths", "ratio_to_disk", "ready_from_standby_s"} <= set(found)
    ways = {
        "memory copy",
        "bare tcp socket",
        "disk as vLLM loads it",
        "disk",
        "tcp",
        "shared memory",
        "attach, no copy",
    }
    assert ways | {"tcp, chain of 2", "tcp, star of 2"} <= set(found["paths"])
    assert all(one["seconds"] > 0.0 for one in found["paths"].values())
    assert found["ready_from_standby_s"] is None and list(tmp_path.iterdir()) == []
