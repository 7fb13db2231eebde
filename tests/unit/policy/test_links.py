"""Who is linked with whom."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from tests.unit.test_controller import info

from hyperflexis.core.cluster import TrackedInstance
from hyperflexis.core.links import Links
from hyperflexis.policy.links import MAX_LINKS, distance, plan_links


def instance(number: int, share: float = 0.5, **labels: str) -> TrackedInstance:
    made = info(f"i{number}", kv_address=f"unix:kv{number}", labels=labels)
    return TrackedInstance(made, made.latency, prefill_share=share)


def join(links: Links, newcomer: TrackedInstance, others: list[TrackedInstance]) -> None:
    new, given_up = plan_links(newcomer, others, links)
    for pair in given_up:
        links.drop(*pair)
    for pair in new:
        links.plan(*pair)


def joined(instances: list[TrackedInstance]) -> Links:
    links = Links()
    for number, one in enumerate(instances):
        join(links, one, instances[:number])
    return links


def test_labels_say_how_near_two_instances_are():
    here = instance(0, host="a", rack="r", zone="z")
    assert distance(here, instance(1, host="a", rack="r", zone="z")) == 0
    assert distance(here, instance(1, host="b", rack="r", zone="z")) == 1
    assert distance(here, instance(1, host="b", rack="s", zone="z")) == 2
    assert distance(here, instance(1, zone="y")) == 3
    assert distance(instance(0), instance(1)) == 3


def test_a_small_fleet_is_linked_all_with_all_whatever_the_roles():
    instances = [instance(n, share) for n, share in enumerate((1.0, 1.0, 0.5, 0.0))]
    links = joined(instances)
    for one in instances:
        assert set(links.table[one.id]) == {other.id for other in instances} - {one.id}


def test_where_links_are_few_a_target_has_the_nearest_that_compute_prompts():
    near = [instance(n, 1.0, host="a") for n in range(4)]
    decode = [instance(10 + n, 0.0, host="a") for n in range(3)]
    far = [instance(20 + n, 1.0, host="b") for n in range(MAX_LINKS)]
    target = instance(99, 0.0, host="a")
    links = joined([*decode, *far, *near, target])
    sources = links.table[target.id]
    assert {one.id for one in near} <= set(sources)
    assert not {one.id for one in decode} & set(sources), "those that decode have nothing to give"
    assert len(sources) == MAX_LINKS


def test_a_nearer_newcomer_takes_the_place_of_a_farther_source():
    far = [instance(n, 1.0, host="b") for n in range(MAX_LINKS)]
    target = instance(50, 0.0, host="a")
    links = joined([*far, target])
    newcomer = instance(60, 1.0, host="a")
    join(links, newcomer, [*far, target])
    assert links.is_planned(newcomer.id, target.id) and len(links.table[target.id]) == MAX_LINKS


def test_in_a_large_fleet_a_newcomer_is_a_source_too():
    others = [instance(n, 0.5) for n in range(3 * MAX_LINKS)]
    newcomer = instance(99, 1.0)
    links = joined([*others, newcomer])
    assert len(links.targets[newcomer.id]) >= MAX_LINKS // 2


@example([(0.0, "a", False)] * 18 + [(0.0, "b", True), (1.0, "a", True), (0.5, "a", True)])
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("abc"), st.booleans()), min_size=1, max_size=60
    )
)
def test_nobody_has_more_links_than_allowed_and_every_target_has_as_many_as_there_are(
    fleet: list[tuple[float, str, bool]],
) -> None:
    links, there = Links(), list[TrackedInstance]()
    for number, (share, host, leaves) in enumerate(fleet):
        newcomer = instance(number, share, host=host)
        join(links, newcomer, there)
        there.append(newcomer)
        if leaves and len(there) > 1:
            gone = there.pop(0)
            links.forget(gone.id)
            targets = links.take_orphans()
            assert not links.take_orphans()
            for one in [one for one in there if one.id in targets]:
                join(links, one, [other for other in there if other is not one])
        ids = {one.id for one in there}
        assert set(links.table) <= ids
        assert {pair for pair in links.unheard} == {(t, s) for t, sources in links.table.items() for s in sources}
        for one in there:
            sources = links.table.get(one.id, {})
            assert set(sources) <= ids - {one.id}
            assert len(sources) <= MAX_LINKS and len(links.targets.get(one.id, [])) <= MAX_LINKS
            assert sorted(links.targets.get(one.id, [])) == sorted(t for t, of in links.table.items() if one.id in of)
        if len(there) <= MAX_LINKS:
            assert all(set(links.table.get(one.id, {})) == ids - {one.id} for one in there)
