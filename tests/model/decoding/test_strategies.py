import random

import pytest

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import DRAFT_FREE
from model.decoding.beam_request import BeamRequest, BeamStats
from model.decoding.beam_twin import BeamTwin
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import InvalidRequest, ListRequest
from model.decoding.strategies import Asked, Strategies
from model.decoding.topology import Budget, FixedBudget
from tests.model.conftest import Tiny


def both(tiny: Tiny, num_rows: int = 4) -> Strategies:
    limits = {"num_rows": num_rows, "max_history_items": 6, "max_k": 20}
    lists = ListDecoder(tiny.target, tiny.draft(), tiny.trie, tiny.catalog, budget=FixedBudget(Budget(3)), **limits)
    return Strategies(lists, BeamDecoder(tiny.target, tiny.trie, tiny.catalog, plan=DRAFT_FREE, **limits))


def mixed(tiny: Tiny, count: int) -> list[Asked]:
    kinds = [ListRequest, BeamRequest]
    return [kinds[i % 2](str(i), tuple(tiny.codes[i : i + 3]), 1 + i % 9) for i in range(count)]


def right(tiny: Tiny, request: Asked) -> list[tuple[int, ...]]:
    if isinstance(request, ListRequest):
        return [item.codes for item in tiny.twin(request).items]
    return [item.codes for item in BeamTwin(tiny.target, tiny.codes, 6).decode(request).items]


def test_both_strategies_get_their_own_answers_in_any_mixture(tiny: Tiny) -> None:
    requests, decoder, rng = mixed(tiny, 20), both(tiny), random.Random(1)
    waiting, results, gone = list(requests), {}, set()
    while len(results) + len(gone) < len(requests):
        joining = waiting[: rng.randrange(decoder.rows.num_free + 1)]
        waiting = waiting[len(joining) :]
        results |= {r.request_id: r for r in decoder.admit(joining)}
        assert len(decoder.rows.in_use) + decoder.rows.num_free == 4 == len(decoder.rows.held)
        if len(gone) < 2 and (held := [r for r in joining if r.request_id not in results]):
            gone.add(held[0].request_id)
            assert decoder.cancel(held[0].request_id)
        if decoder.rows.in_use:
            results |= {r.request_id: r for r in decoder.round()[0]}
    decoder.rows.check_integrity()
    assert len(gone) == 2
    for request in requests:
        if request.request_id not in gone:
            assert [i.codes for i in results[request.request_id].items] == right(tiny, request)


def test_rounds_are_taken_in_turn(tiny: Tiny) -> None:
    decoder = both(tiny)
    decoder.admit([ListRequest("list", (tiny.codes[0],), 20), BeamRequest("beam", (tiny.codes[1],), 20)])
    assert [isinstance(decoder.round()[1], BeamStats) for _ in range(2)] in ([True, False], [False, True])


def test_every_row_can_be_freed_by_its_number(tiny: Tiny) -> None:
    decoder = both(tiny)
    decoder.admit(mixed(tiny, 4))
    for index in decoder.rows.in_use:
        decoder.rows.free(index)
    assert decoder.rows.num_free == 4
    decoder.rows.check_integrity()


@pytest.mark.parametrize("kind", [ListRequest, BeamRequest])
def test_each_request_is_checked_by_its_own_decoder(tiny: Tiny, kind: type[ListRequest] | type[BeamRequest]) -> None:
    with pytest.raises(InvalidRequest, match="/k"):
        both(tiny).validate(kind("bad", (tiny.codes[0],), 21))
    both(tiny).validate(kind("good", (tiny.codes[0],), 20))
