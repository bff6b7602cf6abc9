"""The composite folder: a configuration, a tokenizer and three links, from which vLLM serves three models as one.

The configuration is the base's, under an architecture of our own, with two entries more: `proxy_tuning` says where
the three models lie and which ids they share, `proxy_alpha` how strong the pair is. No weights are copied.
Needs no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from specproxy.adapters import is_adapter
from specproxy.check import model_without_weights
from specproxy.config import check_alpha
from specproxy.errors import ConfigurationError, UnsupportedModelError
from specproxy.pretrained import load_tokenizers
from specproxy.runner import logits_width, position_limit
from specproxy.state import ANTI_EXPERT, BASE, EXPERT
from specproxy.vocab import SharedVocabulary, share_vocabulary
from specproxy_kernels.laws import pack_allowed_tokens, unpack_allowed_tokens

__all__ = [
    "ARCHITECTURE",
    "ROLES",
    "Composite",
    "inspect_roles",
    "read_composite",
    "speculative_config",
    "write_composite",
]

ARCHITECTURE = "ProxyTunedForCausalLM"
ROLES = (BASE, EXPERT, ANTI_EXPERT)
_SETTINGS, _ALPHA = "proxy_tuning", "proxy_alpha"
_HERE = "./"  # before the name of a link in the composite's own folder
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Of the base alone: vLLM reads them in the base's own folder, or has no use for them here.
_OF_BASE_ALONE = ("quantization_config", "auto_map", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class Composite:
    """What a composite's configuration says.

    Args:
        names: folder or hub id per role.
        alpha: strength of the pair.
        widths: per role, the width of its logits.
        vocabulary: the shared ids.
    """

    names: dict[str, str]
    alpha: float
    widths: dict[str, int]
    vocabulary: SharedVocabulary

    @property
    def width(self) -> int:
        """Width of the composite's logits: the expert's, because vLLM wants draft and target to be equally wide."""
        return self.widths[EXPERT]


@dataclass(frozen=True)
class RolesReport:
    """Three models that fit together, without their weights.

    Args:
        models: per role, on the meta device.
        widths: per role, the width of its logits.
        vocabulary: the shared ids.
        tokenizer: of the base, else of the expert or the anti-expert; None where there is none.
    """

    models: dict[str, Any]
    widths: dict[str, int]
    vocabulary: SharedVocabulary
    tokenizer: Any

    @property
    def cost_ratio(self) -> float:
        """Parameters of the expert over those of the base: the ratio of their times where memory bounds both."""
        expert, base = (sum(p.numel() for p in self.models[role].parameters()) for role in (EXPERT, BASE))
        return expert / base

    @property
    def max_positions(self) -> int | None:
        """The smallest position limit; None where no model has one."""
        limits = [position_limit(model) for model in self.models.values()]
        return min((limit for limit in limits if limit is not None), default=None)


def inspect_roles(names: Mapping[str, str], tokenizer: str | None = None) -> RolesReport:
    """Read the configurations and tokenizers of three models and see whether vLLM can run them as one.

    Args:
        names: folder or hub id per role.
        tokenizer: of the base, where it lies elsewhere.

    Raises:
        ConfigurationError: a model is missing, or its folder holds no weights.
        UnsupportedModelError: an architecture that is no decoder of attention layers alone.
        VocabularyError: the vocabularies do not fit.
    """
    missing = [role for role in ROLES if role not in names]
    if missing:
        raise ConfigurationError(f"the {missing[0]} is missing: the composite holds a base and a whole pair; name one.")
    models = {role: _inspect(role, names[role]) for role in ROLES}
    widths = {role: logits_width(model) for role, model in models.items()}
    tokenizers = load_tokenizers({role: names[role] for role in ROLES}, tokenizer)
    vocabulary = share_vocabulary(widths, tokenizers)
    found = next((tokenizers[role] for role in ROLES if tokenizers[role] is not None), None)
    return RolesReport(models, widths, vocabulary, found)


def _inspect(role: str, name: str) -> Any:
    """One role's model on the meta device."""
    folder = Path(name)
    if folder.is_absolute() and not folder.is_dir():
        raise ConfigurationError(f"{role}={name} cannot be read: there is no such folder. Name a folder or hub id.")
    if is_adapter(name):
        raise ConfigurationError(
            f"{role}={name} is an adapter, and the composite holds whole models; merge_and_unload() it, save "
            "the result and name that."
        )
    try:
        model = model_without_weights(name)
    except OSError as error:
        raise ConfigurationError(
            f"{role}={name} cannot be read: {str(error).splitlines()[0]} Name a folder or hub id."
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"{role}={name}: {str(error).splitlines()[0]}") from error
    text = model.config.get_text_config(decoder=True)
    other = sorted(kind for kind in getattr(text, "layer_types", None) or () if not kind.endswith("_attention"))
    other += sorted(kind for kind in getattr(text, "layer_types", None) or () if kind.startswith("linear"))
    if getattr(model, "_is_stateful", False) or other:
        detail = f"layers of type {other[0]}" if other else "recurrent state"
        raise UnsupportedModelError(
            f"{role}: {type(model).__name__} has {detail}, which the composite does not hold; use models of attention "
            "layers alone."
        )
    if text is not model.config:
        raise UnsupportedModelError(f"{role}: {type(model).__name__} reads more than text; use a model of text alone.")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigurationError(f"{role}={name} holds no weights ({', '.join(_WEIGHTS)}); name a complete model.")
    return model


