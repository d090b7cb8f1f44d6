"""Verification: what passes, what does not, and with which probability; who is named; what it may know."""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import hetrain.secret.verification
from hetrain.public.errors import ResultRejected, WireError
from hetrain.public.lattice.ring import DROPPED_BITS, MODULUS, RESULT_BITS
from hetrain.public.model.quantization import Norms
from hetrain.public.protocol.plan import Group, Member
from hetrain.public.protocol.product import Part, Product
from hetrain.secret.engines.clear import ClearClaim
from hetrain.secret.engines.rlwe.hints import HintClaim
from hetrain.secret.engines.rlwe.seal import RlweClaim
from hetrain.secret.randomness import SecretStream
from hetrain.secret.verification import job, parts, rows, verdict
from hetrain.secret.verification.parts import PartsCheck
from hetrain.secret.verification.rows import CheckRows, FieldRows, sample_field, sample_rows
from hetrain.secret.verification.verdict import is_equal, is_near, tolerances

SPAN = 1 << RESULT_BITS
ENTRIES = (-1, 0, 0, 1)
ROWS, COEFFICIENTS, PRODUCTS = 16, 2048, 2_000_000


def random_matrix(n: int, k: int) -> torch.Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 300), (700, 5), (257, 256)])
def test_images_are_rows_times_the_matrix(n: int, k: int) -> None:
    matrix = random_matrix(n, k)
    for w in (matrix, matrix.t().contiguous().t()):
        checked = CheckRows.fresh(w, 5)
        assert torch.equal(checked.values.to(torch.int64) @ w.to(torch.int64), checked.image.to(torch.int64))
        field = FieldRows.fresh(w)
        assert torch.equal(field.values @ w.to(torch.int64) % MODULUS, field.image)


def test_images_are_exact_for_the_largest_vocabularies() -> None:
    matrix = torch.full((300_000, 2), 127, dtype=torch.int8)
    field, checked = FieldRows.fresh(matrix), CheckRows.fresh(matrix, 3)
    assert torch.equal(field.image, (127 * field.values.sum(1) % MODULUS)[:, None].expand(-1, 2))
    assert torch.equal(checked.image, (127 * checked.values.sum(1, dtype=torch.int32))[:, None].expand(-1, 2))


def test_rows_are_fresh_and_drawn_without_repetition() -> None:
    kept = CheckRows.fresh(random_matrix(500, 3))
    assert len(kept.values) == rows.KEPT_ROWS
    assert not torch.equal(kept.values, CheckRows.fresh(random_matrix(500, 3)).values)
    drawn = [kept.draw(16) for _ in range(20)]
    every = [tuple(row.tolist()) for row in kept.values]
    chosen = [frozenset(every.index(tuple(row.tolist())) for row in one.values) for one in drawn]
    assert all(len(one) == 16 for one in chosen)
    assert len(set(chosen)) == 20
    assert "tensor" not in repr(kept)


def test_entries_of_rows_are_distributed_as_said() -> None:
    counts = Counter(sample_rows(SecretStream("test"), 400_001).tolist())
    assert set(counts) == {-1, 0, 1}
    for value, share in ((-1, 1 / 4), (0, 1 / 2), (1, 1 / 4)):
        assert abs(counts[value] - share * 400_001) < 8 * math.sqrt(400_001 * share)
    field = sample_field(SecretStream("test"), 100_000)
    assert 0 <= int(field.min()) < int(field.max()) < MODULUS
    assert abs(float(field.double().mean()) / (MODULUS / 2) - 1) < 8 / math.sqrt(3 * 100_000)


