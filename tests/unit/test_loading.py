"""Where the controller lets new instances get their weights from."""

from __future__ import annotations

from tests.unit.test_controller import info
from tests.unit.test_scaling import bound_to, fleet, of, tick

from hyperflexis.controller import Controller
from hyperflexis.core.effects import Effect, Launch, StopInstance
from hyperflexis.core.events import InstanceJoined, InstanceLeft, LauncherJoined, ScaleAsked
from hyperflexis.core.instance import InstanceInfo, InstanceState
from hyperflexis.core.links import BYTES_PER_S
from hyperflexis.core.weights import (
    Attempt,
    InstanceStandby,
    LoadWeights,
    SetSendRate,
    WeightsLoaded,
    WeightSource,
)
from hyperflexis.policy.multicast import SHARE


def gives(id: str, digest: str = "abc") -> InstanceInfo:
    return info(id, weights_address=f"unix:w-{id}", weights_digest=digest, weights_bytes=1 << 30)


def serving(
    *ids: str, wanted: int, standby: int = 0, copy: WeightSource | None = None
) -> tuple[Controller, list[Launch]]:
    """Instances that give their weights, and what is launched besides."""
    c = fleet(0, policy=f"fixed@{wanted}", standby=standby, copy=copy)
    for id in ids:
        c.handle(InstanceJoined(gives(id)), 0.0)
    return c, of(Launch, tick(c, 1.0))


def standby(c: Controller, id: str, now: float = 2.0) -> list[Effect]:
    return c.handle(InstanceStandby(gives(id, ""), ()), now)


def test_a_new_instance_gets_its_weights_from_one_that_serves_at_a_bounded_rate():
    c, (launch,) = serving("a", wanted=2)
    rate, load = standby(c, launch.instance)
    assert rate == SetSendRate("a", 1, SHARE * BYTES_PER_S)
    assert isinstance(load, LoadWeights)
    assert ([one.instance for one in load.sources], load.digest) == (["a"], "abc")
    assert c.cluster.launches[launch.instance].state is InstanceState.LOADING


def test_the_first_reads_from_disk():
    c, (launch,) = serving(wanted=1)
    assert standby(c, launch.instance) == [LoadWeights(launch.instance, 1)]


def test_a_copy_in_the_hosts_memory_comes_after_all_that_serve_and_before_the_disk():
    copy = WeightSource("unix:c", "m-copy", 0)
    c, (launch,) = serving("a", wanted=2, copy=copy)
    (load,) = of(LoadWeights, standby(c, launch.instance))
    assert ([one.instance for one in load.sources], load.sources[-1], load.digest) == (["a", "m-copy"], copy, "abc")
    c, (launch,) = serving(wanted=1, copy=copy)
    assert launch.means == "disk", "no instance gives it any"
    assert standby(c, launch.instance) == [LoadWeights(launch.instance, 1, (copy,))]
    # A shell of a fleet whose last instance has died.
    c, (launch,) = serving("a", wanted=1, standby=1, copy=copy)
    standby(c, launch.instance)
    c.handle(InstanceLeft("a", 1, "killed"), 2.5)
    (load,) = of(LoadWeights, tick(c, 3.0))
    assert (load.instance, load.sources, load.digest) == (launch.instance, (copy,), "")


def test_whose_requests_have_time_to_spare_gives():
    c, (launch,) = serving("a", "b", wanted=3)
    # A prompt of 8 s, due in a second.
    bound_to(c, "a", "urgent", num_prompt_tokens=400_000)
    (load,) = of(LoadWeights, standby(c, launch.instance))
    assert [one.instance for one in load.sources] == ["b"]


def test_a_source_that_died_before_is_not_asked():
    c, (launch,) = serving("a", "b", wanted=3)
    del launch
    c.cluster.leave(c.cluster.instances["a"])
    (id,) = c.cluster.launches
    (load,) = of(LoadWeights, standby(c, id))
    assert [one.instance for one in load.sources] == ["b"]


def test_those_that_load_pass_on_what_they_have():
    c, launches = serving("a", wanted=3)
    first, second = sorted(launch.instance for launch in launches)
    standby(c, first)
    (load,) = of(LoadWeights, standby(c, second))
    assert [one.instance for one in load.sources] == [first, "a"]


def test_a_shell_waits_until_it_is_woken():
    c, (launch,) = serving("a", wanted=1, standby=1)
    assert launch.shell and standby(c, launch.instance) == []
    c.handle(ScaleAsked("m", 2), 2.5)
    effects = tick(c, 3.0)
    woken = of(Launch, effects)[0]
    assert (woken.instance, woken.means) == (launch.instance, "standby")
    (load,) = of(LoadWeights, effects)
    assert (load.instance, [one.instance for one in load.sources]) == (launch.instance, ["a"])


def test_one_that_gets_no_weights_anywhere_is_stopped_and_replaced():
    c, (launch,) = serving("a", wanted=2)
    standby(c, launch.instance)
    disk = Attempt("disk", "m", 0, 0.1, "the disk is empty")
    effects = c.handle(WeightsLoaded(launch.instance, 1, (disk,), (), disk.problem), 3.0)
    assert [(one.instance, one.reason) for one in of(StopInstance, effects)] == [
        (launch.instance, "it has no weights: the disk is empty")
    ]
    (again,) = of(Launch, tick(c, 3.1))
    assert again.instance != launch.instance


def test_one_without_memory_for_its_kv_cache_waits_and_is_woken_again():
    c, (launch,) = serving("a", wanted=1, standby=1)
    standby(c, launch.instance)
    c.handle(ScaleAsked("m", 2), 2.5)
    assert of(LoadWeights, tick(c, 3.0))
    times = []
    for now in map(float, range(4, 13)):
        if c.cluster.launches[launch.instance].state is InstanceState.LOADING:
            assert c.handle(WeightsLoaded(launch.instance, 1, (), (), "the KV cache needs 9 GB"), now - 0.5) == []
        effects = tick(c, now)
        assert not of(StopInstance, effects) and all(one.shell for one in of(Launch, effects) if one.means == "disk")
        times += [now for load in of(LoadWeights, effects) if load.instance == launch.instance]
    assert times == [4.0, 7.0, 12.0], "later and later, and no other is launched in its place"


def test_a_shell_that_is_there_before_its_launcher_is_remembered():
    for shell in (True, False):
        c = fleet(0, policy="fixed@1")
        c.handle(InstanceJoined(gives("a")), 0.0)
        assert standby(c, "m-7") == []
        effects = c.handle(LauncherJoined((Launch("m-7", "m", "d2d", shell, None, (), ""),)), 3.0)
        assert [load.instance for load in of(LoadWeights, effects)] == ([] if shell else ["m-7"])
        assert c.cluster.launches["m-7"].info == gives("m-7", "")
