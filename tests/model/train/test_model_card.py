from typing import Any

from model.train.model_card import model_card


def report() -> dict[str, Any]:
    draft = {"acceptance_by_step": [0.71, 0.5], "acceptance_by_slot": [0.3, 0.9]}
    return {
        "name": "films",
        "data": "movielens",
        "recipe": {"target": {"architecture": "qwen3", "num_layers": 5, "hidden_size": 48}},
        "cases": 123,
        "held_out_users": ["7", "8", "9"],
        "quality": {"target": {"next@5": 0.25, "future@5": 0.125}, "popularity": {"next@5": 0.1, "future@5": 0.0625}},
        "draft": {"acceptance_length": 2.345, **draft},
        "draft-plain": {"acceptance_length": 1.987, **draft},
    }


def test_the_card_says_what_the_target_is_and_how_good_beside_every_baseline() -> None:
    card = model_card(report())
    assert card.startswith("# films\n")
    assert "qwen3 target of 5 layers x 48" in card
    assert "123 cases of 3 users" in card
    assert "| | next@5 | future@5 |\n|---|---|---|\n" in card
    assert "| target | 0.2500 | 0.1250 |\n| popularity | 0.1000 | 0.0625 |\n" in card


def test_the_card_reports_both_drafts() -> None:
    card = model_card(report())
    assert "- `draft`: acceptance length 2.345, accepted by step [0.71, 0.5], by slot [0.3, 0.9]" in card
    assert "- `draft-plain`: acceptance length 1.987" in card


def test_the_card_speaks_of_the_data_that_were_used() -> None:
    films, bought = model_card(report()), model_card(report() | {"data": "amazon"})
    assert "held out whole" in films
    assert "film ratings" in films
    assert "held out whole" not in bought
    assert "beauty products" in bought


def test_the_card_names_no_user() -> None:
    held_out = report() | {"held_out_users": ["user-4711"]}
    assert "4711" not in model_card(held_out)


def test_the_card_says_what_it_is_not_meant_for() -> None:
    assert "Meant for demonstration" in model_card(report())
