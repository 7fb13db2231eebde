from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperflexis import wire
from hyperflexis.core import effects, events, weights
from hyperflexis.core.instance import InstanceInfo, InstanceReport, InstanceState, RequestProgress
from hyperflexis.core.latency import Coefficients
from hyperflexis.core.links import KvSource, Link
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo
from hyperflexis.core.stream import Sent
from hyperflexis.errors import ProtocolError

COEFFICIENTS = Coefficients(0.01, 1e-5, 2e-9, 3e-5, 4e-8, 0.1)
REQUEST = Request("r", "m", "t", "chat", Slo(0.5, None, 3.0), 2.0, 100, 50, (1, (1 << 64) - 1), True)
REPORT = InstanceReport("i", 1, 2, 3, 4, 5, 6, 7, 8, 9, 1.5, COEFFICIENTS, (RequestProgress("r", 10, 2),))
INFO = InstanceInfo("i", 1, "m", "h100", "unix:/s", "emulated", 4096, 8192, 8, 512, True, COEFFICIENTS)
DECISION = effects.Decision("p", 3, True, 1.0, 0.2, 0.3, 1.4, 0.1, "note")
PLANNED = effects.Planned("m", 1, 2, 2, 0.5, 0.8, 3.0, 0.1, "demand", "demand 0.50")
LAUNCH = effects.Launch("m-1", "m", "d2d", False, None, ("node-1",), "demand")
MESSAGES = [
    wire.Hello(wire.VERSION, "gateway", "g", 3, "secret"),
    wire.Generate(1, "r", 1, wire.pack_ids([1, 2]), wire.Sampling(seed=7, stop_token_ids=(3,), logprobs=2), -0.5, 0.05),
    wire.Generate(2, "r", 1, b"", wire.Sampling(), body=b'{"a": 1}', kind="chat"),
    wire.Generate(3, "r", 1, b"", wire.Sampling(), hands_over=True, kv=KvSource("unix:/k", "i", 4)),
    wire.Cancel(9),
    wire.Output([1, 2], [[5], [6, 7]], finished=[wire.Finish(2, "stop", 10, 2, 8, "why")]),
    wire.Output([1], [[5]], None, [[wire.TokenLogprob(5, -0.5, [(5, -0.5), (6, -1.0)])]]),
    wire.Output([1, 2], [[], []], ["a", "ü"]),
    events.RequestArrived(REQUEST, "g", 0.25, 1, "i", Sent(5, 0.125)),
    events.RequestFinished("r", "failed", 3, None, 1.0, 16, "detail"),
    events.GatewayJoined("g", (events.OpenRequest(REQUEST, 1.0, "i", 1, 5),)),
    events.InstanceJoined(INFO),
    events.InstanceReported(REPORT),
    effects.Dispatch("r", "g", "i", 1, "unix:/s", 2.0, 64.0, DECISION),
    effects.Reject("r", "g", "overloaded", "busy", 2.5),
    effects.Evacuate("i", 1, "it hangs", True),
    wire.Fleet({"m": wire.ModelStatus(["i"], 4096, True)}, [REPORT], {"j": "draining"}),
    wire.Fleet({}, [], scaled={"m": wire.Scaled(0, 4, None, PLANNED, {"ready": 1}, {"process": (2, 1.5)})}),
    effects.Drain("i", 4, 30.0, "a person asks for it"),
    events.DrainAsked("i", None, False),
    events.InstanceDraining("i", 4, 28.0),
    events.PrefillEnding("r", "i", 4, 0.02),
    events.HandoffFailed("r", "i", 4, "no room"),
    effects.Handoff("r", "g", "i", 4, "unix:/k", "j", 5, "unix:/s", 2.0, 64.0, DECISION),
    effects.SetRole("i", 4, 0.5, "it joins"),
    effects.SetLinks("i", 3, (KvSource("unix:/k", "j", 4), KvSource("host:1", "k", 5))),
    events.InstanceLinked("i", 3, "j", 4, Link(0.001, 1e9)),
    events.InstanceLinked("i", 3, "j", 4, None, "nobody listens"),
    weights.InstanceStandby(INFO, (weights.Phase("launching", 2.5),)),
    weights.LoadWeights("i", 3, (weights.WeightSource("host:1", "k", 5),), "abc", 1 << 24),
    weights.WeightsLoaded("i", 3, (weights.Attempt("tcp", "k", 7, 0.5, "it left"),), (), "nothing came"),
    weights.SetSendRate("i", 3, None),
    effects.Stay("r", "i", 3),
    events.LauncherJoined((LAUNCH,), {"m": 3}),
    events.LaunchProgressed("m-1", "engine_init", 0.5, InstanceState.LAUNCHING),
    events.LaunchFailed("m-1", "it ended", "node-1"),
    events.ScaleAsked("m", None),
    LAUNCH,
    effects.StopInstance("m-1", "it is empty"),
]


