"""The compiled kernels give the reference's numbers to the bit."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch

from hetrain.public.errors import ParameterError
from hetrain.public.lattice.parameters import PARAMETER_SETS, ParameterSet
from hetrain.secret.engines.rlwe.kernels import ScaledOperand, TorchKernels
from hetrain.secret.engines.rlwe.native import NativeKernels, library
from hetrain.secret.randomness import SecretStream, sample_ternary

INSECURE = ParameterSet("insecure-16x2", 16, 2)
SETS = [INSECURE, *PARAMETER_SETS.values()]
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    found = library()
    if found is None and shutil.which("cc") is None:
        pytest.skip("there was no C compiler when hetrain was installed")
    assert found is not None, "there is a C compiler: reinstall hetrain (pip install --editable .)"
    return NativeKernels(found)


def words(*shape: int) -> torch.Tensor:
    """Random words, and rows of extremes."""
    values = torch.randint(INT32_MIN, INT32_MAX + 1, shape, dtype=torch.int64).to(torch.int32)
    values[0], values[-1] = INT32_MIN, INT32_MAX
    return values


def secrets(parameters: ParameterSet) -> list[torch.Tensor]:
    """A random secret, and the one that adds everything up."""
    shape = (parameters.rank, parameters.ring_degree)
    random = sample_ternary(SecretStream("test"), parameters.dimension).view(shape)
    return [random, torch.ones(shape, dtype=torch.int8), -torch.ones(shape, dtype=torch.int8)]


@pytest.mark.parametrize("parameters", SETS, ids=lambda p: p.name)
@pytest.mark.parametrize(("rows", "missing", "limit"), [(1, 0, 5), (8, 3, 1 << 15), (21, 1, 1 << 24)])
def test_encryption_equals_the_reference(
    native: NativeKernels, parameters: ParameterSet, rows: int, missing: int, limit: int
) -> None:
    n, tokens, eta = parameters.ring_degree, parameters.ring_degree - missing, parameters.eta
    x = torch.randn(tokens, rows + 5) * torch.rand(tokens, 1).mul(30).exp()
    x[0] = 0
    # Halves, so that rounding has to decide, and values that rounding carries past the limit.
    x[1:3] = (torch.arange(rows + 5) - 7) / 2
    inverse = limit / x.abs().amax(dim=1).clamp_min(1e-30)
    inverse[1], inverse[2] = 1.0, limit / 2.999
    for secret in secrets(parameters):
        masks, keystream = (
            words(rows, parameters.dimension),
            torch.randint(256, (6 * rows * n,)).to(torch.uint8),
        )
        outs = [torch.full((rows, n), 7, dtype=torch.int32) for _ in range(2)]
        for kernels, out in zip((TorchKernels(), native), outs, strict=True):
            ready = kernels.transform(secret)
            operand = ScaledOperand(x, inverse, limit, eta)
            kernels.encrypt(out, operand, 3, masks, keystream.clone(), ready)
        assert torch.equal(*outs)


@pytest.mark.parametrize("parameters", SETS, ids=lambda p: p.name)
@pytest.mark.parametrize(("rows", "missing"), [(1, 0), (8, 3), (21, 1)])
def test_decryption_equals_the_reference(
    native: NativeKernels, parameters: ParameterSet, rows: int, missing: int
) -> None:
    tokens = parameters.ring_degree - missing
    scales = torch.rand(tokens).mul(40).sub(20).exp()
    b = words(rows, parameters.ring_degree) >> 16
    a = words(rows, parameters.dimension)
    high, low = (a >> 16).to(torch.int16), ((a >> 8) & 255).to(torch.uint8)
    for secret in secrets(parameters):
        outs = [torch.full((tokens, rows + 5), 7.0) for _ in range(2)]
        for kernels, out in zip((TorchKernels(), native), outs, strict=True):
            kernels.decrypt(out, 2, (b.to(torch.int16), high, low), scales, kernels.transform(secret))
        assert torch.equal(*outs)
        assert bool((outs[1][:, :2] == 7).all() and (outs[1][:, rows + 2 :] == 7).all())


def test_operands_that_do_not_fit_never_reach_the_kernel(native: NativeKernels) -> None:
    parameters = PARAMETER_SETS["rlwe-256x8"]
    secret = native.transform(secrets(parameters)[0])
    out, masks = torch.zeros(4, 256, dtype=torch.int32), torch.zeros(4, 2048, dtype=torch.int32)
    stream, x, inverse = torch.zeros(6 * 4 * 256, dtype=torch.uint8), torch.zeros(9, 6), torch.ones(9)
    operand = ScaledOperand(x, inverse, 5, 21)
    native.encrypt(out, operand, 2, masks, stream, secret)
    for wrong in (
        (out, operand, 3, masks, stream, secret),
        (out, ScaledOperand(x.double(), inverse, 5, 21), 0, masks, stream, secret),
        (out, ScaledOperand(x.t(), inverse[:6], 5, 21), 0, masks, stream, secret),
        (out, operand, 0, masks[:3], stream, secret),
        (out, operand, 0, masks, stream[1:], secret),
        (out, ScaledOperand(torch.zeros(257, 6), torch.ones(257), 5, 21), 0, masks, stream, secret),
    ):
        with pytest.raises(ParameterError):
            native.encrypt(*wrong)
    for shape in ((1, 4096), (1, 1536), (2048,)):  # more than the workspace holds, no power of two, no rank
        with pytest.raises(ParameterError):
            native.transform(torch.zeros(shape, dtype=torch.int8))
    with pytest.raises(ParameterError):
        native.transform(torch.zeros(2048, 1, dtype=torch.int8).t()[:, ::2])
    shapes = ((256, torch.int16), (2048, torch.int16), (2048, torch.uint8))
    planes, scales = [torch.zeros(4, width, dtype=dtype) for width, dtype in shapes], torch.ones(9)
    native.decrypt(torch.zeros(9, 5), 1, planes, scales, secret)
    with pytest.raises(ParameterError):
        native.decrypt(torch.zeros(9, 5), 2, planes, scales, secret)


def test_secrets_stay_where_they_are(native: NativeKernels) -> None:
    secret = native.transform(secrets(PARAMETER_SETS["rlwe-256x8"])[0])
    with pytest.raises(TypeError, match="cannot be serialised"):
        pickle.dumps(secret)
    assert "array" not in repr(secret)
