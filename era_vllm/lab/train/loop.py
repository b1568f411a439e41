"""READ FIRST in the trainer: one loop for every architecture.

A step: the recipe says what is learnt (``recipe.py``), an architecture makes a batch and its losses
(``qwen3_vl.py``), ranks average gradients (``ranks.py``), Muon and AdamW step (``optim.py``). Every
few minutes: the state is saved (``state.py``), held-out questions are asked, the curve is drawn
(``curve.py``). A task is a function of the seed and its number, so a training that is gone on with
sees what it would have seen.
"""

import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from era_vllm.errors import ConfigError
from era_vllm.lab.screen import interval_s
from era_vllm.lab.synth.assets import load_material, with_bent_digits
from era_vllm.lab.synth.questions import TaskFamily
from era_vllm.lab.synth.tasks import TASK_FAMILIES, Kind, draw_task
from era_vllm.lab.train.arch import Learner, architecture
from era_vllm.lab.train.batch import Batch
from era_vllm.lab.train.curve import append, cut, draw
from era_vllm.lab.train.ranks import Ranks
from era_vllm.lab.train.recipe import Recipe
from era_vllm.lab.train.state import Average, Progress, State

ALLOCATOR: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
"""glibc keeps what it has: a step on a CPU takes half as long."""
DEV_SEED: Final = 4242
EXPORT: Final = "export"
"""The folder in `out` that a model is written to."""
_DEV_BATCH: Final = 8
_LONGEST_STEP_S: Final = 60.0  # what is longer was stopped, and does not count as training
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM)
_CLIP: Final = 1.0
_REPORT: Final = 20  # steps a line of the curve


@dataclass(frozen=True, slots=True)
class Settings:
    """What a training is told; times in minutes."""

    arch: str
    out: Path
    minutes: float
    steps: int | None = None
    """End after so many, if that is sooner."""
    seed: int = 0
    ranks: int = 1
    threads: int = 1
    lr: float = 2e-3
    warmup: int = 100
    cooldown: float = 0.0
    """The last minutes, in which the learning rate falls to a twentieth."""
    save_every: float = 5.0
    dev_every: float = 15.0
    from_text: bool = False
    """Leave out what the recipe begins with: the tower alone, and small pictures."""
    resume: bool = False
    weights: Path | None = None
    device: str = "cpu"
    bf16: bool = False
    recipe: Recipe | None = None
    """None: the architecture's."""


