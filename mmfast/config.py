"""Every MMFAST_* environment variable, read once, when mmfast is imported.

A wrong value is not refused here (importing never fails for a setting) but where it is used, in one sentence.
"""

from __future__ import annotations

import os

#: MMFAST_BACKEND: the backend every op uses instead of choosing: torch, cpu, triton or cuda. Empty: choose.
BACKEND: str | None = os.environ.get("MMFAST_BACKEND") or None

#: MMFAST_ISA: the instruction set of the CPU kernels: baseline, avx2 or avx512. Empty: the best this processor has.
ISA: str | None = os.environ.get("MMFAST_ISA") or None

#: MMFAST_DATA: where `mmfast train` keeps its prepared data. Empty: the user's cache folder.
DATA: str | None = os.environ.get("MMFAST_DATA") or None

#: MMFAST_TABLE: the preference table that `mmfast bench --tune` writes. Empty: in the user's configuration folder.
TABLE: str | None = os.environ.get("MMFAST_TABLE") or None
