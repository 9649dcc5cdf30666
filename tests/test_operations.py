"""The operator's page names what there is: every setting with its default, every overlay, every command."""

import re
from pathlib import Path

from pydantic import SecretStr

from service.settings import Settings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_the_settings_table_names_exactly_the_settings_and_their_defaults() -> None:
    table = PAGE.partition("## Settings")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]*?)`? \|", table, re.MULTILINE))
    assert rows == {name: shown(field.default) for name, field in Settings.model_fields.items()}


def shown(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    return ",".join(default) if isinstance(default, tuple) else str(default)


def test_every_path_it_names_exists() -> None:
    named = re.findall(r"`((?:deploy|docker|docs|tests)/[\w./-]+)`", PAGE)
    assert len(named) > 8
    missing = {path for path in named if not (ROOT / path).exists()}
    assert missing <= {"docs/resilience.md"}


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", PAGE)) <= targets


def test_its_links_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
