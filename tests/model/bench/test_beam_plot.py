from xml.etree import ElementTree

import pytest

from model.bench.beam_plot import plot


def record(plan: str, k: int, batch: int, speedup: float) -> dict[str, object]:
    return {"data": "toys & <games>", "plan": plan, "k": k, "batch": batch, "speedup": speedup}


def test_every_plan_has_a_line_in_every_batchs_panel() -> None:
    records = [record(p, k, b, 1.0 + k / 10) for p in ("plain", "planner") for k in (1, 5, 20) for b in (1, 8)]
    drawing = ElementTree.fromstring(plot([*records, {"plan": "transformers", "k": 1, "batch": 1}]))
    names = "{http://www.w3.org/2000/svg}"
    panels = drawing.findall(f"{names}g")
    assert len(panels) == 2
    for panel in panels:
        assert sum(path.get("stroke-width") == "2" for path in panel.findall(f"{names}path")) == 2
        assert len(panel.findall(f"{names}circle")) == 6
    words = [text.text for text in drawing.iter(f"{names}text")]
    assert {"toys & <games>, batch 1", "toys & <games>, batch 8", "plain", "planner", "K=20", "2x"} <= set(words)


def test_faster_is_higher() -> None:
    drawing = ElementTree.fromstring(plot([record("a", 1, 1, 1.0), record("b", 1, 1, 3.0)]))
    slow, fast = (float(c.get("cy") or "nan") for c in drawing.iter("{http://www.w3.org/2000/svg}circle"))
    assert fast < slow


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="speed-up"):
        plot([{"plan": "transformers", "k": 1, "batch": 1}])
