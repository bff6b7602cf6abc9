"""Command: write checkpoints in the layout of ``specproxy/models``, reload them from disk and compare losses.

The folder gets ``base``, ``anti-expert``, ``expert-arithmetic``, ``expert-python`` (bfloat16 weights) and
``tokenizer``. What is compared is the reloaded model against the float32 checkpoint, on rows of the training set.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from training.train import build, weighted_loss

ROLES = {"base": "base", "anti-expert": "small", "expert-arithmetic": "small", "expert-python": "small"}
"""Folder of each role and the shape of its model."""
LARGEST_TOTAL = 24 * 2**20
"""Most bytes all assets may take together."""


def _loss(model: LlamaForCausalLM, rows: Path, count: int = 32) -> float:
    packed = np.load(rows)
    ids = torch.from_numpy(packed["ids"][:count].astype(np.int64))
    weights = torch.from_numpy(packed["weights"][:count].astype(np.float32))
    with torch.inference_mode():
        return weighted_loss(model(input_ids=ids[:, :-1]).logits, ids[:, 1:], weights[:, 1:]).item()


def _clean_json(path: Path, drop: tuple[str, ...]) -> None:
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(content, indent=2) + "\n")


def export_model(checkpoint: Path | None, shape: str, folder: Path, rows: Path) -> float:
    """Writes one model and reloads it.

    Args:
        checkpoint: A file of `training.train`; None writes random weights.
        shape: A key of `training.train.SHAPES`.
        folder: Where to write.
        rows: Packed rows to compare losses on.

    Returns:
        The loss of the reloaded model, in nats.

    Raises:
        RuntimeError: The reloaded model's loss is not that of the checkpoint.
    """
    model = build(shape).eval()
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    before = _loss(model, rows)
    shutil.rmtree(folder, ignore_errors=True)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 0, 0, 1
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        _clean_json(folder / name, drop=("_name_or_path", "_commit_hash", "_from_model_config"))
    (folder / "model.safetensors").chmod(0o644)
    after = _loss(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), rows)
    print(f"{folder.name}: loss {before:.4f} in float32, {after:.4f} reloaded", flush=True)
    if abs(after - before) > 0.01 + 0.01 * before:
        raise RuntimeError(f"{folder} has loss {after:.4f} after reloading, the checkpoint {before:.4f}")
    return after


def main() -> None:
    """Parses the command line and exports the trio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("training/runs"), help="work folder with tokenizer, rows and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=Path("specproxy/models"), help="folder to write")
    parser.add_argument("--random", action="store_true", help="random weights where a checkpoint is absent")
    arguments = parser.parse_args()
    work: Path = arguments.work
    out: Path = arguments.out
    checkpoints = {"base": "base.pt", "anti-expert": "small.pt"}
    torch.manual_seed(0)
    for role, shape in ROLES.items():
        checkpoint: Path | None = work / checkpoints.get(role, f"{role}.pt")
        if checkpoint is not None and not checkpoint.exists():
            if not arguments.random:
                raise FileNotFoundError(f"{checkpoint} is absent; train it first, or pass --random")
            checkpoint = None
        rows = f"tuned-{role.split('-')[1]}" if role.startswith("expert") else f"pretrain-{shape}"
        export_model(checkpoint, shape, out / role, work / f"{rows}.npz")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    tokenizer.save_pretrained(out / "tokenizer")
    _clean_json(
        out / "tokenizer" / "tokenizer_config.json",
        drop=("name_or_path", "_name_or_path", "is_local", "local_files_only"),
    )
    AutoTokenizer.from_pretrained(out / "tokenizer")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{total:,} bytes in all")
    if total > LARGEST_TOTAL:
        raise RuntimeError(f"the assets take {total:,} bytes, more than {LARGEST_TOTAL:,}")


if __name__ == "__main__":
    main()
