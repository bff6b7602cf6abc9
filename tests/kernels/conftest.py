"""Puts `tests/` on the import path, for the helpers that this folder shares with the end-to-end tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
