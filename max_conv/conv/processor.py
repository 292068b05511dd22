"""The processor of this machine."""

import ctypes
import platform
import re
from functools import cache
from pathlib import Path


@cache
def cpu_features() -> frozenset[str]:
    """Returns the CPU's instruction set extensions, the names that compiled code may depend on."""
    text = _told()
    if not text:
        return frozenset([platform.processor() or platform.machine()])
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    kinds = r"(avx|sse|ssse|fma|f16c|bmi|amx|aes|vaes|vpclmul|gfni|sha|adx|movbe|popcnt|abm|asimd|sve|bf16|i8mm|fphp)"
    return frozenset(flag for flag in line.group(1).split() if re.match(kinds, flag)) if line else frozenset()


def has_pairs() -> bool:
    """Returns whether the CPU has dot products of bfloat16 pairs (AVX512_BF16)."""
    return "avx512_bf16" in cpu_features()


@cache
def has_tiles() -> bool:
    """Returns whether the CPU has matrix tiles for bfloat16 (AMX), and Linux lets this process use them."""
    if not {"amx_tile", "amx_bf16", "avx512_bf16"} <= cpu_features():
        return False
    arch_prctl, request, tiles = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0


def processor() -> str:
    """Returns what tells this machine's processor from others: its maker, family, model, name and cache."""
    lines = re.findall(r"^(vendor_id|cpu family|model|model name|cache size|CPU part)\s*: (.*)$", _told(), re.MULTILINE)
    facts = {name: value for name, value in reversed(lines)}  # the first core's
    return ", ".join(f"{name} {value}" for name, value in sorted(facts.items())) or platform.processor()


@cache
def _told() -> str:
    """Returns what Linux says about the processor; elsewhere nothing."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
