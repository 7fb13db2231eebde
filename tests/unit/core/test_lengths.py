from dataclasses import replace
from random import Random

import msgspec
import pytest

from hyperflexis.core.lengths import MAX_MEANS, MEMORY, PRIOR, PULL, LengthModel
from hyperflexis.core.request import Request
from hyperflexis.core.slo import Slo


def request(prompt: int = 500, tenant: str = "t", slo_class: str = "chat", **changes) -> Request:
    made = Request("r", "m", tenant, slo_class, Slo(), 1.0, prompt, 10_000)
    return replace(made, **changes)


def taught(*lessons: tuple[Request, int], times: int = 1) -> LengthModel:
    model = LengthModel()
    for _ in range(times):
        for asked, tokens in lessons:
            model.learn(asked, tokens)
    return model


def test_a_class_of_which_nothing_is_known_has_the_prior_and_the_first_answer_replaces_it():
    model = LengthModel()
    assert model.predict(request()) == PRIOR
    model.learn(request(), 40)
    assert model.predict(request()) == 40.0
    assert model.predict(request(prompt=9, tenant="another")) == 40.0
    assert model.predict(request(slo_class="code")) == PRIOR
    assert model.predict(request(model="another")) == PRIOR


def test_an_expectation_is_within_the_clients_limit():
    assert LengthModel().predict(request(max_output_tokens=7)) == 7.0
    assert taught((request(), 0)).predict(request()) == 1.0


def test_prompts_of_other_lengths_in_one_class_are_told_apart():
    model = taught((request(300), 90), (request(900), 400), (request(3000), 60), times=50)
    assert model.predict(request(300)) == pytest.approx(90, rel=0.15)
    assert model.predict(request(900)) == pytest.approx(400, rel=0.15)
    assert model.predict(request(3000)) == pytest.approx(60, rel=0.25)
    assert model.predict(request(20)) == pytest.approx((90 + 400 + 60) / 3, rel=0.05), "never seen: the class's mean"


def test_one_odd_answer_moves_its_kind_by_little():
    model = taught((request(300), 90), times=100)
    before = model.predict(request(5000))
    model.learn(request(5000), 1000)
    of_class = (99 * before + 1000) / 100
    coarse = (1000 + PULL * of_class) / (1 + PULL)
    fine = (1000 + PULL * coarse) / (1 + PULL)
    assert model.predict(request(5000)) == pytest.approx(fine)
    assert before < fine < 450


def test_tenants_that_differ_are_told_apart_and_a_new_one_is_of_the_class():
    model = taught((request(tenant="short"), 20), (request(tenant="long"), 800), times=60)
    assert model.predict(request(tenant="short")) == pytest.approx(20, rel=0.3)
    assert model.predict(request(tenant="long")) == pytest.approx(800, rel=0.05)
    assert model.predict(request(tenant="new")) == pytest.approx(410, rel=0.05)


def test_tenants_that_do_not_differ_share_what_is_known_of_prompts():
    random = Random(7)
    model = LengthModel()
    for n in range(1500):
        prompt, tokens = random.choice(((100, 40), (1000, 700)))
        model.learn(request(prompt, tenant=f"t{n % 150}"), round(tokens * random.uniform(0.5, 1.5)))
    # Ten requests of its own, of both sizes: too few for its own ladder.
    errors = [abs(model.predict(request(100, tenant=f"t{n}")) - 40) for n in range(150)]
    assert sum(errors) / 150 < 20


def test_what_changes_is_followed():
    model = taught((request(), 100), times=300)
    for _ in range(round(2 * MEMORY)):
        model.learn(request(), 500)
    assert model.predict(request()) > 100 + 0.8 * 400


def test_memory_is_bounded_and_what_is_asked_for_most_stays():
    model = LengthModel()
    for n in range(3000):
        model.learn(request(1 + n * 37 % 9001, tenant=f"t{n}"), 100)
        model.learn(request(777, tenant="steady"), 300)
    assert len(model.means) == MAX_MEANS
    assert model.predict(request(777, tenant="steady")) == pytest.approx(300, rel=0.05)


def test_a_copy_from_the_wire_goes_on_the_same():
    random = Random(5)
    model = LengthModel()
    asked = [request(random.randint(1, 9000), f"t{random.randrange(9)}") for _ in range(400)]
    lessons = [(one, random.randint(0, 900)) for one in asked]
    for one, tokens in lessons:
        model.learn(one, tokens)
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(model), type=LengthModel)
    for one, tokens in lessons:
        assert copy.predict(one) == model.predict(one)
        copy.learn(one, tokens)
        model.learn(one, tokens)
    assert list(copy.means) == list(model.means), "the same are forgotten first"
