"""The independent oracle: the Hugging Face model fed reduced embeddings and an additive mask.

Nothing of vLLM is used. Features and attention maps come from the Hugging Face tower, the
reduction from the core, and the log-bias is added to the attention scores as a 4-D float mask:
the paper's equations, spelled out densely. Tests and ``era-vllm doctor`` compare the engine
with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from era_vllm.config import EraConfig, Gamma, encoder_layer
from era_vllm.contracts import query_layer
from era_vllm.errors import UnsupportedError
from era_vllm.lab.blocks import prune_blocks
from era_vllm.lab.scout import (
    chat_prefix,
    chat_suffix,
    first_queries,
    heads_of,
    replace_output,
    scout_relevance,
    scout_signals,
)
from era_vllm.pixels import pixel_hash
from era_vllm.policies import make_policy
from era_vllm.question import Question
from era_vllm.steps.merge import average
from era_vllm.types import DEGENERATE_KINDS, PrunedTokens, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Segment:
    """What stands in place of one image: its retained embeddings and their bias."""

    embeds: Float[Tensor, "a d"]
    log_bias: Float32[Tensor, "a"]
    anchors: Int[Tensor, "a"]
    """Original indices, ascending."""
    n: int
    """Visual tokens before pruning."""
    offsets: Int[Tensor, "a 3"] | None = None
    """With M-RoPE: where each stands, from where its run's first token does unpruned."""
    span: int = 0
    """How far text moves on behind it; 0 = by ``n``."""
    states: Float[Tensor, "a k d"] | None = None
    """What its tokens come out of the first k layers with; None = what the layers make of them."""


