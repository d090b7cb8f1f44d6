"""Settings: checked when built, and the same from Python, on the command line and in the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import hetrain
from cli.evaluate import evaluate
from cli.options import as_options, with_dashes
from cli.reference import reference
from cli.submit import submit
from hetrain import api
from hetrain.config import (
    FEW_UPDATES,
    BatchingConfig,
    ComparisonConfig,
    EvaluationSpec,
    JobSpec,
    LoraConfig,
    OutsourcingConfig,
    TrainingConfig,
    TrainingDataConfig,
)
from hetrain.public.errors import UsageError

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "options.md"


def called_with(
    monkeypatch: pytest.MonkeyPatch, name: str, command: Callable[..., None], *arguments: str
) -> dict[str, Any]:
    """What a command gives to the function `name` of `hetrain.api`."""
    monkeypatch.delenv("HETRAIN_BROKER_URL", raising=False)
    calls: list[dict[str, Any]] = []

    def take(**given: Any) -> None:
        calls.append(given)
        raise KeyboardInterrupt  # the command has nothing more to do

    monkeypatch.setattr(api, name, take)
    app = typer.Typer(context_settings={"token_normalize_func": with_dashes})
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert calls, result.output
    return calls[0]


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a job or an evaluation that a command gives to a function."""
    return {
        name: value for name, value in given.items() if name != "comparison" and not name.startswith("on_")
    }


def test_without_options_a_command_has_the_defaults_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    given = called_with(monkeypatch, "finetune", submit, "rows.jsonl")
    assert settings_of(given) == vars(JobSpec(dataset="rows.jsonl"))
    given = called_with(monkeypatch, "evaluate", evaluate, "rows.jsonl")
    assert settings_of(given) == vars(EvaluationSpec(dataset="rows.jsonl"))


