import pytest

from model.decoding.list_decoder import ListDecoder
from model.decoding.profile import Profile, caterpillar, measured_profile
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from tests.model.conftest import Tiny


def decoder(tiny: Tiny, draft: Draft) -> ListDecoder:
    return ListDecoder(
        tiny.target,
        draft,
        tiny.trie,
        tiny.catalog,
        num_rows=4,
        max_history_items=6,
        max_k=10,
        budget=FixedBudget(Budget(3)),
    )


def requests(tiny: Tiny) -> list[ListRequest]:
    return [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(12)]


def test_a_caterpillar_is_a_chain_of_first_guesses_with_the_others_beside_it() -> None:
    assert caterpillar(2, 3, 1).trees == ((((0, 0), (0, 1), (0, 2)), ((0, 0), (0, 1), (0, 2))),)


def test_a_measured_profile_says_how_often_each_rank_was_right(tiny: Tiny) -> None:
    running = decoder(tiny, tiny.draft())
    before = running.budget
    profile = measured_profile(running, requests(tiny), 3, 4)
    assert running.budget is before
    assert running.rows.num_free == 4
    assert sum(profile.begins) == pytest.approx(1.0)
    for steps in profile.acceptance:
        assert len(steps) == 3
        for ranks in steps:
            assert list(ranks) == sorted(ranks, reverse=True)
            assert sum(ranks) <= 4
    assert sum(ranks[0] for steps in profile.acceptance for ranks in steps) > 0


def test_the_first_guesses_of_an_adversarial_draft_are_seldom_right(tiny: Tiny) -> None:
    worse, better = (
        measured_profile(decoder(tiny, tiny.draft(adversarial=adversarial)), requests(tiny), 3, 2)
        for adversarial in (True, False)
    )

    def first(profile: Profile) -> float:
        return sum(share * steps[0][0] for share, steps in zip(profile.begins, profile.acceptance, strict=True))

    assert first(worse) < first(better)


def test_a_profile_survives_being_written_down(tiny: Tiny) -> None:
    profile = Profile((((0.5, 0.25), (0.75, 0.0)),) * 4, (0.25,) * 4)
    assert Profile.from_dict(profile.as_dict(), 4) == profile


@pytest.mark.parametrize(
    "values", [None, {}, {"acceptance": [], "begins": []}, {"acceptance": [[[2.0]]] * 4, "begins": [0.25] * 4}]
)
def test_what_is_no_profile_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="profile"):
        Profile.from_dict(values, 4)
