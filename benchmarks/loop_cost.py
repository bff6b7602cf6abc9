"""What the decode loop itself costs, where every draft is accepted and the models' costs are known.

The base is the small model plus identity layers (their output projections are zero), so that base, expert and
anti-expert follow one law at a cost ratio of our choosing: every draft survives, and what is left to see is the
runtime. Three ways of decoding run in turn, repeat by repeat, and ratios are medians of paired runs:

    speculative   this runtime, `--num-draft-tokens` drafts a cycle
    per-step      this runtime, 0 drafts
    plain loop    three models over Transformers' DynamicCache, as written by hand (`benchmarks/baselines.py`)

Run it on an idle machine: `python benchmarks/loop_cost.py`. It prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from specproxy import ProxyTunedModel

sys.path.insert(0, str(Path(__file__).parent))

from baselines import plain_loop_batched


def identity_grown_trio(
    hidden: int, vocab_size: int, small_layers: int, base_layers: int
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, LlamaForCausalLM]:
    """A base that equals its small models in function, but not in cost.

    Returns:
        base, expert, anti_expert: float32 Llama models of random weights; the base's further layers add zero.
    """
    torch.manual_seed(0)

    def build(layers: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            vocab_size=vocab_size,
            max_position_embeddings=4096,
            initializer_range=0.05,
            eos_token_id=None,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).eval()

    small, base = build(small_layers), build(base_layers)
    base.load_state_dict(small.state_dict(), strict=False)
    for layer in base.model.layers[small_layers:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return base, small, copy.deepcopy(small)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one run, and its result."""
    start = perf_counter()
    result = run()
    return perf_counter() - start, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--small-layers", type=int, default=2)
    parser.add_argument("--base-layers", type=int, default=20)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--do-sample", action="store_true", help="sample at temperature 1 instead of greedy decoding")
    parser.add_argument("--acceptance", default="rejection")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    base, expert, anti_expert = identity_grown_trio(
        arguments.hidden, arguments.vocab_size, arguments.small_layers, arguments.base_layers
    )
    model = ProxyTunedModel(base, expert, anti_expert)
    prompts = torch.randint(0, arguments.vocab_size, (arguments.batch_size, arguments.prompt_length))
    common = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample}
    ours = {**common, "acceptance": arguments.acceptance, "seed": 0, "return_dict_in_generate": True}

    runs: dict[str, Callable[[], Any]] = {
        "speculative": lambda: model.generate(prompts, num_draft_tokens=arguments.num_draft_tokens, **ours),
        "per_step": lambda: model.generate(prompts, num_draft_tokens=0, **ours),
        "plain_loop": lambda: plain_loop_batched([base, expert, anti_expert], prompts, **common),
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    forward_share: dict[str, list[float]] = {"speculative": [], "per_step": []}
    acceptance_rate = 0.0
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            elapsed, output = timed(run)
            seconds[name].append(elapsed)
            if name in forward_share:
                spent = output.speculation.seconds
                forward_share[name].append(1 - spent["other"] / spent["total"])
            if name == "speculative":
                acceptance_rate = output.speculation.acceptance_rate

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    tokens = arguments.max_new_tokens * arguments.batch_size
    result = {
        "acceptance_rate": acceptance_rate,
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "speculative_over_per_step": ratio("per_step", "speculative"),
        "per_step_over_plain_loop": ratio("plain_loop", "per_step"),
        "forward_share": {name: statistics.median(values) for name, values in forward_share.items()},
        "arguments": vars(arguments),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name, value in result["tokens_per_second"].items():  # type: ignore[attr-defined]
        print(f"{name:12s} {value:8.1f} tokens/s", file=sys.stderr)
    print(f"speculative over per-step  {result['speculative_over_per_step']:.2f}", file=sys.stderr)
    print(f"per-step over plain loop   {result['per_step_over_plain_loop']:.2f}", file=sys.stderr)
    for name, share in result["forward_share"].items():  # type: ignore[attr-defined]
        print(f"forwards / total, {name:12s} {share:.3f}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