def test_every_option_reaches_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobSpec(
        dataset=("rows.jsonl", "more.csv"),
        data=TrainingDataConfig(
            text_field="body",
            strict=True,
            completion_only_loss=False,
            assistant_only_loss=True,
            dataset_config="en",
            dataset_train_split="half",
            dataset_test_split="other",
            eval_dataset=("held.jsonl", "out.csv"),
        ),
        init_from=Path("earlier"),
        model="some/model",
        output_dir=Path("elsewhere"),
        workers="redis://broker",
        device="meta",
        overwrite_output_dir=True,
        resume_from_checkpoint="latest",
        lora=LoraConfig(
            r=3,
            alpha=5,
            dropout=0.25,
            target_modules=["q_proj", "v_proj", "up_proj"],
            layers="1,3-4",
            use_rslora=True,
        ),
        training=TrainingConfig(
            max_length=7,
            micro_batch_tokens=70,
            batch_tokens=210,
            in_flight=4,
            max_bytes_in_flight=2 << 30,
            max_steps=9,
            num_train_epochs=2.5,
            activation_memory=3 << 20,
            learning_rate=0.5,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            weight_decay=0.125,
            max_grad_norm=2.0,
            max_skipped_updates=4,
            seed=8,
            max_staleness=1,
            staleness_correction="none",
            save_steps=6,
            save_total_limit=11,
            eval_strategy="steps",
            eval_steps=12,
            early_stopping_patience=13,
            early_stopping_threshold=0.25,
            load_best_model_at_end=True,
            report_to=("tensorboard", "wandb"),
        ),
        outsourcing=OutsourcingConfig(
            engine="clear", activation_bits=12, verify_rows=9, outsource=["*.a", "*.b"]
        ),
    )
    line = """rows.jsonl more.csv --text-field body --strict --no-completion-only-loss --assistant-only-loss
        --dataset-config en --dataset-train-split half --dataset-test-split other
        --eval-dataset held.jsonl --eval-dataset out.csv
        -m some/model -o elsewhere --broker-url redis://broker --device meta
        --overwrite-output-dir --resume-from-checkpoint latest --lora-r 3 --lora-alpha 5 --lora-dropout 0.25
        --lora-layers 1,3-4 --lora-target-modules q_proj,v_proj --lora-target-modules up_proj
        --max-length 7 --batch-tokens 210 --micro-batch-tokens 70 --in-flight 4
        --max-bytes-in-flight 2GiB --max-steps 9 --num-train-epochs 2.5
        --activation-memory 3MiB --learning-rate 0.5 --lr-scheduler-type cosine --warmup-steps 1
        --weight-decay 0.125 --max-grad-norm 2
        --max-skipped-updates 4 --seed 8 --max-staleness 1 --staleness-correction none --save-steps 6
        --save-total-limit 11 --eval-strategy steps --eval-steps 12 --early-stopping-patience 13
        --early-stopping-threshold 0.25 --load-best-model-at-end --report-to tensorboard,wandb
        --init-from earlier --use-rslora --engine clear --activation-bits 12 --verify-rows 9 --outsource *.a
        --outsource *.b"""
    given = called_with(monkeypatch, "finetune", submit, *line.split())
    assert settings_of(given) == vars(job)
    defaults = JobSpec(dataset="other")
    for mine, default in (
        (job, defaults),
        *((getattr(job, n), getattr(defaults, n)) for n in ("lora", "training", "outsourcing", "data")),
    ):
        alike = {name for name, value in vars(default).items() if vars(mine)[name] == value}
        # A row is either a text or a pair, and some things are given in one of two ways.
        others = {"prompt_field", "completion_field", "validation_split", "warmup_ratio"}
        others |= {"gradient_accumulation_steps", "per_device_train_batch_size"}
        assert alike <= others, "not every field is tried"
    pair = ("--prompt_field", "q", "--completion-field=a_b", "--validation-split", "0.25")
    data = called_with(monkeypatch, "finetune", submit, "rows.jsonl", *pair)["data"]
    assert data == TrainingDataConfig(prompt_field="q", completion_field="a_b", validation_split=0.25)
    rows = ("--per-device-train-batch-size=4", "--gradient-accumulation-steps=3", "--warmup-ratio=0.1")
    training = called_with(monkeypatch, "finetune", submit, "rows.jsonl", *rows)["training"]
    assert training == TrainingConfig(
        per_device_train_batch_size=4, gradient_accumulation_steps=3, warmup_ratio=0.1
    )


def typed(*arguments: str) -> Result:
    """What `hetrain submit` answers."""
    app = typer.Typer(context_settings={"token_normalize_func": with_dashes})
    app.command()(submit)
    return CliRunner().invoke(app, arguments)


