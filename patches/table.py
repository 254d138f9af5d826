"""All hooks on SGLang."""

from __future__ import annotations

from sglang_tri.patches.hooks import AFTER, AROUND, BEFORE, Hook

# When a hook is installed: at every start of SGLang; in the main process and in the scheduler
# process of a server whose policy is on; wherever the CPU platform runs a model.
ENTRY, MAIN, SCHEDULER, CPU = "entry", "main", "scheduler", "cpu"

_SRT = "sglang.srt."
_ARGS = _SRT + "server_args.ServerArgs."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_BATCH = _SRT + "managers.schedule_batch.ScheduleBatch."
_ADDER = _SRT + "managers.schedule_policy.PrefillAdder."
_WORKER = _SRT + "managers.tp_worker.TpModelWorker."
_RUNNER = _SRT + "model_executor.model_runner.ModelRunner."
_FORWARD = _SRT + "model_executor.forward_batch_info.ForwardBatch."
_TOKENIZER = _SRT + "managers.tokenizer_manager.TokenizerManager."
_POOL = _SRT + "managers.scheduler_components.pool_stats_observer.PoolStats."
_OPENAI = _SRT + "entrypoints.openai.serving_base.OpenAIServingBase."
_ENGINE = _SRT + "entrypoints.engine.Engine."
_COMMON = _SRT + "mem_cache.common."
_REQ = _SRT + "managers.schedule_batch.Req."
_TREE = _SRT + "mem_cache.radix_cache.RadixCache."
_LORA = _SRT + "lora.lora_manager.LoRAManager."
_WEIGHTS = _SRT + "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."

