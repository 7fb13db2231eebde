from dataclasses import dataclass
from math import inf

from hyperflexis.core.latency import Coefficients
from hyperflexis.policy import step
from hyperflexis.policy.baselines import first_come
from hyperflexis.policy.running import Running
from hyperflexis.policy.waiting import Waiting

MODEL = Coefficients(c0=0.010, c1=1e-4, c2=0.0, c3=5e-4, c4=0.0)
LIMITS = step.StepLimits(max_batch=64, max_batch_tokens=8192, kv_capacity_tokens=100_000, kv_free_tokens=100_000)


@dataclass(eq=False)
class Request:
    id: str
    remaining_prefill: int = 0
    next_due: float = inf
    pace_s: float = inf
    value: float = 1.0
    arrived_at: float = 0.0
    computed: int = 0
    started: bool = False
    missed_first: bool = False
    expected_remaining: float = 50.0
    last_due: float = inf
    memo: object = None


def _running(*requests):
    found = Running()
    for request in requests:
        found.add(request)
    return found


def _waiting(*requests):
    found = Waiting()
    for request in requests:
        found.add(request)
    return found


def _plan(waiting, running=(), latency=MODEL, limits=LIMITS):
    return step.plan(0.0, _waiting(*waiting), _running(*running), latency, limits)


def _ids(plan):
    return [job.id for job, _ in plan.prefills]


def test_all_decodes_run_and_the_chunk_fits_their_slack():
    running = [Request("d", next_due=0.05, pace_s=0.05, computed=100)]
    plan = _plan([Request("p", 4000, next_due=10.0)], running)
    assert plan.decode
    ((_, n),) = plan.prefills
    assert MODEL.predict(n, 0, 1, 100) <= plan.budget_s <= 0.05
    assert MODEL.predict(n + 2, 0, 1, 100) > plan.budget_s


def test_while_the_kv_cache_is_full_prompts_take_no_longer_than_decodes():
    running = [Request("d", next_due=0.3, pace_s=0.3, computed=100)]
    prompt = Request("p", 4000, next_due=10.0)
    full = step.StepLimits(64, 8192, 100_000, 19_000)
    assert _plan([prompt], running, limits=full).budget_s == 2.0 * MODEL.decode_s(1, 100)
    assert _plan([prompt], running, limits=step.StepLimits(64, 8192, 100_000, 21_000)).budget_s > 0.1
    assert _plan([prompt], limits=full).budget_s > 0.1, "nothing decodes, and no KV comes back sooner"


# Up to 500 tokens an iteration cost a tenth of the price beyond.
CURVED = Coefficients(c0=0.010, c1=2e-5, c2=0.0, c3=1e-6, c4=0.0, curve=((0.0, 0.0), (500.0, 50.0)))


def test_chunks_are_cheap_while_nobody_is_in_a_hurry():
    running = [Request("d", next_due=0.05, pace_s=0.05, computed=100)]
    calm = _plan([Request("p", 4000, next_due=10.0)], running, CURVED)
    assert 490 <= calm.prefills[0][1] <= 499, "up to the knot of the curve, with the decode"
    # 4,000 tokens are 8 cheap chunks of 11 ms each, or two and a half of 39 ms.
    hurried = _plan([Request("p", 4000, next_due=0.15)], running, CURVED)
    assert hurried.prefills[0][1] > 1500
    many = [Request(f"p{k}", 4000, next_due=1.0, arrived_at=k) for k in range(8)]
    assert sum(n for _, n in _plan(many, running, CURVED).prefills) > 1500


def test_without_a_curve_or_without_decodes_chunks_are_whole():
    linear = Coefficients(c0=0.010, c1=2e-5, c2=0.0, c3=1e-6, c4=0.0)
    running = [Request("d", next_due=0.05, pace_s=0.05, computed=100)]
    assert _plan([Request("p", 4000, next_due=10.0)], running, linear).prefills[0][1] > 1500
    assert _plan([Request("p", 4000, next_due=10.0)], (), CURVED).prefills[0][1] == 4000