def test_underscores_and_short_names_are_the_same_options(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "rows.jsonl --model-name-or-path x --learning-rate 0.5 --num-train-epochs 0.5 --batch-tokens 64"
    short = "rows.jsonl --model x --lr 0.5 --epochs 0.5 --batch_tokens=64"
    given = [called_with(monkeypatch, "finetune", submit, *line.split()) for line in (long, short)]
    given = [settings_of(each) for each in given]
    assert given[0] == given[1]
    assert given[0]["training"].longest_row == 64  # follows from the micro-batch


def test_what_is_printed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "a.csv b.csv --epochs 1.5 --lora-target-modules q,v --strict --no-completion-only-loss -o x"
    printed = typed(*line.split(), "--print-config")
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "job.yaml"
    file.write_text(printed.stdout)
    assert typed("--config", str(file), "--print-config").stdout == printed.stdout
    changed = called_with(monkeypatch, "finetune", submit, "c.csv", "--config", str(file), "--lora-r=3")
    assert changed["dataset"] == ("c.csv",)
    assert changed["lora"] == LoraConfig(r=3, target_modules=["q", "v"])
    assert changed["training"].num_train_epochs == 1.5
    assert changed["data"] == TrainingDataConfig(strict=True, completion_only_loss=False)


def test_a_password_is_not_printed() -> None:
    url = "rediss://:hunter2@broker/0"
    assert "hunter2" not in typed("x", "--broker-url", url, "--print-config").output
    assert "redis://broker" in typed("x", "--broker-url", "redis://broker", "--print-config").output


def test_a_file_of_trl_has_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(
        "# trl sft\nmodel_name_or_path: some/model\ndataset_name: owner/rows\n"
        "dataset_train_split: train_sft\n"
        "dataset_text_field: body\nlearning_rate: 2.0e-4\nnum_train_epochs: 1\nmax_length: 512\n"
        "lora-r: 32\nlora_alpha: 16\nlora_target_modules: [q_proj, v_proj]\noutput_dir: sft\nseed: 7\n"
    )
    given = called_with(monkeypatch, "finetune", submit, "--config", str(file))
    assert (given["dataset"], given["model"]) == (("owner/rows",), "some/model")
    assert given["data"] == TrainingDataConfig(text_field="body", dataset_train_split="train_sft")
    assert given["training"] == TrainingConfig(num_train_epochs=1, max_length=512, seed=7)
    assert given["lora"] == LoraConfig(r=32, alpha=16, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("lerning_rate: 3", r"lerning_rate is not known \(did you mean learning_rate\?\)"),
        ("bf16: true\nneftune_noise_alpha: 5", r"bf16 has no meaning here: .*integers.*; neftune_noise_"),
        ("lora: {r: 4}", "lora is not known"),
        ("lora_r: {x: 4}", "lora_r holds further keys"),
        ("seed: 1\nseed: 2", "seed stands there twice"),
        ("max_steps: 1\nmax-steps: 2", "max_steps stands there twice"),
        ("learning_rate: 1\nlr: 2", "learning_rate and lr are the same option"),
        ("dataset_name: a\ndataset:", "dataset_name and dataset are the same option"),
        ("max_length: null", "max_length may not be null: rows must fit micro-batches"),
        ("save-total-limit: null\nseed: ~", r"save_total_limit may not .*; seed may not be null: leave"),
        ("- a\n- b", "holds no keys"),
        ("a: [", "no YAML"),
        ("print_config: true", "print_config is not known"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(content: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        raise typed("rows.jsonl", "--config", str(file)).exception or AssertionError
    assert caught.value.where.startswith(str(file))
    file.write_text("learning_rate: fast")
    assert typed("rows.jsonl", "--config", str(file)).exit_code == 2


def test_null_in_a_file_is_the_default_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("dataset: x.csv\ncompletion_only_loss:\nresume_from_checkpoint: null\neval_dataset: ~\n")
    given = called_with(monkeypatch, "finetune", submit, "--config", str(file))
    assert settings_of(given) == vars(JobSpec(dataset="x.csv"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("nowhere.jsonl",), 3, "nowhere.jsonl"),
        (("bad.csv",), 3, "bad.csv:2"),
        (("good.csv", "--engine", "rwle"), 2, "did you mean rlwe?"),
        (("good.csv", "-m", "smolm2-135m"), 4, "did you mean smollm2-135m?"),
        (("good.csv", "--max-steps", "0"), 2, "--max-steps"),
        (("good.csv", "--validation-split", "0.9"), 2, "--validation-split"),
        ((), 2, "DATASET"),
    ],
)
def test_errors_of_options_and_rows_need_no_torch(
    arguments: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "good.csv").write_text("text\nx\n")
    (tmp_path / "bad.csv").write_text("text,n\n,1\n")
    program = (
        "import sys\nfrom cli.main import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}') if heavy else None\n"
    )
    command = [sys.executable, "-c", program, "submit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REFERENCE.parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert result.stderr.startswith("error: ")  # no progress bar before it


def test_errors_name_the_field_in_python_and_the_option_on_the_command_line() -> None:
    with pytest.raises(UsageError) as caught:
        TrainingConfig(max_length=512, micro_batch_tokens=256)
    assert caught.value.field == "max_length"
    assert str(caught.value).startswith("`max_length`: ")
    assert str(caught.value).endswith("raise `micro_batch_tokens` and, in training, `batch_tokens`")
    worded = as_options(str(caught.value))
    assert worded.startswith("--max-length: ")
    assert worded.endswith("raise --micro-batch-tokens and, in training, --batch-tokens")
    assert as_options("`target_modules`, `workers`, `hetrain plan`") == (
        "--lora-target-modules, --broker-url, `hetrain plan`"
    )


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (OutsourcingConfig, "outsource", ("auto", "*")),
        (ComparisonConfig, "link", "1MB"),
        (ComparisonConfig, "worker_speed", 0),
        (ComparisonConfig, "egress_price", -1),
        (ComparisonConfig, "round_trip_ms", -1),
        (ComparisonConfig, "client_memory", 0),
        (ComparisonConfig, "probe", True),
        (LoraConfig, "r", 0),
        (LoraConfig, "alpha", 0),
        (LoraConfig, "dropout", 1.0),
        (LoraConfig, "dropout", -0.1),
        (LoraConfig, "target_modules", " , "),
        (LoraConfig, "layers", "3-1"),
        (LoraConfig, "layers", "top"),
        (LoraConfig, "layers", "0-99999999999"),
        (BatchingConfig, "max_length", 1),
        (BatchingConfig, "max_length", 4096),
        (BatchingConfig, "micro_batch_tokens", 1),
        (BatchingConfig, "in_flight", 0),
        (BatchingConfig, "max_bytes_in_flight", 0),
        (OutsourcingConfig, "verify_rows", 7),
        (OutsourcingConfig, "verify_rows", 65),
        (TrainingConfig, "num_train_epochs", 0),
        (TrainingConfig, "num_train_epochs", float("nan")),
        (TrainingConfig, "max_steps", 0),
        (TrainingConfig, "max_steps", -2),
        (OutsourcingConfig, "engine", "rlew"),
        (TrainingDataConfig, "text_field", ""),
        (TrainingDataConfig, "validation_split", 1.0),
        (TrainingDataConfig, "validation_split", -0.1),
        (JobSpec, "dataset", ()),
        (TrainingConfig, "learning_rate", 0.0),
        (TrainingConfig, "learning_rate", float("nan")),
        (TrainingConfig, "lr_scheduler_type", "bumpy"),
        (TrainingConfig, "warmup_steps", -1),
        (TrainingConfig, "weight_decay", -0.1),
        (TrainingConfig, "max_grad_norm", -1.0),
        (TrainingConfig, "batch_tokens", 1),
        (TrainingConfig, "max_staleness", -1),
        (TrainingConfig, "staleness_correction", "hope"),
        (TrainingConfig, "save_steps", -1),
        (TrainingConfig, "save_total_limit", -1),
        (TrainingConfig, "gradient_accumulation_steps", 0),
        (TrainingConfig, "per_device_train_batch_size", 0),
        (TrainingConfig, "warmup_ratio", 1.0),
        (TrainingConfig, "eval_strategy", "often"),
        (TrainingConfig, "eval_steps", 5),
        (TrainingConfig, "early_stopping_patience", 1),
        (TrainingConfig, "early_stopping_threshold", 0.1),
        (TrainingConfig, "load_best_model_at_end", True),
        (TrainingConfig, "report_to", "mlflow"),
        (TrainingConfig, "report_to", ("none", "wandb")),
        (TrainingConfig, "report_to", ""),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(config: type, field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        config(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"batch_tokens": 4096, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"batch_tokens": 4096, "per_device_train_batch_size": 2}, "per_device_train_batch_size"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"eval_strategy": "epoch", "eval_steps": 3}, "eval_steps"),
    ],
)
def test_of_two_ways_to_say_a_thing_one_is_taken(given: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainingConfig(**given)
    assert caught.value.field == field


def test_to_evaluate_during_training_there_must_be_rows() -> None:
    with pytest.raises(UsageError, match="no rows are held out") as caught:
        JobSpec(dataset="x", training=TrainingConfig(eval_strategy="epoch"))
    assert caught.value.field == "eval_strategy"
    held_out = TrainingDataConfig(validation_split=0.1)
    assert JobSpec(dataset="x", data=held_out, training=TrainingConfig(eval_strategy="epoch")).data.holds_out


def test_an_update_is_so_many_micro_batches_or_rows() -> None:
    config = TrainingConfig(micro_batch_tokens=512, gradient_accumulation_steps=3)
    assert (config.tokens_per_update, config.batches_per_update) == (1536, 3)
    assert config.tokens_per_micro_batch == 512
    rows = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=3, max_length=100)
    assert (rows.batches_per_update, rows.tokens_per_micro_batch, rows.longest_row) == (3, 400, 100)
    assert TrainingConfig(per_device_train_batch_size=4).batches_per_update == 1


def test_warm_up_may_be_a_part_of_all_updates() -> None:
    config = TrainingConfig(warmup_ratio=0.1)
    assert [config.over(total).warmup_steps for total in (1, 10, 11, 100)] == [1, 1, 2, 10]
    assert TrainingConfig(warmup_steps=3).over(100).warmup_steps == 3


@pytest.mark.parametrize(
    ("batch", "micro_batch", "count", "tokens"),
    [
        (4096, 2048, 2, 2048),
        (512, 2048, 1, 512),
        (3000, 2048, 2, 1500),
        (2049, 2048, 2, 1025),
        (100, 10, 10, 10),
    ],
)
def test_an_update_is_divided_into_equal_micro_batches(
    batch: int, micro_batch: int, count: int, tokens: int
) -> None:
    config = TrainingConfig(batch_tokens=batch, micro_batch_tokens=micro_batch, in_flight=64)
    assert (config.batches_per_update, config.tokens_per_micro_batch) == (count, tokens)
    assert config.longest_row == min(1024, tokens)
    assert BatchingConfig(micro_batch_tokens=micro_batch).longest_row == min(1024, micro_batch)
    # No more are under way than updates that overlap have.
    assert config.replicas == count
    assert replace(config, max_staleness=2, warmup_steps=5).replicas == min(3 * count, 64)
    assert replace(config, in_flight=1).replicas == 1


def test_there_is_no_staleness_during_warm_up() -> None:
    config = TrainingConfig(max_staleness=2, warmup_steps=3)
    assert [config.staleness_bound(update) for update in range(5)] == [0, 0, 0, 2, 2]


def test_staleness_in_a_short_training_is_warned_of() -> None:
    assert TrainingConfig().warning(1) is None
    stale = TrainingConfig(max_staleness=1)
    assert "`max_staleness` 0" in (stale.warning(FEW_UPDATES - 1) or "")
    assert stale.warning(FEW_UPDATES) is None


def test_the_reference_is_made_from_the_settings() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), (
        "run: python -m cli.reference docs/reference/options.md"
    )


def test_importing_hetrain_is_cheap_and_offers_what_it_says() -> None:
    code = (
        "import sys, hetrain; hetrain.LoraConfig(r=4); hetrain.TrainingConfig(); hetrain.finetune; "
        "assert not {'torch', 'transformers', 'peft', 'celery', 'redis'} & set(sys.modules), 'heavy'; "
        "assert all(hasattr(hetrain, name) for name in hetrain.__all__); "
        "assert set(hetrain.__all__) <= set(dir(hetrain)); assert not hasattr(hetrain, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    stub = Path(hetrain.__file__).with_suffix(".pyi").read_text()
    assert all(name in stub for name in hetrain.__all__)
