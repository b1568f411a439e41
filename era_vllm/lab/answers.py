"""Ask a model about pictures and score what it answers, in plain transformers.

    model, processor = load()
    ask(model, processor, example.image, "What color is the circle?")

This is the reference that the pruned model in vLLM is held against, so it imports no vllm. As a
command it prints the accuracy table of the model card:

    python -m era_vllm.lab.answers --pictures 400 --seed 12345

Leaves out: pictures (`data.py`), pruning, and sampling (answers are greedy).
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from era_vllm.lab import CHECKPOINT
from era_vllm.lab.data import FAMILIES, LEARNED_FAMILIES, Example, Family, generate

MAX_ANSWER_TOKENS: Final = 6  # the longest right answer has three words, then the end


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were exactly right."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Fraction right, 0 to 1."""
        return self.right / self.asked


def load(
    checkpoint: Path | str = CHECKPOINT, dtype: torch.dtype = torch.bfloat16
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA checkpoint with its processor, on the CPU, ready to answer."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    return model.eval(), LlavaProcessor.from_pretrained(checkpoint)


def ask(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question: str,
) -> str:
    """Ask one question about one picture.

    Returns: the greedy answer, in lower case, words joined with blanks: "7 0".
    """
    return _answer_batch(model, processor, [image], [question])[0]


def answer_all(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 32,
) -> list[tuple[str, ...]]:
    """Ask every question of every example, with a progress bar.

    Returns: for each example its answers, in the order of its questions.
    """
    images = [example.image for example in examples for _ in example.questions]
    texts = [question.text for example in examples for question in example.questions]
    answers: list[str] = []
    with tqdm(total=len(texts), desc="answering", unit="question", mininterval=1) as progress:
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            answers += _answer_batch(model, processor, images[batch], texts[batch])
            progress.update(len(answers) - start)
    remaining = iter(answers)
    return [tuple(next(remaining) for _ in example.questions) for example in examples]


def score(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> dict[Family, Score]:
    """Count exact matches by family.

    Args:    answers: what `answer_all` returns for these examples.
    Returns: a score for each family that was asked, in the order of FAMILIES.
    """
    matches: dict[Family, list[bool]] = defaultdict(list)
    for example, given in zip(examples, answers, strict=True):
        for question, answer in zip(example.questions, given, strict=True):
            matches[question.family].append(answer == question.answer)
    return {
        family: Score(sum(matches[family]), len(matches[family]))
        for family in FAMILIES
        if family in matches
    }


def mean_accuracy(scores: Mapping[Family, Score]) -> float:
    """Mean over the families asked, each counting the same, 0 to 1."""
    return sum(each.accuracy for each in scores.values()) / len(scores)


@torch.inference_mode()
def _answer_batch(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
) -> list[str]:
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    # The template has written the start token already; prompts of a batch end together.
    inputs = processor(
        images=list(images),
        text=prompts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    answers = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def _report(examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> str:
    """Write the table of the model card: all pictures, then each background apart."""
    scores = score(examples, answers)
    lines = ["| family | right | asked | % |", "|---|---|---|---|"]
    lines += [
        f"| {family} | {each.right} | {each.asked} | {100 * each.accuracy:.1f} |"
        for family, each in scores.items()
    ]
    lines += ["", f"mean of {', '.join(LEARNED_FAMILIES)}:"]
    photos = sorted({example.scene.backdrop.photo for example in examples})
    for photo in (None, *photos):
        rows = [
            (example, given)
            for example, given in zip(examples, answers, strict=True)
            if photo in (None, example.scene.backdrop.photo)
        ]
        scores = score([example for example, _ in rows], [given for _, given in rows])
        learned: dict[Family, Score] = {
            family: each for family, each in scores.items() if family in LEARNED_FAMILIES
        }
        if learned:
            lines.append(f"{photo or 'all'}: {100 * mean_accuracy(learned):.1f} %")
    return "\n".join(lines)


def main() -> None:
    """Print the accuracy of a checkpoint on held-out pictures."""
    parser = argparse.ArgumentParser(prog="python -m era_vllm.lab.answers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--questions-per-image", type=int, default=8)
    parser.add_argument("--backgrounds", type=Path, help="a folder of photos of your own")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="default: the shipped one")
    chosen = parser.parse_args()
    examples = list(
        generate(
            chosen.pictures,
            chosen.seed,
            chosen.backgrounds,
            families=FAMILIES,
            questions_per_image=chosen.questions_per_image,
        )
    )
    model, processor = load(chosen.checkpoint)
    print(_report(examples, answer_all(model, processor, examples)))


if __name__ == "__main__":
    main()
