"""The adapter: LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hetrain.config.fields import as_tuple, require, require_least, setting

ALL_LINEAR = "all-linear"
_MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): y += dropout(x)·Aᵀ·Bᵀ·(alpha/r) on every target module.

    With `use_rslora` the last factor is alpha/√r (arXiv 2312.03732).

    Raises:
        UsageError: a value makes no sense; `field` names it.
    """

    r: int = setting(16, "Rank of the adapter.", least=1)
    alpha: int = setting(32, "The adapter counts alpha/r times.", least=1)
    use_rslora: bool = setting(
        False, "Rank-stabilised LoRA: the adapter counts alpha/√r times, so that a large rank learns as fast."
    )
    dropout: float = setting(0.0, "Dropout before the adapter.")
    target_modules: tuple[str, ...] = setting(
        (ALL_LINEAR,),
        "Module name suffixes as peft takes them, comma-separated or repeated; all-linear: all linears of "
        "the decoder blocks, outsourced or not.",
        metavar="NAMES",
    )

    layers: str | None = setting(
        None,
        "Decoder layers that get adapters, counted from 0, as in 8-15 or 0,4,8-11. Below the lowest, nothing "
        "is computed backward, and forward once for each row.",
        default="all",
        metavar="NUMBERS",
    )

    @property
    def layer_numbers(self) -> tuple[int, ...] | None:
        """The numbers in `layers`, in ascending order; None for all.

        Raises:
            UsageError: it is no list of numbers and ranges.
        """
        if self.layers is None:
            return None
        ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in self.layers.split(",")]
        numbers: set[int] = set()
        for match in ranges:
            require(match is not None, "layers", f"{self.layers!r} are no numbers", "write 8-15, or 0,4,8-11")
            assert match is not None
            first, last = int(match[1]), int(match[2] or match[1])
            require(first <= last, "layers", f"{match[0]} ends before it begins")
            require(last < _MOST_LAYERS, "layers", f"{last} is no layer of a model")
            numbers.update(range(first, last + 1))
        return tuple(sorted(numbers))

    def __post_init__(self) -> None:
        given = ",".join(as_tuple(self.target_modules)).split(",")
        object.__setattr__(self, "target_modules", tuple(name.strip() for name in given if name.strip()))
        require_least(self)
        require(0 <= self.dropout < 1, "dropout", f"{self.dropout} does not lie in [0, 1)")
        require(bool(self.target_modules), "target_modules", "no module is named", f"use {ALL_LINEAR}")
        _ = self.layer_numbers
