"""SGLang's own scheduler, tree, allocators and row pool in one process, without a server.

Only the network, the metrics and the transformer are missing. Every step takes the scheduler's own
way through admission, prefill, decode, retraction and results; the forward pass is `Forward`'s.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers import scheduler as scheduler_module
from sglang.srt.managers.io_struct import AbortReq, PauseGenerationReqInput
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.managers.scheduler_components.weight_updater import (
    SchedulerWeightUpdaterManager,
)
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_context, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_tri.patches.cpu.allocator import make_allocator

VOCABULARY = 64
EOS = 1
LONGEST = 512
# Requests at once.
ROWS = 4

# SGLang reads it whenever it looks for a prefix.
FORCE_MISS = "SGLANG_RADIX_FORCE_MISS"
# Features of the scheduler that are off.
ABSENT = (
    "abort_on_priority_when_disabled",
    "enable_dp_attention",
    "enable_dynamic_chunking",
    "enable_fpm",
    "enable_hicache_storage",
    "enable_hierarchical_cache",
    "enable_hisparse",
    "enable_lora",
    "enable_overlap_mlx",
    "enable_pdmux",
    "enable_unified_memory",
    "is_hybrid_swa",
    "is_mixed_chunk",
    "require_mlp_sync",
    "schedule_low_priority_values_first",
    "_engine_paused",
)

# Computes a batch and returns its next tokens.
Forward = Callable[[ForwardBatch], Sequence[int]]
# Is told of a request that decodes next, or is retracted.
BeforeDecode = Callable[[Req], None]


@dataclass(frozen=True)
class Setup:
    """What a server is started with.

    Attributes:
        slots: size of the KV pool, whole pages.
        chunk: tokens prefilled at once, whole pages; None if there is no chunked prefill.
        optimism: share of its outstanding output that a running request is taken to need.
        preempts: whether requests of a higher priority take the place of others.
        forces_miss: whether prefixes that are found are ignored, a debugging feature of SGLang.
    """

    page_size: int
    overlap: bool
    slots: int
    chunk: int | None
    policy: str
    optimism: float
    preempts: bool
    forces_miss: bool


class Idle:
    """Stands for parts of a server that these histories do not use: any method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Loop(Scheduler):
    """The scheduler, with attributes in place of what its constructor would start."""

    def __init__(self, setup: Setup, forward: Forward, before_decode: BeforeDecode) -> None:
        self._before_decode = before_decode
        os.environ[FORCE_MISS] = str(int(setup.forces_miss))
        arguments = ServerArgs(
            model_path="dummy",
            device="cpu",
            attention_backend="torch_native",
            page_size=setup.page_size,
            disable_overlap_schedule=not setup.overlap,
        )
        publish(arguments, role="scheduler")
        get_context().override("histories", pp_max_micro_batch_size=ROWS)
        self._set_features(arguments)
        self._set_memory(setup)
        self._set_worker(forward)
        self._set_queues(setup)
        self._set_reporting()

    def _set_features(self, arguments: ServerArgs) -> None:
        self.server_args = arguments
        self.page_size = arguments.page_size
        self.enable_overlap = not arguments.disable_overlap_schedule
        self._war_barrier_enabled = False
        self.disaggregation_mode = DisaggregationMode.NULL
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.ps = SimpleNamespace(pp_size=1)
        self.is_generation = True
        self.dllm_config = self.draft_worker = self.hisparse_coordinator = None
        self.prefill_delayer = self.min_free_slots_delayer = self.lora_drainer = None
        self.scripted_scheduler_hook = self.forward_sleep_time = None
        self._confidence_budget_prepare = self.truncation_align_size = None
        self.max_queued_requests = None
        for name in ABSENT:
            setattr(self, name, False)

    def _set_memory(self, setup: Setup) -> None:
        self.req_to_token_pool = ReqToTokenPool(ROWS, LONGEST, "cpu", False)
        self.token_to_kv_pool_allocator = make_allocator(
            setup.slots,
            page_size=setup.page_size,
            dtype=torch.int64,
            device="cpu",
            kvcache=None,
            need_sort=False,
        )
        self.tree_cache = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=setup.page_size,
            )
        )

    def _set_worker(self, forward: Forward) -> None:
        self.model_config = SimpleNamespace(
            vocab_size=VOCABULARY, is_encoder_decoder=False, think_end_ids=None
        )
        worker = TpModelWorker.__new__(TpModelWorker)
        worker.is_draft_worker, worker.enable_spec = False, False
        worker.enable_overlap = self.enable_overlap
        worker.pp_group = SimpleNamespace(is_last_rank=True)
        worker.hicache_layer_transfer_counter = None
        worker.dllm_algorithm = None
        worker._model_runner = _Runner(self.server_args, forward)
        self.tp_worker = self.model_worker = worker
        self.future_map = FutureMap("cpu", self.spec_algorithm, self.req_to_token_pool)
        self.device_module = torch.cpu
        self.schedule_stream, self.forward_stream = torch.cpu.Stream(), torch.cpu.Stream()
        self.copy_stream = torch.cpu.Stream()
        self.forward_stream_ctx = torch.cpu.stream(self.forward_stream)
        self.copy_stream_ctx = torch.cpu.stream(self.copy_stream)
        self.batch_record_buf, self.batch_record_ct = [None] * 2, 0

    def _set_queues(self, setup: Setup) -> None:
        self.waiting_queue: list[Req] = []
        self.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
        self.last_batch = self.cur_batch_for_debug = None
        self.chunked_req = self._pending_chunked_abort_req = None
        self.result_queue: deque[Any] = deque()
        self.forward_ct = 0
        self.chunked_prefill_size = setup.chunk
        self.max_prefill_tokens = LONGEST
        self.max_running_requests, self.max_prefill_bs = ROWS, 0.0
        self.schedule_policy = setup.policy
        self.priority_scheduling_preemption_threshold = 0
        self.enable_priority_scheduling = setup.preempts
        self.init_schedule_policy()
        ratio = setup.optimism
        self.new_token_ratio_tracker = NewTokenRatioTracker(
            init=ratio, min=ratio, decay=0.0, current=ratio
        )

    def _set_reporting(self) -> None:
        self.grammar_manager = SimpleNamespace(
            has_waiting_grammars=lambda: False,
            abort_requests=lambda request: None,
            clear=lambda: None,
            grammar_queue=[],
        )
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=Idle())
        self.profiler_manager = self.load_inquirer = self.kv_events_publisher = Idle()
        self.dllm_manager = SimpleNamespace(any_staging_reqs=lambda: False)
        self.metrics_reporter = SimpleNamespace(
            num_generated_tokens=0,
            forward_ct_decode=0,
            num_retracted_reqs=0,
            enable_metrics=False,
            is_stats_logging_rank=False,
            current_scheduler_metrics_enabled=False,
            report_prefill_stats=lambda **kwargs: None,
            report_decode_stats=lambda *args, **kwargs: None,
            reset_metrics=lambda: None,
        )
        passes_on = SimpleNamespace(
            maybe_prepare_mlp_sync_batch=lambda batch, **kwargs: batch,
            prepare_for_forward=lambda batch, **kwargs: batch,
        )
        self.dp_attn_adapter = self.ngram_embedding_manager = passes_on
        self.batch_result_processor = SchedulerBatchResultProcessor(
            is_generation=True,
            disaggregation_mode=self.disaggregation_mode,
            enable_overlap=self.enable_overlap,
            enable_overlap_mlx=False,
            server_args=self.server_args,
            model_config=self.model_config,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
            req_to_token_pool=self.req_to_token_pool,
            decode_offload_manager=None,
            metrics_collector=None,
            metrics_reporter=self.metrics_reporter,
            draft_worker=None,
            model_worker=self.model_worker,
            logprob_result_processor=None,
            output_streamer=Idle(),
            abort_request=self.abort_request,
        )

    def step(self) -> None:
        """One turn of `event_loop_normal` or `event_loop_overlap`."""
        plan = self.get_next_batch_to_run(self.running_batch, self.last_batch)
        self.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            result = self.run_batch(batch)
            if self.enable_overlap:
                self.result_queue.append((batch.copy(), result))
            else:
                self.process_batch_result(batch, result)
        if self.enable_overlap and self.last_batch:
            self.process_batch_result(*self.result_queue.popleft())
        self.last_batch = batch

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        batch.filter_batch()
        for req in batch.reqs:
            self._before_decode(req)
        return super().update_running_batch(batch)

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """The scheduler's, without its counters."""
        processor = self.batch_result_processor
        if batch.forward_mode.is_decode():
            processor.process_batch_result_decode(batch, result)
        else:
            processor.process_batch_result_prefill(batch, result)

    def submit(
        self,
        rid: str,
        tokens: Sequence[int],
        most: int,
        priority: int,
        extra_key: str | None,
        overrides: dict[str, Any],
    ) -> Req:
        """Queue a request for at most `most` output tokens; `EOS` ends it earlier."""
        sampling = SamplingParams(
            max_new_tokens=most, temperature=0, custom_params={"kv_policy": overrides}
        )
        sampling.normalize(None)
        req = Req(
            rid,
            "",
            array("q", tokens),
            sampling,
            priority=priority,
            extra_key=extra_key,
            vocab_size=VOCABULARY,
            eos_token_ids={EOS},
        )
        self._add_request_to_queue(req)
        return req

    def abort(self, rid: str) -> None:
        self.abort_request(AbortReq(rid=rid))

    def retract(self) -> None:
        """A step in which the scheduler retracts a request, where two or more decode."""
        scheduler_module.TEST_RETRACT, scheduler_module.TEST_RETRACT_INTERVAL = True, 1
        try:
            self.step()
        finally:
            scheduler_module.TEST_RETRACT = False

    def retract_all(self) -> None:
        """What a pause with mode "retract" does, and the end of the pause."""
        self.pause_generation(PauseGenerationReqInput(mode="retract"))
        self._engine_paused = False

    def evict(self, slots: int) -> None:
        self.tree_cache.evict(EvictParams(num_tokens=slots))

    def take_all(self) -> torch.Tensor:
        """Every free slot."""
        allocator = self.token_to_kv_pool_allocator
        taken = allocator.alloc(allocator.available_size())
        return torch.empty(0, dtype=torch.int64) if taken is None else taken

    def give_back(self, slots: torch.Tensor) -> None:
        self.token_to_kv_pool_allocator.free(slots)

    def new_weights(self) -> None:
        """Weights were updated, and the caller did not want the cache to be flushed."""
        updated = SimpleNamespace(flush_cache=False)
        SchedulerWeightUpdaterManager.flush_cache_after_weight_update(None, updated)

    @property
    def idle(self) -> bool:
        return bool(self.is_fully_idle())


class _Runner:
    """What `TpModelWorker` and `ForwardBatch.init_new` ask of a model runner."""

    def __init__(self, arguments: ServerArgs, forward: Forward) -> None:
        self.server_args = arguments
        self.device = "cpu"
        self.is_draft_worker = self.prefill_aware_swa = False
        self.ngram_embedding_manager = SimpleNamespace(enabled=False)
        self.model_config = SimpleNamespace(model_is_mrope=False)
        self._forward = forward
        self._next: Sequence[int] = ()

    def forward(self, batch: ForwardBatch, **kwargs: Any) -> SimpleNamespace:
        self._next = self._forward(batch)
        return SimpleNamespace(
            logits_output=SimpleNamespace(customized_info=None),
            can_run_graph=False,
            expert_distribution_metrics=None,
            routed_experts_output=None,
            indexer_topk_output=None,
        )

    def sample(self, logits: Any, batch: ForwardBatch) -> torch.Tensor:
        return torch.tensor(self._next)
