"""Text sources of the embedded trio: generated arithmetic, WordNet glosses, the Jargon File, Python source.

Every source is a list of documents for one split, free of duplicates, in a fixed order. The module knows nothing of
tokens or models; `training.rows` packs what it returns.
"""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from training.split import split_of
from training.styles import drill, untuned_story

WORDNET = Path("/usr/share/wordnet")
"""Where Debian's `wordnet-base` keeps its ``data.*`` files."""
JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
"""Where Debian's `jargon-text` keeps the Jargon File."""
PYTHON_PACKAGES = (
    ".", "asyncio", "collections", "concurrent/futures", "dbm", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml/dom", "xml/etree", "xml/sax",
    "zoneinfo",
)  # fmt: skip


class SourceMissingError(FileNotFoundError):
    """A text source is not installed; the message names the package that brings it."""


def _unique(documents: Iterable[str], split: str) -> list[str]:
    """Documents of one split, the first of each set of copies only (copies: equal but for white space and case)."""
    seen: set[str] = set()
    kept: list[str] = []
    for document in documents:
        key = " ".join(document.lower().split())
        if key and key not in seen:
            seen.add(key)
            if split_of(key) == split:
                kept.append(document)
    return kept


def wordnet_glosses(split: str, folder: Path = WORDNET) -> list[str]:
    """Dictionary lines ``lemma: gloss``, shuffled with a fixed seed.

    Args:
        split: One of `training.split.SPLITS`.
        folder: Folder with WordNet's ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv``.

    Returns:
        One document per synset.

    Raises:
        SourceMissingError: A file is absent.
    """
    lines: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{part}"
        if not path.exists():
            raise SourceMissingError(f"{path} is absent; install the Debian package wordnet-base, or name its folder")
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            lemma = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
            lines.append(f"{lemma}: {gloss.strip()}")
    documents = _unique(lines, split)
    random.Random("wordnet").shuffle(documents)
    return documents


def jargon_entries(split: str, path: Path = JARGON) -> list[str]:
    """Passages of the Jargon File of at most about 800 characters, paragraphs unwrapped.

    Args:
        split: One of `training.split.SPLITS`.
        path: The gzipped text.

    Returns:
        Passages in the order of the File.

    Raises:
        SourceMissingError: The file is absent.
    """
    if not path.exists():
        raise SourceMissingError(f"{path} is absent; install the Debian package jargon-text, or name its file")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", file.read())]
    passages = [""]
    for paragraph in paragraphs:
        if len(paragraph) < 60 or not re.search(r"[a-z]{3}", paragraph):
            continue
        if passages[-1] and len(passages[-1]) + len(paragraph) > 800:
            passages.append("")
        passages[-1] = f"{passages[-1]}\n{paragraph}".strip()
    return _unique(passages, split)


def python_source(split: str, folder: Path | None = None) -> list[str]:
    """Source of the Python standard library, one document per top-level block of a module.

    Args:
        split: One of `training.split.SPLITS`; all blocks of a module share one.
        folder: A standard library; that of the running interpreter when None.

    Returns:
        Blocks (the head of a module, or one function or class with its decorators), shuffled with a fixed seed.

    Raises:
        SourceMissingError: The folder has no Python source.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    documents: list[str] = []
    for package in PYTHON_PACKAGES:
        for path in sorted((root / package).glob("*.py")):
            if split_of(f"{package}/{path.name}") != split:
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            blocks = re.split(r"(?m)^(?=@)|(?<!\n@)^(?=(?:async def|def|class)\b)", text)
            documents += [block.strip("\n") for block in _join_decorators(blocks) if len(block.strip()) > 40]
    if not documents and not any(root.glob("*.py")):
        raise SourceMissingError(f"{root} holds no Python source; name the folder of a standard library")
    documents = list(dict.fromkeys(documents))
    random.Random("python").shuffle(documents)
    return documents


def _join_decorators(blocks: list[str]) -> list[str]:
    joined: list[str] = []
    for block in blocks:
        if joined and joined[-1].startswith("@") and not re.search(r"(?m)^(async def|def|class)\b", joined[-1]):
            joined[-1] += block
        else:
            joined.append(block)
    return joined


def raw_arithmetic(
    split: str, documents: int, seed: int, drill_share: float = 0.35, operations: str = "+-x", by_line: float = 0.0
) -> list[str]:
    """Arithmetic in untuned styles, with the marks of `training.arithmetic`.

    Args:
        split: One of `training.split.SPLITS`.
        documents: How many documents to draw.
        seed: Seed of the draw.
        drill_share: Share of drills among the documents; the others are stories.
        operations: What the drills draw from, as in `training.arithmetic.draw_step`.
        by_line: Share of the stories that are solved line by line.

    Returns:
        The documents, in the order drawn.
    """
    rng = random.Random(f"{seed}/{split}/raw")
    return [
        drill(rng, split, operations=operations) if rng.random() < drill_share else untuned_story(rng, split, by_line)
        for _ in range(documents)
    ]
