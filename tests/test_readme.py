import re
from pathlib import Path

from service.metrics import metric_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_metrics_table_names_exactly_the_metrics_there_are() -> None:
    assert set(re.findall(r"^\| `(padrec_\w+)` \|", README, re.MULTILINE)) == metric_names()


def test_the_tree_names_every_module() -> None:
    tree = README.partition("## The tree")[2].partition("```text")[2].partition("```")[0]
    named = re.findall(r"^ *(\w+\.py)\b", tree, re.MULTILINE)
    modules = [p.name for part in ("service", "model") for p in (ROOT / part).rglob("*.py") if p.name != "__init__.py"]
    assert sorted(named) == sorted(modules)


def test_nothing_was_left_to_fill_in() -> None:
    assert "@@" not in README


def test_every_make_target_it_mentions_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets
