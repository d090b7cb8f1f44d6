"""What leaves for the workers, under which engine."""

from __future__ import annotations

from dataclasses import dataclass

from hetrain.config.fields import as_tuple, require, require_known, setting

AUTO = "auto"
ENGINES = ("rlwe", "concrete", "clear")


@dataclass(frozen=True, kw_only=True)
class OutsourcingConfig:
    """Which products workers compute, and how operands and results are encrypted."""

    engine: str = setting(
        "rlwe", "rlwe encrypts; concrete too, exactly but slowly; clear hides nothing (for tests)."
    )
    activation_bits: int | None = setting(
        None,
        "Most bits of an encrypted value, 2 to 24 (concrete: to 12).",
        default="as many as fit; concrete: 8",
    )
    verify_rows: int = setting(
        16,
        "Secret rows by which each result is verified before it is decrypted, 8 to 64: a wrong one passes "
        "with probability 2^-N. The engine concrete takes 40 at least.",
    )
    outsource: tuple[str, ...] = setting(
        ("*",),
        "Glob on full module names, as in 'model.layers.*.mlp.*', repeatable: only matching linears of the "
        "decoder blocks go to workers, and the output head if it is named, as in lm_head; the others run on "
        "the client, with adapters all the same. auto: what pays over `link`, chosen once, when the job "
        "starts.",
        metavar="PATTERN",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "outsource", as_tuple(self.outsource))
        require_known("engine", self.engine, ENGINES)
        require(
            AUTO not in self.outsource or self.is_auto,
            "outsource",
            f"{AUTO} takes no pattern beside it",
            f"give {AUTO} alone, or patterns",
        )
        require(8 <= self.verify_rows <= 64, "verify_rows", f"{self.verify_rows} does not lie in 8..64")

    @property
    def is_auto(self) -> bool:
        """Whether the groups that pay are still to be chosen."""
        return self.outsource == (AUTO,)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The globs. Raises `UsageError` where they are still to be chosen, as only a training job does."""
        require(
            not self.is_auto,
            "outsource",
            f"{AUTO} is for training jobs",
            "`hetrain plan` with auto and `link` prints the patterns to give",
        )
        return self.outsource
