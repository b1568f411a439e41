"""README's results are those of the figures beside them."""

from tests import results


def test_the_readme_shows_what_was_measured() -> None:
    page = (results.ROOT / "README.md").read_text(encoding="utf-8")
    assert results.put(page, "x") != page
    assert results.readme() == page, "write it: python -m tests.results"
