"""Run by torchrun in every process of `tests/test_ranks.py`: texts of a trio whose base the processes share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.distributed import DistributedConfig

from specproxy import ConfigurationError, Engine, ProxyTunedModel

SETTINGS: dict[str, dict[str, Any]] = {
    "per-step": {"num_draft_tokens": 0},
    "greedy": {"num_draft_tokens": 3},
    "coupled": {"do_sample": True, "acceptance": "coupled", "seed": 5},
    "block": {"do_sample": True, "acceptance": "block", "seed": 6},
    "tree": {"num_draft_tokens": 3, "num_tree_tokens": 7},
    "lookup": {"drafter": "lookup"},
    "auto": {"num_draft_tokens": "auto"},
}


def texts(model: ProxyTunedModel) -> dict[str, list[list[int]]]:
    """Tokens of three rows by setting."""
    prompts = torch.tensor([[3, 1, 4, 1, 5, 9], [0, 0, 2, 7, 1, 8], [2, 7, 1, 8, 2, 7]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1] * 6])
    return {
        name: model.generate(prompts, mask, max_new_tokens=14, eos_token_id=[], **setting).tolist()
        for name, setting in SETTINGS.items()
    }


def main(folder: Path, out: Path) -> None:
    """In every process but the first the expert is another one, so that draws would part if nobody agreed."""
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
    model = ProxyTunedModel.from_pretrained(
        str(folder / "base"),
        expert=str(folder / "expert"),
        anti_expert=str(folder / "anti_expert"),
        dtype="float64",
        base_kwargs={"distributed_config": config},
        progress=False,
    )
    rank = int(os.environ["RANK"])
    if rank:
        with torch.no_grad():
            for weight in model.expert.parameters():
                weight.add_(torch.randn_like(weight))
    found: dict[str, Any] = {"texts": texts(model)}
    unseeded = model.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=8, eos_token_id=[], do_sample=True)
    gathered: list[Any] = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(gathered, unseeded.tolist())
    found["unseeded"] = gathered
    found["refused"] = []
    for call in (
        lambda: model.generate(torch.tensor([[3]]), max_time=1.0),
        lambda: model.generate(torch.tensor([[3]]), cuda_graphs=True),
        lambda: Engine(model),
    ):
        try:
            call()
        except ConfigurationError as error:
            found["refused"].append(str(error))
    if rank == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
