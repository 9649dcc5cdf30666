from model.config import TokenizerConfig
from model.data.histories import History, Interaction, Logs
from model.tokenizer.build import build_catalog

CONFIG = TokenizerConfig(embedding_size=4, context_items=2, codebook_sizes=(3, 2), iterations=5)
ITEMS = [f"i{n}" for n in range(9)]


def build() -> tuple[Logs, list[History]]:
    """Six training users, and events of a held-out one, who alone has seen `rare`."""
    users = [History(f"u{u}", tuple(ITEMS[u : u + 4]), tuple(range(4))) for u in range(6)]
    events = [Interaction(u.user_id, i, t) for u in users for t, i in enumerate(u.item_ids)]
    events += [Interaction("held-out", "rare", 1), Interaction("held-out", "i3", 2)]
    return Logs(tuple(events), {"i0": {"genre": ["a"]}, "unseen": {"genre": ["b"], "year": 1990}}), users


def test_every_item_of_the_logs_is_in_the_catalog_once() -> None:
    catalog = build_catalog(*build(), CONFIG)
    assert [item.item_id for item in catalog.items] == sorted([*ITEMS, "rare", "unseen"])
    assert catalog.codebook_sizes[:2] == (3, 2)


def test_popularity_counts_training_users_only() -> None:
    popularity = {item.item_id: item.popularity for item in build_catalog(*build(), CONFIG).items}
    assert popularity["i3"] == 4
    assert popularity["i0"] == 1
    assert popularity["rare"] == popularity["unseen"] == 0


def test_what_held_out_users_did_leaves_no_trace_in_the_codes() -> None:
    logs, users = build()
    more = (Interaction("held-out", "i0", 3), Interaction("held-out", "i8", 4)) * 20
    told = build_catalog(Logs(logs.interactions + more, logs.attributes), users, CONFIG)
    assert told.version == build_catalog(logs, users, CONFIG).version


def test_attributes_go_with_their_items() -> None:
    attributes = {item.item_id: item.attributes for item in build_catalog(*build(), CONFIG).items}
    assert attributes["unseen"] == {"genre": ["b"], "year": 1990}
    assert attributes["i0"] == {"genre": ["a"]}
    assert attributes["i5"] == {}