class LanguageOracle:
    """A language model in plain transformers, with eager attention, given what its tower gave."""

    model: Any
    """The Hugging Face model, float32."""
    dtype: torch.dtype

    @property
    def visual_tokens(self) -> Sequence[int]:
        """Token ids that stand for visual tokens in a prompt."""
        return [self.model.config.image_token_id]

    @torch.inference_mode()
    def log_probs(
        self,
        token_ids: Sequence[int],
        segments: Sequence[Segment],
        last: int,
        *,
        positions: Literal["original", "compact"] = "original",
        bias: bool = True,
        gamma: Gamma = None,
    ) -> Float32[Tensor, "m v"]:
        """Return log-probabilities over the vocabulary after each of the last m tokens.

        Args:
            token_ids: Prompt and answer; each image stands as one run of placeholders, as long as
                its segment.
            segments: One a run, in the order of the prompt.
            last: m.
            positions: Whether anchors and text keep the positions they have unpruned.
            bias: False leaves the bias out: the control that a comparison must fail.
            gamma: ``EraConfig.gamma``, the exponent of each layer and KV head.
        """
        ids = torch.tensor([list(token_ids)])
        embeds = self.model.get_input_embeddings()(ids)
        visual = self.is_visual(ids, last)
        column = torch.zeros(ids.shape, dtype=torch.float32)
        deep: dict[str, object] = {}
        if segments:
            rows = torch.cat([segment.embeds for segment in segments]).to(embeds.dtype)
            embeds[visual], *maps = rows.split(embeds.shape[-1], -1)
            column[visual] = torch.cat([segment.log_bias for segment in segments])
            if maps:  # feature maps, level by level
                deep = {"visual_pos_masks": visual, "deepstack_visual_embeds": maps}
        length = ids.shape[1]
        causal = torch.full((length, length), torch.finfo(self.dtype).min).triu(1)

        def mask(exponents: Float32[Tensor, "h"]) -> Float[Tensor, "1 h t t"]:
            added = exponents[:, None, None] * column
            return (causal + added.masked_fill(causal < 0, 0.0))[None].to(self.dtype)

        with ExitStack() as stack:
            if bias and gamma is not None:
                for layer, exponents in self._exponents(gamma):
                    stack.callback(_give_mask(layer, mask(exponents)).remove)
            for layer, at, states in self._injected(segments, visual[0]):
                stack.callback(replace_output(layer, at, states).remove)
            hidden = self.model.model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask(torch.full((1,), float(bias))),
                position_ids=self.position_ids(visual[0], segments, positions)[..., None, :],
                use_cache=False,
                **deep,
            ).last_hidden_state
        return self.model.lm_head(hidden[0, -last:]).float().log_softmax(-1)

    def _injected(
        self, segments: Sequence[Segment], visual: Bool[Tensor, "t"]
    ) -> Iterator[tuple[nn.Module, Int[Tensor, "v"], Float[Tensor, "v d"]]]:
        """Yield each layer whose output is replaced, where, and by what."""
        has = [torch.full((len(one.log_bias),), one.states is not None) for one in segments]
        given = [one.states for one in segments if one.states is not None]
        if not given:
            return
        at = visual.nonzero()[:, 0][torch.cat(has)]
        of_layers = torch.cat(given).unbind(1)
        layers = self.model.model.language_model.layers
        for layer, states in zip(layers, of_layers, strict=False):
            yield layer, at, states.to(self.dtype)

    def is_visual(self, token_ids: Int[Tensor, "1 t"], last: int) -> Bool[Tensor, "1 t"]:
        """Return where visual tokens stand: none among the answer's, whatever a model says."""
        visual = torch.isin(token_ids, torch.tensor(list(self.visual_tokens)))
        visual[:, token_ids.shape[1] - last + 1 :] = False
        return visual

    def _exponents(self, gamma: Gamma) -> Iterator[tuple[nn.Module, Float32[Tensor, "hq"]]]:
        """Return each decoder layer with the exponents of its query heads."""
        layers = self.model.model.language_model.layers
        text = self.model.config.get_text_config()
        table = EraConfig(gamma=gamma).exponents(len(layers), text.num_key_value_heads)
        groups = text.num_attention_heads // text.num_key_value_heads
        for layer, row in zip(layers, table, strict=True):
            yield layer, torch.tensor(row).repeat_interleave(groups)

    def position_ids(
        self,
        visual: Bool[Tensor, "t"],
        segments: Sequence[Segment],
        positions: Literal["original", "compact"],
    ) -> Int[Tensor, "t"] | Int[Tensor, "3 t"]:
        """Return each token's position, spelled out token by token; on three axes with M-RoPE."""
        axes = 3 if _is_mrope(self.model.config) else 1
        if positions == "compact":
            ids = torch.arange(len(visual))
            return ids if axes == 1 else ids.expand(3, -1)
        waiting, places, place = list(segments), list[list[int]](), 0
        left: list[list[int]] = []
        for is_visual in visual.tolist():
            if not is_visual:
                places.append([place] * axes)
                place += 1
                continue
            if not left:
                segment = waiting.pop(0)
                offsets = segment.anchors[:, None] if segment.offsets is None else segment.offsets
                left = [[place + offset for offset in one] for one in offsets.tolist()]
                place += segment.span or segment.n
            places.append(left.pop(0))
        return torch.tensor(places).T if axes == 3 else torch.tensor(places)[:, 0]