@pytest.mark.parametrize("n", [1, 40, 3000])
def test_a_verdict_is_that_of_plain_integers(n: int) -> None:
    """Right results with the largest rounding that is honest, and the first ones that are too far off."""
    values = sample_rows(SecretStream("test"), ROWS * n).view(ROWS, n)
    weights = values.abs().sum(1, dtype=torch.int64).double()
    products = torch.randint(MODULUS, (n, 5))
    u = (products * SPAN + MODULUS // 2) // MODULUS % SPAN
    expected = (values.to(torch.int64) @ products) % MODULUS
    claimed = values.to(torch.int64) @ u
    assert is_near(expected.to(torch.int32), claimed, weights)
    assert is_near(expected.to(torch.int32), claimed + 7 * SPAN, weights)
    step = torch.zeros_like(claimed)
    step[0, 2] = math.floor(tolerances(weights)[0]) + 1 + math.ceil(float(weights[0]) / 2)
    if step[0, 2] < SPAN / 2:
        assert not is_near(expected.to(torch.int32), claimed + step, weights)
        assert not is_near(expected.to(torch.int32), claimed - step, weights)


@pytest.mark.parametrize("change", [1, -1, 1 << 20, MODULUS, -MODULUS])
def test_exact_verdicts_accept_nothing_else(change: int) -> None:
    matrix = random_matrix(30, 20)
    x = torch.randint(-500_000, 500_000, (7, 20))
    y = (x @ matrix.to(torch.int64).t()).to(torch.int32)
    checked = CheckRows.fresh(matrix, 64)
    expected = ((checked.image.to(torch.int64) @ x.t() << DROPPED_BITS) % MODULUS).to(torch.int32)
    assert is_equal(expected, y, checked.values)
    y[3, 4] += change
    assert not is_equal(expected, y, checked.values)


def passing(changes: Sequence[int], entries: Sequence[int], tolerance: float) -> float:
    """Share of the choices of r over `entries` for which |Σ r_j·δ_j mod 2^14| stays within the tolerance."""
    sums = [sum(map(int.__mul__, changes, r)) % SPAN for r in itertools.product(entries, repeat=len(changes))]
    return sum(min(s, SPAN - s) <= tolerance for s in sums) / len(sums)


@pytest.mark.parametrize("n", [64, 2048, 28672])
def test_a_changed_entry_passes_a_row_with_at_most_one_half(n: int) -> None:
    """For every δ that is more than twice the tolerance from 0: by enumeration, other entries right."""
    tolerance = float(tolerances(torch.tensor([n / 2.0])))
    first = math.floor(2 * tolerance) + 1
    worst = max(passing([delta], ENTRIES, tolerance) for delta in range(first, SPAN - first + 1))
    assert worst == 1 / 2
    half = [SPAN // 2, SPAN // 2]
    assert passing(half, ENTRIES, tolerance) == 1 / 2
    assert passing(half, (-1, 0, 1), tolerance) == 5 / 9
    assert math.log2(5 / 9) * 64 == pytest.approx(-54.3, abs=0.1)


def test_honest_results_are_not_refused() -> None:
    """For the figures, the tail of a Gaussian and Chernoff's bound; and a million sums of rounding errors.

    Uniform values in ±1/2 satisfy E exp(λX) = sinh(λ/2)/(λ/2) ≤ exp(λ²/24), so that a sum over ‖r‖₁ of them
    exceeds t in size with probability at most 2·exp(−6·t²/‖r‖₁), for every n.
    """
    sums = ROWS * COEFFICIENTS * PRODUCTS
    assert 1e-8 < math.erfc(verdict.DEVIATIONS / math.sqrt(2)) * sums < 2e-8
    for n in (64, 2048, 28672):
        weight = torch.tensor([n / 2.0])
        chernoff = 2 * math.exp(-6 * float(tolerances(weight)[0]) ** 2 / (n / 2))
        assert 3e-7 < chernoff * sums < 4e-7
    generator = torch.Generator().manual_seed(1)
    for n in (30, 700, 2048):
        values = sample_rows(SecretStream("test"), ROWS * n).view(ROWS, n).double()
        errors = torch.rand(n, 1_000_000 // (3 * ROWS), generator=generator, dtype=torch.float64) - 0.5
        largest = (values @ errors).abs().amax(dim=1)
        assert bool((largest <= tolerances(values.abs().sum(dim=1))).all())
        assert float(largest.max()) > 3 * math.sqrt(n / 2 / 12), "the errors are of the size that is meant"


@pytest.mark.parametrize(("ratio", "passes"), [(1.0, True), (3.0, False)])
def test_noise_of_three_times_the_rounding_never_passes(ratio: float, passes: bool) -> None:
    """Errors everywhere, beside the rounding: a thousand products of 256 tokens."""
    n, tokens = 512, 256
    generator = torch.Generator().manual_seed(2)
    for _ in range(1000 if not passes else 100):
        values = sample_rows(SecretStream("test"), ROWS * n).view(ROWS, n).float()
        rounding = torch.rand(n, tokens, generator=generator) - 0.5
        added = torch.randn(n, tokens, generator=generator) * (ratio / math.sqrt(12))
        off = (values @ (rounding + added)).abs().double()
        assert bool((off <= tolerances(values.abs().sum(1).double())[:, None]).all()) == passes


def test_noise_in_a_single_token_is_refused_from_about_thirteen_times_the_rounding() -> None:
    """9σ/|z|: half of the rows see more than 0.67 standard deviations, one of 16 nearly always."""
    n = 2048
    generator = torch.Generator().manual_seed(3)
    refused = Counter[float]()
    for ratio in (1.0, 4.0, 7.0, 13.0):
        for _ in range(300):
            values = sample_rows(SecretStream("test"), ROWS * n).view(ROWS, n).float()
            error = torch.rand(n, generator=generator) - 0.5
            error += torch.randn(n, generator=generator) * (ratio / math.sqrt(12))
            refused[ratio] += bool(
                ((values @ error).abs().double() > tolerances(values.abs().sum(1).double())).any()
            )
    assert refused[1.0] == 0
    assert 0 < refused[4.0] < 300
    assert refused[7.0] > 270
    assert refused[13.0] >= 298


@pytest.mark.parametrize("n", [576, 2048, 16384])
def test_a_single_entry_of_a_token_can_be_moved_by_at_most_twice_the_tolerance(n: int) -> None:
    """A third of the tolerance always passes; the tolerance is 2.9 % of q/2 for the largest of these."""
    tolerance = float(tolerances(torch.tensor([n / 2.0])))
    generator = torch.Generator().manual_seed(4)
    passed = Counter[float]()
    for _ in range(300):
        values = sample_rows(SecretStream("test"), ROWS * n).view(ROWS, n).float()
        limits = tolerances(values.abs().sum(1).double())[:, None]
        rounding = torch.rand(n, 16, generator=generator) - 0.5
        for share in (1 / 3, 2.1):
            moved = rounding.clone()
            moved[7] += share * tolerance
            passed[share] += bool(((values @ moved).abs().double() <= limits).all())
    assert passed[1 / 3] == 300
    assert passed[2.1] <= 1, "2^-16 each time: two with probability 10^-5"
    assert tolerance / (SPAN / 2) < 0.03


@dataclass
class Sums:
    """A claim on numbers that need no matrix: each part must be its first row's number."""

    drawn: int = 0

    def read(self, part: Part) -> int:
        if part.data.nbytes != 1:
            raise WireError("a part is one byte")
        return part.data[0]

    def rows(self) -> int:
        self.drawn += 1
        return 0

    def rows_for(self, matrix: torch.Tensor) -> int:
        self.drawn += 1
        return int(matrix[0, 0])

    def holds(self, rows: int, results: Sequence[int]) -> bool:
        return all(result == rows + 64 * index for index, result in enumerate(results))


PRODUCT = Product(
    Group(
        name="g",
        members=(Member(module="g", tensor="g", out_features=192),),
        in_features=1,
        forward=Norms(l1=1, squares=1),
        backward=Norms(l1=1, squares=1),
        digest="0" * 64,
    ),
    "forward",
)
FIRST_ROWS = (0, 64, 128)


def part(first: int, value: int, worker: str) -> Part:
    return Part((first, first + 64), memoryview(bytes([value])), worker)


def weights(product: Product) -> torch.Tensor:
    return torch.arange(product.n)[:, None].repeat(1, 2)


def test_exactly_the_liars_are_named_and_others_parts_are_kept() -> None:
    for liars in itertools.chain.from_iterable(itertools.combinations("abc", r) for r in (1, 2, 3)):
        claim = Sums()
        check = PartsCheck(PRODUCT, claim, weights)
        given = [part(first, first + (w in liars), w) for first, w in zip(FIRST_ROWS, "abc", strict=True)]
        for one in given[:2]:
            check.add(one)
            with pytest.raises(WireError, match="not complete"):
                check.results()
        with pytest.raises(ResultRejected, match="wrong") as error:
            check.add(given[2])
        assert error.value.workers == liars
        assert error.value.where == ", ".join(liars)
        with pytest.raises(WireError, match="not complete"):
            check.results()
        drawn = claim.drawn
        for first, worker in zip(FIRST_ROWS, "abc", strict=True):
            if worker in liars:
                check.add(part(first, first, "d"))
        assert claim.drawn > drawn, "rows are drawn anew"
        assert [(each.rows[0], each.values) for each in check.results()] == [(r, r) for r in FIRST_ROWS]


def test_a_second_look_decides_where_no_range_alone_is_wrong() -> None:
    """The whole fails and each range passes: two chances of 2^-16, and a false alarm names nobody."""

    @dataclass
    class OnceWrong(Sums):
        def holds(self, rows: int, results: Sequence[int]) -> bool:
            return len(results) == 1

    check = PartsCheck(PRODUCT, OnceWrong(), weights)
    for first, worker in zip(FIRST_ROWS, "abc", strict=True):
        check.add(part(first, first, worker))
    assert len(check.results()) == 3


def test_a_single_worker_is_named_without_the_weights() -> None:
    def unread(product: Product) -> torch.Tensor:
        raise AssertionError(product)

    check = PartsCheck(PRODUCT, Sums(), unread)
    for first in FIRST_ROWS[:2]:
        check.add(part(first, first, "a"))
    with pytest.raises(ResultRejected) as error:
        check.add(part(128, 7, "a"))
    assert error.value.workers == ("a",)


def test_a_part_of_another_length_is_refused_at_once() -> None:
    check = PartsCheck(PRODUCT, Sums(), weights)
    check.add(part(0, 0, "a"))
    with pytest.raises(ResultRejected, match="length") as error:
        check.add(Part((64, 128), memoryview(b"two"), "b"))
    assert error.value.workers == ("b",)
    check.add(part(64, 64, "c"))
    check.add(part(128, 128, "c"))
    assert len(check.results()) == 3


PUBLIC = ["torch.Tensor", "hetrain.public", "collections.abc", "typing", "builtins"]


def test_no_verdict_can_be_handed_a_secret() -> None:
    """Fields of claims and rows are public values, check rows, or functions that give these."""
    allowed = {"CheckRows", "FieldRows", "Tensor", "ResultFormat", "Product", "PublicSeed", "Callable", "int"}
    for claim in (RlweClaim, ClearClaim, HintClaim, CheckRows, FieldRows, job.Verification):
        hints = get_type_hints(claim)
        for field in fields(claim):
            names = set(ast.walk(ast.parse(str(field.type), mode="eval")))
            used = {node.id for node in names if isinstance(node, ast.Name)}
            used |= {node.attr for node in names if isinstance(node, ast.Attribute)}
            assert used <= allowed | {"torch", "Mapping", "ProductKey", "Weights"}, (claim, field, hints)


def test_verification_imports_no_engine() -> None:
    folder = Path(hetrain.secret.verification.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hetrain"):
                assert not (node.module or "").startswith(("hetrain.secret.engine", "hetrain.transport")), (
                    path
                )
    assert {module.__name__.rpartition(".")[2] for module in (job, parts, rows, verdict)} == {
        path.stem for path in folder.glob("*.py")
    } - {"__init__"}
