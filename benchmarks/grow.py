"""Grow a Llama-style model to a wanted shape without changing its function.

A small trained model gets the cost of a large one and keeps its text, so that speed can be measured at real acceptance
and at any cost ratio. What is new is either read and never written, or written and never read:

    layers             o_proj and down_proj are zero, the residual stream passes
    heads              their columns of o_proj are zero; a key-value head is copied where its query heads are regrouped
    hidden size        new channels carry zeros; with h of H channels in use the mean square shrinks by h / H, hence
                       epsilon *= h / H and norm weight *= sqrt(h / H)
    feed-forward size  new columns of down_proj are zero
    vocabulary         new ids stand behind the old ones; a tokenizer, or a pair of the old width, masks them

All other new weights are random with the model's own initial scale. The result is equal up to rounding; a norm weight
in half precision is rounded once more unless H / h is a power of four. Knows Transformers only, nothing of specproxy.

Example:
    python benchmarks/grow.py specproxy/models/base --shape 1.5B --out grown --dtype bfloat16
    python benchmarks/grow.py specproxy/models/base --cost-ratio 0.1 --small specproxy/models/anti-expert --out grown
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["SHAPES", "Shape", "cost_parameters", "grow", "grow_to_cost_ratio", "parse_shape", "shape_for_cost_ratio"]

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_BLOCK = 1_000_003  # random numbers drawn at most; weights repeat them, which is fast, and no row length divides it


@dataclass(frozen=True)
class Shape:
    """What a model is grown to; None keeps what it has.

    Args:
        layers: number of layers.
        hidden: width of the residual stream.
        heads, kv_heads: query and key-value heads of `head_dim`; a model of another head size gets as many channels.
        head_dim: the head size that heads are counted in; None for the model's own.
        feed_forward: inner width of the feed-forward blocks.
        vocab: rows of the embeddings.
        untie: give the output layer weights of its own.
    """

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    feed_forward: int | None = None
    vocab: int | None = None
    untie: bool = False


#: Shapes by name: Qwen2.5 (0.5B, 1.5B, 3B, 14B, 32B) and Llama 2 (7B, 13B, 70B).
SHAPES = {
    "0.5B": Shape(24, 896, 14, 2, 64, 4864, 151_936),
    "1.5B": Shape(28, 1536, 12, 2, 128, 8960, 151_936),
    "3B": Shape(36, 2048, 16, 2, 128, 11_008, 151_936),
    "7B": Shape(32, 4096, 32, 32, 128, 11_008, 32_000, untie=True),
    "13B": Shape(40, 5120, 40, 40, 128, 13_824, 32_000, untie=True),
    "14B": Shape(48, 5120, 40, 8, 128, 13_824, 152_064, untie=True),
    "32B": Shape(64, 5120, 40, 8, 128, 27_648, 152_064, untie=True),
    "70B": Shape(80, 8192, 64, 8, 128, 28_672, 32_000, untie=True),
}


def parse_shape(text: str) -> Shape:
    """A named shape, or one spelt out as `layers=24,hidden=1024,heads=16`.

    Raises:
        ValueError: naming what is not understood.
    """
    if text in SHAPES:
        return SHAPES[text]
    fields = [name for name in Shape.__dataclass_fields__ if name != "untie"]
    values: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in fields or not equals or not value.isdecimal():
            raise ValueError(
                f"shape {text!r}: {part!r} is neither one of {', '.join(SHAPES)} nor field=number with a field of "
                f"{', '.join(fields)}."
            )
        values[name] = int(value)
    return Shape(**values)


def grow(model: Any, shape: Shape | str, *, seed: int = 0) -> Any:
    """A model of the wanted shape with the function of `model`, on its device and in its dtype.

    Args:
        model: a LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM; it is left as it was.
        shape: what to grow to, or its name. Key-value heads are raised to what the model's own heads need.
        seed: of the new weights.

    Returns:
        A new model in evaluation mode.

    Raises:
        ValueError: for another architecture, or a shape that is smaller than the model.
    """
    config = _grown_config(model, parse_shape(shape) if isinstance(shape, str) else shape)
    weight = model.get_input_embeddings().weight
    with torch.device("meta"):
        grown = type(model)(config)
    grown = grown.to(weight.dtype).to_empty(device=weight.device)
    grown.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(weight.device)  # its tables are not weights
    grown.tie_weights()
    grown.generation_config = copy.deepcopy(model.generation_config)
    generator = torch.Generator().manual_seed(seed)
    drawn = min(_BLOCK, max(parameter.numel() for parameter in grown.parameters()))
    block = torch.randn(drawn, generator=generator) * (getattr(config, "initializer_range", None) or 0.02)
    block = block.to(weight)
    old = dict(model.named_parameters())
    if "lm_head.weight" not in old:
        old["lm_head.weight"] = old["model.embed_tokens.weight"]
    axes = _axes(model.config, config)
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            _fill(name, parameter, block)
            if name in old:
                _place(name, parameter, old[name], axes)
    return grown.eval()


def grow_to_cost_ratio(base: Any, small: Any, ratio: float, *, depth_only: bool = False, seed: int = 0) -> Any:
    """`base` grown, in its own proportions or in depth alone, until small over base is about `ratio`.

    Counted are the parameters that a token reads, see `cost_parameters`.

    Raises:
        ValueError: where the ratio asks for a base smaller than it is.
    """
    return grow(base, shape_for_cost_ratio(base, cost_parameters(small) / ratio, depth_only), seed=seed)


def shape_for_cost_ratio(base: Any, wanted: float, depth_only: bool = False) -> Shape:
    """The shape with about `wanted` parameters whose ratio of width to depth is nearest to that of `base`.

    Width, heads and feed-forward size grow together, by whole groups of heads.

    Args:
        base: the model to grow.
        wanted: parameters that a token reads.
        depth_only: keep the width and add layers.

    Raises:
        ValueError: where `base` has more of them.
    """
    own = base.config
    if wanted < cost_parameters(base):
        raise ValueError(
            f"{wanted:.3g} parameters are wanted and the base has {cost_parameters(base):.3g} already; "
            "ask for a smaller cost ratio or grow the small models."
        )
    group = own.num_attention_heads // own.num_key_value_heads
    candidates: list[tuple[float, float, Shape]] = []
    most = own.num_key_value_heads * (1 if depth_only else 64)
    for groups in range(own.num_key_value_heads, most + 1):
        hidden, rest = divmod(own.hidden_size * groups, own.num_key_value_heads)
        if rest:
            continue
        feed_forward = own.intermediate_size * groups // own.num_key_value_heads
        shape = Shape(1, hidden, group * groups, groups, None, feed_forward)
        one, two = (_parameters_of(base, replace(shape, layers=layers)) for layers in (1, 2))
        layers = max(own.num_hidden_layers, round((wanted - one) / (two - one)) + 1)
        count = one + (layers - 1) * (two - one)
        if candidates and count > 2 * wanted:
            break
        aspect = math.log(hidden / layers * own.num_hidden_layers / own.hidden_size)
        candidates.append((abs(count / wanted - 1), abs(aspect), replace(shape, layers=layers)))
    near = [candidate for candidate in candidates if candidate[0] <= 0.02]
    if near:
        return min(near, key=lambda candidate: candidate[1])[2]
    return min(candidates, key=lambda candidate: candidate[0])[2]


def cost_parameters(model: Any) -> int:
    """Parameters that a decoded token reads: all but an input embedding that is not the output layer as well."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in model.parameters())
    return total if embedding is head else total - embedding.numel()


