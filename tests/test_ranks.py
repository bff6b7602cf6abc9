"""A base shared by several processes gives the tokens of a base in one piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specproxy import ProxyTunedModel
from tests import tiny
from tests.ranks_worker import texts

ROOT = Path(__file__).resolve().parents[1]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )


def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    trio = tiny.shared_trio("llama")
    models = {"base": trio.base, "expert": trio.expert, "anti_expert": trio.anti_expert}
    for role, model in models.items():
        model.save_pretrained(tmp_path / role)
    done = torchrun(str(ROOT / "tests/ranks_worker.py"), str(tmp_path), str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["texts"] == texts(ProxyTunedModel(**models))
    first, second = found["unseeded"]
    assert first == second
    assert [message.split(":")[0] for message in found["refused"]] == ["max_time=1.0", "cuda_graphs=True", "model"]


@pytest.mark.slow
def test_command_line_under_torchrun(tmp_path: Path) -> None:
    arguments = ("generate", "--max-new-tokens", "24", "--dtype", "float64")
    alone = subprocess.run(
        [sys.executable, "-m", "specproxy", *arguments], capture_output=True, encoding="utf-8", timeout=300, check=True
    )
    together = torchrun("-m", "specproxy.cli", *arguments)
    assert (together.returncode, together.stdout) == (0, alone.stdout)
    wrong = torchrun("-m", "specproxy.cli", *arguments, "--tensor-parallel-size", "3")
    assert wrong.returncode != 0 and "--tensor-parallel-size=3 with 2 processes" in wrong.stderr
