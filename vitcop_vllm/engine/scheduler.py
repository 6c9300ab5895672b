"""vLLM's schedulers, told each request's plan."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.kv_cache import StagedKVCacheManager
from vitcop_vllm.pruning.budgets import SELECTORS
from vitcop_vllm.pruning.identity import plan_request
from vitcop_vllm.pruning.plan import RequestPlan


class StagedScheduler(Scheduler):
    """Keeps the plans of unfinished requests and never splits a visual span.

    Nor, where the selector reads the question, the prompt of a pruned picture: its last
    token and all before it must be there when the picture's tokens are chosen.

    Attributes:
        plans: Request id -> plan, for requests with pruned pictures.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config.model_config.hf_config)
        self._reads_question = SELECTORS[settings.selector].reads_question
        self.plans: dict[str, RequestPlan] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, StagedKVCacheManager):
                manager.plans = self.plans

    def _update_plan(self, request: Request) -> None:
        plan = plan_request(request.mm_features)
        if plan is not None:
            self.plans[request.request_id] = plan

    def add_request(self, request: Request) -> None:
        # Before vLLM sees it: the first thing it may do is count the request's blocks.
        if request.request_id not in self.requests:
            self._update_plan(request)
        super().add_request(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        super()._update_request_as_session(session, update)
        self._update_plan(session)
        if self._reads_question and session.request_id in self.plans:
            # The prompt has another last token now: it is computed again, as one.
            self._free_request_blocks(session)
            self.encoder_cache_manager.free(session)
            session.num_computed_tokens = 0

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        # Not at preemption, which frees blocks too: a resumed request needs its plan.
        self.plans.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        plan = self.plans.get(request.request_id)
        # Tokens below which the request waits for another step.
        least = 0
        if plan is not None and self._reads_question:
            least = request.num_prompt_tokens - num_computed_tokens
        not_now: Any = [], 0, encoder_compute_budget, [], []
        if num_new_tokens < least:
            return not_now
        if plan is not None:
            # vLLM rolls a chunk back to before a span it would cut, except where the chunk
            # begins at that span and the budget left over by others is too small for it.
            end = plan.last_whole_end(num_computed_tokens, num_computed_tokens + num_new_tokens)
            num_new_tokens = end - num_computed_tokens
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )
        if scheduled[1] < least:
            # No room for all its pictures: nor may it hold on to those that are there.
            self.encoder_cache_manager.free(request)
            return not_now
        return scheduled


class StagedAsyncScheduler(StagedScheduler, AsyncScheduler):
    """The same for vLLM's asynchronous scheduler."""


def create_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler vLLM would have chosen, with plans.

    A function, because which one it is is settled after our start-up hook has run.
    """
    is_async = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (StagedAsyncScheduler if is_async else StagedScheduler)(*args, **kwargs)
