"""Choosing device and kernel when a worker starts: exactness first, then speed."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hetrain.public.errors import UsageError, WorkerError
from hetrain.public.lattice.result_format import DIGITS, packed_bytes
from hetrain.public.settings import WorkerSettings, variable
from worker_gpu import epilogue
from worker_gpu.epilogue import Epilogue
from worker_gpu.kernels import KERNELS, Kernel, combined, reference

_SEED = 20260101
# n, K, N: one value, ragged, and large enough that libraries choose the routines of real products.
_PROBES = ((1, 1, 1), (5, 67, 9), (33, 40, 24), (48, 512, 256))
_PLANES = (3, 4)  # of operands and of masks
# n, K, N that are timed: small ones of real products, since int8 without an instruction for it is slow.
_TIMED = (576, 576, 512)
_ROUNDS, _LIMIT_S = 5, 0.7
_CLEARLY = 1.5
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class Compute:
    """Where and how this worker multiplies."""

    device: torch.device
    kernel_name: str
    kernel: Kernel
    epilogue: Epilogue = epilogue.REFERENCE

    @property
    def description(self) -> str:
        """For logs and results, e.g. ``cpu · int8 kernel, avx512 epilogue``."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name} · {self.kernel_name} kernel, {self.epilogue.name} epilogue"


def choose_device() -> torch.device:
    """The device of the settings, else CUDA where torch finds it, else the CPU.

    Raises:
        UsageError: the setting names no device of this machine.
    """
    name = WorkerSettings().device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            f"device {name!r} cannot be used: {error}",
            where=variable("device"),
            hint="unset the variable to let the worker choose",
        ) from error
    return device


def choose_compute(device: torch.device) -> Compute:
    """The kernel and the epilogue that are exact on `device`, and fast.

    Raises:
        WorkerError: no kernel, or no epilogue, is exact here.
    """
    kernels = [name for name, kernel in KERNELS.items() if is_exact(kernel, device)]
    native = epilogue.native() if device.type == "cpu" else None
    epilogues = [one for one in (native, epilogue.REFERENCE) if one is not None and switches(one, device)]
    if not kernels or not epilogues:
        raise WorkerError(
            f"no {'epilogue' if kernels else 'kernel'} computes exact integer products on this device",
            where=str(device),
            hint="report the device and the torch version",
        )
    name = kernels[0] if len(kernels) == 1 else preferred(measured(kernels, device))
    return Compute(device, name, KERNELS[name], epilogues[0])


def is_exact(kernel: Kernel, device: torch.device) -> bool:
    """Whether `kernel` agrees with plain integers on random, ragged and extreme matrices on `device`."""
    return all(_agrees(kernel, probe, device) for probe in _probes())


@dataclass(frozen=True)
class _Probe:
    """Digit planes, int8 weights, and what `reference` makes of them."""

    planes: torch.Tensor
    weights: torch.Tensor
    expected: torch.Tensor


@functools.cache
def _probes() -> list[_Probe]:
    generator, probes = torch.Generator().manual_seed(_SEED), []
    for (n, k, tokens), count in itertools.product(_PROBES, _PLANES):
        weights = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        random = torch.randint(-128, 128, (count, tokens, k), dtype=torch.int8, generator=generator)
        # Saturating 16-bit accumulators fail on adjacent extremes of one sign.
        for w in (weights, torch.full_like(weights, -128), torch.full_like(weights, 127)):
            for planes in (random, torch.full_like(random, -128), torch.full_like(random, 127)):
                probes.append(_Probe(planes, w, reference(planes, w)))
    return probes


def _agrees(kernel: Kernel, probe: _Probe, device: torch.device) -> bool:
    planes = probe.planes.to(device)
    for matrix in (probe.weights.to(device), probe.weights.t().contiguous().to(device).t()):
        try:
            products = kernel(planes, matrix).cpu()
        except (RuntimeError, NotImplementedError):
            return False
        if not torch.equal(combined(products, torch.int64), probe.expected):
            return False
    return True


def switches(one: Epilogue, device: torch.device) -> bool:
    """Whether an epilogue on `device` gives the reference's bytes on random and extreme products."""
    generator = torch.Generator().manual_seed(_SEED)
    random = torch.randint(_INT32.min, _INT32.max + 1, (3, 40, 200), generator=generator).to(torch.int32)
    random[:, ::4], random[:, 1::4] = _INT32.min, _INT32.max
    expected, out = (torch.zeros(40, packed_bytes(200), dtype=torch.uint8) for _ in range(2))
    epilogue.REFERENCE.switch(random, expected)
    found = out.to(device)
    one.switch(random.to(device), found)
    return torch.equal(found.cpu(), expected)


def measured(names: Sequence[str], device: torch.device) -> dict[str, list[float]]:
    """The seconds of each kernel on a product of real size, in several rounds of all of them.

    In turn, so that other load slows all of them alike; fewer rounds where they are slow.
    """
    n, k, tokens = _TIMED
    planes = torch.ones(DIGITS, tokens, k, dtype=torch.int8, device=device)
    matrix = torch.ones(n, k, dtype=torch.int8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(_ROUNDS):
        for name in names:
            start = time.perf_counter()
            int(KERNELS[name](planes, matrix)[0, 0, 0])  # reading a value waits for the device
            seconds[name].append(time.perf_counter() - start)
        if number and time.perf_counter() - begin > _LIMIT_S:
            break
    return seconds


def preferred(seconds: Mapping[str, Sequence[float]]) -> str:
    """The first kernel, unless another one's best round is faster by more than half."""
    best = {name: min(values) for name, values in seconds.items()}
    first, fastest = next(iter(best)), min(best, key=lambda name: best[name])
    return fastest if best[first] > _CLEARLY * best[fastest] else first