def test_there_is_an_example_of_each_message() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_out_as_it_went_in(message: object) -> None:
    (back,) = wire.Framer().feed(wire.encode(message))
    assert back == message
    assert type(back) is type(message)


@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.data())
def test_frames_survive_any_cut_of_the_byte_stream(messages: list[object], data: st.DataObject) -> None:
    whole = b"".join(wire.encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    framer = wire.Framer()
    back = []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        back += framer.feed(whole[start:end])
    assert back == messages


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_else(data: bytes) -> None:
    feed_quietly(data)


@settings(max_examples=400)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_frame_is_a_protocol_error_or_another_value(message: object, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    feed_quietly(bytes(frame))


def feed_quietly(data: bytes) -> None:
    try:
        messages = wire.Framer().feed(data)
    except ProtocolError:
        return
    assert all(type(message) in wire.MESSAGES for message in messages)


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    body = b"\x91" * 100_000 + b"\x01"
    frame = (len(body) + 1).to_bytes(4, "big") + bytes([wire.MESSAGES.index(wire.Output)]) + body
    with pytest.raises(ProtocolError):
        wire.Framer().feed(frame)


def test_an_oversized_frame_is_refused_before_it_is_collected() -> None:
    with pytest.raises(ProtocolError, match=r"1001 bytes \(limit 1000\)"):
        wire.Framer(1000).feed((1001).to_bytes(4, "big") + b"\x00")


def test_an_unknown_type_asks_for_the_peers_version() -> None:
    with pytest.raises(ProtocolError, match="another version"):
        wire.Framer().feed(b"\x00\x00\x00\x01\xff")


def test_what_came_before_the_garbage_is_not_lost_to_later_frames() -> None:
    framer = wire.Framer()
    frame = wire.encode(wire.Cancel(1))
    assert framer.feed(frame + frame[:3]) == [wire.Cancel(1)]
    assert framer.feed(frame[3:]) == [wire.Cancel(1)]


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_token_ids_pack_to_words_and_back(ids: list[int]) -> None:
    packed = wire.pack_ids(ids)
    assert packed == b"".join(token.to_bytes(4, "little") for token in ids)
    assert wire.unpack_ids(packed) == ids


def test_half_a_token_id_is_refused() -> None:
    with pytest.raises(ProtocolError, match="u32"):
        wire.unpack_ids(b"\x00\x00\x00")


@pytest.mark.parametrize(
    ("text", "where"),
    [("unix:/run/a.sock", "/run/a.sock"), ("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:80", ("::1", 80))],
)
def test_addresses(text: str, where: object) -> None:
    assert wire.parse_address(text) == where


@pytest.mark.parametrize("text", ["localhost", ":80", "host:", "host:http", ""])
def test_a_wrong_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="neither unix:PATH nor HOST:PORT"):
        wire.parse_address(text)


def test_only_known_messages_are_sent() -> None:
    with pytest.raises(KeyError):
        wire.encode(msgspec.Raw(b""))
