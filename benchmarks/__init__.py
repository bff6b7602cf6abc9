"""Measurements of specproxy against the ways of decoding it competes with (not part of the wheel)."""
