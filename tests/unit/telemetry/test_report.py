"""The report: a page that needs nothing but itself, and three pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hyperflexis
from hyperflexis.core.record import Record, Run
from hyperflexis.core.slo import Slo
from hyperflexis.errors import HyperFlexisError
from hyperflexis.telemetry import machine, report


def run(late: float) -> Run:
    slo = Slo(1.0, 0.1)
    records = [
        Record("chat", slo, i * 0.5, 10, 5, "finished", 0.1 * i * late, 0.1 * i * late + 0.2, 5) for i in range(20)
    ]
    records += [Record("batch", Slo(e2e_s=5.0), 3.0, 10, 5, "rejected"), Record("<b>", Slo(), 4.0, 10, 5, "unfinished")]
    return Run(tuple(records), 10.0, 14.0)


def test_the_page_holds_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    page = report.write(
        tmp_path / "out", "A <title>", {"seed": "7"}, {"slow": [run(3.0)], "fast": [run(0.5)]}, ["A note."]
    )
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert "A &lt;title&gt;" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert "A note." in text and "seed" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    for name in ("attainment.png", "ttft.png", "timeline.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    # 20 chat requests: TTFT 0.1 i late <= 1 holds for 4 (late 3) and 20 (late 0.5).
    assert ">20.0%<" in text and ">100.0%<" in text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need the extra `report`")
    (tmp_path / "file").write_text("")
    with pytest.raises(HyperFlexisError, match="cannot write the report"):
        report.write(tmp_path / "file", "t", {}, {"p": [run(1.0)]})


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from hyperflexis.telemetry import report\n"
        "from hyperflexis.errors import HyperFlexisError\n"
        "try: report.write(Path('x'), 't', {}, {})\n"
        "except HyperFlexisError as error: print(error)"
    )
    path = str(Path(hyperflexis.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "pip install 'hyperflexis[report]'" in done.stdout, done.stderr
    assert not (tmp_path / "x").exists()


def test_the_machine_is_described() -> None:
    facts = machine.describe()
    assert int(facts["cores"]) >= 1 and facts["processor"] and facts["python"]
