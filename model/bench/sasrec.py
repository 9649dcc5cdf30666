"""SASRec by RecBole on the split and the cases a recipe's target is judged by, run in RecBole's own environment:

    make peers PEERS=recbole
    .peers/recbole/bin/python -m model.bench.sasrec RECIPE --data DIR --json FILE

RecBole trains (cross entropy over all items, early stopping on the validation users' recall); ranking excludes the
history, and recall and NDCG are counted by our own `quality`, as the target's are. Knows the readers of data; nothing
of targets, drafts or semantic IDs.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import RecipeError, load_recipe, with_data
from model.data.histories import Case, History, cases
from model.data.movielens import DataError
from model.data.splits import read_split
from model.train.evaluate import quality

NAME = "cases"


def write_cases(path: Path, asked: Sequence[tuple[str, Sequence[str], str]]) -> None:
    """RecBole's atomic file of (user, history, next item), one a line."""
    lines = [f"{user}\t{' '.join(history)}\t{item}" for user, history, item in asked]
    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def prefixes(users: Sequence[History], most: int) -> list[tuple[str, Sequence[str], str]]:
    """Every item of every user behind the newest `most` of what came before it."""
    return [
        (user.user_id, user.item_ids[max(0, place - most) : place], user.item_ids[place])
        for user in users
        for place in range(1, len(user.item_ids))
    ]


def trained(folder: Path, epochs: int, most: int) -> tuple[Any, Any]:
    """RecBole's model and data set, trained on the cases in `folder`."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer
    from recbole.utils import get_model, init_seed

    settings = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "MAX_ITEM_LIST_LENGTH": most,
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "train_batch_size": 1024,
        "eval_batch_size": 1024,
        "epochs": epochs,
        "stopping_step": 4,
        "metrics": ["Recall", "NDCG"],
        "topk": [10],
        "valid_metric": "Recall@10",
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "use_gpu": False,
        "show_progress": False,
        "seed": 7,
    }
    config = Config(model="SASRec", dataset=NAME, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = get_model("SASRec")(config, train.dataset)
    best, result = Trainer(config, model).fit(train, valid, saved=False, verbose=True, show_progress=False)
    print(json.dumps({"best_valid_recall": best, **result}), flush=True)  # noqa: T201 - a command's answer
    return model.eval(), dataset


@torch.no_grad()
def ranked(model: Any, dataset: Any, asked: Sequence[Case], k: int, most: int) -> list[list[str]]:
    """The `k` items SASRec puts first for each case, without those of its history."""
    known = {str(token): number for number, token in enumerate(dataset.field2id_token["item_id"])}
    found = []
    for begin in range(0, len(asked), 256):
        chunk = asked[begin : begin + 256]
        recent = [[known[i] for i in case.history[-most:] if i in known] for case in chunk]
        length = torch.tensor([max(1, len(items)) for items in recent])
        items = torch.tensor([items + [0] * (most - len(items)) for items in recent])
        scores = model.full_sort_predict({model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: length}).view(len(chunk), -1)
        scores[:, 0] = float("-inf")
        for row, case in enumerate(chunk):
            scores[row, [known[i] for i in case.history if i in known]] = float("-inf")
        tokens = dataset.field2id_token["item_id"]
        found += [[str(tokens[number]) for number in row] for row in scores.topk(k).indices.tolist()]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2: bad recipe or data."""
    parser = argparse.ArgumentParser(prog="python -m model.bench.sasrec", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, default=None, help="where the data lies (default: what the recipe says)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    try:
        recipe = with_data(load_recipe(options.recipe), options.data)
        split = read_split(Path(recipe.data.folder), recipe.data)
    except (RecipeError, DataError, OSError) as exc:
        print(f"sasrec: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    most, asked = recipe.target.max_history_items, cases(split.test, recipe.data)
    asked = asked[: recipe.evaluate.max_cases or None]
    validated = cases(split.validation, recipe.data)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / NAME
        folder.mkdir()
        write_cases(folder / f"{NAME}.train.inter", prefixes(split.train, most))
        for part, judged in (("valid", validated), ("test", asked)):
            lines = [(case.user_id, case.history[-most:], case.future[0]) for case in judged]
            write_cases(folder / f"{NAME}.{part}.inter", lines)
        with contextlib.chdir(name):  # it leaves logs where it stands
            model, dataset = trained(Path(name), options.epochs, most)
    record = {
        "model": "SASRec (RecBole)",
        "cases": len(asked),
        **quality(asked, ranked(model, dataset, asked, options.k, most), options.k),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(record))  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
