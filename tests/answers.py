"""A request and its answer of each family, as a server gave it: docs/families/answers.md.

pytest tests/server/test_tiles.py -m slow     # keeps them in out/families
.venv/bin/python -m tests.answers             # writes the page and copies the pictures
"""

import json
import shutil
from typing import Any, Final

from tests.situations import ROOT
from tests.support import NAMES

FOLDER: Final = ROOT / "out" / "families"
PAGE: Final = ROOT / "docs" / "families" / "answers.md"
_HEAD: Final = """# What each family is asked and answers

`messages` of a chat, without the bytes of pictures and video, and of the answer what is ours, with
`usage`: as tiny models with random weights answered `pytest tests/server/test_tiles.py -m slow`.
Below them what `/v1/era/inspect` drew of the picture (500 x 333 pixels) and of the video (16
frames) at the default rate; which tokens are kept means nothing with random weights. Written by
`.venv/bin/python -m tests.answers`.
"""


def page() -> str:
    """Return the page."""
    parts = [_HEAD]
    for name, title in NAMES.items():
        found = FOLDER / f"{name}.json"
        if not found.exists():
            continue
        parts.append(f"## {title}\n")
        for asked, pair in json.loads(found.read_text()).items():
            parts += [f"### {asked[0].upper()}{asked[1:]}\n"]
            parts += [f"```json\n{_lines(one)}\n```\n" for one in pair.values()]
        for kind in ("image", "video"):
            drawn = FOLDER / f"{name}-{kind}.png"
            if drawn.exists():
                shutil.copyfile(drawn, PAGE.parent / drawn.name)
                parts.append(f"![What stays of the {kind}]({drawn.name})\n")
    return "\n".join(parts)


def _lines(value: Any) -> str:
    """Return JSON, a line each entry of the outermost lists."""
    if isinstance(value, list):
        (message,) = value
        rows = ",\n   ".join(map(json.dumps, message["content"]))
        return f'[{{"role": "user", "content": [\n   {rows}]}}]'
    usage = {key: value["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
    rows = [f'"usage": {json.dumps(usage)}']
    for name, items in value["era"].items():
        of_name = map(json.dumps, items if isinstance(items, list) else ())
        text = "[" + ",\n   ".join(of_name) + "]" if isinstance(items, list) else json.dumps(items)
        rows.append(f'"{name}": {text}')
    first, *others = rows
    return "{" + first + ',\n "era": {' + ",\n  ".join(others) + "}}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT))