def test_a_cheap_chunk_that_would_be_slow_is_not_taken():
    # 50 tokens for nothing, but at a fifth of the speed.
    slow = Coefficients(c0=0.010, c1=2e-5, c2=0.0, c3=0.0, c4=0.0, curve=((0.0, 0.0), (50.0, 0.0)))
    assert slow.thrifty_tokens(1500, 0) == 1500
    quick = Coefficients(c0=0.010, c1=2e-5, c2=0.0, c3=0.0, c4=0.0, curve=((0.0, 0.0), (400.0, 0.0)))
    assert quick.thrifty_tokens(1500, 0) == 400
    assert quick.thrifty_tokens(300, 0) == 300
    assert quick.thrifty_tokens(0, 0) == 0


def test_earliest_deadline_first_among_those_that_can_be_on_time():
    waiting = [Request("loose", 500, next_due=5.0), Request("tight", 500, next_due=0.3, arrived_at=1.0)]
    assert _ids(_plan(waiting)) == ["tight", "loose"]
    assert _ids(first_come.plan(0.0, _waiting(*waiting), _running(), MODEL, LIMITS)) == ["loose", "tight"]


def test_the_request_that_would_make_others_late_is_demoted_not_refused():
    big = Request("big", 8000, next_due=1.0)
    small = [Request(f"s{i}", 1000, next_due=1.1) for i in range(6)]
    plan = _plan([big, *small])
    assert "big" not in _ids(plan)
    alone = _plan([big])
    assert _ids(alone) == ["big"]


def test_value_decides_who_is_demoted():
    waiting = [Request("cheap", 4000, next_due=0.6, value=1.0), Request("dear", 4000, next_due=0.6, value=4.0)]
    assert _ids(_plan(waiting))[0] == "dear"


def test_late_requests_come_last_started_first():
    late_new, late_started = Request("ln", 100, next_due=-1.0), Request("ls", 300, next_due=-1.0, started=True)
    plan = _plan([late_new, late_started, Request("ok", 200, next_due=1.0)])
    assert _ids(plan) == ["ok", "ls", "ln"]


def test_a_long_queue_of_late_requests_does_not_hide_a_newcomer():
    late = [Request(f"l{i}", 100, next_due=-1.0) for i in range(step.MAX_RANKED)]
    waiting = _waiting(*late)
    first = step.plan(0.0, waiting, _running(), MODEL, LIMITS)
    assert set(first.late) == set(late)
    for request in first.late:
        waiting.give_up(request)
    waiting.add(Request("ok", 200, next_due=1.0))
    assert _ids(step.plan(0.0, waiting, _running(), MODEL, LIMITS))[:2] == ["ok", "l0"]


def test_a_prompt_that_has_begun_goes_on_behind_newcomers_that_find_no_place():
    begun = Request("begun", 100, next_due=-1.0, started=True)
    newcomers = [Request(f"n{i}", 100, next_due=5.0) for i in range(2 * step.MAX_REFUSED)]
    one_place = step.StepLimits(max_batch=1, max_batch_tokens=8192, kv_capacity_tokens=1000, kv_free_tokens=0)
    assert _ids(_plan([*newcomers, begun], [], MODEL, one_place)) == ["begun"]


def test_progress_is_made_even_where_nothing_is_feasible():
    slow = Coefficients(c0=1.0, c1=1.0, c2=0.0, c3=0.0, c4=0.0)
    plan = _plan([Request("p", 100, next_due=-1.0, computed=5000, started=True)], [], slow, LIMITS)
    assert plan.prefills


def test_no_request_starts_that_would_break_a_promised_pace():
    running = [Request(f"d{i}", next_due=10.0, pace_s=0.0165, computed=10) for i in range(11)]
    newcomer = Request("new", 100, next_due=5.0, pace_s=inf)
    assert not _plan([newcomer], running).prefills
    assert _plan([newcomer], [*running[:5]]).prefills


