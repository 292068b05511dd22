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


SAPPHIRE_RAPIDS = frozenset(
    [
        "abm",
        "adx",
        "amx_bf16",
        "amx_int8",
        "amx_tile",
        "avx2",
        "avx512_bf16",
        "avx512_bitalg",
        "avx512_fp16",
        "avx512_vbmi2",
        "avx512_vnni",
        "avx512_vpopcntdq",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512f",
        "avx512ifma",
        "avx512vbmi",
        "avx512vl",
        "avx_vnni",
        "bmi1",
        "bmi2",
        "f16c",
        "fma",
        "gfni",
        "movbe",
        "popcnt",
        "sha_ni",
        "vaes",
        "vpclmulqdq",
    ]
)
"""Extensions of Intel's processors since Sapphire Rapids that a compiler uses by itself."""


def cpu_target() -> str:
    """Returns LLVM's name of a processor to compile for, or "" for the one that MAX finds.

    MAX finds it by the processor's number. Virtual machines may show the number of an older processor. Code for that
    processor has no conversions of bfloat16: operations on bfloat16 took up to 9 times as long.
    """
    return "sapphirerapids" if cpu_features() >= SAPPHIRE_RAPIDS else ""


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
    """Returns the facts that identify this machine's processor: its maker, family, model, name and cache."""
    lines = re.findall(r"^(vendor_id|cpu family|model|model name|cache size|CPU part)\s*: (.*)$", _told(), re.MULTILINE)
    facts = {name: value for name, value in reversed(lines)}  # the first core's
    return ", ".join(f"{name} {value}" for name, value in sorted(facts.items())) or platform.processor()


@cache
def _told() -> str:
    """Returns Linux's description of the processor; on other systems nothing."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
