"""The kernels of layers.c by way of ctypes: each takes one structure, whose fields are checked here.

Operands are float32 on the CPU, [rows, width], each row contiguous: rows may be apart, as those of columns of
a wider matrix are. Results are fresh and contiguous. Calls have one thread each.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from hetrain.nn.families import Activation
from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS, require, structure

_INTERFACE = 2
_KERNELS = ("rms_norm", "rms_norm_backward", "gate", "gate_backward", "exponentials")

_NormArguments = structure("level rows width x_stride x* weight* epsilon~ y*")
_NormBackwardArguments = structure("level rows width x_stride dy_stride x* weight* dy* epsilon~ dx*")
_GateArguments = structure("level rows width g_stride u_stride is_gelu g* u* y*")
_GateBackwardArguments = structure("level rows width g_stride u_stride dy_stride is_gelu g* u* dy* both*")
_ExponentialsArguments = structure("level rows width z_stride z* largest* sums*")


@dataclass(frozen=True)
class NativeLayers:
    """The kernels for one instruction set. Thread-safe. `level` is that of lanes.h.

    All raise `ParameterError` where operands do not fit each other.
    """

    found: ctypes.CDLL
    level: int

    @staticmethod
    def best(instructions: str | None = None) -> NativeLayers | None:
        """For the named instruction set, else see `compiled.level`; None where nothing was compiled."""
        found = library()
        return None if found is None else NativeLayers(found, compiled.level(found, instructions))

    @property
    def name(self) -> str:
        """For logs."""
        return INSTRUCTION_SETS[self.level]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """w∘x·r with r = 1/sqrt(mean(x²) + epsilon) for each row of x [rows, width]; weight [width]."""
        _require_rows(x)
        _require_weight(weight, x)
        y = torch.empty(x.shape, dtype=torch.float32)
        self.found.hetrain_rms_norm(
            ctypes.byref(
                _NormArguments(
                    self.level,
                    *x.shape,
                    x.stride(0),
                    x.data_ptr(),
                    weight.data_ptr(),
                    epsilon,
                    y.data_ptr(),
                )
            )
        )
        return y

    def rms_norm_backward(
        self, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """dx = r·(w∘dy − x̂·mean(w∘dy∘x̂)), x̂ = x·r, [rows, width]."""
        _require_rows(x, dy)
        _require_weight(weight, x)
        dx = torch.empty(x.shape, dtype=torch.float32)
        self.found.hetrain_rms_norm_backward(
            ctypes.byref(
                _NormBackwardArguments(
                    self.level,
                    *x.shape,
                    x.stride(0),
                    dy.stride(0),
                    x.data_ptr(),
                    weight.data_ptr(),
                    dy.data_ptr(),
                    epsilon,
                    dx.data_ptr(),
                )
            )
        )
        return dx

    def gate(self, g: torch.Tensor, u: torch.Tensor, activation: Activation) -> torch.Tensor:
        """act(g)∘u, [rows, width]."""
        _require_rows(g, u)
        y = torch.empty(g.shape, dtype=torch.float32)
        self.found.hetrain_gate(
            ctypes.byref(
                _GateArguments(
                    self.level,
                    *g.shape,
                    g.stride(0),
                    u.stride(0),
                    activation == "gelu",
                    g.data_ptr(),
                    u.data_ptr(),
                    y.data_ptr(),
                )
            )
        )
        return y

    def gate_backward(
        self, g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        """dg = dy∘u∘act'(g) beside du = dy∘act(g), [rows, 2·width]."""
        _require_rows(g, u, dy)
        rows, width = g.shape
        both = torch.empty(rows, 2 * width, dtype=torch.float32)
        self.found.hetrain_gate_backward(
            ctypes.byref(
                _GateBackwardArguments(
                    self.level,
                    rows,
                    width,
                    g.stride(0),
                    u.stride(0),
                    dy.stride(0),
                    activation == "gelu",
                    g.data_ptr(),
                    u.data_ptr(),
                    dy.data_ptr(),
                    both.data_ptr(),
                )
            )
        )
        return both

    def exponentials(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z becomes e^(z − m), m its rows' largest values. Returns m and the sums of rows, both [rows]."""
        _require_rows(z)
        largest, sums = torch.empty(2, len(z), dtype=torch.float32)
        self.found.hetrain_exponentials(
            ctypes.byref(
                _ExponentialsArguments(
                    self.level, *z.shape, z.stride(0), z.data_ptr(), largest.data_ptr(), sums.data_ptr()
                )
            )
        )
        return largest, sums


def _require_rows(*operands: torch.Tensor) -> None:
    first = operands[0]
    require(first.dim() == 2)
    for each in operands:
        require(each.shape == first.shape, each.dtype == torch.float32, each.device.type == "cpu")
        require(each.stride(1) == 1 or each.shape[1] == 1)


def _require_weight(weight: torch.Tensor, x: torch.Tensor) -> None:
    require(weight.shape == x.shape[1:], weight.dtype == torch.float32, weight.device.type == "cpu")
    require(weight.is_contiguous())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled extension, if there is one."""
    found = compiled.load(Path(__file__).parent, "_layers", _INTERFACE)
    if found is not None:
        for name in _KERNELS:
            function = getattr(found, f"hetrain_{name}")
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found
