"""One engine per process: a job in JSON on standard input, its result in JSON in the file that the job names.

A job: `folder`, `prompts` (lists of ids), `sampling` (of SamplingParams), `num_draft_tokens`, `engine` (of LLM),
`result`, and `repair_expand`: whether vLLM's CPU backend is mended first (vllm-project/vllm issue 55005).
The result: `tokens` per prompt and sample, and the `counters` of vLLM's metrics.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def repair_expand() -> None:
    """Give rejection sampling on a CPU its temperatures, which vLLM 0.32 leaves uninitialised there."""
    import vllm.v1.sample.rejection_sampler

    def expand(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):  # type: ignore[no-untyped-def]
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.where(x != replace_from, replace_to).repeat_interleave(counts.long(), output_size=num_tokens)

    vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = expand


def main() -> None:
    """Run the job."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from specproxy.integrations.vllm.composite import read_composite, speculative_config

    job = json.load(sys.stdin)
    if job.get("repair_expand"):
        repair_expand()
    engine = job.get("engine", {})
    if job["num_draft_tokens"]:
        with open(os.path.join(job["folder"], "config.json"), encoding="utf-8") as file:
            composite = read_composite(json.load(file), job["folder"])
        engine["speculative_config"] = speculative_config(composite, job["num_draft_tokens"])
    engine = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 8} | engine
    llm = LLM(job["folder"], disable_log_stats=False, **engine)
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]],
        SamplingParams(**job["sampling"]),
        use_tqdm=False,
    )
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    tokens = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
    with open(job["result"], "w", encoding="utf-8") as file:
        json.dump({"tokens": tokens, "counters": counters}, file)


if __name__ == "__main__":
    main()