class Oracle(LanguageOracle):
    """A LLaVA-1.5 checkpoint, tower included."""

    def __init__(
        self, path: str, dtype: torch.dtype = torch.float32, *, language: bool = True
    ) -> None:
        """Load a checkpoint.

        Args:
            path: Folder or name.
            dtype: What the weights are loaded as.
            language: False leaves the language model's layers out, which ``tokens``, ``reduce`` and
                ``recycle`` do not need: of a 7B model a tenth is read.

        Raises:
            UnsupportedError: not a LLaVA-1.5 checkpoint.
        """
        self.processor = LlavaProcessor.from_pretrained(path)
        config = LlavaConfig.from_pretrained(path)
        if not language:
            config.text_config.num_hidden_layers = 0
        model = LlavaForConditionalGeneration.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
        )
        if model.config.vision_config.model_type != "clip_vision_model":
            raise UnsupportedError(
                f"oracle: got a {model.config.vision_config.model_type} tower, allowed: CLIP"
            )
        self.model = model.eval()
        self.dtype = dtype

    @property
    def image_token(self) -> int:
        """Token id of an image placeholder."""
        return self.model.config.image_token_id

    def pixels(self, image: Image) -> Float[Tensor, "1 c h w"]:
        """Return what the tower is given for an image."""
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def tokens(
        self,
        images: Sequence[Image],
        config: EraConfig | None = None,
        questions: Sequence[Question] | None = None,
    ) -> VisualTokens:
        """Run tower and projector, and read what a policy may need.

        Queries of the language model, and relevance to questions, only where it was loaded.

        Args:
            images: s pictures.
            config: Decides the attention's layer and queries, and how relevance is reduced.
            questions: What is asked of each; None = nothing.

        Raises:
            UnsupportedError: a layer that the features do not come through.
        """
        config = config or EraConfig()
        pixels = torch.cat([self.pixels(image) for image in images]).to(self.dtype)
        body, hf = self.model.model, self.model.config
        out = body.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        features = out.hidden_states[hf.vision_feature_layer][:, 1:]
        layers = hf.vision_config.num_hidden_layers
        index = encoder_layer(config.attention_layer, hf.vision_feature_layer, layers)
        probabilities = out.attentions[index - 1].float()
        key, scores = self._keys_and_scores(index - 1, out.hidden_states[index - 1])
        embeds = body.multi_modal_projector(features)
        rows = slice(0, 1) if config.attention_queries == "cls" else slice(None)
        side = hf.vision_config.image_size // hf.vision_config.patch_size
        prefix = config.scout_prefix
        if prefix is None and (config.scout or query_layer(make_policy(config)) > 1):
            prefix = chat_prefix(self.processor, self.image_token)
        asked = list(questions or [()] * len(images))
        if config.scout and any(asked):
            suffix = config.scout_suffix
            suffix = chat_suffix(self.processor) if suffix is None else suffix
            asked = [(*one, *suffix) if one else one for one in asked]
        scouted, of_layers = scout_signals(body.language_model, prefix or (), embeds, config)
        return VisualTokens(
            embeds,
            (side, side),
            {
                Signal.ENCODER_ATTENTION: probabilities[:, :, rows].mean(2)[:, :, 1:],
                Signal.ENCODER_SCORES: scores[:, :, rows].mean(2)[:, :, 1:],
                Signal.CLASS_ATTENTION: probabilities[:, :, 0, 1:],
                Signal.ENCODER_KEYS: key[:, :, 1:].transpose(2, 3),
                Signal.PIXEL_HASH: torch.tensor([pixel_hash(image) for image in pixels]),
                **first_queries(body.language_model.layers, embeds),
                **scouted,
                **self._relevance(embeds, asked, config, prefix or ()),
            },
            of_layers,
        )

    def _relevance(
        self,
        embeds: Float[Tensor, "s n d"],
        questions: Sequence[Question],
        config: EraConfig,
        prefix: Sequence[int],
    ) -> dict[Signal, Float32[Tensor, "s 1 n"]]:
        language, table = self.model.model.language_model, self.model.get_input_embeddings()
        if not len(language.layers):
            return {}
        found = [
            scout_relevance(language, prefix, own, asked, config)
            if config.scout
            else first_relevance(language.layers, table, own, asked, config.question_reduction)
            for own, asked in zip(embeds, questions, strict=True)
        ]
        return {Signal.RELEVANCE: torch.stack(found)[:, None]}

    def _keys_and_scores(
        self, layer: int, hidden: Float[Tensor, "s n d"]
    ) -> tuple[Float32[Tensor, "s hv n dh"], Float32[Tensor, "s hv n n"]]:
        """Return keys and attention scores of an encoder layer, given its input."""
        tower = self.model.model.vision_tower
        block = getattr(tower, "vision_model", tower).encoder.layers[layer]
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        query, key = (
            project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float()
            for project in (attention.q_proj, attention.k_proj)
        )
        return key, query @ key.transpose(2, 3) * attention.scale

    @torch.inference_mode()
    def reduce(
        self,
        images: Sequence[Image],
        config: EraConfig,
        rate: float,
        questions: Sequence[Question] | None = None,
    ) -> PrunedTokens:
        """Prune images of one rate with the core, in blocks where they are large."""
        return prune_blocks(self.tokens(images, config, questions), config, rate)

    @torch.inference_mode()
    def recycle(
        self, images: Sequence[Image], config: EraConfig, anchors: Int[Tensor, "s a"]
    ) -> list[Segment]:
        """Merge and weigh with anchors that were chosen elsewhere.

        So that a near-tie of the search, decided by a last bit, is no difference.
        """
        tokens, policy = self.tokens(images, config), make_policy(config)
        seen = tokens.compared
        if anchors.shape[1] == tokens.n:
            bias = torch.zeros(tokens.n)
            return [Segment(embeds, bias, anchors[0], tokens.n) for embeds in tokens.embeds]
        clusters = policy.assign(seen, anchors)
        embeds, bias = average(tokens.embeds, clusters), policy.log_bias(seen, clusters)
        riders = None if tokens.riders is None else average(tokens.riders, clusters)
        counts = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64)
        found = PrunedTokens(embeds, bias, anchors, clusters.assignment, counts, riders)
        return segments_of(found)

    def prompt_ids(
        self, text: str, num_anchors: Sequence[int], *, add_special_tokens: bool = True
    ) -> list[int]:
        """Tokenize a prompt and widen each ``<image>`` to its number of anchors.

        Args:    add_special_tokens: False for a chat template's text, which has its own.
        """
        counts = iter(num_anchors)
        ids: list[int] = []
        tokenized = self.processor.tokenizer(text, add_special_tokens=add_special_tokens)
        for token in tokenized["input_ids"]:
            ids += [token] * (next(counts) if token == self.image_token else 1)
        return ids

    def answer(
        self,
        text: str,
        segments: Sequence[Segment],
        max_tokens: int = 8,
        positions: Literal["original", "compact"] = "original",
    ) -> str:
        """Return a plain prompt's answer."""
        ids = self.prompt_ids(text, [len(segment.log_bias) for segment in segments])
        return self.decode(ids, segments, max_tokens, positions)[0]

    @torch.inference_mode()
    def decode(
        self,
        prompt_ids: Sequence[int],
        segments: Sequence[Segment],
        max_tokens: int,
        positions: Literal["original", "compact"],
        gamma: Gamma = None,
    ) -> tuple[str, Float32[Tensor, "v"]]:
        """Decode greedily; slow, for small models.

        Returns: the answer, and the log-probabilities of its first token.
        """
        ids, rows = list(prompt_ids), list[Tensor]()
        for _ in range(max_tokens):
            rows.append(self.log_probs(ids, segments, 1, positions=positions, gamma=gamma)[0])
            token = int(rows[-1].argmax())
            if token == self.model.generation_config.eos_token_id:
                break
            ids.append(token)
        new = ids[len(prompt_ids) :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True), rows[0]


