"""`padrec train RECIPE`: the stages of one training run, in order, each in its own folder under runs/<name>/.

A stage whose folder holds `done.json` is not run again; a stage that was interrupted resumes. Stages talk through
these folders only: tokenizer -> target -> rankings -> finetune -> lists -> draft, draft-plain -> evaluate -> bundle.
`--ablation` trains the drafts that `padrec bench ablation` compares on the same lists, each in ablation/<draft>/.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.bundle import save_manifest
from model.catalog import Catalog
from model.config import DraftConfig, Recipe, RecipeError, load_recipe, with_data
from model.data import amazon
from model.data.histories import Case, History, cases, last_cases
from model.data.movielens import DataError, read_movielens
from model.data.splits import read_split
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.profile import PROFILE_RANKS, Profile, measured_profile
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.item_trie import ItemTrie
from model.semantic_id import Codes, Vocabulary
from model.target import Target
from model.tokenizer.build import build_catalog
from model.train.baselines import baselines
from model.train.draft import DraftBatch, draft_batches, draft_loss, train_draft
from model.train.evaluate import quality
from model.train.item_at_once import item_loss
from model.train.lists import WrittenLists, training_requests, write_lists
from model.train.model_card import model_card
from model.train.ranking import finetune, most_likely_items, sampled_histories, write_rankings
from model.train.target import train_target
from model.train.variants import SERVED, VARIANTS, feature_layers, new_draft

console = Console(stderr=True)

# Stage -> the recipe sections it adds to those of the stages before it.
STAGES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("data", "tokenizer"),
    "target": ("target",),
    "rankings": ("finetune",),
    "finetune": (),
    "lists": ("lists",),
    "draft": ("draft",),
    "draft-plain": (),
    "evaluate": ("evaluate",),
}


ABLATION = "ablation"
_SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Recipe) if f.name != "name"}
GATES = ("require_beats_baselines", "min_acceptance_length")


def sections_of(stage: str) -> list[str]:
    """Every recipe section that bears on a stage's result."""
    if stage.startswith(f"{ABLATION}/"):
        return [*sections_of("draft"), "ablation"]
    names = list(STAGES)
    return [section for name in names[: names.index(stage) + 1] for section in STAGES[name]]


