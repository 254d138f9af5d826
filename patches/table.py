"""All hooks on SGLang."""

from __future__ import annotations

from sglang_tri.patches import decode, flags, launch, lifecycle, request_lifetime, responses
from sglang_tri.patches.hooks import AFTER, AROUND, BEFORE, Hook

# When a hook is installed: at every start of SGLang; in the main process and in the scheduler
# process of a server whose policy is on.
ENTRY, MAIN, SCHEDULER = "entry", "main", "scheduler"

_SRT = "sglang.srt."
_ARGS = _SRT + "server_args.ServerArgs."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_BATCH = _SRT + "managers.schedule_batch.ScheduleBatch."
_WORKER = _SRT + "managers.tp_worker.TpModelWorker."
_FORWARD = _SRT + "model_executor.forward_batch_info.ForwardBatch."
_TOKENIZER = _SRT + "managers.tokenizer_manager.TokenizerManager."
_POOL = _SRT + "managers.scheduler_components.pool_stats_observer.PoolStats."
_ENGINE = _SRT + "entrypoints.engine.Engine."
_COMMON = _SRT + "mem_cache.common."

# fmt: off
TABLE = (
    Hook(ENTRY, _ARGS + "add_cli_args", AFTER, flags.add_flags, ("parser",),
         "add the flags"),
    Hook(ENTRY, _ARGS + "from_cli_args", AROUND, flags.parse_flags, ("cls", "args"),
         "read the flags, refuse what cannot work"),
    Hook(ENTRY, _ARGS + "__init__", AROUND, flags.take_keywords, ("self",),
         "the same settings for sgl.Engine(...)"),
    Hook(ENTRY, _SCHEDULER + "__init__", AROUND, lifecycle.start_scheduler, ("self", "server_args"),
         "install the scheduler's hooks, build the runtime"),
    Hook(MAIN, _ENGINE + "_launch_subprocesses", AFTER, launch.confirm, ("cls", "server_args"),
         "confirm that the scheduler runs the policy"),
    Hook(MAIN, _TOKENIZER + "_handle_batch_output", BEFORE, responses.collect, ("self", "recv_obj"),
         "take the request's report from the output"),
    Hook(MAIN, _TOKENIZER + "_wait_one_response", AROUND, responses.deliver, ("self", "obj"),
         "put it into meta_info as a dict"),
    Hook(SCHEDULER, _SCHEDULER + "_add_request_to_queue", BEFORE, request_lifetime.admit,
         ("self", "req", "is_retracted"),
         "give a request its policy state"),
    Hook(SCHEDULER, _BATCH + "check_decode_mem", BEFORE, decode.plan_rounds,
         ("self", "selected_indices"),
         "plan rounds: shrink lengths, free slots"),
    Hook(SCHEDULER, _WORKER + "forward_batch_generation", BEFORE, decode.run_rounds,
         ("self", "batch"),
         "run rounds on the forward stream"),
    Hook(SCHEDULER, _FORWARD + "init_new", AFTER, decode.shift_positions, ("cls", "batch"),
         "keep RoPE positions logical"),
    Hook(SCHEDULER, _COMMON + "release_kv_cache", AROUND, request_lifetime.release,
         ("req", "tree_cache", "is_insert"),
         "keep evicted generations out of the radix tree"),
    Hook(SCHEDULER, _SCHEDULER + "get_init_info", AFTER, responses.report_ready, ("self",),
         "report the policy to the main process"),
    Hook(SCHEDULER, _SCHEDULER + "get_internal_state", AFTER, responses.report_state, ("self",),
         "counters in /server_info"),
    Hook(SCHEDULER, _POOL + "get_decode_usage_msg_parts", AFTER, responses.report_usage, ("self",),
         "counters in the decode log line"),
)
# fmt: on


def stage(name: str) -> list[Hook]:
    """All hooks of one stage."""
    return [hook for hook in TABLE if hook.stage == name]
