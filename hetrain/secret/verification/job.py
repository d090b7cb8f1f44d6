"""What a job keeps to verify its results: rows for each product, and the way to the public weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from hetrain.public.protocol.plan import Group
from hetrain.public.protocol.product import Product, ProductKey
from hetrain.secret.verification.parts import Weights
from hetrain.secret.verification.rows import KEPT_ROWS, CheckRows

DEFAULT_ROWS = 16


@dataclass(frozen=True, repr=False)
class Verification:
    """See `hetrain.secret.verification.parts`.

    Attributes:
        kept: `KEPT_ROWS` rows for each product, from `kept_rows`.
        weights: loads a product's matrix.
        count: rows of one verification.
    """

    kept: Mapping[ProductKey, CheckRows]
    weights: Weights
    count: int = DEFAULT_ROWS

    def rows_of(
        self, product: Product
    ) -> tuple[Callable[[], CheckRows], Callable[[torch.Tensor], CheckRows]]:
        """Functions that draw rows for a verification of `product`, and make new ones for a range of W."""
        kept = self.kept[product.key]
        return partial(kept.draw, self.count), partial(CheckRows.fresh, count=self.count)


def kept_rows(group: Group, matrix: torch.Tensor) -> dict[ProductKey, CheckRows]:
    """Rows for both products with the group's int8 matrix [out_features, in_features]."""
    return {
        (group.name, "forward"): CheckRows.fresh(matrix, KEPT_ROWS),
        (group.name, "backward"): CheckRows.fresh(matrix.t(), KEPT_ROWS),
    }
