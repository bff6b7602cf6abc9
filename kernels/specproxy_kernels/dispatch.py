"""Which implementation an operation takes: the Triton kernels, or the torch reference.

CUDA tensors take the kernels, all others the reference. The environment variable SPECPROXY_KERNELS forces either:
`auto` (the rule above), `triton`, or `torch`. Kernels on CPU tensors run in Triton's interpreter, slowly, to test
them; it has to be switched on before triton is first imported, which this module does where it can.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from specproxy_kernels import reference
from specproxy_kernels.laws import LogitPair, WarpParameters
from specproxy_kernels.reference import DraftLaw, NoiseStream

__all__ = ["kernel_path", "sample_drafts", "verify_window"]

VARIABLE = "SPECPROXY_KERNELS"
_CHOICES = ("auto", "triton", "torch")

if os.environ.get(VARIABLE) == "triton" and "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def kernel_path(device: torch.device) -> str:
    """Implementation that tensors of a device take.

    Args:
        device: of the tensors.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: SPECPROXY_KERNELS has an unknown value.
        RuntimeError: kernels are asked for on the CPU, and Triton's interpreter is off; or triton is not installed.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r} is not known: set it to one of {', '.join(_CHOICES)}.")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return "torch"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}=triton on the CPU needs Triton's interpreter: set TRITON_INTERPRET=1 before Python starts."
        )
    if importlib.util.find_spec("triton") is None:
        # Not a reason to fall back: results must not depend on what happens to be installed.
        raise RuntimeError(
            f"the kernels need triton, which is not installed: pip install triton, or set {VARIABLE}=torch."
        )
    return "triton"


def sample_drafts(
    logits: Tensor, parameters: WarpParameters, drafts: Tensor, noise: NoiseStream, vocab_size: int
) -> tuple[Tensor, DraftLaw]:
    """Draw one draft per row and keep the descriptor of its law: `reference.sample_drafts`, or its kernel."""
    if kernel_path(logits.device) == "torch":
        return reference.sample_drafts(logits, parameters, drafts, noise, vocab_size)
    from specproxy_kernels.fused import draft

    return draft.sample_drafts(logits, parameters, drafts, noise, vocab_size)


def verify_window(
    rule: str,
    base: Tensor,
    pairs: Sequence[LogitPair],
    drafts: Tensor,
    num_drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: NoiseStream,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit arithmetic, acceptance and the next token of a window: `reference.verify_window`, or its kernels."""
    arguments = (rule, base, pairs, drafts, num_drafts, draft_law, parameters, noise, vocab_size)
    if kernel_path(base.device) == "torch":
        return reference.verify_window(*arguments)
    from specproxy_kernels.fused import verify

    return verify.verify_window(*arguments)