def write_composite(folder: str | Path, names: Mapping[str, str], report: RolesReport, alpha: float = 1.0) -> Composite:
    """Write the folder that `vllm serve` takes.

    Args:
        folder: made where it is missing; a composite in it is replaced.
        names: folder or hub id per role. Folders become links.
        report: of `inspect_roles`.
        alpha: strength of the pair.

    Returns:
        What `read_composite` reads from it.

    Raises:
        ConfigurationError: alpha is not finite, there is no tokenizer, or the folder holds something else.
    """
    check_alpha(alpha)
    if report.tokenizer is None:
        raise ConfigurationError(
            f"no tokenizer was found beside {', '.join(names[role] for role in ROLES)}: vLLM reads text; "
            "save one in the base's folder."
        )
    folder = Path(folder)
    others = _make_room(folder)
    report.tokenizer.save_pretrained(folder)
    entries = {}
    for role in ROLES:
        entries[role] = names[role]
        if Path(names[role]).is_dir():
            link = role.replace("_", "-")
            (folder / link).symlink_to(Path(names[role]).resolve(), target_is_directory=True)
            entries[role] = f"{_HERE}{link}"
    size, allowed = report.vocabulary.size, report.vocabulary.allowed
    shared = torch.ones(size, dtype=torch.bool) if allowed is None else unpack_allowed_tokens(allowed[0, 0], size)
    config = report.models[BASE].config.to_dict()
    for name in _OF_BASE_ALONE:
        config.pop(name, None)
    config["architectures"] = [ARCHITECTURE]
    config["vocab_size"] = report.widths[EXPERT]
    if report.max_positions is not None:
        config["max_position_embeddings"] = report.max_positions
    config[_ALPHA] = alpha
    _generation_config(names).save_pretrained(folder)
    config[_SETTINGS] = {
        "files": sorted(entry.name for entry in folder.iterdir() if entry.name not in others),
        "models": entries,
        "widths": report.widths,
        "shared_ids": size,
        "excluded_ids": (~shared).nonzero()[:, 0].tolist(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return read_composite(config, folder)


def _make_room(folder: Path) -> set[str]:
    """Create a folder, or remove what was written into a composite's; returns the names that are in it besides."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return set()
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [Path(str(name)).name for name in written[_SETTINGS]["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"out={folder} holds something else; name a new or an empty folder.") from error
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return {entry.name for entry in folder.iterdir()}


def _generation_config(names: Mapping[str, str]) -> GenerationConfig:
    """End ids of base and expert, as `ProxyTunedModel` unites them; no sampling defaults."""
    ends: set[int] = set()
    pads: list[int] = []
    for role in (BASE, EXPERT):
        try:
            config = GenerationConfig.from_pretrained(names[role])
        except OSError:
            config = GenerationConfig.from_model_config(model_without_weights(names[role]).config)
        end = config.eos_token_id
        ends.update([end] if isinstance(end, int) else end or [])
        pads += [] if config.pad_token_id is None else [int(config.pad_token_id)]
    return GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pads[0] if pads else None)


def read_composite(config: Mapping[str, Any], folder: str | Path) -> Composite:
    """What a composite's configuration says.

    Args:
        config: the content of config.json.
        folder: where it lies; links are resolved from there.

    Raises:
        ConfigurationError: an entry is missing or unusable.
    """
    try:
        settings = config[_SETTINGS]
        entries = {role: str(settings["models"][role]) for role in ROLES}
        widths = {role: int(settings["widths"][role]) for role in ROLES}
        size, excluded = int(settings["shared_ids"]), [int(i) for i in settings["excluded_ids"]]
        alpha = check_alpha(config[_ALPHA])
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{folder}/config.json is no composite's: {_SETTINGS} or {_ALPHA} lacks {error}; "
            "write the folder with `specproxy vllm-config`."
        ) from error
    names = {
        role: str(Path(folder) / name.removeprefix(_HERE)) if name.startswith(_HERE) else name
        for role, name in entries.items()
    }
    if not excluded:
        return Composite(names, alpha, widths, SharedVocabulary(size))
    shared = torch.ones(size, dtype=torch.bool)
    shared[excluded] = False
    return Composite(names, alpha, widths, SharedVocabulary(size, pack_allowed_tokens(shared)[None, None]))


def speculative_config(composite: Composite, num_draft_tokens: int) -> dict[str, Any]:
    """vLLM's `--speculative-config`: the expert drafts, its drafts are sampled and accepted by their probabilities.

    Args:
        composite: what was written.
        num_draft_tokens: at least 1.

    Raises:
        ConfigurationError: fewer drafts.
    """
    if num_draft_tokens < 1:
        raise ConfigurationError(f"num_draft_tokens={num_draft_tokens} drafts nothing; use 1 or more.")
    return {
        "method": "draft_model",
        "model": composite.names[EXPERT],
        "num_speculative_tokens": num_draft_tokens,
        "draft_sample_method": "probabilistic",
    }
