"""The header of `rlwe`: travels beside the ciphertexts, public."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

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
        operand: what the payload is: the digit planes of a ciphertext matrix, or the 32-byte seed of masks,
            whose product with W is a hint.
    """

    parameters: Annotated[str, AfterValidator(_known)]
    operand: Literal["ciphertext", "mask_seed"]

    @property
    def result_format(self) -> ResultFormat:
        """Sizes of operand and result."""
        return ResultFormat(PARAMETER_SETS[self.parameters])
