"""vLLM's schedulers, extended with the plan of each request."""

from typing import Any

from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem
from vllm.multimodal.utils import strip_covered_mm_data
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vitcop_vllm.engine.config import pruning_settings_of
from vitcop_vllm.engine.coordinator import StagedCoordinator
from vitcop_vllm.engine.kv_cache import StagedKVCacheManager
from vitcop_vllm.engine.metrics import COUNTS_MISMATCHES, KV_BLOCKS_NOT_TAKEN
from vitcop_vllm.engine.output import StagedSchedulerOutput
from vitcop_vllm.engine.prefix_cache import (
    PreemptedPrefillStats,
    PrefixHashes,
    StepWrites,
)
from vitcop_vllm.pruning.identity import CountsMismatchError, plan_request
from vitcop_vllm.pruning.plan import RequestPlan
from vitcop_vllm.pruning.selectors import selector_of

logger = init_logger(f"vllm.{__name__}")


class StagedScheduler(Scheduler):
    """Keeps the plans of unfinished requests, and never splits a pruned image or frame.

    If the selector reads the question, it never splits the prompt of a pruned image either: the
    selection needs the whole prompt.

    Attributes:
        plans: Request id -> plan, for requests with pruned images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = pruning_settings_of(self.vllm_config.model_config.hf_config)
        self._reads_question = selector_of(settings.selector).reads_question
        self.plans: dict[str, RequestPlan] = {}
        self._writes = StepWrites()
        # Whether a waiting request with pruned images needs more tokens than the step has left.
        self._holds_back = False
        # Request id -> images that the next step will encode.
        self._to_encode: dict[str, list[int]] = {}
        self._hash_function = get_hash_fn_by_name(
            self.vllm_config.cache_config.prefix_caching_hash_algo
        )
        coordinator = self.kv_cache_manager.coordinator
        # Otherwise vLLM rounds a hit down to whole blocks, and never hits at a span's end.
        coordinator.enable_partial_hash_hits = True
        StagedCoordinator.adopt(coordinator)
        for manager in coordinator.single_type_managers:
            assert isinstance(manager, StagedKVCacheManager)
            manager.plans = self.plans
            manager.writes = self._writes

    def _update_plan(self, request: Request) -> None:
        try:
            plan = plan_request(request.mm_features)
        except CountsMismatchError as error:
            # The processor refuses such a request, but a prompt may come from elsewhere. An
            # exception here would stop the engine. vLLM finishes these requests with an error
            # at the end of the step.
            self.encoder_cache_mismatch_reqs.add(request.request_id)
            COUNTS_MISMATCHES.labels("scheduler").inc()
            logger.error("Request %s refused: %s", request.request_id, error)
            return
        if plan is not None:
            self.plans[request.request_id] = plan
            KV_BLOCKS_NOT_TAKEN.inc(self._blocks_not_taken(request, plan))
        if self.kv_cache_manager.enable_caching:
            request.block_hashes = PrefixHashes(
                request,
                plan or RequestPlan(()),
                self.block_size,
                self._hash_function,
                self._writes,
            )

    def _blocks_not_taken(self, request: Request, plan: RequestPlan) -> int:
        """Blocks of all KV cache groups that the unpruned prompt would take in addition."""
        prompt = request.num_prompt_tokens
        unpruned = prompt + sum(s.counts.encoder - s.counts.stages[0] for s in plan.spans)
        return sum(
            cdiv(unpruned, manager.block_size)
            - cdiv(plan.num_slots(prompt, manager.segment), manager.block_size)
            for manager in self.kv_cache_manager.coordinator.single_type_managers
        )

    def add_request(self, request: Request) -> None:
        # Before super, which may count the request's blocks.
        if request.request_id not in self.requests:
            self._update_plan(request)
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)
        self._update_plan(session)
        if self._reads_question and session.request_id in self.plans:
            # The prompt has another last token now, so all of it is computed again.
            self._free_request_blocks(session)
            self.encoder_cache_manager.free(session)
            session.num_computed_tokens = 0

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        # A preemption does not call this: a resumed request needs its plan.
        self.plans.pop(request.request_id, None)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._holds_back = False
        scheduled = super().schedule(*args, **kwargs)
        self._reschedule_lost_encoder_inputs(scheduled)
        for new in scheduled.scheduled_new_reqs:
            new.mm_features = [
                self._without_covered_data(feature, new.num_computed_tokens)
                for feature in new.mm_features
            ]
        return scheduled if self.use_v2_model_runner else self._with_image_data(scheduled)

    def _without_covered_data(
        self, image: MultiModalFeatureSpec, num_computed_tokens: int
    ) -> MultiModalFeatureSpec:
        """An image as workers need it: without data if a prefix hit covers its visual tokens.

        vLLM sends the data of an image whose last text token is not computed, and our hits end
        before that token.
        """
        place = image.mm_position
        end = place.offset + place.length
        if place.is_embed is None or not place.offset < num_computed_tokens < end:
            return image
        if place.extract_embeds_range()[-1][1] >= num_computed_tokens:
            return image
        uses_mrope = self.vllm_config.model_config.uses_mrope
        (stripped,) = strip_covered_mm_data([image], end, uses_mrope)
        return stripped

    def _with_image_data(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """``scheduled`` with the data of images that model runner V1 does not have."""
        new = {request.req_id for request in scheduled.scheduled_new_reqs}
        data: dict[str, dict[int, MultiModalKwargsItem]] = {}
        for name, input_ids in scheduled.scheduled_encoder_inputs.items():
            request = self.requests[name]
            if request.num_preemptions and name not in new:
                features = request.mm_features
                data[name] = {i: item for i in input_ids if (item := features[i].data)}
        return StagedSchedulerOutput(**vars(scheduled), image_data=data) if data else scheduled

    def _allocate_encoder_inputs(
        self, request: Request, input_ids: list[int], *args: Any, **kwargs: Any
    ) -> None:
        super()._allocate_encoder_inputs(request, input_ids, *args, **kwargs)
        self._to_encode.setdefault(request.request_id, []).extend(input_ids)

    def _reschedule_lost_encoder_inputs(self, scheduled: SchedulerOutput) -> None:
        """Let the runner encode images of requests that were preempted in this same step.

        vLLM removes such a request from the step, but keeps its images marked as cached. The next
        request that needs them would stop the engine.
        """
        for name, input_ids in self._to_encode.items():
            request = self.requests.get(name)
            if request is None or name in scheduled.scheduled_encoder_inputs:
                continue
            cached = self.encoder_cache_manager.cached
            if lost := [i for i in input_ids if request.mm_features[i].identifier in cached]:
                scheduled.scheduled_encoder_inputs[name] = lost
        if scheduled.total_num_scheduled_tokens:  # otherwise the runner skips the step
            self._to_encode.clear()

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # vLLM 0.33 would schedule later requests now, and their prompts could fill each next
        # step too.
        if self._holds_back or request.request_id in self.encoder_cache_mismatch_reqs:
            return False
        if not super()._handle_blocked_waiting_request(request):
            return False
        hashes = request.block_hashes
        if not isinstance(hashes, PrefixHashes) or not hashes.plan.spans or not self._writes.keys:
            return True
        # Another request computes the same images in this step. In the next step this request
        # can copy the result; now it would compute them again.
        hashes.awaits_copy = False
        if request.num_computed_tokens == 0:
            self.kv_cache_manager.get_computed_blocks(request)
        return not hashes.awaits_copy

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # This step will not write the blocks that it registered, so no request may hit them.
        if block_ids := self._writes.block_ids.pop(request.request_id, None):
            self.kv_cache_manager.evict_blocks(block_ids)
        if (stats := request.prefill_stats) is not None:
            stats = request.prefill_stats = PreemptedPrefillStats(**vars(stats))
            stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        super()._preempt_request(request, *args, **kwargs)

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        plan = self.plans.get(request.request_id)
        if plan is None:
            return super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, *args, **kwargs
            )
        scheduled = self._schedule_whole_images(plan, request, num_computed_tokens, *args, **kwargs)
        num_new_tokens = scheduled[1]
        if num_new_tokens == 0 and request.status != RequestStatus.RUNNING:
            self._holds_back = True
        return scheduled

    def _schedule_whole_images(
        self,
        plan: RequestPlan,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """vLLM's choice of images and tokens, in which no pruned image is split."""
        # Tokens below which the request waits for another step.
        min_new_tokens = 0
        if self._reads_question:
            min_new_tokens = request.num_prompt_tokens - num_computed_tokens
        deferred: Any = [], 0, encoder_compute_budget, [], []
        if num_new_tokens < min_new_tokens:
            return deferred
        # vLLM's budget is in placeholders, but the encoder computes every patch.
        patches, placeholders = plan.patches_per_placeholder
        # vLLM may compute any image in parts. A pruned one is whole, or waits for a step.
        end = plan.last_whole_end(num_computed_tokens, num_computed_tokens + num_new_tokens)
        num_new_tokens = end - num_computed_tokens
        budget = encoder_compute_budget * placeholders // patches
        if encoder_compute_budget >= min(patches, self.max_num_encoder_input_tokens):
            # Images of a session may have different ratios: the longest must fit. A video may
            # have more patches than a step's whole budget: the model encodes it in parts.
            budget = max(budget, plan.largest_item)
        inputs, num_new_tokens, left, *others = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, budget, *args, **kwargs
        )
        used = (budget - left) * patches // placeholders
        encoder_compute_budget = max(encoder_compute_budget - used, 0)
        if num_new_tokens < min_new_tokens:
            # Not all of its images fit, so it must not hold those that are cached.
            self.encoder_cache_manager.free(request)
            return deferred
        return inputs, num_new_tokens, encoder_compute_budget, *others


class StagedAsyncScheduler(StagedScheduler, AsyncScheduler):
    """:class:`StagedScheduler` for asynchronous scheduling."""


def create_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """vLLM's scheduler of the configuration, with plans.

    A function, because vLLM decides about asynchronous scheduling after our start-up hook.
    """
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (StagedAsyncScheduler if is_async else StagedScheduler)(*args, **kwargs)
