"""The csv files of workloads: what is read, and what is said about rows that cannot be meant."""

from __future__ import annotations

import pytest

from hyperflexis.errors import ConfigError
from hyperflexis.sim.workload import SessionRow, TraceRow
from hyperflexis.sim.workload_csv import parse_rates, parse_sessions, parse_table

TRACE = "t,prompt_tokens,output_tokens,hash_ids\n0,10,5,\n1.5,20,6,3 4\n"
SESSIONS = (
    "session,t_in_session,prompt_tokens,output_tokens,reusable_prefix_tokens\n"
    "a,0,1000,100,0\nb,0,50,5,0\na,9,1200,0,1064\na,3,1300,7,1200\n"
)


def test_a_trace_whatever_the_order_of_its_columns() -> None:
    rows = (TraceRow(0.0, 10, 5), TraceRow(1.5, 20, 6, (3, 4)))
    assert parse_table(TRACE, "x.csv", timed=True) == rows
    turned = "\n".join(",".join(reversed(line.split(","))) for line in TRACE.splitlines())
    assert parse_table(turned, "x.csv", timed=True) == rows


def test_a_table_of_lengths_needs_no_times() -> None:
    text = "prompt_tokens,output_tokens,t\n10,5,9\n20,6,3\n"
    assert parse_table(text, "x.csv", timed=False) == (TraceRow(0.0, 10, 5), TraceRow(0.0, 20, 6))


def test_sessions_keep_the_order_of_their_rows() -> None:
    assert parse_sessions(SESSIONS, "s.csv") == (
        (SessionRow(0.0, 1000, 100, 0), SessionRow(9.0, 1200, 0, 1064), SessionRow(3.0, 1300, 7, 1200)),
        (SessionRow(0.0, 50, 5, 0),),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "x.csv:1: the file is empty; it needs a row of column names (t, prompt_tokens, output_tokens)"),
        ("\n", "x.csv:1: the file is empty"),
        ("t,prompt_tokens,output_tokens\n", "x.csv:2: no rows below the header; add one for each request"),
        (
            "TIMESTAMP,prompt_tokens,output_tokens\n1,2,3\n",
            "x.csv:1: column 't' is missing; add it, or rename the one meant (TIMESTAMP, prompt_tokens, output_tokens)",
        ),
        (TRACE + "1.25,20,6,\n", "x.csv:4: t goes back from 1.5 to 1.25; sort the rows by t"),
        (TRACE.replace("\n0,", "\n-2,"), "x.csv:2: t must not be negative (-2); subtract the earliest time"),
        (TRACE.replace("\n0,", "\nnan,"), "x.csv:2: t must be a number of seconds, not 'nan'; correct the row"),
        (TRACE.replace("\n0,", "\ninf,"), "x.csv:2: t must be a number of seconds, not 'inf'"),
        (TRACE.replace("\n0,", "\n12:30,"), "x.csv:2: t must be a number of seconds, not '12:30'"),
        (TRACE.replace("1.5,20", "1.5,0"), "x.csv:3: prompt_tokens must be at least 1, not 0; correct the row or"),
        (TRACE.replace("20,6", "20,0"), "x.csv:3: output_tokens must be at least 1, not 0; correct the row or remove"),
        (TRACE.replace("20,6", "20,-6"), "x.csv:3: output_tokens must be at least 1, not -6"),
        (TRACE.replace("20,6", "20,6.5"), "x.csv:3: output_tokens must be a whole number, not '6.5'; correct the row"),
        (TRACE + "2,20\n", "x.csv:4: output_tokens must be a whole number, not ''"),
        (TRACE.replace("3 4", "3 x"), "x.csv:3: hash_ids must be whole numbers of at least 0, apart by spaces"),
        (TRACE.replace("3 4", "3 -4"), "x.csv:3: hash_ids must be whole numbers of at least 0, apart by spaces"),
        (TRACE + '2,20,6,"' + "1 " * 100_000 + '"\n', "x.csv:4: not csv: field larger than field limit"),
    ],
)
def test_rows_of_traces_that_cannot_be_meant(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_table(text, "x.csv", timed=True)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (SESSIONS.replace("session,", "sesion,"), "s.csv:1: column 'session' is missing"),
        (SESSIONS.replace("b,0,50", ",0,50"), "s.csv:3: session must not be empty; name the session"),
        (SESSIONS.replace("a,9,", "a,-9,"), "s.csv:4: t_in_session must not be negative (-9)"),
        (SESSIONS.replace("b,0,50,5", "b,0,50,-1"), "s.csv:3: output_tokens must be at least 0, not -1"),
        (SESSIONS.replace("b,0,50,5,0", "b,0,0,5,0"), "s.csv:3: prompt_tokens must be at least 1, not 0"),
        (
            SESSIONS.replace("b,0,50,5,0", "b,0,50,5,40"),
            "s.csv:3: reusable_prefix_tokens is 40, but the prompt and the session's earlier ones with their answers"
            " have 0; lower it",
        ),
        (SESSIONS.replace("1064", "1101"), "s.csv:4: reusable_prefix_tokens is 1101, but"),
        (SESSIONS.replace("1300,7,1200", "1100,7,1200"), "s.csv:5: reusable_prefix_tokens is 1200, but"),
    ],
)
def test_rows_of_sessions_that_cannot_be_meant(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sessions(text, "s.csv")
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_rates_begin_at_0_and_go_on() -> None:
    assert parse_rates("rate_rps,t\n2,0\n0,0.5\n3.5,60\n", "r.csv") == ((0.0, 2.0), (0.5, 0.0), (60.0, 3.5))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("", "r.csv:2: no rows below the header; add one for each step"),
        ("5,1\n", "r.csv:2: the first t must be 0, not 5; subtract it from all rows"),
        ("0,1\n0,2\n", "r.csv:3: t must grow, and 0 comes after 0; sort the rows by t, one for each t"),
        ("0,x\n", "r.csv:2: rate_rps must be a number of requests per second, not 'x'; correct the row or remove it"),
        ("0,-1\n", "r.csv:2: rate_rps must not be negative (-1); correct the row or remove it"),
        ("0,inf\n", "r.csv:2: rate_rps must be a number of requests per second, not 'inf'"),
    ],
)
def test_rates_that_cannot_be_meant(rows: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_rates("t,rate_rps\n" + rows, "r.csv")
    assert says in str(error.value)
