"""Nothing that runs data as code, or fetches code, is used anywhere in the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "yaml"}
MODULES |= {"multiprocessing"}  # pickles what it sends
NAMES = {"ProcessPoolExecutor"}  # so does this
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "yaml.load", "os.system", "os.popen"}
OPTIONS = {"allow_pickle", "trust_remote_code", "shell", "weights_only"}


def banned(source: str) -> list[str]:
    """What `source` uses of all that, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = ast.unparse(node).rpartition(".")[2]
            found += [f"{node.lineno} {name}"] * (name in NAMES)
        found += [f"{node.lineno} import {name}" for name in names if name in MODULES]  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                found.append(f"{node.lineno} {name}")
            for keyword in node.keywords:
                if keyword.arg in OPTIONS and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    found.append(f"{node.lineno} {keyword.arg}")
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "service").rglob("*.py")) + sorted((ROOT / "model").rglob("*.py")), ids=str
)
def test_the_house_is_clean(path: Path) -> None:
    assert banned(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import joblib.externals",
        "from multiprocessing.connection import Client",
        "from concurrent.futures import ProcessPoolExecutor",
        "concurrent.futures.ProcessPoolExecutor(2)",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "subprocess.run('ls', shell=True)",
        "from yaml import safe_load",
    ],
)
def test_each_of_them_would_be_found(source: str) -> None:
    assert banned(source)


def test_tests_are_no_packages_and_go_through_a_real_server_or_the_bare_application() -> None:
    """Two tests of one name would shadow each other in packages; Starlette's TestClient runs requests on a thread of
    its own, where a client that leaves is never noticed."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert not [path for path in files if path.name == "__init__.py"]
    assert not [path for path in files if "starlette.testclient" in path.read_text() and path.name != "test_banned.py"]
    assert not [path for path in files if "fastapi.testclient" in path.read_text() and path.name != "test_banned.py"]
