"""Command: train one model of the trio on packed rows, from scratch or from another model's checkpoint.

A run is a number of steps over one file of `training.prepare`; it writes a checkpoint every few minutes and when it is
asked to end (SIGTERM, Ctrl-C), and goes on from it when started again. It knows nothing of what the rows say.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from training.muon import Muon

SHAPES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704, "num_attention_heads": 4},
    "small": {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 352, "num_attention_heads": 2},
}


def build(shape: str) -> LlamaForCausalLM:
    """Builds a model with random weights.

    Args:
        shape: A key of `SHAPES`.

    Returns:
        A float32 Llama whose end of text is id 0 and pad id 1, as in `training.tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=2048,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        attn_implementation="sdpa",
        **SHAPES[shape],
        num_key_value_heads=SHAPES[shape]["num_attention_heads"],
        head_dim=64,
    )
    return LlamaForCausalLM(config).float()


def learning_rate_scale(step: int, steps: int, warmup: int = 20, hold: float = 0.5) -> float:
    """Factor on the learning rates: short warm-up, constant, then linear decay to 0.02 after `hold` of the run."""
    decay = min(1.0, (1 - step / steps) / (1 - hold))
    return min(1.0, (step + 1) / warmup) * max(0.02, decay)


def batch_rows(step: int, batch: int, total: int, seed: int) -> np.ndarray:
    """Row numbers of a step: each pass over the rows has its own fixed shuffle.

    Args:
        step: Step number from 0.
        batch: Rows a step.
        total: Rows there are.
        seed: Seed of the shuffles.

    Returns:
        int64 [batch].
    """
    per_pass = total // batch
    order = np.random.default_rng([seed, step // per_pass]).permutation(total)
    start = (step % per_pass) * batch
    return order[start : start + batch]


def weighted_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the cross entropy in nats, over positions; logits [B, S, V], targets and weights [B, S]."""
    each = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    flat = weights.flatten()
    return (each * flat).sum() / flat.sum().clamp_min(1e-6)


def starting_weights(source: Path) -> dict[str, torch.Tensor]:
    """Weights to start from.

    Args:
        source: A checkpoint of this module, or a model's folder as `training.export` writes it.

    Returns:
        The state of a model of `build`, in float32.
    """
    if source.is_dir():
        return LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    weights: dict[str, torch.Tensor] = torch.load(source, weights_only=True)["model"]
    return weights


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint so that a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a .npz of training.prepare")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint; the run goes on from it where it exists")
    parser.add_argument(
        "--start-from", type=Path, default=None, help="checkpoint, or a model's folder, whose weights to start from"
    )
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of Muon; AdamW takes a quarter")
    parser.add_argument("--hold", type=float, default=0.5, help="share of the run before the decay starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forward pass")
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    packed = np.load(arguments.rows)
    ids, weights = packed["ids"], packed["weights"]
    model = build(arguments.shape)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=arguments.learning_rate),
        torch.optim.AdamW(others, lr=arguments.learning_rate / 4, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    step = 0
    if arguments.out.exists():
        state = torch.load(arguments.out, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        print(f"goes on from step {step}", flush=True)
    elif arguments.start_from is not None:
        model.load_state_dict(starting_weights(arguments.start_from))
    forward = torch.compile(model) if arguments.compile else model

    def save() -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(arguments.out, {"model": model.state_dict(), "optimizers": states, "step": step})

    asked_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: asked_to_end.append(received))
    saved_at = reported_at = time.monotonic()
    reported_step, running = step, 0.0
    while step < arguments.steps and not asked_to_end:
        chosen = batch_rows(step, arguments.batch, len(ids), arguments.seed)
        batch = torch.from_numpy(ids[chosen].astype(np.int64))
        batch_weights = torch.from_numpy(weights[chosen].astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = weighted_loss(logits, batch[:, 1:], batch_weights[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = learning_rate_scale(step, arguments.steps, hold=arguments.hold)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * scale
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        running += loss.item()
        if step % 20 == 0 or step == arguments.steps:
            now = time.monotonic()
            speed = (step - reported_step) * arguments.batch * (ids.shape[1] - 1) / (now - reported_at)
            mean = running / (step - reported_step)
            print(f"step {step}/{arguments.steps} loss {mean:.4f} {speed:,.0f} tokens/s", flush=True)
            reported_at, reported_step, running = now, step, 0.0
            if now - saved_at > arguments.save_every:
                save()
                saved_at = now
    save()
    print("done" if step == arguments.steps else f"ended at step {step}", flush=True)


if __name__ == "__main__":
    main()