def first_relevance(
    layers: nn.ModuleList,
    table: nn.Module,
    embeds: Float[Tensor, "n d"],
    question: Question,
    reduction: Literal["largest", "mean"],
) -> Float32[Tensor, "n"]:
    """Return how much a question's words attend to each token in a Hugging Face model's first
    layer, word by word and head by head, without positions; 0 where nothing is asked.
    """
    if not question:
        return torch.zeros(len(embeds))
    attention: Any = layers[0].self_attn
    words = table(torch.tensor(question, device=embeds.device))
    query, key = heads_of(layers[0], "q", words), heads_of(layers[0], "k", embeds)
    of_words: list[Tensor] = []
    for word in query:
        heads = [
            (key[:, head // attention.num_key_value_groups] @ own * attention.scaling).softmax(0)
            for head, own in enumerate(word)
        ]
        of_words.append(torch.stack(heads).mean(0))
    each = torch.stack(of_words)
    return each.amax(0) if reduction == "largest" else each.mean(0)


def _is_mrope(config: Any) -> bool:  # noqa: ANN401  # Hugging Face's, of any family
    return "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})


def _give_mask(layer: nn.Module, mask: Float[Tensor, "1 hq t t"]) -> RemovableHandle:
    """Have a decoder layer take a mask of its own; the model passes one to all layers."""

    def replace(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "attention_mask": mask}

    return layer.register_forward_pre_hook(replace, with_kwargs=True)


def segments_of(pruned: PrunedTokens) -> list[Segment]:
    """Return one segment an image."""
    rows = zip(pruned.embeds, pruned.log_bias, pruned.anchors, strict=True)
    segments = [Segment(*row, pruned.assignment.shape[1]) for row in rows]
    if pruned.riders is None or pruned.anchors.shape == pruned.assignment.shape:
        return segments
    states = pruned.riders.unflatten(-1, (-1, pruned.embeds.shape[-1]))
    return [replace(one, states=own) for one, own in zip(segments, states, strict=True)]
