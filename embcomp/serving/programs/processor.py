"""What code that was compiled on one machine asks of the processor that it runs on."""

from __future__ import annotations

from pathlib import Path

_PREFIXES = ("avx", "amx", "sse4", "fma", "bmi", "f16c", "popcnt", "movbe", "vaes", "gfni", "sve")
"""Instruction sets that compilers use by themselves."""


def instruction_sets(described: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The instruction sets of this processor, as the kernel names them; empty where it does not say.

    Args:
        described: where the kernel says so.
    """
    if not described.exists():
        return set()
    for line in described.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return {flag for flag in value.split() if flag.startswith(_PREFIXES)}
    return set()
