"""The header of `rlwe`: travels beside the ciphertexts, public."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, StringConstraints, model_validator

from hetrain.public.lattice.masks import SEED_BYTES, PublicSeed
from hetrain.public.lattice.parameters import PARAMETER_SETS
from hetrain.public.lattice.result_format import ResultFormat
from hetrain.public.protocol.messages import EngineHeader


def _known(name: str) -> str:
    if name not in PARAMETER_SETS:
        raise ValueError(f"unknown parameter set {name[:40]!r}")
    return name


class RlweHeader(EngineHeader):
    """The header of one product.

    Attributes:
        parameters: name of the parameter set.
        mask_seed: 256 bits in lower-case hexadecimal that expand to the masks a; W·a is wanted, too.
        result: ``"b"`` in place of a seed: W·b alone is wanted, the client has W·a.
    """

    parameters: Annotated[str, AfterValidator(_known)]
    mask_seed: Annotated[str, StringConstraints(pattern=f"^[0-9a-f]{{{2 * SEED_BYTES}}}$")] | None = None
    result: Literal["b"] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.mask_seed is None) == (self.result is None):
            raise ValueError("either mask_seed or result must be there")
        return self

    @staticmethod
    def of(result_format: ResultFormat, seed: PublicSeed) -> RlweHeader:
        """Asks for results of this format; masks, where they are wanted, come from `seed`."""
        name = result_format.parameters.name
        if result_format.has_mask_product:
            return RlweHeader(parameters=name, mask_seed=seed.hex())
        return RlweHeader(parameters=name, result="b")

    @property
    def seed(self) -> PublicSeed | None:
        """The masks' seed, None where W·a is not wanted."""
        return None if self.mask_seed is None else PublicSeed(bytes.fromhex(self.mask_seed))

    @property
    def result_format(self) -> ResultFormat:
        """Layout of operand and result."""
        return ResultFormat(PARAMETER_SETS[self.parameters], has_mask_product=self.mask_seed is not None)