def _parameters_of(model: Any, shape: Shape) -> int:
    config = _grown_config(model, shape, may_shrink=True)
    with torch.device("meta"):
        return cost_parameters(type(model)(config))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _grown_config(model: Any, shape: Shape, may_shrink: bool = False) -> Any:
    """The configuration of the grown model; nothing gets smaller."""
    if type(model).__name__ not in _ARCHITECTURES:
        raise ValueError(f"{type(model).__name__} cannot be grown; use one of {', '.join(_ARCHITECTURES)}.")
    own = model.config
    head_dim = _head_dim(own)
    scale = (shape.head_dim or head_dim) / head_dim
    heads = own.num_attention_heads if shape.heads is None else round(shape.heads * scale)
    least_kv = own.num_key_value_heads if shape.kv_heads is None else round(shape.kv_heads * scale)
    wanted = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": heads,
        "intermediate_size": shape.feed_forward,
        "vocab_size": shape.vocab,
    }
    config = copy.deepcopy(own)
    for name, value in wanted.items():
        before = getattr(own, name)
        if value is not None and value < before and not may_shrink:
            raise ValueError(f"{name}={value} is less than the model's {before}; a model can only grow.")
        setattr(config, name, before if value is None else value)
    config.num_key_value_heads = next(n for n in range(least_kv, heads + 1) if _holds_heads(own, heads, n))
    config.head_dim = head_dim
    config.rms_norm_eps = own.rms_norm_eps * own.hidden_size / config.hidden_size
    config.dtype = model.dtype
    config.tie_word_embeddings = own.tie_word_embeddings and not shape.untie
    if getattr(own, "layer_types", None):
        last = own.layer_types[-1]
        config.layer_types = [*own.layer_types, *[last] * (config.num_hidden_layers - own.num_hidden_layers)]
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def _copies(own: Any, heads: int, kv_heads: int) -> int:
    """New key-value heads per old one, where groups of query heads get smaller."""
    old_group = own.num_attention_heads // own.num_key_value_heads
    return math.ceil(old_group / (heads // kv_heads))


def _holds_heads(own: Any, heads: int, kv_heads: int) -> bool:
    """Whether the model's own heads find a place among so many; all of them being key-value heads always does."""
    if kv_heads == heads:
        return True
    return heads % kv_heads == 0 and own.num_key_value_heads * _copies(own, heads, kv_heads) <= kv_heads


def _axes(own: Any, config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Per axis of a weight, where its entries go: new indices, and the old indices that go there."""
    head_dim = _head_dim(own)
    group, new_group = (c.num_attention_heads // c.num_key_value_heads for c in (own, config))
    copies = _copies(own, config.num_attention_heads, config.num_key_value_heads)
    queries = [
        (head // group * copies + head % group // new_group) * new_group + head % group % new_group
        for head in range(own.num_attention_heads)
    ]
    keys = [kv_head * copies + i for kv_head in range(own.num_key_value_heads) for i in range(copies)]
    sources = [kv_head for kv_head in range(own.num_key_value_heads) for _ in range(copies)]

    def spread(heads: list[int]) -> Tensor:
        return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()

    same = {"hidden": own.hidden_size, "inner": own.intermediate_size, "vocab": own.vocab_size}
    axes = {name: (torch.arange(size), torch.arange(size)) for name, size in same.items()}
    axes["query"] = spread(queries), spread(list(range(own.num_attention_heads)))
    axes["key"] = spread(keys), spread(sources)
    return axes


#: Axes of each weight [rows, columns]; a bias has the rows alone.
_WEIGHT_AXES = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("inner", "hidden"),
    "up_proj": ("inner", "hidden"),
    "down_proj": ("hidden", "inner"),
}


def _fill(name: str, parameter: Tensor, block: Tensor) -> None:
    """What stands in a grown weight before the old one is placed in it."""
    if "norm" in name:
        parameter.fill_(1.0)
    elif name.endswith("bias") or "o_proj" in name or "down_proj" in name:
        parameter.zero_()
    else:
        flat = parameter.view(-1)
        whole = flat.numel() // len(block) * len(block)
        flat[:whole].view(-1, len(block)).copy_(block.expand(whole // len(block), -1))
        flat[whole:].copy_(block[: flat.numel() - whole])


def _place(name: str, parameter: Tensor, old: Tensor, axes: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put a weight of the old model into the grown one, in place."""
    if "norm" in name:
        share = len(old) / len(parameter)
        parameter[: len(old)] = (old.double() * math.sqrt(share)).to(old.dtype) if share != 1 else old
        return
    rows, columns = _WEIGHT_AXES[name.split(".")[-2]]
    new_rows, old_rows = (index.to(old.device) for index in axes[rows])
    if parameter.ndim == 1:
        parameter[new_rows] = old[old_rows]
        return
    new_columns, old_columns = (index.to(old.device) for index in axes[columns])
    if "embed_tokens" in name:
        parameter[:, old.shape[1] :] = 0  # the new channels' only source
    parameter[new_rows[:, None], new_columns] = old[old_rows][:, old_columns]


def main(arguments: list[str] | None = None) -> None:
    """Grow a model folder into another one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of the model to grow")
    parser.add_argument("--out", required=True, help="folder to write")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--shape", help=f"{', '.join(SHAPES)}, or layers=24,hidden=1024,...")
    goal.add_argument("--cost-ratio", type=float, help="parameters of --small over those of the result")
    parser.add_argument("--small", help="folder of the small model, for --cost-ratio")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if (options.cost_ratio is None) != (options.small is None):
        parser.error("--cost-ratio and --small go together.")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    try:
        if options.shape is not None:
            grown = grow(model, options.shape, seed=options.seed)
        else:
            small = AutoModelForCausalLM.from_pretrained(options.small)
            grown = grow_to_cost_ratio(model, small, options.cost_ratio, seed=options.seed)
    except ValueError as error:
        parser.error(str(error))
    grown.save_pretrained(options.out)
    try:
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    except (OSError, ValueError):
        print("the model has no tokenizer of its own; none was written", file=sys.stderr)
    config = grown.config
    print(
        f"{options.out}: {cost_parameters(grown):,} parameters read per token, {config.num_hidden_layers} layers, "
        f"hidden {config.hidden_size}, heads {config.num_attention_heads}/{config.num_key_value_heads} of "
        f"{config.head_dim}, feed-forward {config.intermediate_size}, vocabulary {config.vocab_size}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
