from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from model.config import ListsConfig
from model.data.histories import History
from model.train.lists import WrittenLists, training_requests, write_lists
from tests.model.conftest import Tiny

CONFIG = ListsConfig(lists_per_user=3, list_items=4, batch_size=5)


def users(tiny: Tiny) -> list[History]:
    ids = [item.item_id for item in tiny.catalog.items]
    return [History(str(u), tuple(ids[u * 7 : u * 7 + 9]), tuple(range(9))) for u in range(6)]


@pytest.fixture(scope="module")
def written(tiny: Tiny) -> WrittenLists:
    codes = {item.item_id: item.codes for item in tiny.catalog.items}
    requests = training_requests(users(tiny), codes, CONFIG, 6, 1)
    return write_lists(tiny.target, tiny.trie, tiny.catalog, requests, CONFIG, 6)


def test_requests_are_pieces_of_the_users_histories(tiny: Tiny) -> None:
    codes = {item.item_id: item.codes for item in tiny.catalog.items}
    requests = training_requests(users(tiny), codes, CONFIG, 6, 1)
    assert len({r.request_id for r in requests}) == len(requests) == 18
    for request in requests:
        user = users(tiny)[int(request.request_id.split("/")[0])]
        walked = [codes[i] for i in user.item_ids]
        start = walked.index(request.history[0])
        assert list(request.history) == walked[start : start + len(request.history)]
        assert 1 <= len(request.history) <= 6
        assert request.k == 4
    assert len({len(r.history) for r in requests}) > 2
    assert requests == training_requests(users(tiny), codes, CONFIG, 6, 1)
    assert requests != training_requests(users(tiny), codes, CONFIG, 6, 2)


def test_requests_end_behind_what_is_known_of_a_user(tiny: Tiny) -> None:
    codes = {item.item_id: item.codes for item in tiny.catalog.items}
    partly = [replace(user, known=7) for user in users(tiny)]
    for request in training_requests(partly, codes, CONFIG, 9, 1):
        assert 7 <= len(request.history) <= 9


def test_the_lists_are_those_of_the_slow_twin(tiny: Tiny, written: WrittenLists) -> None:
    codes = {item.item_id: item.codes for item in tiny.catalog.items}
    requests = training_requests(users(tiny), codes, CONFIG, 6, 1)
    for row, request in enumerate(requests):
        assert [tuple(c) for c in written.items[row].tolist()] == [i.codes for i in tiny.twin(request).items]
        assert [tuple(c) for c in written.history[row].tolist() if c[0] >= 0] == list(request.history)


def test_every_decision_prefers_the_code_that_was_written(written: WrittenLists) -> None:
    decisions = 0
    for row, decision in (written.level >= 0).nonzero().tolist():
        level, item = int(written.level[row, decision]), int(written.item[row, decision])
        log_probs = written.log_probs[row, decision].float()
        assert log_probs[written.items[row, item, level]] == log_probs.max()
        decisions += 1
    assert decisions > 4 * len(written.items)


def test_a_decision_has_a_choice_or_is_certain_and_its_probabilities_sum_to_one(written: WrittenLists) -> None:
    for row, decision in (written.level >= 0).nonzero().tolist():
        log_probs = written.log_probs[row, decision].float()
        legal = log_probs[log_probs > float("-inf")]
        assert len(legal) >= 2 or legal.tolist() == [0.0]
        assert legal.exp().sum().item() == pytest.approx(1.0, abs=2e-3)


def test_legal_codes_are_those_that_lead_to_an_item_not_yet_written_or_watched(
    tiny: Tiny, written: WrittenLists
) -> None:
    for row, decision in (written.level >= 0).nonzero().tolist():
        level, item = int(written.level[row, decision]), int(written.item[row, decision])
        past = [tuple(c) for c in written.history[row].tolist() + written.items[row, :item].tolist()]
        prefix = tuple(written.items[row, item, :level].tolist())
        free = {c[level] for c in tiny.codes if c[:level] == prefix and c not in past}
        log_probs = written.log_probs[row, decision]
        assert set((log_probs > float("-inf")).nonzero().flatten().tolist()) == free


def test_decisions_go_through_a_list_in_order_and_forced_tokens_are_none(tiny: Tiny, written: WrittenLists) -> None:
    for row in range(len(written.items)):
        made = written.level[row] >= 0
        assert made.tolist() == sorted(made.tolist(), reverse=True)
        at = (written.item[row] * 10 + written.level[row])[made].tolist()
        assert at == sorted(set(at))
        expected = {
            item * 10 + level
            for item, codes in enumerate(written.items[row].tolist())
            for level in range(4)
            if level == 0 or len({c[level] for c in tiny.codes if c[:level] == tuple(codes[:level])}) > 1
        }
        assert set(at) == expected


def test_lists_survive_the_disk(written: WrittenLists, tmp_path: Path) -> None:
    written.save(tmp_path / "lists.safetensors")
    loaded = WrittenLists.load(tmp_path / "lists.safetensors")
    for name in (f.name for f in fields(WrittenLists)):
        assert torch.equal(getattr(loaded, name), getattr(written, name)), name
        assert getattr(loaded, name).dtype == getattr(written, name).dtype