def test_the_less_valuable_leave_room_in_the_batch_for_the_more_valuable():
    running = [Request(f"d{i}", next_due=10.0, pace_s=0.020, value=4.0, computed=10) for i in range(5)]
    assert _plan([Request("dear", 100, next_due=5.0, value=4.0)], running).prefills
    assert not _plan([Request("cheap", 100, next_due=5.0, value=1.0)], running).prefills
    alone = [Request(f"d{i}", next_due=10.0, pace_s=0.020, value=1.0, computed=10) for i in range(5)]
    assert _plan([Request("cheap", 100, next_due=5.0, value=1.0)], [*alone]).prefills


def test_kv_and_batch_limits_hold():
    full = step.StepLimits(max_batch=2, max_batch_tokens=8192, kv_capacity_tokens=1000, kv_free_tokens=150)
    running = [Request("d", next_due=inf, computed=850)]
    assert not _plan([Request("p", 400, next_due=5.0)], [*running], MODEL, full).prefills
    busy = [Request("a", next_due=inf), Request("b", next_due=inf)]
    roomy = step.StepLimits(2, 8192, 1000, 1000)
    assert not _plan([Request("p", 100, next_due=5.0)], [*busy], MODEL, roomy).prefills
    assert not first_come.plan(0.0, _waiting(Request("p", 100, next_due=5.0)), _running(*busy), MODEL, roomy).prefills


def test_half_done_prompts_that_will_wait_do_not_keep_others_out():
    late = [Request(f"l{i}", 4000, next_due=-1.0, pace_s=0.012, computed=100, started=True) for i in range(8)]
    plan = _plan([*late, Request("ok", 100, next_due=1.0, pace_s=0.012)])
    assert _ids(plan)[0] == "ok"


def test_first_come_keeps_the_token_budget():
    limits = step.StepLimits(64, 512, 100_000, 100_000)
    running = [Request(f"d{i}") for i in range(12)]
    plan = first_come.plan(0.0, _waiting(Request("a", 300), Request("b", 900)), _running(*running), MODEL, limits)
    assert [n for _, n in plan.prefills] == [300, 200]


def test_victims():
    lost = Request("lost", missed_first=True, value=9.0, computed=10, next_due=0.0, pace_s=0.05)
    cheap = Request("cheap", computed=1000, next_due=10.0, arrived_at=1.0)
    dear = Request("dear", computed=1000, next_due=10.0, value=5.0, arrived_at=2.0)
    assert step.victim(0.0, [dear, cheap, lost]).id == "lost"
    assert step.victim(0.0, [dear, cheap]).id == "cheap"
    assert first_come.victim(0.0, [dear, cheap]).id == "dear"


def _fresh(*promises):
    found = Waiting()
    for i, promise_s in enumerate(promises):
        found.add(Request(str(i), 4000, next_due=promise_s), fresh=True)
    return found


def test_an_iteration_leaves_a_newcomer_time_for_its_own():
    loose = Request("d", next_due=9.0, pace_s=1.0, computed=10)
    for running in (_running(), _running(loose)):
        assert step.plan(0.0, _fresh(0.2, 9.0), running, MODEL, LIMITS).budget_s == 0.4 * 0.2
    waiting = _fresh(9.0)
    waiting.add(Request("back", 4000, next_due=0.001))
    assert step.plan(0.0, waiting, _running(), MODEL, LIMITS).budget_s > 0.1, "only what is new makes a promise"


def test_a_promise_that_cannot_be_kept_does_not_slow_the_others_down():
    decodes = [Request(f"d{i}", next_due=9.0, pace_s=1.0, computed=10) for i in range(40)]
    for running in ([], decodes):
        plan = step.plan(0.0, _fresh(0.001, 9.0), _running(*running), MODEL, LIMITS)
        assert plan.budget_s == 3.0 * MODEL.decode_s(len(running), 10 * len(running))
        ((job, n),) = plan.prefills
        assert job.id == "1" and n > 100
