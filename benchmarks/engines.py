"""What each engine costs and keeps, shape by shape: ``python -m benchmarks.engines --json FILE``.

Both halves of an engine run in this process, in turn, each with all cores. Measured per engine and shape:

- the worker's part, from the payload's bytes to the result's, in weight·tokens/s = K·N·T / s, and how that
  compares with torch's fp32 product of the same K, N and T in the same run;
- encryption and decryption, per input and output value (K·T and N·T of them), serialised form included;
- bytes on the wire per input and output value;
- the error of a token's result, ‖y − ŷ‖ / ‖y‖ against the float64 product with the int8 matrix, median over
  the tokens: what rounding the activations and what the scheme add together;
- the largest error against the exact product of the rounded activations, in units of that product and over
  its largest entry: the scheme's part alone, and the rounding of a result to float32;
- sizes of serialised keys.

concrete-ml-extensions, Zama's library for the same product (``pip install concrete-ml-extensions==0.2.0``),
is measured beside them where it is installed. Seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.data import CORPUS
from benchmarks.environment import environment
from hetrain.nn.split import split_model
from hetrain.public.checkpoints import Checkpoint, resolve
from hetrain.public.circuits import compile_circuit, tile
from hetrain.public.concrete import PACKAGE, load_fhe
from hetrain.public.errors import UsageError
from hetrain.public.parameters import SLOTS, largest_operand, parameters_for
from hetrain.public.plan import Group, Member, Plan, stack_group
from hetrain.public.weights import matrix_digest, max_l1
from hetrain.public.wire import EvaluateTask
from hetrain.secret.concrete import DEFAULT_BITS
from hetrain.secret.engine import client_engine, open_sealer
from hetrain.secret.quantisation import dequantise_result, quantise_operand
from hetrain.train.session import open_base
from hetrain.transport.local import LocalChannel
from worker_gpu.device import Compute, choose_compute, choose_device
from worker_gpu.service import Service
from worker_gpu.weights import WeightStore

PEER, PEER_VERSION = "concrete-ml-extensions", "0.2.0"
EIGHT_BITS = (1 << (DEFAULT_BITS - 1)) - 1

_FULL, _FEW = (2048, 512), (8,)
# Tokens of one operand, by shape and engine: as many as take some seconds at most.
TOKENS: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "tiny": {"rlwe": _FULL, "clear": _FULL, "concrete": (16,), PEER: (1,)},
        "smollm2": {"rlwe": _FULL, "clear": _FULL, "concrete": _FEW, PEER: (1,)},
        "llama": {"rlwe": _FULL, "clear": _FULL, "concrete": (1,), PEER: (1,)},
    }
)
# Shapes on which an engine runs only with --all.
SLOW = frozenset({("llama", "concrete"), ("llama", PEER)})

_MIN_LAPS, _PATIENCE_S = 3, 15.0
_GEMM_LAPS, _GEMM_PATIENCE_S = 25, 2.0
_SEED = 7
_LAYER = "model.layers.15.self_attn"  # the middle one of 30


@dataclass(frozen=True)
class Problem:
    """One public matrix, and activations that meet it.

    Attributes:
        name: of the shape.
        what: for a reader.
        plan: of this one group.
        directory: of the checkpoint that the worker reads.
        matrix: Q, int8 [N, K].
        x: float32 [2048, K].
    """

    name: str
    what: str
    plan: Plan
    directory: Path
    matrix: torch.Tensor
    x: torch.Tensor

    @property
    def group(self) -> Group:
        """The plan's only group."""
        return self.plan.groups[0]


@dataclass(frozen=True)
class Keys:
    """Bytes of what a client keeps secret and of what it sends a worker once, and how long they serve."""

    secret_bytes: int
    evaluation_bytes: int
    serve: str


@dataclass(frozen=True)
class Lap:
    """One product on its whole way: seconds, bytes, and y float32 [T, N]."""

    encrypt_s: float
    worker_s: float
    worker_cpu_s: float
    decrypt_s: float
    bytes_up: int
    bytes_down: int
    y: torch.Tensor