def train(settings: Settings) -> None:
    """Train in processes of their own, one a rank; wait for them.

    Ctrl-C or SIGTERM: they end after the step, with everything saved. The second kills them.

    Raises: ConfigError: a rank ended with an error, which is above.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    architecture(settings.arch).tokenizer()  # what has to be fetched is fetched once
    os.environ.update(ALLOCATOR)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    context = multiprocessing.get_context("spawn")
    address = f"file://{settings.out.absolute()}/.ranks-{os.getpid()}"
    ranks = [Ranks(rank, settings.ranks) for rank in range(settings.ranks)]
    processes = [context.Process(target=run, args=(settings, rank, address)) for rank in ranks]
    for process in processes:
        process.start()
    stopping: list[int] = []
    for number in _STOPPING:
        signal.signal(number, lambda which, _: stopping.append(which))
    passed = 0
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode for process in processes)
        for process in processes:
            if failed or len(stopping) > 1:
                process.kill()
            elif len(stopping) > passed and process.pid:
                os.kill(process.pid, signal.SIGTERM)
        passed = len(stopping)
        time.sleep(0.2)
    Path(address.removeprefix("file://")).unlink(missing_ok=True)
    if any(process.exitcode for process in processes):
        raise ConfigError("training: a process ended with an error; it is above")


def run(settings: Settings, ranks: Ranks, address: str = "") -> list[float]:
    """Train as one rank; return the loss of each step.

    Mutates: the folder settings.out.
    """
    torch.set_num_threads(settings.threads)
    ranks.join(address)
    training = _Training(settings, ranks)
    if address:  # a process of its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; train() passes it
        signal.signal(signal.SIGTERM, lambda *_: training.stop())
    return training.run()


class _Training:
    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        torch.manual_seed(settings.seed)
        self.model = architecture(settings.arch)()
        if settings.weights is not None:
            self.model.read(settings.weights)
        self.model.to(settings.device)
        self.average = Average(self.model)
        self.optimizers = self.model.optimizers(ranks, settings.lr)
        self.progress = Progress(settings.arch, settings.seed)
        self.state = State(self.progress, self.model, self.average, self.optimizers)
        if settings.resume:
            self.state.load(settings.out)
        self.progress.from_text |= settings.from_text
        self.recipe = settings.recipe or self.model.recipe
        if self.progress.from_text:
            self.recipe = replace(self.recipe, tower=0, small=0)
        if ranks.first:
            cut(settings.out, self.progress.step)
        self.words = self.model.tokenizer()
        self.material = with_bent_digits(load_material(split="train"))
        self.stopped = False
        self.sums: dict[str, list[float]] = defaultdict(list)

    def run(self) -> list[float]:
        settings, progress = self.settings, self.progress
        start, losses = progress.minutes, []
        saved = asked = progress.minutes
        with self._bar() as bar:
            while progress.minutes - start < settings.minutes and len(losses) != settings.steps:
                began = time.monotonic()
                losses.append(self._step(progress.minutes - start))
                spent = min(time.monotonic() - began, _LONGEST_STEP_S) / 60
                spent, stopped = self._agreed(spent)
                bar.update(round(spent, 4))
                progress.minutes += spent
                if progress.step % _REPORT == 0:
                    self._report(bar)
                if progress.minutes - saved >= settings.save_every:
                    saved = progress.minutes
                    self._save()
                if progress.minutes - asked >= settings.dev_every:
                    asked = progress.minutes
                    self._dev()
                if stopped:
                    break
        self._save()
        if not self.stopped:
            self._dev()
        return losses

    def stop(self) -> None:
        """End after this step."""
        self.stopped = True

    def _step(self, minutes: float) -> float:
        settings, progress, ranks = self.settings, self.progress, self.ranks
        lesson = self.recipe.lesson(settings.seed, progress.step, progress.seen)
        first = progress.seen + ranks.rank * lesson.rows
        drawn = self.material, lesson.tokens, lesson.quotas
        numbers = range(first, first + lesson.rows)
        tasks = [draw_task(lesson.kind, settings.seed, number, *drawn) for number in numbers]
        lots = random.Random(f"packing {settings.seed} {progress.step} {ranks.rank}")
        if lesson.with_text:
            batch = self.model.asked(tasks, self.words, lots, lesson.wordy)
        else:
            batch = self.model.batch(tasks)
        self._set_rate(minutes)
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
            found = self.model.losses(batch.to(settings.device))
        loss = found["loss"]
        loss.backward()
        self._share_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.seen += lesson.rows * ranks.count
        self.average.update(progress.step)
        for name, value in found.items():
            self.sums[name].append(value.item())
        if "text" in found:
            self.sums[f"text_{lesson.kind}"].append(found["text"].item())
        return float(loss.item())

    def _share_gradients(self) -> None:
        weights = list(self.model.parameters())
        gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights
        ]
        for weight, gradient in zip(weights, self.ranks.added(gradients), strict=True):
            weight.grad = gradient / self.ranks.count
        nn.utils.clip_grad_norm_(weights, _CLIP)

    def _set_rate(self, minutes: float) -> None:
        settings = self.settings
        rate = settings.lr * min(1.0, (self.progress.step + 1) / settings.warmup)
        left = settings.minutes - minutes
        if left < settings.cooldown:
            rate *= max(0.05, left / settings.cooldown)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("share", 1.0)

    def _agreed(self, spent: float) -> tuple[float, bool]:
        """Return rank 0's time, and whether any is to stop: all end after the same step."""
        own = [spent if self.ranks.first else 0.0, float(self.stopped)]
        (both,) = self.ranks.added([torch.tensor(own, dtype=torch.float64)])
        self.stopped = bool(both[1] > 0)
        return float(both[0]), self.stopped

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.settings.minutes,
            desc=f"train {self.settings.arch}",
            unit="min",
            mininterval=interval_s(),
            disable=not self.ranks.first,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} min{postfix}",
        )

    def _report(self, bar: Any) -> None:
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums.clear()
        if self.ranks.first:
            self._append(means)
            shown = " ".join(f"{name} {value:.2f}" for name, value in means.items())
            bar.set_postfix_str(f"{self.progress.seen} tasks, {shown}")

    def _append(self, found: Mapping[str, object]) -> None:
        progress = self.progress
        known = {"minutes": progress.minutes, "step": progress.step, "seen": progress.seen}
        append(self.settings.out, {**known, **found})

    def _save(self) -> None:
        if self.ranks.first:
            self.state.save(self.settings.out)
            self.average.swap()
            self.model.export(self.settings.out / EXPORT)
            self.average.swap()

    def _dev(self) -> None:
        """Ask held-out questions with the averaged weights; each rank a share."""
        self.average.swap()
        try:
            correct = accuracy(self.model, self.ranks, self.model.dev, DEV_SEED)
        finally:
            self.average.swap()
        if self.ranks.first:
            self._append({"dev": correct})
            draw(self.settings.out)


def accuracy(
    model: Learner, ranks: Ranks, counts: Mapping[Kind, int], seed: int, extra: int = 0
) -> dict[TaskFamily, tuple[int, int]]:
    """Ask held-out questions, all words of an answer at once: exactly right as greedy decoding is.

    Args:    counts: tasks by kind.   extra: words of filler before pictures and questions.
    Returns: right and asked, by family.
    """
    tokenizer, material = model.tokenizer(), load_material(split="test")
    counted: dict[TaskFamily, list[int]] = {family: [0, 0] for family in TASK_FAMILIES}
    device = next(model.parameters()).device
    for kind, count in counts.items():
        numbers = range(ranks.rank, count, ranks.count)
        tasks = [draw_task(kind, seed, number, material) for number in numbers]
        for start in range(0, len(tasks), _DEV_BATCH):
            some = tasks[start : start + _DEV_BATCH]
            batch = model.asked(some, tokenizer, random.Random(start), extra=extra)
            _count(batch.to(device), model, counted)
    (total,) = ranks.added([torch.tensor(list(counted.values()))])
    together = zip(counted, total.tolist(), strict=True)
    return {family: (right, asked) for family, (right, asked) in together if asked}


@torch.no_grad()
def _count(batch: Batch, model: Learner, counted: Mapping[TaskFamily, list[int]]) -> None:
    scores, wanted = model.answer(batch, model.see(batch))
    hits = iter((scores.argmax(-1) == wanted).tolist())
    for row in batch.rows:
        for question, (first, end) in zip(row.questions, row.spans, strict=True):
            counted[question.family][0] += all(list(islice(hits, end - first)))
            counted[question.family][1] += 1
