"""Whose commit a report names."""

import subprocess
from pathlib import Path

from era_vllm.bench.provenance import commit_of


def _git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_commit_is_that_of_the_checkout_and_not_of_one_around_it(tmp_path: Path) -> None:
    within = tmp_path / "venv" / "site-packages"
    within.mkdir(parents=True)
    assert commit_of(tmp_path) is None, "no checkout"
    _git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-qm", "a")
    assert commit_of(tmp_path) == _git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit_of(within) is None, "another's"
    (tmp_path / "a").write_text("2")
    assert str(commit_of(tmp_path)).endswith("-dirty")
