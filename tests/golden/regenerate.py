"""Writes the known-answer vectors of the ring: ``python -m tests.golden.regenerate``, 10 seconds.

Everything is computed with `tests.harness.plain_ring`, in Python integers; no vector comes from the code that
it tests. Long results are kept as their BLAKE2b-128 digests, beside their first entries. A change of these
files is a change of the wire format, of masks or of the scheme.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.harness import plain_ring as plain

HERE = Path(__file__).parent
SEED = bytes(range(32))
SETS = ((256, 8, 17), (512, 4, 3), (1024, 2, 2), (2048, 1, 2))
"""N, d and features of a case."""
LIMIT = 1 << 15
WEIGHTS = 5
"""Rows of the matrix that results are products with."""


def stream(label: str, count: int) -> bytes:
    """`count` bytes that depend on the label alone."""
    return hashlib.shake_128(label.encode()).digest(count)


def digest(values: Iterable[int] | npt.NDArray[Any], kind: str) -> str:
    """BLAKE2b-128 of the values as little-endian numbers of this numpy type, in C order."""
    return hashlib.blake2b(np.asarray(values).astype(kind).tobytes(), digest_size=16).hexdigest()


def ternary(label: str, count: int) -> npt.NDArray[np.int8]:
    """Values of {−1, 0, 1}; the bias of a byte modulo 3 does not matter here."""
    return (np.frombuffer(stream(label, count), np.uint8) % 3).astype(np.int8) - np.int8(1)


def inputs(degree: int, rank: int, features: int) -> dict[str, npt.NDArray[Any]]:
    """What a case encrypts: secret, noise keystream, operand, scales, and the matrix of its product."""
    name, tokens = f"{degree}x{rank}", degree - 3
    blocks = -(-features // plain.LANES)
    x = np.frombuffer(stream(f"x {name}", 2 * tokens * features), np.int16).astype(np.float32) / 7
    return {
        "secret": ternary(f"secret {name}", rank * degree).reshape(rank, degree),
        "keystream": np.frombuffer(stream(f"noise {name}", 32 * blocks * degree), np.uint8),
        "x": x.reshape(tokens, features),
        "inverse": np.frombuffer(stream(f"inverse {name}", 2 * tokens), np.uint16).astype(np.float32) / 4096,
        "weights": np.frombuffer(stream(f"weights {name}", WEIGHTS * features), np.int8).reshape(WEIGHTS, -1),
        "rows": ternary(f"rows {name}", 16 * WEIGHTS).reshape(16, -1),
    }


def mask_vectors() -> dict[str, Any]:
    """Blocks of one seed."""
    cases = []
    for index in (0, 1, 1000):
        block = plain.mask_block(SEED, index)
        words = [word for point in block for word in point]
        cases.append({"block": index, "first": words[:8], "last": words[-1], "digest": digest(words, "<u4")})
    return {"seed": SEED.hex(), "blocks": cases}


def transform_vectors() -> list[dict[str, Any]]:
    """Of the polynomial a_i = 7^i mod q, and all of the smallest degree."""
    cases = []
    for degree in (16, 256, 512, 1024, 2048):
        values = plain.transform([pow(7, i, plain.Q) for i in range(degree)])
        first = values if degree == 16 else values[:4]
        cases.append(
            {"degree": degree, "psi": plain.root(degree), "first": first, "digest": digest(values, "<u4")}
        )
    return cases


def product_vectors(degree: int, rank: int, features: int) -> dict[str, Any]:
    """One operand encrypted, multiplied, switched, checked and decrypted."""
    case = inputs(degree, rank, features)
    tokens = len(case["x"])
    blocks = [plain.mask_block(SEED, index) for index in range(-(-features // plain.LANES))]
    masks = [[point[k % 16] for point in blocks[k // 16]] for k in range(features)]
    secret = case["secret"].tolist()
    pairs = case["keystream"].reshape(len(blocks), degree, plain.LANES, 2)
    planes = np.zeros((3, degree, features), np.int8)
    for k in range(features):
        b = plain.masked(masks[k], secret)
        for t in range(degree):
            b[t] += plain.noise(pairs[k // 16, t, k % 16].tobytes())
            if t < tokens:
                b[t] += plain.scaled(case["x"][t, k], case["inverse"][t], LIMIT)
            planes[:, t, k] = plain.digits(b[t])
    weights = case["weights"].astype(object)
    products = [plane.astype(object) @ weights.T for plane in planes]
    u = np.vectorize(plain.switch, otypes=[object])(*products)
    hint = (weights @ np.array(masks, dtype=object)) % plain.Q
    a = np.array([plain.masked(row.tolist(), secret) for row in hint], dtype=object).T
    opened = np.vectorize(plain.opened, otypes=[object])(u, a)
    c = np.vectorize(lambda *three: plain.value(three), otypes=[object])(*planes.astype(object))
    rows = case["rows"].astype(object)
    up, down = (64 * (rows @ weights @ c.T)) % plain.Q, (rows @ u.T) % plain.LEVELS
    return {
        "degree": degree,
        "rank": rank,
        "features": features,
        "wire": {"first": planes[:, 0, 0].tolist(), "digest": digest(planes, "<i1")},
        "result": {"first": u[0].tolist(), "digest": digest(u, "<u2")},
        "packed": {"digest": digest([list(plain.packed(row)) for row in u.tolist()], "u1")},
        "hint": {"first": hint[:, 0].tolist(), "digest": digest(hint, "<u4")},
        "opened": {"first": opened[0].tolist(), "digest": digest(opened[:tokens], "<f4")},
        "check_up": {"first": up[:2, 0].tolist(), "digest": digest(up, "<u4")},
        "check_down": {"first": down[:2, 0].tolist(), "digest": digest(down, "<u2")},
    }


def main() -> None:
    """Writes the three files."""
    files = {
        "masks": mask_vectors(),
        "transform": transform_vectors(),
        "products": {"limit": LIMIT, "cases": [product_vectors(*one) for one in SETS]},
    }
    for name, vectors in files.items():
        text = json.dumps(vectors, indent=1)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