def same_recipe(begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a stage that was begun with some values would be the same with those of now. A field that came later had
    its default's effect; where the data lies has none."""
    before = {
        section: dataclasses.asdict(_SECTIONS[section]()) | values
        for section, values in begun.items()
        if section in _SECTIONS
    }
    before, after = (json.loads(json.dumps(sections)) for sections in (before, now))
    for sections in (before, after):
        sections.get("data", {}).pop("folder", None)
        for gate in GATES:
            sections.get("evaluate", {}).pop(gate, None)
    return bool(before == after)


class GateError(Exception):
    """The trained bundle is not good enough to be written; the message says which gate failed."""


class Run:
    """One training run and its folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder, self.data = recipe, folder, Path(recipe.data.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.split = read_split(self.data, recipe.data)

    def stage(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage unless it is done; returns what it reported. Raises RecipeError when it was done with other
        values than the recipe has now: its results would be passed off as this recipe's."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True, parents=True)
        begun, done = folder / "recipe.json", folder / "done.json"
        sections = {s: self.recipe.as_dict()[s] for s in sections_of(name)}
        for gate in GATES:  # they judge a result, they do not change it
            sections.get("evaluate", {}).pop(gate, None)
        used = json.loads(json.dumps(sections))
        if begun.exists() and not same_recipe(json.loads(begun.read_text()), used):
            raise RecipeError(f"stage {name!r} was begun with another recipe; remove {folder} and what came after it")
        if not begun.exists():
            begun.write_text(json.dumps(used, indent=1))
        if not done.exists():
            console.print(f"[bold]{name}")
            started = time.monotonic()
            report = work(folder)
            report["seconds"] = round(time.monotonic() - started, 1)
            done.write_text(json.dumps(report, indent=1))
        result: dict[str, Any] = json.loads(done.read_text())
        return result

    def all_stages(self, bundle: Path) -> None:
        """Everything, in order. Raises GateError when the result should not be served."""
        self.target_stages()
        for name in SERVED:
            self.stage(name, lambda folder, name=name: self.run_draft(folder, name))  # type: ignore[misc]
        report = self.stage("evaluate", self.run_evaluate)
        check_gates(self.recipe, report)
        self.write_bundle(bundle, report)

    def target_stages(self) -> None:
        """All that comes before the drafts."""
        self.stage("tokenizer", self.run_tokenizer)
        self.stage("target", self.run_target)
        self.stage("rankings", self.run_rankings)
        self.stage("finetune", self.run_finetune)
        self.stage("lists", self.run_lists)

    def ablation(self) -> None:
        """Everything up to the lists, then every draft that is compared."""
        self.target_stages()
        for name in VARIANTS:
            self.stage(f"{ABLATION}/{name}", lambda folder, name=name: self.run_compared(folder, name))  # type: ignore[misc]

    # ---- the data ---------------------------------------------------------------------------------------------

    @property
    def cases(self) -> list[Case]:
        """What the quality of the target is measured on: `evaluate.max_cases` cases of the test users."""
        return self._some(cases(self.split.test, self.recipe.data))

    @property
    def last_cases(self) -> list[Case]:
        """One case per test user: what drafts are measured on."""
        return self._some(last_cases(self.split.test, self.recipe.data))

    def _some(self, found: list[Case]) -> list[Case]:
        return found[: self.recipe.evaluate.max_cases or None]

    # ---- what the stages left behind --------------------------------------------------------------------------

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog.load(self.folder / "tokenizer" / "catalog.jsonl")

    @cached_property
    def codes(self) -> dict[str, Codes]:
        return {item.item_id: item.codes for item in self.catalog.items}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.compact(self.catalog.codebook_sizes)

    @cached_property
    def trie(self) -> ItemTrie:
        return ItemTrie(np.array([item.codes for item in self.catalog.items]), self.vocabulary)

    def checkpoint(self, stage: str) -> PreTrainedModel:
        folder = self.folder / stage / "checkpoint"
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()  # type: ignore[no-untyped-call]
        return model

    @cached_property
    def model(self) -> PreTrainedModel:
        model = self.checkpoint("finetune")
        model.requires_grad_(False)
        return model

    @cached_property
    def target(self) -> Target:
        return Target(self.model, self.vocabulary)

    # ---- stages -----------------------------------------------------------------------------------------------

    def run_tokenizer(self, folder: Path) -> dict[str, Any]:
        if amazon.is_amazon(self.data):
            catalog = amazon.read_catalog(self.data, self.split)
        else:
            catalog = build_catalog(read_movielens(self.data), self.split.train, self.recipe.tokenizer)
        catalog.save(folder / "catalog.jsonl")
        return {"items": len(catalog.items), "codebook_sizes": list(catalog.codebook_sizes)}

    def run_target(self, folder: Path) -> dict[str, Any]:
        model, result = train_target(self.split, self.codes, self.vocabulary, self.recipe.target, folder)
        model.save_pretrained(folder / "checkpoint")
        return {"validation": result.validation, "best_epoch": result.best_epoch}

    def run_rankings(self, folder: Path) -> dict[str, Any]:
        config, target = self.recipe.finetune, Target(self.checkpoint("target"), self.vocabulary)
        counts = {}
        for name, users in (("train", self.split.train), ("validation", self.split.validation)):
            histories = sampled_histories(
                some_users(users, config.max_users),
                self.codes,
                config.lists_per_user,
                self.recipe.target.max_history_items,
                config.item_dropout,
                config.seed,
            )
            with ticking(f"rankings {name}", len(histories)) as tick:
                rankings = write_rankings(target, self.trie, histories, config, tick)
            rankings.save(folder / f"{name}.safetensors")
            counts[name] = len(rankings.scores)
        return counts

    def run_finetune(self, folder: Path) -> dict[str, Any]:
        model = self.checkpoint("target")
        result = finetune(
            model, folder, self.folder / "rankings", self.vocabulary, self.recipe.finetune, self.recipe.target
        )
        model.save_pretrained(folder / "checkpoint")
        return {"validation": result.validation, "best_epoch": result.best_epoch}

    def run_lists(self, folder: Path) -> dict[str, Any]:
        recipe = self.recipe
        counts = {}
        for name, users in (("train", self.split.train), ("validation", self.split.validation)):
            chosen = some_users(users, recipe.lists.max_users)
            requests = training_requests(chosen, self.codes, recipe.lists, recipe.target.max_history_items, 7)
            limit = recipe.target.max_history_items
            with ticking(f"lists {name}", len(requests)) as tick:
                lists = write_lists(self.target, self.trie, self.catalog, requests, recipe.lists, limit, tick)
            lists.save(folder / f"{name}.safetensors")
            counts[name] = len(lists.items)
        return counts

    @cached_property
    def draft_data(self) -> tuple[list[DraftBatch], list[DraftBatch]]:
        """What drafts are trained and validated on: the target's lists and features."""
        layers, size = feature_layers(self.target.num_layers), self.recipe.draft.batch_size
        lists = (WrittenLists.load(self.folder / "lists" / f"{part}.safetensors") for part in ("train", "validation"))
        train, validation = (draft_batches(part, self.model, self.vocabulary, layers, size) for part in lists)
        return train, validation

    def run_draft(self, folder: Path, name: str) -> dict[str, Any]:
        return self._taken_over(folder, f"{ABLATION}/{name}") or self._train_draft(folder, name, self.recipe.draft)

    def run_compared(self, folder: Path, name: str) -> dict[str, Any]:
        config = replace(self.recipe.draft, epochs=self.recipe.ablation.epochs)
        return self._taken_over(folder, name) or self._train_draft(folder, name, config)

    def _taken_over(self, folder: Path, stage: str) -> dict[str, Any] | None:
        """The report of a stage that has trained the same draft with the same budget, and its network put into
        `folder`: what is served and what is compared need not be trained twice. None: there is no such stage."""
        begun, done = (self.folder / stage / f"{name}.json" for name in ("recipe", "done"))
        if self.recipe.ablation.epochs != self.recipe.draft.epochs or not done.exists():
            return None
        sections = sections_of("draft")
        before, now = json.loads(begun.read_text()), self.recipe.as_dict()
        if not same_recipe({s: before[s] for s in sections}, {s: now[s] for s in sections}):
            return None
        shutil.copytree(self.folder / stage / "network", folder / "network", dirs_exist_ok=True)
        report: dict[str, Any] = json.loads(done.read_text())
        return report

    def _train_draft(self, folder: Path, name: str, config: DraftConfig) -> dict[str, Any]:
        variant, target = VARIANTS[name], self.target
        network = new_draft(config, self.vocabulary, target.hidden_size, target.num_layers, variant)
        of_batch = item_loss if variant.whole_items else draft_loss
        unrolled = config if variant.unrolled else replace(config, steps=1)

        def loss(batch: DraftBatch) -> torch.Tensor:
            return of_batch(network, target.embedding, target.head.weight, target.head_columns, batch, unrolled)

        train, validation = self.draft_data
        result = train_draft(network, loss, train, validation, config, folder, name)
        network.save(folder / "network")
        return {"validation": result.validation, "best_epoch": result.best_epoch}

    def run_evaluate(self, folder: Path) -> dict[str, Any]:
        recipe, k = self.recipe, self.recipe.evaluate.list_items
        asked = self.cases
        item_of = {codes: item for item, codes in self.codes.items()}
        decoded = self._decode("draft", asked, batch=32, steps=0)
        lists = [[item_of[i.codes] for i in decoded.results[str(n)].items] for n in range(len(asked))]
        rows = {
            "target": quality(asked, self._most_likely(asked, k), k),
            "target-list": quality(asked, lists, k),
        }
        item_ids = [item.item_id for item in self.catalog.items]
        for name, recommend in baselines(self.split.train, item_ids, k).items():
            rows[name] = quality(asked, [recommend(case.history) for case in asked], k)
        report: dict[str, Any] = {
            "cases": len(asked),
            "quality": rows,
            "held_out_users": [user.user_id for user in self.split.test],
        }
        for name in SERVED:
            measured = self._decode(name, self.last_cases, batch=1, steps=recipe.draft.steps)
            report[name] = {
                "acceptance_length": round(measured.acceptance_length, 3),
                "profile": self._profile(name).as_dict(),
                "acceptance_by_step": measured.acceptance_by_step(),
                "acceptance_by_slot": measured.acceptance_by_slot(),
            }
        return report

    def _most_likely(self, asked: Sequence[Case], k: int) -> list[list[str]]:
        """The target's k most likely next items of each case, by beam search: how well the target ranks, apart from
        how well its greedy lists follow that ranking."""
        item_of = {codes: item for item, codes in self.codes.items()}
        ranked: list[list[str]] = []
        width = 6 * k  # room for items of the history that the prompt no longer holds
        for begin in range(0, len(asked), 32):
            chunk = asked[begin : begin + 32]
            recent = [[self.codes[i] for i in c.history[-self.recipe.target.max_history_items :]] for c in chunk]
            found = most_likely_items(self.target, self.trie, recent, width, width)
            for case, best in zip(chunk, found, strict=True):
                seen = set(case.history)
                ranked.append([item for codes, _ in best if (item := item_of[codes]) not in seen][:k])
        return ranked

    def _decode(self, draft: str, asked: Sequence[Case], batch: int, steps: int) -> Decoded:
        return decode_all(self._decoder(draft, batch, steps), self._requests(asked))

    def _profile(self, draft: str) -> Profile:
        """Of a draft, on the validation users."""
        steps, asked = self.recipe.draft.steps, cases(self.split.validation, self.recipe.data)
        return measured_profile(self._decoder(draft, 8, steps), self._requests(asked), steps, PROFILE_RANKS)

    def _requests(self, asked: Sequence[Case]) -> list[ListRequest]:
        k = self.recipe.evaluate.list_items
        return [ListRequest(str(n), tuple(self.codes[i] for i in case.history), k) for n, case in enumerate(asked)]

    def _decoder(self, draft: str, batch: int, steps: int) -> ListDecoder:
        network = DraftNetwork.load(self.folder / draft / "network")
        return ListDecoder(
            self.target,
            Draft(network, self.target.embedding, self.vocabulary),
            self.trie,
            self.catalog,
            num_rows=batch,
            max_history_items=self.recipe.target.max_history_items,
            max_k=self.recipe.evaluate.list_items,
            budget=FixedBudget(Budget(steps)),
        )

    def write_bundle(self, bundle: Path, report: dict[str, Any]) -> None:
        """Put what serving needs into one folder, replacing what was there."""
        building = bundle.with_name(bundle.name + ".tmp")
        shutil.rmtree(building, ignore_errors=True)
        shutil.copytree(self.folder / "finetune" / "checkpoint", building / "target")
        (building / "target" / "generation_config.json").unlink(missing_ok=True)
        for name in SERVED:
            shutil.copytree(self.folder / name / "network", building / name)
        shutil.copy(self.folder / "tokenizer" / "catalog.jsonl", building / "catalog.jsonl")
        seconds = {s: json.loads((self.folder / s / "done.json").read_text())["seconds"] for s in STAGES}
        kind = "amazon" if amazon.is_amazon(self.data) else "movielens"
        full = {
            "name": self.recipe.name,
            "data": kind,
            "recipe": self.recipe.as_dict(),
            "stage_seconds": seconds,
        } | report
        (building / "report.json").write_text(json.dumps(full, indent=1) + "\n")
        (building / "README.md").write_text(model_card(full))
        save_manifest(building, self.recipe.name, self.vocabulary, self.recipe.target.max_history_items)
        shutil.rmtree(bundle, ignore_errors=True)
        building.rename(bundle)
        console.print(f"[bold]bundle[/] written to {bundle}")


def some_users(users: Sequence[History], limit: int) -> Sequence[History]:
    """At most `limit` of the users (0: all), spread over them."""
    if not limit or len(users) <= limit:
        return users
    return [users[n * len(users) // limit] for n in range(limit)]


@contextmanager
def ticking(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar with the time left; the call given moves it on by one."""
    with Progress(console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def check_gates(recipe: Recipe, report: dict[str, Any]) -> None:
    """Raises GateError when in any column the target's ranking does not beat every baseline, the lists it writes are
    worse than one, or the draft accepts too little."""
    gates, rows = recipe.evaluate, report["quality"]
    if gates.require_beats_baselines:
        for name in rows.keys() - {"target", "target-list"}:
            for metric, value in rows[name].items():
                if rows["target"][metric] <= value:
                    raise GateError(f"quality gate: {name} is at least as good as the target's ranking in {metric}")
                if rows["target-list"][metric] < value:
                    raise GateError(f"quality gate: {name} is better than the target's lists in {metric}")
    if report["draft"]["acceptance_length"] < gates.min_acceptance_length:
        raise GateError(f"draft gate: acceptance length {report['draft']['acceptance_length']} is too low")


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec train RECIPE`. Exit code 2: bad recipe or data; 3: a gate failed, no bundle written."""
    parser = argparse.ArgumentParser(prog="padrec train", description="Train a bundle from a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where stages keep their results")
    parser.add_argument("--bundles", type=Path, default=Path("model/bundles"), help="where the bundle is written")
    parser.add_argument("--data", type=Path, default=None, help="where the data lies (default: what the recipe says)")
    parser.add_argument("--ablation", action="store_true", help="train the drafts that are compared, and no bundle")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        recipe = with_data(load_recipe(options.recipe), options.data)
        run = Run(recipe, options.runs / recipe.name)
        if options.ablation:
            run.ablation()
        else:
            options.bundles.mkdir(parents=True, exist_ok=True)
            run.all_stages(options.bundles / recipe.name)
    except (RecipeError, DataError, ValueError) as exc:
        print(f"padrec train: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    except GateError as exc:
        print(f"padrec train: {exc}", file=sys.stderr)  # noqa: T201
        return 3
    return 0
