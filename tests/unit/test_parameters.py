"""Weak parameters cannot be built, products cannot wrap, a worker serves what the plan says or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hetrain.public.errors import ModelError, ParameterError, WireError, WorkerRefused
from hetrain.public.lattice import parameters as parameters_module
from hetrain.public.lattice.bounds import (
    LARGEST_ENTRY,
    OPERAND_ERROR,
    RESULT_ERROR,
    accepted_error,
    operand_bound,
)
from hetrain.public.lattice.parameters import (
    ETA,
    MODULUS_BITS,
    PARAMETER_SETS,
    SECURITY_ESTIMATES,
    Estimate,
    ParameterSet,
    parameters_for,
)
from hetrain.public.lattice.ring import MODULUS
from hetrain.public.model.files import resolve
from hetrain.public.model.quantization import Norms, input_scales, matrix_digest, norms_of, quantize
from hetrain.public.protocol.messages import Blob, Direction, EvaluateTask, PrepareTask
from hetrain.public.protocol.plan import Member, Plan, group_of, parse_plan, stack_group
from hetrain.public.protocol.product import Product
from hetrain.public.system import flush_denormals
from hetrain.secret.activation_quantization import quantize_operand, token_norms, token_scales
from hetrain.secret.engines.clear import digit_planes
from worker_gpu.device import Compute
from worker_gpu.epilogue import REFERENCE
from worker_gpu.kernels import float64_products
from worker_gpu.service import Service
from worker_gpu.weights.store import WeightStore

TOKEN = "0" * 32


@pytest.mark.parametrize(
    ("ring_degree", "rank"),
    [(1024, 1), (512, 2), (4096, 1), (256, 7), (2, 1024), (0, 1), (24, 1), (16, 0)],
)
def test_other_sets_cannot_be_built(ring_degree: int, rank: int) -> None:
    with pytest.raises(ParameterError):
        ParameterSet("rlwe-custom", ring_degree, rank)


def test_a_set_without_an_estimate_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = {(2048, 30, 8): Estimate(matzov=229.2, core_svp=127.9)}
    for table in ({}, weak):
        monkeypatch.setattr(parameters_module, "SECURITY_ESTIMATES", table)
        with pytest.raises(ParameterError, match="no estimate of at least 128 bits"):
            ParameterSet("rlwe-2048x1", 2048, 1)


def test_a_strong_set_cannot_be_weakened() -> None:
    strong = PARAMETER_SETS["rlwe-2048x1"]
    with pytest.raises(ParameterError):
        dataclasses.replace(strong, ring_degree=1024)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strong.rank = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        PARAMETER_SETS["rlwe-weak"] = strong  # type: ignore[index]
    with pytest.raises(TypeError):
        SECURITY_ESTIMATES[(1024, 30, 8)] = SECURITY_ESTIMATES[(2048, 30, 8)]  # type: ignore[index]


def test_every_set_on_offer_is_strong() -> None:
    for name, parameters in PARAMETER_SETS.items():
        estimate = SECURITY_ESTIMATES[(parameters.dimension, MODULUS_BITS, ETA)]
        assert min(estimate.matzov, estimate.core_svp) >= 128
        assert name == parameters.name == f"rlwe-{parameters.ring_degree}x{parameters.rank}"
        assert parameters.dimension == 2048
    assert MODULUS.bit_length() == MODULUS_BITS


@pytest.mark.parametrize(
    ("tokens", "degree"),
    [(1, 256), (256, 256), (257, 512), (512, 512), (513, 1024), (1024, 1024), (1025, 2048), (2048, 2048)],
)
def test_the_smallest_ring_that_holds_the_tokens(tokens: int, degree: int) -> None:
    assert parameters_for(tokens).ring_degree == degree


@pytest.mark.parametrize("tokens", [-1, 0, 2049])
def test_tokens_that_fit_no_ring(tokens: int) -> None:
    with pytest.raises(ParameterError, match=str(tokens)):
        parameters_for(tokens)


def random_matrix(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (40, 576), (9, 8192), (5, 28672)])
def test_no_operand_within_its_bound_wraps(n: int, k: int) -> None:
    """The worst tokens that either norm allows, with all errors at their bounds, in plain integers."""
    matrix = random_matrix(n, k, seed=k)
    bound = operand_bound(norms_of(matrix)[0], len(matrix))
    wide = matrix.to(torch.int64)
    row = wide[wide.abs().sum(1).argmax()]
    error = OPERAND_ERROR * int(row.abs().sum()) + RESULT_ERROR + accepted_error(n)
    assert bound.largest * int(row.abs().sum()) + error <= MODULUS / 2
    assert (bound.largest + 1) * int(row.abs().sum()) + error > MODULUS / 2
    longest = wide[wide.square().sum(1).argmax()]
    assert bound.norm * float(longest.double().norm()) + error <= MODULUS / 2 * (1 + 1e-12)


@pytest.mark.parametrize("k", [1, 8, 576, 8192])
@pytest.mark.parametrize("kind", ["normal", "spike", "constant", "tiny", "huge", "aligned"])
def test_quantized_tokens_keep_one_of_both_bounds(k: int, kind: str) -> None:
    matrix = random_matrix(16, k, seed=3)
    x = torch.randn(20, k, generator=torch.Generator().manual_seed(k))
    if kind == "spike":
        x[:, 0] = 1e6
    elif kind == "constant":
        x = torch.full((20, k), 0.37)
    elif kind == "aligned":
        x = matrix[:1].sign().to(torch.float32).repeat(20, 1)
    x = x * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    bound = operand_bound(norms_of(matrix)[0], len(matrix))
    operand = quantize_operand(x, bound)
    values = operand.values.to(torch.float64)
    largest, norm = values.abs().amax(dim=1), values.norm(dim=1)
    assert bool(((largest <= bound.largest) | (norm <= bound.norm)).all())
    assert bool((largest <= LARGEST_ENTRY).all())
    reach = (values @ matrix.to(torch.float64).t()).abs().max() + OPERAND_ERROR * norms_of(matrix)[0].l1
    assert reach + RESULT_ERROR + accepted_error(len(matrix)) <= MODULUS / 2
    # The better bound is used to within the margin, unless entries have all their digits.
    used = torch.maximum(largest / bound.largest, norm / bound.norm)
    assert bool(((used > 0.98) | (largest > 0.98 * LARGEST_ENTRY)).all())


def test_the_second_bound_gains_bits_on_tokens_like_those_of_a_model() -> None:
    matrix = random_matrix(64, 2048, seed=9)
    x = torch.randn(50, 2048, generator=torch.Generator().manual_seed(1))
    bound = operand_bound(norms_of(matrix)[0], len(matrix))
    first_alone = x.abs().amax(dim=1) / bound.largest
    assert float((first_alone / token_scales(token_norms(x), bound)).log2().min()) > 1


def test_fewer_bits_bound_every_entry() -> None:
    x = torch.randn(9, 30)
    operand = quantize_operand(x, operand_bound(Norms(l1=30, squares=900), 1), bits=5)
    assert operand.values.abs().amax(dim=1).tolist() == [15] * 9
    assert operand.scales.tolist() == (x.abs().amax(dim=1) / 15).tolist()


def test_a_matrix_that_leaves_too_few_levels_is_refused() -> None:
    assert operand_bound(Norms(l1=0, squares=0), 1).largest > LARGEST_ENTRY
    with pytest.raises(ParameterError, match="levels"):
        operand_bound(Norms(l1=2**30 // 330, squares=1), 1)


def test_quantise_rounds_each_output_channel_to_127_levels() -> None:
    w = torch.randn(20, 30) * torch.logspace(-6, 3, 20)[:, None]
    w[4] = 0
    w[:, 7] = 0
    matrix = quantize(w)
    outputs, inputs = matrix.scales.outputs, matrix.scales.inputs
    assert (matrix.values.dtype, outputs.dtype, inputs.dtype) == (torch.int8, torch.float32, torch.float32)
    assert matrix.values.abs().amax(1).tolist() == [0 if j == 4 else 127 for j in range(20)]
    assert (float(outputs[4]), not matrix.values[:, 7].any()) == (1, True)
    error = (matrix.values * outputs[:, None] * inputs - w).abs()
    assert bool((error <= 0.5001 * outputs[:, None] * inputs).all())
    assert torch.equal(quantize(w.t().contiguous().t()).values, matrix.values)


def test_large_columns_do_not_cost_the_others_their_precision() -> None:
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    w[:, 5] *= 100
    matrix = quantize(w)
    step = (matrix.scales.outputs[:, None] * matrix.scales.inputs)[:, :5].mean()
    by_row_alone = (w.abs().amax(dim=1) / 127).mean()
    assert step < by_row_alone / 20


def test_input_scales_do_not_depend_on_the_order_of_a_sum() -> None:
    """Client and worker may add in another order; the scales, and so the int8 matrices, must be the same."""
    w = torch.randn(2500, 300, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(3))
    assert torch.equal(input_scales(w), input_scales(w[order]))


def test_the_plan_does_not_depend_on_the_flushing_of_denormals() -> None:
    """Clients flush them, workers need not."""
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(4))
    w[3] *= 1e-39
    w[:, 5] *= 1e-38
    w[4, 7] = 1e-40
    kept = quantize(w)
    before = flush_denormals()
    try:
        flushed = quantize(w)
    finally:
        flush_denormals(before)
    assert torch.equal(flushed.values, kept.values)
    assert torch.equal(flushed.scales.outputs, kept.scales.outputs)
    assert torch.equal(flushed.scales.inputs, kept.scales.inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.ones(3, 4)
    w[1, 2] = bad
    with pytest.raises(ModelError, match="not finite"):
        quantize(w)


def test_norms_of_rows_and_columns() -> None:
    for n, k in ((1, 1), (3, 5000), (2500, 1030)):
        values = random_matrix(n, k, seed=n)
        values[0] = -128
        wide = values.to(torch.int64)
        expected = [
            Norms(l1=int(w.abs().sum(1).max()), squares=int(w.square().sum(1).max()))
            for w in (wide, wide.t())
        ]
        assert list(norms_of(values)) == expected


def test_matrix_digest_covers_shape_and_bytes() -> None:
    values = torch.arange(12, dtype=torch.int8).view(3, 4)
    assert matrix_digest(values) == hashlib.sha256(b"(3, 4)" + bytes(range(12))).hexdigest()
    assert (
        matrix_digest(values.t())
        == hashlib.sha256(b"(4, 3)" + bytes(values.t().flatten().tolist())).hexdigest()
    )
    changed = values.clone()
    changed[2, 3] += 1
    assert len({matrix_digest(v) for v in (values, values.view(4, 3), values.view(2, 6), changed)}) == 4


# --- a checkpoint of two groups, its plan, and a worker that serves it ---


WIDTHS = {"h.q": (12, 8), "h.v": (4, 8), "h.up": (8, 20)}  # h.up is stored transposed: [in, out]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in WIDTHS.items()}
    tensors["bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    return folder


def member(name: str, out_features: int, transposed: bool = False) -> Member:
    return Member(module=name, tensor=f"{name}.weight", out_features=out_features, transposed=transposed)


@pytest.fixture
def plan(checkpoint: Path) -> Plan:
    groups = []
    for members in ((member("h.q", 12), member("h.v", 4)), (member("h.up", 20, transposed=True),)):
        values = stack_group(members, resolve(str(checkpoint)).read).values
        groups.append(group_of(members, values))
    return Plan(model="tiny", groups=tuple(groups))


@pytest.fixture
def store(checkpoint: Path) -> WeightStore:
    return WeightStore(torch.device("cpu"), models={"tiny": str(checkpoint)})


@pytest.fixture
def worker(store: WeightStore) -> Service:
    return Service(Compute(torch.device("cpu"), "float64", float64_products, REFERENCE), store)


def prepare(worker: Service, plan: Plan, **changes: object) -> None:
    blob = Blob(job=TOKEN, kind="plan", token=TOKEN, nbytes=len(plan.to_bytes()))
    fields = {
        "request": TOKEN,
        "job": TOKEN,
        "model": plan.model,
        "engine": "rlwe",
        "plan": blob,
        "plan_digest": plan.digest,
    }
    worker.prepare(PrepareTask(**(fields | changes)), plan.to_bytes)  # type: ignore[arg-type]


def evaluate(
    worker: Service, plan: Plan, payload: bytes = bytes(3 * 8 * 256), **changes: object
) -> list[memoryview]:
    blob = Blob(job=TOKEN, kind="plan", token=TOKEN, nbytes=len(plan.to_bytes()))
    header = {"parameters": "rlwe-256x8", "operand": "ciphertext"}
    fields = {
        "request": TOKEN, "job": TOKEN, "model": plan.model, "engine": "rlwe", "plan": blob,
        "plan_digest": plan.digest, "group": "h.q", "direction": "forward", "start": 0, "stop": 16,
        "header": header, "input": blob,
    }  # fmt: skip
    task = EvaluateTask(**(fields | changes))  # type: ignore[arg-type]
    return worker.evaluate(task, plan.to_bytes, memoryview(bytearray(payload)))


def test_a_plan_survives_the_wire(plan: Plan) -> None:
    assert parse_plan(plan.to_bytes(), plan.digest) == plan
    assert parse_plan(memoryview(plan.to_bytes()), plan.digest).digest == plan.digest
    group = plan.groups[0]
    forward, backward = Product(group, "forward"), Product(group, "backward")
    assert (group.out_features, forward.k, backward.k) == (16, 8, 16)
    assert (forward.n, backward.n) == (16, 8)
    assert forward.norms == group.forward != group.backward == backward.norms


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_tampered_plan_is_refused(plan: Plan) -> None:
    good = plan.to_bytes()
    with pytest.raises(WireError, match="digest"):
        parse_plan(good.replace(b'"in_features":8', b'"in_features":9'), plan.digest)
    twice = plan.model_copy(update={"groups": (plan.groups[0], plan.groups[0])}).to_bytes()
    malformed = [
        twice,
        good[:-1],
        b"",
        b"[]",
        good.replace(b'"in_features":8', b'"in_features":0'),
        good.replace(b'"in_features":8', b'"in_features":"8"'),
        good.replace(b'"version":2', b'"version":1'),
        good.replace(b'"version":2', b'"version":2,"more":1'),
        good.replace(b'"h.q.weight"', b'"/etc/passwd"'),
    ]
    for data in malformed:
        assert data != good
        with pytest.raises(WireError):
            parse_plan(data, digest(data))


def test_a_plan_that_names_a_tensor_twice_is_refused(plan: Plan) -> None:
    first = plan.groups[0]
    groups = (first, first.model_copy(update={"name": "again"}))
    data = plan.model_copy(update={"groups": groups}).to_bytes()
    with pytest.raises(WireError, match="share rows of a tensor"):
        parse_plan(data, digest(data))


def test_a_plan_with_false_shapes_is_refused_also_for_loaded_matrices(worker: Service, plan: Plan) -> None:
    prepare(worker, plan)
    first, second, *_ = plan.groups
    wide = first.model_copy(update={"in_features": 1 << 20})
    with pytest.raises(WorkerRefused, match="has shape 12×8, the plan says 12 outputs and 1048576 inputs"):
        prepare(worker, plan.model_copy(update={"groups": (wide,)}))
    with pytest.raises(WorkerRefused, match="contradicts itself"):
        prepare(
            worker,
            plan.model_copy(update={"groups": (first.model_copy(update={"digest": second.digest}),)}),
        )


def test_a_worker_multiplies_in_both_directions(worker: Service, plan: Plan, checkpoint: Path) -> None:
    """With the engine that hides nothing, whose results are plain products."""
    prepare(worker, plan, engine="clear")
    read = resolve(str(checkpoint)).read
    for group in plan.groups:
        q = stack_group(group.members, read).values.to(torch.int32)
        directions: tuple[tuple[Direction, torch.Tensor], ...] = (("forward", q), ("backward", q.t()))
        for direction, matrix in directions:
            operand = torch.randint(-1000, 1000, (5, Product(group, direction).k), dtype=torch.int32)
            payload = digit_planes(operand).numpy().tobytes()
            for start, stop in ((0, len(matrix)), (1, 4), (len(matrix) - 1, len(matrix))):
                parts = evaluate(
                    worker, plan, payload, engine="clear", header={}, group=group.name,
                    direction=direction, start=start, stop=stop,
                )  # fmt: skip
                result = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.int32)
                assert torch.equal(result.view(5, -1), operand @ matrix[start:stop].t())


def test_a_worker_with_other_weights_refuses(worker: Service, plan: Plan) -> None:
    first = plan.groups[0]
    other = plan.model_copy(update={"groups": (first.model_copy(update={"digest": "ab" * 32}),)})
    with pytest.raises(WorkerRefused, match="differ from the client's") as error:
        prepare(worker, other)
    assert error.value.where == "h.q"
    for members in (
        (member("h.q", 13),),
        (member("h.absent", 12),),
        (Member(module="h.q", tensor="bias", out_features=3),),
        (member("h.q", 12), member("h.up", 8)),
    ):
        wrong = plan.model_copy(update={"groups": (first.model_copy(update={"members": members}),)})
        with pytest.raises(WorkerRefused, match="does not fit"):
            prepare(worker, wrong)


def test_a_worker_serves_its_own_models_only(worker: Service, plan: Plan, checkpoint: Path) -> None:
    for model in ("other", str(checkpoint).lstrip("/")):
        with pytest.raises(WorkerRefused, match="does not serve"):
            prepare(worker, plan.model_copy(update={"model": model}))
    with pytest.raises(WorkerRefused, match="no engine"):
        prepare(worker, plan, engine="nonsense")
    with pytest.raises(WireError, match="model"):
        prepare(worker, plan, model="other")
    gone = WeightStore(torch.device("cpu"), models={"tiny": str(checkpoint / "absent")})
    with pytest.raises(WorkerRefused, match="cannot load"):
        gone.load_all(plan)


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "absent"},
        {"start": 0, "stop": 17},
        {"start": 4, "stop": 4},
        {"start": 9, "stop": 4},
        {"direction": "backward", "start": 0, "stop": 9},
        {"direction": "backward", "stop": 8},  # an operand of the other direction's size
        {"header": {}},
        {"header": {"parameters": "rlwe-256x8"}},
        {"header": {"operand": "ciphertext"}},
        {"header": {"parameters": "rlwe-128x16", "operand": "ciphertext"}},
        {"header": {"parameters": 7, "operand": "ciphertext"}},
        {"header": {"parameters": "rlwe-512x4", "operand": "ciphertext"}},
        {"header": {"parameters": "rlwe-256x8", "operand": "mask_seed"}},
        {"header": {"parameters": "rlwe-256x8", "operand": "other"}},
        {"header": {"parameters": "rlwe-256x8", "operand": "ciphertext", "more": 1}},
        {"payload": b""},
        {"payload": bytes(3 * 8 * 256 - 1)},
        {"payload": bytes(3 * 8 * 256 + 3)},
        {"engine": "clear", "payload": b""},
        {"engine": "clear", "payload": bytes(3 * 8 * 256 + 1)},
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_task_that_does_not_fit_is_refused(worker: Service, plan: Plan, changes: dict[str, object]) -> None:
    assert sum(part.nbytes for part in evaluate(worker, plan)) == 256 * 112
    with pytest.raises(WireError):
        evaluate(worker, plan, **changes)  # type: ignore[arg-type]
