"""The kernels of ring.c by way of ctypes: each takes one structure, whose fields are checked here.

Words modulo q are int32 here and uint32 in C, the same bits since q < 2^30; residues modulo 2^14 are int16
here and uint16 in C.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from hetrain.public import compiled
from hetrain.public.compiled import INSTRUCTION_SETS, require, structure
from hetrain.public.lattice import ring
from hetrain.public.lattice.result_format import packed_bytes
from hetrain.public.lattice.ring import LANES, companions
from hetrain.secret.activation_quantization import TokenNorms
from hetrain.secret.engines.rlwe.torch_ring import LARGEST_IMAGE, RESULT_MASK, Message, ResultScales

_INTERFACE = 4
_KERNELS = ("spectrum", "token_norms", "encrypt", "unpack", "decrypt", "check_up", "check_down")


_Roots = structure("degree forward* forward_companions* inverse* inverse_companions*")
_Spectrum = structure("rank roots* values* companions*")
_SpectrumArguments = structure("level rank roots* secret* values* companions*")
_TokenNormsArguments = structure("level tokens features x* columns* largest* squares*")
_EncryptArguments = structure(
    "level secret* tokens width first features masks* noise* x* columns* inverse* limit~ planes*"
)
_UnpackArguments = structure("level tokens features stride packed* u*")
_DecryptArguments = structure(
    "level secret* tokens n first features width column u* hint* scales* columns* y*"
)
_CheckArguments = structure("level rows features tokens left* right* out*")
"""Of both checks: `left` is R·W or R, `right` the digit planes or u."""


class _NativeRoots:
    """`ring.roots` as C reads them, and the memory that they lie in."""

    def __init__(self, degree: int) -> None:
        found = ring.roots(degree)
        tables = (found.forward, companions(found.forward), found.inverse, companions(found.inverse))
        self._memory = np.stack([table.numpy() for table in tables]).astype(np.uint32)
        self.structure = _Roots(degree, *(row.ctypes.data for row in self._memory))
        self.address = ctypes.addressof(self.structure)


_roots = functools.cache(_NativeRoots)


class NativeSpectrum:
    """The transform of a secret int8 [d, N] over N, and the companions. Never serialised."""

    def __init__(self, secret: torch.Tensor, found: ctypes.CDLL) -> None:
        require(secret.dtype == torch.int8, secret.dim() == 2, secret.is_contiguous())
        self.rank, self.degree = secret.shape
        self._roots = _roots(self.degree)
        self.words = np.empty((2, self.rank * self.degree), np.uint32)
        values, others = (row.ctypes.data for row in self.words)
        found.hetrain_spectrum(
            ctypes.byref(
                _SpectrumArguments(0, self.rank, self._roots.address, secret.data_ptr(), values, others)
            )
        )
        self._structure = _Spectrum(self.rank, self._roots.address, values, others)
        self.address = ctypes.addressof(self._structure)

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied: a secret never leaves the memory it was drawn in."""
        raise TypeError("a secret cannot be serialised or copied")


