"""Loading the extensions in C, and the instruction set that their kernels use.

They are compiled when hetrain is installed, where there is a C compiler. All that they compute has a version
in torch or numpy, which is the reference and the fall-back. Calls give up the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from hetrain.public.errors import ParameterError, UsageError

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""By level, as in public/lattice/native/lanes.h."""
VARIABLE = "HETRAIN_INSTRUCTIONS"
"""Environment: at most this instruction set, for tests; "torch" for no compiled kernel."""


def load(directory: Path, name: str, interface: int) -> ctypes.CDLL | None:
    """The extension `name` in `directory`; None where none was compiled for this version and machine."""
    if os.environ.get(VARIABLE) == "torch":
        return None
    path = next((p for s in EXTENSION_SUFFIXES if (p := directory / f"{name}{s}").exists()), None)
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
        return found if found.hetrain_interface() == interface else None
    except (OSError, AttributeError):  # compiled for another machine, or long ago
        return None


def level(found: ctypes.CDLL, wanted: str | None = None) -> int:
    """The level to use: the machine's best, or a lower one by name: `wanted`, else the environment's.

    Raises:
        UsageError: there is no such instruction set, or this machine lacks it.
    """
    best: int = found.hetrain_best_level()
    name = wanted or os.environ.get(VARIABLE) or INSTRUCTION_SETS[best]
    if name not in INSTRUCTION_SETS[: best + 1]:
        names = ", ".join(("torch", *INSTRUCTION_SETS[: best + 1]))
        raise UsageError(f"no instruction set {name!r} here", where=VARIABLE, hint=f"choose one of {names}")
    return INSTRUCTION_SETS.index(name)


def structure(fields: str) -> Any:
    """A structure of C from its fields' names: pointers are marked by *, floats by ~, others are int64."""
    kinds = {"*": ctypes.c_void_p, "~": ctypes.c_float}
    types = [(name.rstrip("*~"), kinds.get(name[-1], ctypes.c_int64)) for name in fields.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": types})


def require(*conditions: bool) -> None:
    """Checks shapes, types and layout, on which C relies. Raises `ParameterError`."""
    if not all(conditions):
        raise ParameterError("the operands of a compiled kernel do not fit each other")
