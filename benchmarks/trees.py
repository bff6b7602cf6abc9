"""Tokens a cycle of token trees beside chains of the same depth, and how often the target's token is which guess.

Nothing here reads a clock. Under greedy decoding and `coupled` the texts of all ways of drafting are those of per-step
decoding, which is asserted for each (texts that part at a near-tie, in float32, are counted), so that the figures
compare the same tokens. `rejection` has a text of its own.

    python benchmarks/trees.py --demo python --num-prompts 40 --max-new-tokens 96 --depths 4 --nodes 16 32 63

It prints tables to stderr and one JSON line to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from specproxy import ProxyTunedModel
from specproxy.tree import TreeShape
from specproxy_kernels import gumbel_noise, row_keys
from specproxy_kernels.noise import PURPOSE_TOKEN

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prompts import demo_prompts

RANKS = 8
LAWS: dict[str, dict[str, Any]] = {
    "coupled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "acceptance": "coupled"},
    "greedy": {"do_sample": False},
    "rejection": {"do_sample": True, "temperature": 1.0, "top_k": 0, "acceptance": "rejection"},
}


def decode(
    model: ProxyTunedModel, prompts: list[torch.Tensor], count: int, **settings: Any
) -> tuple[list[list[int]], list[Any]]:
    """New tokens and statistics of every prompt by itself; the prompt's place is its seed."""
    texts, statistics = [], []
    for place, ids in enumerate(prompts):
        output: Any = model.generate(
            ids, max_new_tokens=count, seed=[place], eos_token_id=[], return_dict_in_generate=True, **settings
        )
        texts.append(output.sequences[0, ids.shape[1] :].tolist())
        statistics.append(output.speculation)
    return texts, statistics


@torch.inference_mode()
def rank_counts(model: ProxyTunedModel, prompts: list[torch.Tensor], texts: list[list[int]], noisy: bool) -> list[int]:
    """How often a text's token is the expert's guess of each rank; the last entry counts all that come behind.

    Args:
        model: whose expert guesses.
        prompts, texts: what every guess follows.
        noisy: guesses are the largest logits + noise, as under `coupled`, and not the largest logits.
    """
    counts = [0] * (RANKS + 1)
    for place, (ids, text) in enumerate(zip(prompts, texts, strict=True)):
        tokens = torch.tensor(text)
        whole = torch.cat([ids, tokens[None].to(ids.device)], dim=1)
        logits = model.expert(input_ids=whole).logits[0, ids.shape[1] - 1 : -1, : model.vocab_size].double().cpu()
        if noisy:
            index = torch.arange(len(text))[None]
            logits += gumbel_noise(row_keys([place], [0]), index, PURPOSE_TOKEN, model.vocab_size)[0]
        ranks = (logits > logits.gather(1, tokens[:, None])).sum(-1).clamp(max=RANKS)
        counts = [a + b for a, b in zip(counts, ranks.bincount(minlength=RANKS + 1).tolist(), strict=True)]
    return counts


def measure(
    model: ProxyTunedModel, prompts: list[str], count: int, depths: list[int], nodes: list[int]
) -> dict[str, Any]:
    """Rank acceptance, and a line for every way of drafting."""
    ids = [model.tokenizer(prompt, return_tensors="pt").input_ids.to(model.device) for prompt in prompts]
    lines: list[dict[str, Any]] = []
    acceptance: dict[str, list[float]] = {}
    for law, settings in LAWS.items():
        per_step = None
        if law != "rejection":
            per_step, _ = decode(model, ids, count, num_draft_tokens=0, **settings)
            counts = rank_counts(model, ids, per_step, noisy=law == "coupled")
            acceptance[law] = [times / sum(counts) for times in counts[:RANKS]]
        for depth in depths:
            chain = None
            for num_nodes in [0, *(nodes if per_step is not None else [])]:
                texts, statistics = decode(
                    model, ids, count, num_draft_tokens=depth, num_tree_tokens=num_nodes, **settings
                )
                cycles = sum(call.num_cycles for call in statistics)
                rate = sum(call.num_new_tokens for call in statistics) / cycles
                chain = rate if chain is None else chain
                apart = None if per_step is None else sum(a != b for a, b in zip(texts, per_step, strict=True))
                lines.append(
                    {
                        "law": law,
                        "depth": depth,
                        "nodes": num_nodes,
                        "tokens_a_cycle": rate,
                        "over_the_chain": rate / chain,
                        "texts_apart": apart,
                    }
                )
    return {"rank_acceptance": acceptance, "drafting": lines, "forecasts": _forecasts(acceptance, depths, nodes)}


def _forecasts(acceptance: dict[str, list[float]], depths: list[int], nodes: list[int]) -> list[dict[str, Any]]:
    """Expected tokens of chains and of the best trees for the measured ranks, if levels were independent."""
    lines = []
    for law, ranks in acceptance.items():
        for depth in depths:
            shapes = [TreeShape.chain(depth), *(TreeShape.best_tree(ranks, count, depth) for count in nodes)]
            for count, shape in zip([0, *nodes], shapes, strict=True):
                expected = shape.expected_tokens(ranks)
                lines.append({"law": law, "depth": depth, "nodes": count, "expected_tokens": expected})
    return lines


def show(record: dict[str, Any], console: Console) -> None:
    """Print what was measured as tables."""
    table = Table("law", *(f"rank {rank}" for rank in range(RANKS)), title="the target's token among the guesses")
    for law, shares in record["rank_acceptance"].items():
        table.add_row(law, *(f"{share:.1%}" for share in shares))
    console.print(table)
    table = Table("law", "depth", "nodes", "tokens a cycle", "over the chain", "texts apart from per-step")
    for line in record["drafting"]:
        table.add_row(
            line["law"],
            str(line["depth"]),
            str(line["nodes"] or "chain"),
            f"{line['tokens_a_cycle']:.2f}",
            f"{line['over_the_chain']:.2f}",
            "-" if line["texts_apart"] is None else str(line["texts_apart"]),
        )
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", default="python", choices=("arithmetic", "python"))
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--depths", type=int, nargs="+", default=[4])
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 32, 63])
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    options = parser.parse_args()
    model = ProxyTunedModel.demo(options.demo, dtype=getattr(torch, options.dtype))
    prompts = demo_prompts(options.demo, options.num_prompts)
    record = measure(model, prompts, options.max_new_tokens, options.depths, options.nodes)
    record |= {name: value for name, value in vars(options).items() if name not in ("depths", "nodes")}
    record |= {"torch": torch.__version__, "transformers": transformers.__version__}
    show(record, Console(stderr=True))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
