"""All hooks on SGLang, by the class or module of SGLang that they are on."""

from __future__ import annotations

from sglang_tri.patches.hooks import AFTER, AROUND, BEFORE, Hook

# When a hook is installed: at every start of SGLang; in the main process and in the scheduler
# process of a server whose policy is on; wherever the CPU platform runs a model.
ENTRY, MAIN, SCHEDULER, CPU = "entry", "main", "scheduler", "cpu"


def _on(stage: str, owner: str, *rows: tuple[str, str, str, str, str]) -> list[Hook]:
    """Hooks on functions of `owner`: name, kind, hook, leading parameters, and what it is for."""
    return [
        Hook(stage, f"sglang.srt.{owner}.{name}", kind, hook, tuple(parameters.split()), purpose)
        for name, kind, hook, parameters, purpose in rows
    ]


# fmt: off
TABLE = (
    *_on(ENTRY, "server_args.ServerArgs",
         ("add_cli_args", AFTER, "server.add_flags", "parser", "add the flags"),
         ("from_cli_args", AROUND, "server.parse_flags", "cls args",
          "read the flags, refuse what cannot work"),
         ("__init__", AROUND, "server.take_keywords", "self",
          "the same settings for sgl.Engine(...)")),
    *_on(ENTRY, "managers.scheduler.Scheduler",
         ("__init__", AROUND, "scheduler.start", "self server_args",
          "install the scheduler's hooks, build the engine")),
    *_on(MAIN, "entrypoints.engine.Engine",
         ("_launch_subprocesses", AFTER, "server.confirm", "cls server_args",
          "confirm that the scheduler runs the policy")),
    *_on(MAIN, "managers.tokenizer_manager.TokenizerManager",
         ("generate_request", BEFORE, "arrival.check_shape", "self obj",
          "refuse what cannot be told apart into requests"),
         ("_init_req_state", BEFORE, "arrival.check_fields", "self obj",
          "refuse what a request may not ask for"),
         ("_create_tokenized_object", AROUND, "arrival.pack", "self obj",
          "refuse what the scheduler could not read"),
         ("get_internal_state", AROUND, "arrival.add_refused", "self",
          "count refused requests in /server_info"),
         ("_handle_batch_output", BEFORE, "server.collect", "self recv_obj",
          "take the request's report from the output"),
         ("_wait_one_response", AROUND, "server.deliver", "self obj",
          "put it into meta_info as a dict")),
    *_on(MAIN, "entrypoints.openai.serving_base.OpenAIServingBase",
         ("_compute_extra_key", AROUND, "arrival.join_key", "self request",
          "tell salt and key apart")),
    *_on(SCHEDULER, "model_executor.model_runner.ModelRunner",
         ("alloc_memory_pool", BEFORE, "scheduler.reserve_workspace", "self memory_pool_config",
          "reserve scratch before the KV pool is sized")),
    *_on(SCHEDULER, "managers.scheduler.Scheduler",
         ("_add_request_to_queue", BEFORE, "scheduler.queue", "self req is_retracted",
          "give a request its policy state"),
         ("init_req_max_new_tokens", AROUND, "scheduler.bound_output", "self req",
          "let outputs be longer than the pool"),
         ("_get_new_batch_prefill_raw", AFTER, "scheduler.requeue_preempted", "self",
          "requeue requests preempted for a batch that never ran"),
         ("flush_cache", AFTER, "radix.forget_flushed", "self",
          "forget all when the cache is flushed"),
         ("get_init_info", AFTER, "scheduler.report_ready", "self",
          "report the policy to the main process"),
         ("get_internal_state", AFTER, "scheduler.report_state", "self",
          "counters in /server_info")),
    *_on(SCHEDULER, "managers.schedule_policy.PrefillAdder",
         ("add_one_req", AROUND, "scheduler.cut_chunk", "self req",
          "reserve what a request will hold"),
         ("add_chunked_req", AROUND, "scheduler.cut_chunk", "self req",
          "the same behind the last chunk of a prompt"),
         ("preempt_to_schedule", AROUND, "scheduler.preempt", "self req",
          "the same for a request that preempts others"),
         ("_get_running_request_total_token_offset", AROUND, "scheduler.reserve_running",
          "self req", "reserve what a running request will take until its next round")),
    *_on(SCHEDULER, "managers.schedule_batch.ScheduleBatch",
         ("check_decode_mem", BEFORE, "scheduler.plan_rounds", "self selected_indices",
          "plan rounds: shrink lengths, free slots"),
         ("prepare_for_extend", AFTER, "radix.admit", "self", "count cached tokens, not slots")),
    *_on(SCHEDULER, "managers.tp_worker.TpModelWorker",
         ("forward_batch_generation", BEFORE, "scheduler.run_rounds", "self batch",
          "run rounds on the forward stream")),
    *_on(SCHEDULER, "model_executor.forward_batch_info.ForwardBatch",
         ("init_new", AFTER, "scheduler.shift_positions", "cls batch",
          "keep RoPE positions logical")),
    *_on(SCHEDULER, "mem_cache.common",
         ("release_kv_cache", AROUND, "radix.release", "req tree_cache is_insert",
          "give compressed generations to the radix tree under ids of their own")),
    *_on(SCHEDULER, "managers.schedule_batch.Req",
         ("init_next_round_input", AROUND, "radix.start_prefill", "self tree_cache",
          "prefill behind the compressed history found"),
         ("_refresh_fill_ids", AROUND, "radix.refresh_ids", "self",
          "count slots in what is to be prefilled")),
    *_on(SCHEDULER, "mem_cache.radix_cache.RadixCache",
         ("match_prefix", AROUND, "radix.match_prefix", "self params", "find compressed history"),
         ("cache_unfinished_req", AROUND, "radix.cache_unfinished", "self req chunked",
          "keep what a request generated before private"),
         ("_delete_leaf", AFTER, "radix.forget_deleted", "self node",
          "forget what the tree evicts")),
    *_on(SCHEDULER, "managers.schedule_policy",
         ("match_prefix_for_req", AFTER, "radix.count_matched", "tree_cache req",
          "weigh a waiting request's prefix by its tokens")),
    *_on(SCHEDULER, "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
         ("flush_cache_after_weight_update", AFTER, "radix.forget_outdated", "self recv_req",
          "forget all when weights change")),
    *_on(SCHEDULER, "managers.scheduler_components.pool_stats_observer.PoolStats",
         ("get_decode_usage_msg_parts", AFTER, "scheduler.report_usage", "self",
          "counters in the decode log line")),
    *_on(CPU, "lora.lora_manager.LoRAManager",
         ("__init__", AROUND, "cpu.lora.unpin", "self", "LoRA without pinned memory"),
         ("load_lora_adapter", AROUND, "cpu.lora.unpin", "self", "LoRA without pinned memory"),
         ("load_lora_adapter_from_tensors", AROUND, "cpu.lora.unpin", "self",
          "LoRA without pinned memory"),
         ("prepare_lora_batch", AROUND, "cpu.lora.unpin", "self", "LoRA without pinned memory")),
)
# fmt: on


def stage(name: str) -> list[Hook]:
    """All hooks of one stage."""
    return [hook for hook in TABLE if hook.stage == name]