class Contestant(Protocol):
    """An engine with its keys drawn, its circuits compiled and its matrix loaded."""

    keys: Keys

    def x_max(self, tokens: int) -> int:
        """The largest entry of a quantised operand."""
        ...

    def multiply(self, x: torch.Tensor) -> Lap:
        """X·Qᵀ for float32 [T, K]: encrypted, evaluated, decrypted."""
        ...


class Clock:
    """Seconds and processor seconds since it was made or last read."""

    def __init__(self) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Reads it and starts it again."""
        now, begun = (time.perf_counter(), time.process_time()), self._begun
        self._begun = now
        return now[0] - begun[0], now[1] - begun[1]


def random_problem(name: str, k: int, n: int, folder: Path) -> Problem:
    """A Gaussian matrix [n, k] and Gaussian activations."""
    generator = torch.Generator().manual_seed(_SEED)
    directory = folder / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "none"}), encoding="utf-8")
    weight = torch.randn(n, k, generator=generator)
    save_file({"weight": weight}, directory / "model.safetensors")
    checkpoint = resolve(str(directory))
    members = (Member(module="linear", tensor="weight", out_features=n),)
    values = stack_group(members, checkpoint.read).values
    rows, columns = max_l1(values)
    group = Group(
        name="linear",
        members=members,
        in_features=k,
        forward_l1=rows,
        backward_l1=columns,
        digest=matrix_digest(values),
    )
    plan = Plan(model=checkpoint.label, groups=(group,))
    x = torch.randn(SLOTS, k, generator=generator)
    return Problem(name, "Gaussian", plan, checkpoint.directory, values, x)


def real_problem(name: str) -> Problem:
    """q, k and v of SmolLM2-135M's middle layer, and their input on 4 rows of 512 tokens of running text."""
    base = open_base("smollm2-135m")
    split = split_model(base.checkpoint, [f"{_LAYER}.[qkv]_proj"])
    (group,) = split.plan.groups
    x = _activations(base.checkpoint, base.tokenizer, group.name) * split.scales[group.name].inputs
    matrix = stack_group(group.members, base.checkpoint.read).values
    what = f"SmolLM2-135M, {_LAYER.removeprefix('model.')}, q k v"
    return Problem(name, what, split.plan, base.checkpoint.directory, matrix, x)


