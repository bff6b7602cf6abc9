"""Which implementation an operation takes: the Triton kernels, or the torch reference.

CUDA tensors take the kernels, all others the reference. The environment variable SPECPROXY_KERNELS forces either:
`auto` (the rule above), `triton`, or `torch`. Kernels on CPU tensors run in Triton's interpreter, slowly, to
test them: set TRITON_INTERPRET=1 as well before Python starts. This module sets it only where triton has not been
imported yet, which Transformers, and so `specproxy`, may have done.
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

__all__ = ["kernel_path", "sample_candidates", "sample_drafts", "verify_window"]

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
    """Draw one draft per row from the drafter's warped law, and keep the law's descriptor. One launch on CUDA.

    Args:
        logits: floating [B, 1, V_draft], V_draft >= vocab_size, contiguous along the vocabulary: the drafter's at
            window position i. They are kept, not copied, and must stay as they are until the window is verified.
        parameters: of the B rows.
        drafts: int64 [B, i], the cycle's drafts before this position.
        noise: of the cycle; the draw takes the token purpose at position i.
        vocab_size: V, the shared vocabulary.

    Returns:
        tokens: int64 [B, 1].
        law: `logits` with tau (None without filters) and lse, [B, 1] each, in promote(float32, logits).

    Raises:
        ValueError: a tensor whose shape, dtype or stride the kernels do not read; the message names it.

    Example:
        >>> import torch
        >>> from specproxy_kernels import NoiseStream, WarpParameters, row_keys, sample_drafts
        >>> parameters = WarpParameters(temperature=torch.ones(1), any_greedy=False)
        >>> noise = NoiseStream(row_keys([7], [0]), torch.zeros(1, dtype=torch.long))
        >>> nothing = torch.empty(1, 0, dtype=torch.long)
        >>> token, law = sample_drafts(torch.randn(1, 1, 100), parameters, nothing, noise, 100)
        >>> token.shape, law.lse.shape
        (torch.Size([1, 1]), torch.Size([1, 1]))
    """
    if kernel_path(logits.device) == "torch":
        return reference.sample_drafts(logits, parameters, drafts, noise, vocab_size)
    from specproxy_kernels.fused import draft

    return draft.sample_drafts(logits, parameters, drafts, noise, vocab_size)


def sample_candidates(
    logits: Tensor, parameters: WarpParameters, drafts: Tensor, noise: NoiseStream, vocab_size: int, count: int
) -> Tensor:
    """The best guesses of every node of one level of a token tree. One or two launches and a top-k on CUDA.

    All nodes race with the noise of their depth; the first candidate is what `sample_drafts` would draw there.

    Args:
        logits: floating [B, n, V_draft], V_draft >= vocab_size, contiguous along the vocabulary: the drafter's at n
            nodes of depth d.
        parameters: of the B rows.
        drafts: int64 [B, n, d], the drafts before each node.
        noise: of the cycle; the draw takes the token purpose at position d.
        vocab_size: V, the shared vocabulary.
        count: k, candidates of each node, at most V.

    Returns:
        int64 [B, n, k], the best first; ids of no probability where fewer have one.

    Raises:
        ValueError: a tensor whose shape, dtype or stride the kernels do not read; the message names it.

    Example:
        >>> import torch
        >>> from specproxy_kernels import NoiseStream, WarpParameters, row_keys, sample_candidates
        >>> parameters = WarpParameters(temperature=torch.zeros(1), any_sampling=False)
        >>> noise = NoiseStream(row_keys([7], [0]), torch.zeros(1, dtype=torch.long))
        >>> nothing = torch.empty(1, 1, 0, dtype=torch.long)
        >>> sample_candidates(torch.tensor([[[0.5, 2.0, 1.0]]]), parameters, nothing, noise, 3, 2).tolist()
        [[[1, 2]]]
    """
    arguments = (logits, parameters, drafts, noise, vocab_size, count)
    if kernel_path(logits.device) == "torch":
        return reference.sample_candidates(*arguments)
    from specproxy_kernels.fused import draft

    return draft.sample_candidates(*arguments)


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
    """Logit arithmetic, acceptance and the next token of a whole window, from raw logits. One to four launches on CUDA.

    Args:
        rule: `rejection`, `block` or `coupled`; rows of temperature 0 are greedy under each.
        base: floating [B, W, V_base], V_base >= vocab_size, contiguous along the vocabulary, any other strides. Or,
            without pairs, logits that a caller has combined and processed already.
        pairs: expert and anti-expert logits at the same W positions, laid out alike, dtypes and widths of their own;
            alpha floating [B, W], any strides.
        drafts: int64 [B, W - 1].
        num_drafts: int64 [B], at most W - 1; what lies behind a row's drafts is not read.
        draft_law: what the drafts were drawn from, joined over positions: logits [B, >= W - 1, V_draft], tau and lse
            [B, W - 1]. None where they are certain.
        parameters: of the B rows; `seen` and `counts` without the drafts, which are added per position.
        noise: keys and positions of the cycle.
        vocab_size: V, the shared vocabulary.

    Returns:
        num_accepted: int64 [B].
        next_token: int64 [B], a safe id (below V) where the status reports an error.
        status: int32 [B], bits `STATUS_*` of the law that the next token was drawn from.

    Raises:
        ValueError: a tensor whose shape, dtype or stride the kernels do not read; the message names it.

    Example:
        >>> import torch
        >>> from specproxy_kernels import LogitPair, NoiseStream, WarpParameters, row_keys, verify_window
        >>> base, expert, anti_expert = torch.randn(3, 1, 2, 100)  # one row, two positions each
        >>> pair = LogitPair(expert, anti_expert, alpha=torch.ones(1, 2))
        >>> kept, token, status = verify_window(
        ...     "rejection", base, [pair], torch.tensor([[5]]), torch.tensor([1]), None,
        ...     WarpParameters(temperature=torch.zeros(1), any_sampling=False),
        ...     NoiseStream(row_keys([7], [0]), torch.zeros(1, dtype=torch.long)), 100,
        ... )
        >>> kept.shape, token.shape, status.tolist()
        (torch.Size([1]), torch.Size([1]), [0])
    """
    arguments = (rule, base, pairs, drafts, num_drafts, draft_law, parameters, noise, vocab_size)
    if kernel_path(base.device) == "torch":
        return reference.verify_window(*arguments)
    from specproxy_kernels.fused import verify

    return verify.verify_window(*arguments)
