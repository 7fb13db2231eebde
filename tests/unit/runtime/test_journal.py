from __future__ import annotations

from math import inf
from pathlib import Path

import msgspec
import pytest

from hyperflexis.core.effects import Decision, Dispatch, Reject
from hyperflexis.core.events import GatewayJoined, RequestArrived, RequestFinished
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.errors import ProtocolError
from hyperflexis.runtime.journal import VERSION, Entry, Header, Journal, encode_effects, read_journal, segments

DECISION = Decision("hyperflexis", 2, True, 1.5, 0.25, 0.125, inf)
REQUEST = Request("r1", "tiny", "t", "chat", Slo(0.1), 2.0, 100, 16, prefix_keys=(2**64 - 1,))
ARRIVED = RequestArrived(REQUEST, "g", 0.001)
DISPATCH = Dispatch("r1", "g", "i", 1, "unix:x", 2.0, 128.0, DECISION)


class Headers:
    """Makes headers whose snapshot counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, dropped: int) -> Header:
        self.made += 1
        return Header(VERSION, "0", "f", 1, 0.0, msgspec.Raw(b"{}"), str(self.made).encode(), dropped)


def read(path: Path) -> tuple[list[Header], list[Entry]]:
    items = list(read_journal(path))
    return [i for i in items if isinstance(i, Header)], [i for i in items if isinstance(i, Entry)]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Headers())
    reject = Reject("r1", "g", "overloaded", "too much", 2.5)
    events = [ARRIVED, RequestFinished("r1", "finished", 3, 0.1, 0.2), GatewayJoined("g")]
    journal.append(1.1, events[0], [DISPATCH, reject], DECISION)
    journal.append(2.2, events[1], [])
    journal.append(3.3, events[2], [])
    journal.close()
    headers, entries = read(tmp_path)
    assert len(headers) == 1
    assert [e.event for e in entries] == events
    assert [e.now for e in entries] == [1.1, 2.2, 3.3]
    assert entries[0].effects == encode_effects([DISPATCH, reject])
    assert entries[1].effects == b"[]"
    assert b'"load_s":0.25' in entries[0].shadow
    assert entries[1].shadow == b"null"


async def test_a_full_segment_is_followed_by_another_and_old_ones_go(tmp_path: Path) -> None:
    headers = Headers()
    journal = Journal(tmp_path, headers, max_segment_bytes=200, keep=2)
    for i in range(5):
        journal.append(float(i), ARRIVED, [])
        await journal.flush()
    journal.close()
    assert len(segments(tmp_path)) == 2
    found, entries = read(tmp_path)
    assert [int(h.snapshot) for h in found] == [headers.made - 1, headers.made], "a snapshot opens each segment"
    nows = [e.now for e in entries]
    assert nows == [float(i) for i in range(5)][-len(nows) :], "no entry between the first and the last is lost"
    assert nows[0] > 0.0


def test_a_new_journal_goes_on_after_the_old_segments(tmp_path: Path) -> None:
    for _ in range(3):
        Journal(tmp_path, Headers(), keep=2).close()
    assert [p.name for p in segments(tmp_path)] == ["journal-000002.jsonl", "journal-000003.jsonl"]


async def test_over_its_bound_it_drops_and_says_so_in_a_new_segment(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Headers(), max_pending=3)
    for i in range(10):
        journal.append(float(i), ARRIVED, [])
    await journal.flush()
    journal.append(10.0, ARRIVED, [])
    journal.close()
    headers, entries = read(tmp_path)
    assert [h.dropped for h in headers] == [0, 8]
    assert [e.now for e in entries] == [0.0, 1.0, 10.0], "none follows the gap in the old segment"


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Headers())
    journal.append(1.0, ARRIVED, [])
    journal.append(2.0, ARRIVED, [])
    journal.close()
    file = segments(tmp_path)[0]
    file.write_bytes(file.read_bytes()[:-10])
    assert [e.now for e in read(file)[1]] == [1.0]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path, Headers())
    journal.close()
    file = segments(tmp_path)[0]
    file.write_bytes(file.read_bytes() + b'{"now": 1}\n')
    with pytest.raises(ProtocolError, match=r"journal-000001\.jsonl:2"):
        read(file)
    file.write_bytes(file.read_bytes().replace(b'"version":%d' % VERSION, b'"version":999'))
    with pytest.raises(ProtocolError, match=r"journal-000001\.jsonl:1.*version"):
        read(file)


def test_a_full_disk_stops_the_journal_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", Headers())
    (tmp_path / "j").rmdir()  # no segment can be opened in it now
    journal.append(1.0, ARRIVED, [])
    journal.close()
    assert not (tmp_path / "j").exists()