@dataclass(frozen=True)
class NativeRing:
    """See `hetrain.secret.engines.rlwe.ring_kernels.RingKernels`. `level` is that of lanes.h."""

    found: ctypes.CDLL
    level: int

    @staticmethod
    def best(instructions: str | None = None) -> NativeRing | None:
        """For the named instruction set, else see `compiled.level`; None where nothing was compiled."""
        found = _library()
        return None if found is None else NativeRing(found, compiled.level(found, instructions))

    @property
    def name(self) -> str:
        """For logs."""
        return INSTRUCTION_SETS[self.level]

    def spectrum(self, secret: torch.Tensor) -> NativeSpectrum:
        """See `RingKernels.spectrum`."""
        return NativeSpectrum(secret, self.found)

    def token_norms(self, x: torch.Tensor, columns: torch.Tensor) -> TokenNorms:
        """See `RingKernels.token_norms`."""
        require(x.dim() == 2, columns.shape == x.shape[1:], x.shape[1] > 0)
        require(x.dtype == columns.dtype == torch.float32, x.is_contiguous(), columns.is_contiguous())
        largest, squares = torch.empty(2, len(x)).unbind()
        pointers = (one.data_ptr() for one in (x, columns, largest, squares))
        self.found.hetrain_token_norms(ctypes.byref(_TokenNormsArguments(self.level, *x.shape, *pointers)))
        return TokenNorms(largest, squares, x.shape[1])

    def encrypt(
        self,
        planes: torch.Tensor,
        first: int,
        masks: torch.Tensor,
        keystream: torch.Tensor,
        message: Message,
        secret: NativeSpectrum,
    ) -> None:
        """See `RingKernels.encrypt`."""
        (tokens, width), degree = message.x.shape, secret.degree
        blocks = len(masks)
        require(
            masks.shape[1:] == (secret.rank * degree, LANES),
            planes.shape == (3, degree, width),
            keystream.numel() == 2 * LANES * blocks * degree,
            first >= 0 and first % LANES == 0 and first + LANES * (blocks - 1) < width,
            tokens <= degree,
            message.inverse.shape == (tokens,),
            message.columns.shape == (width,),
            0 < message.limit <= 1 << 24,
            (planes.dtype, masks.dtype, keystream.dtype) == (torch.int8, torch.int32, torch.uint8),
            message.x.dtype == message.inverse.dtype == message.columns.dtype == torch.float32,
            all(one.is_contiguous() for one in (planes, masks, keystream)),
            all(one.is_contiguous() for one in (message.x, message.columns, message.inverse)),
        )
        self.found.hetrain_encrypt(
            ctypes.byref(
                _EncryptArguments(
                    self.level,
                    secret.address,
                    tokens,
                    width,
                    first,
                    min(LANES * blocks, width - first),
                    masks.data_ptr(),
                    keystream.data_ptr(),
                    message.x.data_ptr(),
                    message.columns.data_ptr(),
                    message.inverse.data_ptr(),
                    message.limit,
                    planes.data_ptr(),
                )
            )
        )

    def unpack(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """See `RingKernels.unpack`."""
        require(
            (packed.dtype, out.dtype) == (torch.uint8, torch.int16),
            out.dim() == 2,
            packed.shape == (len(out), packed_bytes(out.shape[1])),
            packed.is_contiguous(),
            out.stride(1) == 1,
        )
        pointers = packed.data_ptr(), out.data_ptr()
        self.found.hetrain_unpack(
            ctypes.byref(_UnpackArguments(self.level, *out.shape, out.stride(0), *pointers))
        )

    def decrypt(
        self,
        out: torch.Tensor,
        column: int,
        u: torch.Tensor,
        first: int,
        hint: torch.Tensor,
        scales: ResultScales,
        secret: NativeSpectrum,
    ) -> None:
        """See `RingKernels.decrypt`."""
        (tokens, width), n, blocks = out.shape, u.shape[1], len(hint)
        features = min(LANES * blocks, n - first)
        require(
            hint.shape[1:] == (secret.rank * secret.degree, LANES),
            len(u) == secret.degree,
            0 <= first < n and first + LANES * (blocks - 1) < n,
            0 <= column <= width - features,
            tokens <= secret.degree,
            scales.tokens.shape == (tokens,),
            scales.columns.shape == (width,),
            (u.dtype, hint.dtype) == (torch.int16, torch.int32),
            out.dtype == scales.tokens.dtype == scales.columns.dtype == torch.float32,
            all(one.is_contiguous() for one in (out, u, hint, scales.tokens, scales.columns)),
        )
        self.found.hetrain_decrypt(
            ctypes.byref(
                _DecryptArguments(
                    self.level,
                    secret.address,
                    tokens,
                    n,
                    first,
                    features,
                    width,
                    column,
                    u.data_ptr(),
                    hint.data_ptr(),
                    scales.tokens.data_ptr(),
                    scales.columns.data_ptr(),
                    out.data_ptr(),
                )
            )
        )

    def check_up(self, image: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """See `RingKernels.check_up`."""
        require(image.dtype == torch.int32, planes.dtype == torch.int8)
        require(planes.dim() == 3 == len(planes))
        require(int(image.max()) <= LARGEST_IMAGE, int(image.min()) >= -LARGEST_IMAGE)
        return self._check(self.found.hetrain_check_up, image, planes, planes.shape[1], torch.int32)

    def check_down(self, rows: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """See `RingKernels.check_down`."""
        require(rows.dtype == torch.int8, u.dtype == torch.int16)
        sums = self._check(self.found.hetrain_check_down, rows, u, len(u), torch.int16)
        return sums.to(torch.int32) & RESULT_MASK

    def _check(
        self, kernel: Any, left: torch.Tensor, right: torch.Tensor, tokens: int, dtype: torch.dtype
    ) -> torch.Tensor:
        require(left.dim() == 2)
        rows, features = left.shape
        require(right.shape[-2:] == (tokens, features), tokens % LANES == 0, features > 0)
        require(left.is_contiguous(), right.is_contiguous())
        out = torch.empty(-(-rows // LANES), tokens, LANES, dtype=dtype)
        pointers = (left.data_ptr(), right.data_ptr(), out.data_ptr())
        kernel(ctypes.byref(_CheckArguments(self.level, rows, features, tokens, *pointers)))
        return out.transpose(1, 2).reshape(-1, tokens)[:rows]


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = compiled.load(Path(__file__).parent, "_ring", _INTERFACE)
    if found is not None:
        for name in _KERNELS:
            function = getattr(found, f"hetrain_{name}")
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found
