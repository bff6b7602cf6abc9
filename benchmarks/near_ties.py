"""How often greedy speculation parts from per-step decoding because a window rounds differently from a single token.

The two are the same tokens wherever their logits are the same. In floating point a forward over W tokens may round
differently from one over a single token, so an argmax can flip where the two best logits nearly tie. For each dtype
this counts the sequences that part, and the margin between the two best combined logits where they first do.

    python benchmarks/near_ties.py --dtypes float32 bfloat16 --num-prompts 100

It prints a table to stderr and one JSON line to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from specproxy import ProxyTunedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prompts import demo_prompts, load_prompts


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs, or None; a sequence that ends early differs at its end."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def margin(logits: torch.Tensor) -> float:
    """Difference of the two largest of logits [V]."""
    best = logits.topk(2).values
    return float(best[0] - best[1])


def compare(model: ProxyTunedModel, prompts: list[str], max_new_tokens: int, num_draft_tokens: int) -> dict[str, Any]:
    """Run every prompt both ways and count where they part."""
    parted: list[float] = []
    margins: list[float] = []
    tokens = 0
    for prompt in prompts:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        common = {"max_new_tokens": max_new_tokens, "output_logits": True, "return_dict_in_generate": True}
        per_step = model.generate(ids, num_draft_tokens=0, **common)
        speculative = model.generate(ids, num_draft_tokens=num_draft_tokens, **common)
        expected = per_step.sequences[0, ids.shape[1] :].tolist()
        place = first_difference(speculative.sequences[0, ids.shape[1] :].tolist(), expected)
        tokens += len(expected) if place is None else place + 1
        steps = [margin(line[0]) for line in per_step.logits]
        margins += steps
        if place is not None:
            parted.append(steps[min(place, len(steps) - 1)])
    return {
        "sequences": len(prompts),
        "parted": len(parted),
        "tokens_compared": tokens,
        "margin_where_parted": {
            "median": statistics.median(parted) if parted else None,
            "largest": max(parted, default=None),
        },
        "median_margin_everywhere": statistics.median(margins),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", default="arithmetic", choices=("arithmetic", "python"))
    parser.add_argument(
        "--prompts", type=Path, help="JSON lines with question or prompt; the demo task's own otherwise"
    )
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    prompts = (
        load_prompts(arguments.prompts)[: arguments.num_prompts]
        if arguments.prompts
        else demo_prompts(arguments.demo, arguments.num_prompts)
    )
    result: dict[str, Any] = {}
    for dtype in arguments.dtypes:
        model = ProxyTunedModel.demo(arguments.demo, device=arguments.device, dtype=getattr(torch, dtype))
        result[dtype] = compare(model, prompts, arguments.max_new_tokens, arguments.num_draft_tokens)
        parted, margins = result[dtype]["parted"], result[dtype]["margin_where_parted"]
        print(f"{dtype:9s} {parted} of {len(prompts)} sequences part, at margins {margins}", file=sys.stderr)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"demo": arguments.demo, "device": arguments.device, "dtypes": result, "versions": versions}))


if __name__ == "__main__":
    main()
