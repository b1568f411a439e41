#!/usr/bin/env python3
"""Write the pictures and questions of ``era-vllm eval`` as a task of lmms-eval.

    deploy/lmms_eval/make_task.py out/lmms --count 60

Then, in an environment of lmms-eval (docs/paper-tables.md), against a server that is up::

    OPENAI_API_KEY=none python -m lmms_eval --model openai --include_path out/lmms \\
        --tasks era_sample --model_args base_url=http://127.0.0.1:8000/v1,model_version=era-sample

The same --seed and --count give the questions of ``era-vllm eval --tasks standard``, so that the
two can be compared question by question.
"""

import argparse
import json
from pathlib import Path
from typing import Final

from era_vllm.lab.synth.assets import load_material
from era_vllm.lab.synth.tasks import YES_NO, draw_task

TASK: Final = "era_sample"
_UTILS: Final = '''\
"""Read a task that deploy/lmms_eval/make_task.py wrote."""

from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent


def visuals(doc):
    return [Image.open(HERE / doc["picture"]).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    right = float(results[0].strip().lower() == doc["answer"])
    return {"right": right, "yes_no" if doc["yes_no"] else "open_ended": right}


def mean(values):
    return sum(values) / len(values)
'''
_METRIC: Final = """\
  - metric: {name}
    aggregation: !function utils.mean
    higher_is_better: true
"""
_YAML: Final = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
process_results: !function utils.score
metric_list:
{metrics}metadata:
  - version: 1.0
"""


def write(out: Path, count: int, seed: int) -> int:
    """Write the task; return the number of questions."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    material, lines = load_material(split="test"), list[str]()
    for number in range(count):
        task = draw_task("standard", seed, number, material)
        name = f"pictures/{number:04}.png"
        task.items[0].frames[0].save(out / name)
        for question in task.questions:
            doc = {
                "picture": name,
                "question": question.text,
                "answer": question.answer,
                "family": question.family,
                "yes_no": question.family in YES_NO,
            }
            lines.append(json.dumps(doc))
    data = (out / "questions.jsonl").absolute()
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    metrics = "".join(_METRIC.format(name=name) for name in ("right", "open_ended", "yes_no"))
    text = _YAML.format(task=TASK, data=json.dumps(str(data)), metrics=metrics)
    (out / f"{TASK}.yaml").write_text(text, encoding="utf-8")
    (out / "utils.py").write_text(_UTILS, encoding="utf-8")
    return len(lines)


def main() -> None:
    """Write a task where the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder; made if it is not there")
    parser.add_argument("--count", type=int, default=60, help="pictures (default 60)")
    parser.add_argument("--seed", type=int, default=777)
    arguments = parser.parse_args()
    questions = write(arguments.out, arguments.count, arguments.seed)
    print(f"{questions} questions about {arguments.count} pictures: {arguments.out}/{TASK}.yaml")


if __name__ == "__main__":
    main()