def _activations(checkpoint: Checkpoint, tokenizer: Any, module: str) -> torch.Tensor:
    """The input of `module` in the stock model, float32 [2048, K]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda linear, inputs: seen.append(inputs[0]))
    tokens = tokenizer(CORPUS.read_text(encoding="utf-8"))["input_ids"][:SLOTS]
    with torch.no_grad():
        model.base_model(input_ids=torch.tensor(tokens).view(4, -1))
    return seen[0].flatten(0, 1)


PROBLEMS: Mapping[str, Callable[[Path], Problem]] = MappingProxyType(
    {
        "tiny": lambda folder: random_problem("tiny", 32, 96, folder),
        "smollm2": lambda folder: real_problem("smollm2"),
        "llama": lambda folder: random_problem("llama", 2048, 2048, folder),
    }
)


@dataclass(frozen=True)
class Traits:
    """What a measurement has to know of an engine: its keys, and the operands it takes.

    `x_max` gets the number of tokens and max_j ‖Q_j‖₁.
    """

    keys: Callable[[Problem], Keys]
    x_max: Callable[[int, int], int]


def _rlwe_keys(problem: Problem) -> Keys:
    return Keys(parameters_for(SLOTS).dimension, 0, "one ciphertext matrix")  # ternary, a byte each


def _rlwe_x_max(tokens: int, max_l1: int) -> int:
    return largest_operand(parameters_for(tokens), max_l1)


def _concrete_keys(problem: Problem) -> Keys:
    n, k = problem.matrix.shape
    holder = compile_circuit(tile(k, n, EIGHT_BITS)).new_keys()
    return Keys(len(holder.keys.serialize()), len(holder.evaluation_keys.serialize()), "one job")


TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "rlwe": Traits(_rlwe_keys, _rlwe_x_max),
        "clear": Traits(lambda problem: Keys(0, 0, ""), _rlwe_x_max),
        "concrete": Traits(_concrete_keys, lambda tokens, max_l1: EIGHT_BITS),
    }
)


class OwnEngine:
    """An engine of hetrain: its client half, and a worker's service, through the queue's messages."""

    def __init__(self, name: str, problem: Problem, compute: Compute) -> None:
        self._traits, self._group = TRAITS[name], problem.group
        self._rows = [(0, problem.group.out_features)]
        plan = problem.plan
        self._load_plan = plan.to_bytes
        self._service = Service(compute, WeightStore(compute.device, {plan.model: str(problem.directory)}))
        self._sealer = open_sealer(client_engine(name), plan)
        self._channel = LocalChannel(
            self._evaluate, lambda task, data: self._service.prepare(task, lambda: data)
        )
        self._channel.prepare(plan.model, name, plan.to_bytes(), plan.digest, self._sealer.setup)
        self._worker = (0.0, 0.0)
        self.keys = self._traits.keys(problem)

    def x_max(self, tokens: int) -> int:
        """See `Contestant.x_max`."""
        return self._traits.x_max(tokens, self._group.max_l1("forward"))

    def multiply(self, x: torch.Tensor) -> Lap:
        """See `Contestant.multiply`."""
        clock = Clock()
        sealed = self._sealer.seal(x, self._group, "forward")
        encrypt_s, _ = clock.lap()
        pending = self._channel.send(self._group.name, "forward", sealed.header, sealed.payload, self._rows)
        reply = pending.result()
        clock.lap()
        y = sealed.opening.open(reply.parts, self._rows)
        decrypt_s, _ = clock.lap()
        return Lap(encrypt_s, *self._worker, decrypt_s, reply.bytes_up, reply.bytes_down, y)

    def _evaluate(self, task: EvaluateTask, payload: memoryview) -> list[memoryview]:
        clock = Clock()
        parts = self._service.evaluate(task, self._load_plan, payload)
        self._worker = clock.lap()
        return parts


class Peer:
    """concrete-ml-extensions: activations of 8 bits, one GLWE ciphertext for up to 2048 inputs of a token."""

    def __init__(self, problem: Problem, compute: Compute) -> None:
        import concrete_ml_extensions

        self._library = concrete_ml_extensions
        self._columns = problem.group.out_features
        text = self._library.default_params()
        self._degree = int(json.loads(text)["polynomial_size"])
        self._parameters = self._library.MatmulCryptoParameters.deserialize(text)
        self._secret, self._compression = self._library.create_private_key(self._parameters)
        # It takes signed numbers as their two's complement.
        self._weights = np.ascontiguousarray(problem.matrix.t().to(torch.int64).numpy()).view(np.uint64)
        sizes = (len(key.serialize()) for key in (self._secret, self._compression))
        self.keys = Keys(*sizes, serve="one job")

    def x_max(self, tokens: int) -> int:
        """See `Contestant.x_max`."""
        return EIGHT_BITS

    def multiply(self, x: torch.Tensor) -> Lap:
        """See `Contestant.multiply`."""
        library, clock = self._library, Clock()
        operand = quantise_operand(x, EIGHT_BITS)
        values = np.ascontiguousarray(operand.values.t().to(torch.int64).numpy()).view(np.uint64)
        up = library.encrypt_matrix(self._secret, self._parameters, values).serialize()
        encrypt_s, _ = clock.lap()
        encrypted = library.EncryptedMatrix.deserialize(up)
        down = library.matrix_multiplication(encrypted, self._weights, self._compression).serialize()
        worker = clock.lap()
        result = library.CompressedResultEncryptedMatrix.deserialize(down)
        last = self._columns % self._degree or self._degree
        clear = library.decrypt_matrix(
            result, self._secret, self._parameters, num_valid_glwe_values_in_last_ciphertext=last
        )
        products = torch.from_numpy(np.ascontiguousarray(clear.view(np.int64)[: len(x), : self._columns].T))
        y = dequantise_result(products, operand.scales)
        decrypt_s, _ = clock.lap()
        return Lap(encrypt_s, *worker, decrypt_s, len(up), len(down), y)


def open_contestant(name: str, problem: Problem, compute: Compute) -> Contestant:
    """The engine called `name`, ready to multiply by the problem's matrix."""
    return Peer(problem, compute) if name == PEER else OwnEngine(name, problem, compute)


