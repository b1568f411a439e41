"""The encoder inputs of a step, counted as the encoder's work and not as the prompt's tokens.

vLLM takes both from one number, the placeholders of an item. Where they are fewer than what the
encoder works on, its budget of a step admits N/K times as many items as were profiled.

Upstream (0.32.0): vllm/v1/core/sched/scheduler.py, ``Scheduler._try_schedule_encoder_inputs``
(:1789, called for each request at :741 and :1203), which tells the caller what is left of a budget
that begins every step at ``max_num_encoder_input_tokens`` (:621). The caller only carries it from
request to request, so it may be in another unit; but where a request is preempted within a step
(policy "priority", :829) it gives the placeholders back, fewer than were taken: what could still
have been admitted waits for the next step.
Private use: the same call, its list of items cut where their work reaches the budget, as vLLM cuts
it (:1922) where the cache is full.
Remove when: vLLM asks a model how much work an item is to its encoder.
"""

from abc import abstractmethod

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class WorkBoundScheduler(Scheduler):
    """Admits encoder inputs to a step by their work. What is cached or loaded costs nothing."""

    @abstractmethod
    def encoder_work(self, feature: MultiModalFeatureSpec) -> int:
        """Return an item's work, in the unit of ``max_num_encoder_input_tokens``, >= 1."""

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """Schedule what vLLM would, up to the first item that is too much; the first of a step is
        never too much.

        Returns:
            items to encode, tokens to compute, work left in the step (below 0 if a single item is
            larger), items to load, items that repeat one of this step
        """
        items, tokens, left, loaded, repeated = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        left = encoder_compute_budget
        for index, item in enumerate(items):
            feature = request.mm_features[item]
            work = self.encoder_work(feature)
            if work > left < self.max_num_encoder_input_tokens:
                before = feature.mm_position.offset - num_computed_tokens - shift_computed_tokens
                self._unreference_after(request, item)
                loaded = [other for other in loaded if other < item]
                repeated = [other for other in repeated if other < item]
                return items[:index], max(0, before), left, loaded, repeated
            left -= work
        return items, tokens, left, loaded, repeated

    def _unreference_after(self, request: Request, item: int) -> None:
        """Let go of cached items behind one that is not encoded; vLLM would not have reached them.

        The cache keeps what a request refers to, so it could be full of what waits for ``item``.
        """
        for other in list(self.encoder_cache_manager.get_cached_input_ids(request)):
            if other > item:
                self.encoder_cache_manager.free_encoder_input(request, other)
