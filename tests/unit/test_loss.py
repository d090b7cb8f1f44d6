"""Loss and gradient over the vocabulary, a few tokens and rows of the head at a time, in stored precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hetrain.nn.loss import LocalHead, OutputHead, summed_loss
from hetrain.nn.memory.bfloat16 import add_product, has_bfloat16_tiles
from hetrain.nn.memory.low_precision import StoredHead

TOKENS, HIDDEN, VOCABULARY = 1100, 32, 9000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (2.0, 3.0)])
def test_loss_is_that_of_float64(dtype: torch.dtype, scale: float, cap: float | None) -> None:
    generator = torch.Generator().manual_seed(5)
    head = StoredHead(HIDDEN, VOCABULARY).requires_grad_(False)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::7] = -100
    loss = summed_loss(hidden, targets, OutputHead(LocalHead(head), scale, cap))
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    logits = scale * (exact @ weight.double().t() + head.bias.double())
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.skipif(not has_bfloat16_tiles(), reason="this processor has no tiles for bfloat16")
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_bfloat16_are_summed_in_float32(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    x, w = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ((37, 700), (700, 90)))
    wide = torch.ones(37, 120)
    out = wide[:, 10:100]
    add_product(out, x, w.t().contiguous().t() if transposed else w)
    torch.testing.assert_close(out.double(), 1 + x.double() @ w.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(wide[:, :10], torch.ones(37, 10))
    add_product(out, x, w, keep=False)
    torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="fit"):
        add_product(out, x[:5], w)
