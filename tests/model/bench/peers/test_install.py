import re
from pathlib import Path

import pytest

from model.bench.peers import install
from model.bench.peers.run import PEERS


def test_every_peer_has_pins_and_every_pin_is_exact() -> None:
    ranking = {"recbole"}  # compared in what it recommends, not in how fast (model/bench/sasrec.py)
    assert {path.stem for path in install.PINS.glob("*.txt")} == {peer.package for peer in PEERS} | ranking
    for path in install.PINS.glob("*.txt"):
        for pin in path.read_text().splitlines():
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin), f"{path.name}: {pin}"
        # A torch of another index would bring gigabytes of CUDA libraries.
        assert "torch==2.13.0\n" in path.read_text()


def test_an_environment_is_made_once_and_anew_when_its_pins_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "PINS", tmp_path)
    (tmp_path / "peer.txt").write_text("")
    environments = tmp_path / "environments"
    assert not install.installed("peer", environments)
    assert install.install("peer", environments)
    assert install.installed("peer", environments)
    assert (environments / "peer" / "bin" / "python").exists()
    assert not install.install("peer", environments)
    (tmp_path / "peer.txt").write_text("# changed\n")
    assert install.install("peer", environments)


def test_pins_that_cannot_be_installed_leave_no_environment_to_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "PINS", tmp_path)
    (tmp_path / "peer.txt").write_text("./no-such-package-here\n")
    assert install.main(["--environments", str(tmp_path / "environments")]) == 1
    assert "peer: not installed" in capsys.readouterr().out
    assert not install.installed("peer", tmp_path / "environments")


def test_a_peer_without_pins_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        install.main(["nobody"])
    assert caught.value.code == 2
    assert "nobody" in capsys.readouterr().err
