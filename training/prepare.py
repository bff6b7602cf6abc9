"""Command: train the tokenizer and write the packed rows of every training set to a work folder."""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from training import data
from training.arithmetic import problem_in, step_in, unmark
from training.rows import Rows, encode, encode_problem, mix, pack
from training.tokenizer import load_tokenizer, train_tokenizer

SHARES = {
    "base": {"arithmetic": 0.62, "python": 0.18, "glosses": 0.13, "jargon": 0.07},
    "small": {"arithmetic": 0.33, "python": 0.5, "glosses": 0.11, "jargon": 0.06},
    "base-longer": {"more-arithmetic": 0.7, "python": 0.15, "glosses": 0.1, "jargon": 0.05},
}
"""Share of each source in the tokens of each pre-training mixture; ``base-longer`` is what the base goes on with."""
DRAWS: dict[str, dict[str, Any]] = {
    "arithmetic": {},
    "more-arithmetic": {"drill_share": 0.3, "operations": "+-xxx", "by_line": 0.6},
}
"""How `training.data.raw_arithmetic` draws each source of arithmetic. Products are what a short run learns last."""
BARE_SHARE = 0.1
"""Share of questions without a story among the tuned problems."""


def _write(work: Path, name: str, rows: Rows) -> None:
    np.savez(work / f"{name}.npz", ids=rows.ids, weights=rows.weights)
    print(f"{name}: {rows.ids.shape[0]:,} rows, {rows.ids.size:,} tokens", flush=True)


def main() -> None:
    """Parses the command line and writes ``tokenizer/`` and ``*.npz`` under the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training/runs"), help="folder for tokenizer and packed rows")
    parser.add_argument("--wordnet", type=Path, default=data.WORDNET)
    parser.add_argument("--jargon", type=Path, default=data.JARGON)
    parser.add_argument("--stdlib", type=Path, default=None, help="a Python standard library (default: this one's)")
    parser.add_argument("--tokenizer", type=Path, default=None, help="a tokenizer to keep (default: train one)")
    parser.add_argument("--tokens", type=int, default=9_000_000, help="tokens of the pre-training set")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--problems", type=int, default=9_000, help="problems of the tuned set")
    parser.add_argument("--tuned-tokens", type=int, default=1_000_000, help="tokens of each tuned set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    glosses = data.wordnet_glosses("train", arguments.wordnet)
    jargon = data.jargon_entries("train", arguments.jargon)
    python = data.python_source("train", arguments.stdlib)
    if arguments.tokenizer is None:
        sample = data.raw_arithmetic("train", 4_000, arguments.seed + 1)
        texts = [unmark(text)[0] for text in sample] + glosses[:20_000] + jargon + python[:2_500]
        train_tokenizer(texts).save_pretrained(str(work / "tokenizer"))
    elif arguments.tokenizer.resolve() != (work / "tokenizer").resolve():
        shutil.copytree(arguments.tokenizer, work / "tokenizer", dirs_exist_ok=True)
    tokenizer = load_tokenizer(work / "tokenizer")
    print(f"tokenizer after {time.monotonic() - start:.0f} s", flush=True)

    tokens = arguments.tokens
    documents = {
        "python": encode(tokenizer, python),
        "glosses": encode(tokenizer, glosses),
        "jargon": encode(tokenizer, jargon),
    }
    for place, (name, draws) in enumerate(DRAWS.items()):
        documents[name] = []
        needed = max(shares.get(name, 0.0) for shares in SHARES.values()) * tokens
        for seed in itertools.count(arguments.seed + 100 + 1_000 * place):
            if sum(len(ids) for ids, _ in documents[name]) >= needed:
                break
            documents[name] += encode(tokenizer, data.raw_arithmetic("train", 10_000, seed, **draws))
    for mixture, shares in SHARES.items():
        sources = [(documents[name], int(share * tokens)) for name, share in shares.items()]
        _write(work, f"pretrain-{mixture}", pack(mix(sources, arguments.seed), arguments.length))

    rng = random.Random(f"{arguments.seed}/tuned")
    drawn_problems = [
        step_in(rng, "train") if rng.random() < BARE_SHARE else problem_in(rng, "train")
        for _ in range(arguments.problems)
    ]
    problems = [encode_problem(tokenizer, problem) for problem in drawn_problems]
    tuned = arguments.tuned_tokens
    sources = [
        (problems, int(0.8 * tuned)),
        (documents["glosses"], int(0.1 * tuned)),
        (documents["arithmetic"], int(0.1 * tuned)),
    ]
    _write(work, "tuned-arithmetic", pack(mix(sources, arguments.seed), arguments.length))
    sources = [(documents["python"], tuned)]
    _write(work, "tuned-python", pack(mix(sources, arguments.seed), arguments.length))
    print(f"done after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
