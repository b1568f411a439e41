"""The task for lmms-eval: what `era-vllm eval` asks, in files that it can read."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")

from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import draw_task

ROOT = Path(__file__).parents[3]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's `!function module.name` as a text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def test_its_questions_are_those_of_eval_and_it_scores_them_alike(tmp_path: Path) -> None:
    script = _module(ROOT / "deploy/lmms_eval/make_task.py")
    count = script.write(tmp_path, 2, 777)
    task = yaml.load((tmp_path / "era_sample.yaml").read_text(), _Loader)  # noqa: S506
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    docs = [json.loads(line) for line in lines]
    material = load_material(split="test")
    drawn = [draw_task("standard", 777, number, material) for number in range(2)]
    wanted = [(q.text, q.answer) for one in drawn for q in one.questions]
    assert [(doc["question"], doc["answer"]) for doc in docs] == wanted and len(docs) == count
    utils = _module(tmp_path / "utils.py")
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        module, name = task[key].split(".")
        assert module == "utils" and callable(getattr(utils, name))
    (picture,) = utils.visuals(docs[0])
    assert picture.tobytes() == drawn[0].items[0].frames[0].tobytes()
    doc = docs[0]
    assert utils.score(doc, [f" {doc['answer'].upper()}\n"])["right"] == 1.0
    assert utils.score(doc, [doc["answer"] + " x"])["right"] == 0.0
    scored = {name for doc in docs for name in utils.score(doc, [""])}
    assert scored <= {metric["metric"] for metric in task["metric_list"]}
