"""The model card of a bundle, written from its report. Knows the report's keys and nothing else."""

from typing import Any

# Kind of data -> who was tested, and what the data are.
ABOUT = {
    "movielens": (
        "users held out whole (`next`: the next item; `future`: the next ten)",
        "a small public data set of film ratings from 1997-98, with its audience's tastes and gaps. Titles and ratings "
        "are not part of this bundle.",
    ),
    "amazon": (
        "users, what they bought before a point in time given (`next`: the next item; `future`: all that followed)",
        "public reviews of beauty products, with their audience's tastes and gaps; only users and products with at "
        "least five reviews. Reviews and product names are not part of this bundle.",
    ),
}


def model_card(report: dict[str, Any]) -> str:
    """Markdown: what it is, how it was made, how good it is, what it must not be used for."""
    shape, (tested, data) = report["recipe"]["target"], ABOUT[report["data"]]
    rows = report["quality"]
    metrics = list(rows["target"])
    table = ["| | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(f"{row[m]:.4f}" for m in metrics) + " |" for name, row in rows.items()]
    drafts = [
        f"- `{name}`: acceptance length {report[name]['acceptance_length']}, accepted by step "
        f"{report[name]['acceptance_by_step']}, by slot {report[name]['acceptance_by_slot']}"
        for name in ("draft", "draft-plain")
    ]
    return "\n".join(
        [
            f"# {report['name']}",
            "",
            f"A {shape['architecture']} target of {shape['num_layers']} layers x {shape['hidden_size']}, trained from "
            "nothing on time-ordered histories, with a PAD-Rec draft and the same draft without PAD-Rec's embeddings.",
            "",
            f"Quality on {report['cases']} cases of {len(report['held_out_users'])} {tested}. "
            "`target` are its ten most likely next items by beam search, `target-list` the lists it writes greedily, "
            "which are what is served:",
            "",
            *table,
            "",
            "Drafts, greedy chain at batch 1 on the held-out users:",
            "",
            *drafts,
            "",
            f"Meant for demonstration, tests and benchmarks: {data}",
            "",
        ]
    )
