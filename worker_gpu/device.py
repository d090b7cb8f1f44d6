"""Choosing device and kernel when a worker starts: exactness first, then speed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hetrain.public.errors import UsageError, WorkerError
from hetrain.public.settings import WorkerSettings, variable
from worker_gpu.kernels import KERNELS, Kernel, reference

_SEED = 20260101
_ROUNDS = 8
# [n, K]·[K, M]: one value, ragged, and large enough that libraries choose the routines of real products.
_PROBES = ((1, 1, 1), (5, 67, 9), (33, 40, 24), (48, 512, 256))


@dataclass(frozen=True)
class Compute:
    """Where and how this worker multiplies."""

    device: torch.device
    kernel_name: str
    kernel: Kernel

    @property
    def description(self) -> str:
        """For logs and results, e.g. ``cpu · int8 kernel`` or ``cuda:0 (NVIDIA H100) · int8 kernel``."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name} · {self.kernel_name} kernel"


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
    """The fastest kernel that reproduces exact integer products on `device`.

    Raises:
        WorkerError: no kernel is exact here.
    """
    exact = [name for name, kernel in KERNELS.items() if is_exact(kernel, device)]
    if not exact:
        raise WorkerError(
            "no kernel computes exact integer products on this device",
            where=str(device),
            hint="report the device and the torch version",
        )
    # In turn, so that other load slows all of them alike.
    rounds = [{name: measure_seconds(KERNELS[name], device) for name in exact} for _ in range(_ROUNDS)]
    name = min(exact, key=lambda candidate: min(times[candidate] for times in rounds))
    return Compute(device, name, KERNELS[name])


def is_exact(kernel: Kernel, device: torch.device) -> bool:
    """Whether `kernel` agrees with plain integers on random, ragged and extreme matrices on `device`."""
    generator = torch.Generator().manual_seed(_SEED)
    for n, k, m in _PROBES:
        weights = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        random = torch.randint(-(2**31), 2**31, (k, m), dtype=torch.int64, generator=generator)
        # Saturating 16-bit accumulators fail on adjacent extremes of one sign.
        extremes = torch.full((k, m), -(2**31) + 0x7F7F7F, dtype=torch.int32)
        for w in (weights, torch.full_like(weights, -128), torch.full_like(weights, 127)):
            for x in (random.to(torch.int32), extremes, ~extremes):
                if not _agrees(kernel, w, x, device):
                    return False
    return True


def _agrees(kernel: Kernel, weights: torch.Tensor, operand: torch.Tensor, device: torch.device) -> bool:
    try:
        result = kernel(weights.to(device), operand.to(device)).cpu()
        transposed = kernel(weights.t().contiguous().to(device).t(), operand.to(device)).cpu()
    except (RuntimeError, NotImplementedError):
        return False
    expected = reference(weights, operand)
    return torch.equal(result, expected) and torch.equal(transposed, expected)


def measure_seconds(kernel: Kernel, device: torch.device) -> float:
    weights = torch.ones(512, 512, dtype=torch.int8, device=device)
    operand = torch.ones(512, 1024, dtype=torch.int32, device=device)
    start = time.perf_counter()
    int(kernel(weights, operand)[0, 0])  # reading a value waits for the device
    return time.perf_counter() - start
