from pathlib import Path

import pytest

from model.config import DataConfig, Recipe, RecipeError, load_recipe


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_what_a_recipe_says_is_kept_and_the_rest_are_defaults(tmp_path: Path) -> None:
    text = (
        'name = "mine"\n[data]\nheld_out_users = 3\n[tokenizer]\ncodebook_sizes = [5, 6]\n[target]\nweight_decay = 1\n'
    )
    loaded = load_recipe(recipe(tmp_path, text))
    assert loaded.name == "mine"
    assert loaded.data == DataConfig(held_out_users=3)
    assert loaded.tokenizer.codebook_sizes == (5, 6)
    assert isinstance(loaded.target.weight_decay, float)
    assert loaded.draft == Recipe("x").draft
    assert loaded.as_dict()["data"]["held_out_users"] == 3


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("model/recipes/*.toml")), ids=lambda p: p.stem)
def test_every_recipe_we_ship_loads_and_is_named_like_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("[targets]\nepochs = 1", "'targets'"),
        ("[target]\nepoch = 1", "'epoch'"),
        ("[target]\nepochs = 1.5", "target.epochs"),
        ('[target]\nepochs = "2"', "target.epochs"),
        ("[target]\nepochs = true", "target.epochs"),
        ("[target]\nepochs = -1", "target.epochs"),
        ("[lists]\nbatch_size = 0", "lists.batch_size"),
        ("[draft]\nlearning_rate = nan", "draft.learning_rate"),
        ("[draft]\nlearning_rate = inf", "draft.learning_rate"),
        ("[tokenizer]\ncodebook_sizes = []", "tokenizer.codebook_sizes"),
        ("[tokenizer]\ncodebook_sizes = [8, 0]", "tokenizer.codebook_sizes"),
        ("[tokenizer]\ncodebook_sizes = 8", "tokenizer.codebook_sizes"),
        ("[evaluate]\nrequire_beats_baselines = 1", "evaluate.require_beats_baselines"),
        ("data = 3", "[data]"),
    ],
)
def test_an_error_names_the_field(tmp_path: Path, body: str, named: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe(tmp_path, f'name = "x"\n{body}\n'))
    assert named in str(refused.value)


@pytest.mark.parametrize("name", ['""', '"."', '".."', '"../other"', '"/etc"', '"a/b"', "3"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="'name'"):
        load_recipe(recipe(tmp_path, f"name = {name}\n"))


def test_a_missing_name_a_missing_file_and_broken_toml_are_recipe_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'name'"):
        load_recipe(recipe(tmp_path, ""))
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        load_recipe(recipe(tmp_path, "name = "))


def test_zero_means_all_where_it_says_so(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path, 'name = "x"\n[data]\nmax_users = 0\nseed = 0\n[evaluate]\nmax_cases = 0\n'))
    assert (loaded.data.max_users, loaded.data.seed, loaded.evaluate.max_cases) == (0, 0, 0)