# fmt: off
TABLE = (
    Hook(ENTRY, _ARGS + "add_cli_args", AFTER, "server.add_flags", ("parser",),
         "add the flags"),
    Hook(ENTRY, _ARGS + "from_cli_args", AROUND, "server.parse_flags", ("cls", "args"),
         "read the flags, refuse what cannot work"),
    Hook(ENTRY, _ARGS + "__init__", AROUND, "server.take_keywords", ("self",),
         "the same settings for sgl.Engine(...)"),
    Hook(ENTRY, _SCHEDULER + "__init__", AROUND, "scheduler.start", ("self", "server_args"),
         "install the scheduler's hooks, build the runtime"),
    Hook(MAIN, _ENGINE + "_launch_subprocesses", AFTER, "server.confirm", ("cls", "server_args"),
         "confirm that the scheduler runs the policy"),
    Hook(MAIN, _TOKENIZER + "generate_request", BEFORE, "arrival.check_shape", ("self", "obj"),
         "refuse what cannot be told apart into requests"),
    Hook(MAIN, _TOKENIZER + "_init_req_state", BEFORE, "arrival.check_fields", ("self", "obj"),
         "refuse what a request may not ask for"),
    Hook(MAIN, _TOKENIZER + "_create_tokenized_object", AROUND, "arrival.pack", ("self", "obj"),
         "refuse what the scheduler could not read"),
    Hook(MAIN, _OPENAI + "_compute_extra_key", AROUND, "arrival.join_key", ("self", "request"),
         "tell salt and key apart"),
    Hook(MAIN, _TOKENIZER + "get_internal_state", AROUND, "arrival.add_refused", ("self",),
         "count refused requests in /server_info"),
    Hook(MAIN, _TOKENIZER + "_handle_batch_output", BEFORE, "server.collect", ("self", "recv_obj"),
         "take the request's report from the output"),
    Hook(MAIN, _TOKENIZER + "_wait_one_response", AROUND, "server.deliver", ("self", "obj"),
         "put it into meta_info as a dict"),
    Hook(SCHEDULER, _RUNNER + "alloc_memory_pool", BEFORE, "scheduler.reserve_workspace",
         ("self", "memory_pool_config"),
         "reserve scratch before the KV pool is sized"),
    Hook(SCHEDULER, _SCHEDULER + "_add_request_to_queue", BEFORE, "scheduler.queue",
         ("self", "req", "is_retracted"),
         "give a request its policy state"),
    Hook(SCHEDULER, _SCHEDULER + "init_req_max_new_tokens", AROUND, "scheduler.bound_output",
         ("self", "req"),
         "let outputs be longer than the pool"),
    Hook(SCHEDULER, _ADDER + "add_one_req", AROUND, "scheduler.cut_chunk", ("self", "req"),
         "reserve what a request will hold"),
    Hook(SCHEDULER, _ADDER + "add_chunked_req", AROUND, "scheduler.cut_chunk", ("self", "req"),
         "the same behind the last chunk of a prompt"),
    Hook(SCHEDULER, _ADDER + "preempt_to_schedule", AROUND, "scheduler.preempt", ("self", "req"),
         "the same for a request that preempts others"),
    Hook(SCHEDULER, _SCHEDULER + "_get_new_batch_prefill_raw", AFTER, "scheduler.requeue_preempted",
         ("self",),
         "requeue requests preempted for a batch that never ran"),
    Hook(SCHEDULER, _ADDER + "_get_running_request_total_token_offset", AROUND,
         "scheduler.reserve_running", ("self", "req"),
         "reserve what a running request will take until its next round"),
    Hook(SCHEDULER, _BATCH + "check_decode_mem", BEFORE, "scheduler.plan_rounds",
         ("self", "selected_indices"),
         "plan rounds: shrink lengths, free slots"),
    Hook(SCHEDULER, _WORKER + "forward_batch_generation", BEFORE, "scheduler.run_rounds",
         ("self", "batch"),
         "run rounds on the forward stream"),
    Hook(SCHEDULER, _FORWARD + "init_new", AFTER, "scheduler.shift_positions", ("cls", "batch"),
         "keep RoPE positions logical"),
    Hook(SCHEDULER, _COMMON + "release_kv_cache", AROUND, "radix.release",
         ("req", "tree_cache", "is_insert"),
         "give compressed generations to the radix tree under ids of their own"),
    Hook(SCHEDULER, _REQ + "init_next_round_input", AROUND, "radix.start_prefill",
         ("self", "tree_cache"),
         "prefill behind the compressed history found"),
    Hook(SCHEDULER, _REQ + "_refresh_fill_ids", AROUND, "radix.refresh_ids", ("self",),
         "count slots in what is to be prefilled"),
    Hook(SCHEDULER, _TREE + "match_prefix", AROUND, "radix.match_prefix", ("self", "params"),
         "find compressed history"),
    Hook(SCHEDULER, _SRT + "managers.schedule_policy.match_prefix_for_req", AFTER,
         "radix.count_matched", ("tree_cache", "req"),
         "weigh a waiting request's prefix by its tokens"),
    Hook(SCHEDULER, _BATCH + "prepare_for_extend", AFTER, "radix.admit", ("self",),
         "count cached tokens, not slots"),
    Hook(SCHEDULER, _TREE + "cache_unfinished_req", AROUND, "radix.cache_unfinished",
         ("self", "req", "chunked"),
         "keep what a request generated before private"),
    Hook(SCHEDULER, _TREE + "_delete_leaf", AFTER, "radix.forget_deleted", ("self", "node"),
         "forget what the tree evicts"),
    Hook(SCHEDULER, _SCHEDULER + "flush_cache", AFTER, "radix.forget_flushed", ("self",),
         "forget all when the cache is flushed"),
    Hook(SCHEDULER, _WEIGHTS + "flush_cache_after_weight_update", AFTER, "radix.forget_outdated",
         ("self", "recv_req"),
         "forget all when weights change"),
    Hook(SCHEDULER, _SCHEDULER + "get_init_info", AFTER, "scheduler.report_ready", ("self",),
         "report the policy to the main process"),
    Hook(SCHEDULER, _SCHEDULER + "get_internal_state", AFTER, "scheduler.report_state", ("self",),
         "counters in /server_info"),
    Hook(SCHEDULER, _POOL + "get_decode_usage_msg_parts", AFTER, "scheduler.report_usage",
         ("self",),
         "counters in the decode log line"),
    Hook(CPU, _LORA + "__init__", AROUND, "cpu.lora.unpin", ("self",),
         "LoRA without pinned memory"),
    Hook(CPU, _LORA + "load_lora_adapter", AROUND, "cpu.lora.unpin", ("self",),
         "LoRA without pinned memory"),
    Hook(CPU, _LORA + "load_lora_adapter_from_tensors", AROUND, "cpu.lora.unpin", ("self",),
         "LoRA without pinned memory"),
    Hook(CPU, _LORA + "prepare_lora_batch", AROUND, "cpu.lora.unpin", ("self",),
         "LoRA without pinned memory"),
)
# fmt: on


def stage(name: str) -> list[Hook]:
    """All hooks of one stage."""
    return [hook for hook in TABLE if hook.stage == name]
