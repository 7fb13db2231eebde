import pytest

from hyperflexis.core.instance import INSTANCE_TRANSITIONS, InstanceState, check_instance_move
from hyperflexis.core.request import REQUEST_TRANSITIONS, RequestState, check_request_move
from hyperflexis.errors import IllegalTransition


def test_every_state_has_a_row():
    assert set(REQUEST_TRANSITIONS) == set(RequestState)
    assert set(INSTANCE_TRANSITIONS) == set(InstanceState)


def test_illegal_moves_raise_and_name_both_states():
    with pytest.raises(IllegalTransition, match="finished to dispatched"):
        check_request_move(RequestState.FINISHED, RequestState.DISPATCHED)
    with pytest.raises(IllegalTransition, match="lost to ready"):
        check_instance_move(InstanceState.LOST, InstanceState.READY)
    check_request_move(RequestState.WAITING, RequestState.DISPATCHED)
    check_instance_move(InstanceState.DRAINING, InstanceState.READY)


def test_every_state_is_reachable_and_lost_from_any_live_one():
    for table, start in ((REQUEST_TRANSITIONS, RequestState.WAITING), (INSTANCE_TRANSITIONS, InstanceState.LAUNCHING)):
        seen, todo = set(), [start]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo.extend(table[state])
        assert seen == set(table)
    for state, moves in INSTANCE_TRANSITIONS.items():
        assert not moves or InstanceState.LOST in moves, state