def missing(name: str) -> str | None:
    """Why an engine cannot be measured here, and what to do; None when it can."""
    try:
        if name == "concrete":
            load_fhe()
        elif name == PEER:
            import concrete_ml_extensions  # noqa: F401
    except (UsageError, ImportError) as error:
        hint = "" if name == "concrete" else f": pip install {PEER}=={PEER_VERSION}"
        return f"{error}{hint}"
    return None


def laps(contestant: Contestant, x: torch.Tensor, repeats: int) -> list[Lap]:
    """`repeats` products, or as many as fit into a quarter of a minute, but three at least."""
    done, begin = [], time.perf_counter()
    while len(done) < min(repeats, _MIN_LAPS) or (
        len(done) < repeats and time.perf_counter() - begin < _PATIENCE_S
    ):
        done.append(contestant.multiply(x))
    return done


def gemm_s(matrix: torch.Tensor, x: torch.Tensor, device: torch.device) -> float:
    """Seconds of torch's fp32 product of the same shape; median of up to 25."""
    w, operand = matrix.to(device, torch.float32), x.t().contiguous().to(device)
    seconds, begin = [], time.perf_counter()
    while len(seconds) < _GEMM_LAPS and time.perf_counter() - begin < _GEMM_PATIENCE_S:
        started = time.perf_counter()
        float((w @ operand)[0, 0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def errors(problem: Problem, x: torch.Tensor, y: torch.Tensor, x_max: int) -> dict[str, float]:
    """How far ŷ is from x·Qᵀ, and from the exact product of the rounded x; see the module."""
    q = problem.matrix.t().to(torch.float64)
    truth, got = x.to(torch.float64) @ q, y.to(torch.float64)
    operand = quantise_operand(x, x_max)
    exact = operand.values.t().to(torch.float64) @ q  # below 2^53
    units = (got / operand.scales.to(torch.float64)[:, None]).round()
    largest = float((units - exact).abs().max())
    return {
        "token_error": float(((got - truth).norm(dim=1) / truth.norm(dim=1)).median()),
        "largest_error_units": largest,
        "largest_error": largest / float(exact.abs().max()),
    }


def measure(
    name: str, problem: Problem, contestant: Contestant, tokens: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """All figures of one engine on one shape at `tokens` tokens per operand."""
    x, (n, k) = problem.x[:tokens], problem.matrix.shape
    plain_s = gemm_s(problem.matrix, x, device)
    done = laps(contestant, x, repeats)
    seconds = {
        part: statistics.median(getattr(lap, part) for lap in done)
        for part in ("encrypt_s", "worker_s", "worker_cpu_s", "decrypt_s")
    }
    last, work = done[-1], n * k * tokens
    return {
        "engine": name,
        "shape": problem.name,
        "what": problem.what,
        "k": k,
        "n": n,
        "tokens": tokens,
        "repeats": len(done),
        **seconds,
        "weight_tokens_per_s": work / seconds["worker_s"],
        "gemm_weight_tokens_per_s": work / plain_s,
        "ratio_to_gemm": plain_s / seconds["worker_s"],
        "worker_cores": seconds["worker_cpu_s"] / seconds["worker_s"],
        "encrypt_ns_per_value": 1e9 * seconds["encrypt_s"] / (k * tokens),
        "decrypt_ns_per_value": 1e9 * seconds["decrypt_s"] / (n * tokens),
        "bytes_per_input": last.bytes_up / (k * tokens),
        "bytes_per_output": last.bytes_down / (n * tokens),
        "x_max": contestant.x_max(tokens),
        **errors(problem, x, last.y, contestant.x_max(tokens)),
        "keys": asdict(contestant.keys),
    }


def table(figures: Iterable[Mapping[str, Any]]) -> str:
    """The figures in Markdown."""
    header = (
        "engine", "K × N", "tokens", "worker", "weight·tokens/s", "of fp32 GEMM", "cores", "encrypt a value",
        "decrypt a value", "bytes per input", "per output", "error of a token", "largest error", "secret key",
        "evaluation keys",
    )  # fmt: skip
    rows = [header, ("---",) * len(header), *map(_row, figures)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(figure: Mapping[str, Any]) -> tuple[str, ...]:
    keys = figure["keys"]
    return (
        figure["engine"],
        f"{figure['k']} × {figure['n']}",
        str(figure["tokens"]),
        _scaled(figure["worker_s"], _TIMES),
        f"{figure['weight_tokens_per_s']:.2g}",
        f"{figure['ratio_to_gemm']:.2g}",
        f"{figure['worker_cores']:.1f}",
        _scaled(figure["encrypt_ns_per_value"] * 1e-9, _TIMES),
        _scaled(figure["decrypt_ns_per_value"] * 1e-9, _TIMES),
        f"{figure['bytes_per_input']:.1f}",
        f"{figure['bytes_per_output']:.1f}",
        f"{100 * figure['token_error']:.2g} %",
        f"{figure['largest_error']:.1e}" if figure["largest_error"] else "exact",
        _scaled(keys["secret_bytes"], _SIZES),
        _scaled(keys["evaluation_bytes"], _SIZES),
    )


_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e6, "MB"), (1e3, "kB"), (1, "B"))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next((pair for pair in units if value >= pair[0]), units[-1])
    return f"{value / scale:.3g} {unit}"


def installed(package: str) -> str | None:
    """Its version, None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run(arguments: argparse.Namespace, compute: Compute) -> dict[str, Any]:
    """Measures what was asked for, saying what it is at."""
    skipped = {name: why for name in arguments.engines if (why := missing(name))}
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}", flush=True)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for problem in [PROBLEMS[shape](Path(folder)) for shape in arguments.shapes]:
            for name in arguments.engines:
                if name in skipped or ((problem.name, name) in SLOW and not arguments.all):
                    continue
                contestant = open_contestant(name, problem, compute)
                for tokens in arguments.tokens or TOKENS[problem.name][name]:
                    print(f"{problem.name}: {name}, {tokens} tokens", flush=True)
                    figures.append(
                        measure(name, problem, contestant, tokens, arguments.repeats, compute.device)
                    )
    return {"figures": figures, "skipped": skipped}


def main() -> None:
    """Parses arguments, measures, prints, writes."""
    engines = (*TRAITS, PEER)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--shapes", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--engines", nargs="+", choices=engines, default=list(engines))
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens per operand, for every engine alike")
    parser.add_argument("--repeats", type=int, default=5, help="products per figure")
    parser.add_argument("--all", action="store_true", help="slow engines on the largest shape too")
    arguments = parser.parse_args()
    if not all(1 <= tokens <= SLOTS for tokens in arguments.tokens or ()) or arguments.repeats < 1:
        parser.error(f"--tokens is 1 to {SLOTS}, --repeats at least 1")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no directory {arguments.json.parent}")
    before = environment()
    compute = choose_compute(choose_device())
    measured = run(arguments, compute)
    print(table(measured["figures"]))
    if arguments.json:
        figures = {
            **measured,
            "worker": compute.description,
            "threads": {"torch": torch.get_num_threads(), "concrete": len(os.sched_getaffinity(0))},
            "packages": {package: installed(package) for package in (PACKAGE, PEER)},
            "environment": before,
        }
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
