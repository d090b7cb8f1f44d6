"""The model card of an adapter: README.md as the hub has it, from the run's own records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetrain.train.records import RunRecord

_HEAD = """\
---
library_name: peft
base_model: {base_model}
tags:
- lora
- hetrain
---

# LoRA adapter for {base_model}

Trained with hetrain {hetrain} ([arXiv 2505.07329](https://arxiv.org/abs/2505.07329)): {steps} of
{total_steps} updates over {tokens} tokens{best}. Rank {r}, alpha {alpha}{scaled}, target modules {targets}.
Last loss of a micro-batch: {loss}.

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained("{base_model}")
    model = PeftModel.from_pretrained(base, "PATH OF THIS ADAPTER")

## How the run was protected

| | |
| --- | --- |
"""

_TAIL = """
The base weights are public and were with the workers. An adapter may reveal what it was trained on: this page
says nothing about its contents.
"""


def model_card(run: RunRecord) -> str:
    """Markdown with the hub's metadata. Names neither the data set nor a path of the machine."""
    job, last = run.job, run.micro_batches[-1] if run.micro_batches else {}
    lora: Mapping[str, Any] = job["lora"]
    head = _HEAD.format(
        base_model=job["base_model"],
        hetrain=job["hetrain"],
        steps=job.get("steps", 0),
        total_steps=job["total_steps"],
        tokens=job.get("tokens", 0),
        best=_best(job),
        scaled=" (alpha/√r, rsLoRA)" if lora.get("use_rslora") else "",
        r=lora["r"],
        alpha=lora["alpha"],
        targets=", ".join(lora["target_modules"]),
        loss="not finite" if last.get("loss") is None else f"{last['loss']:.3f}",
    )
    return head + "".join(f"| {name} | {value} |\n" for name, value in protection_rows(run)) + _TAIL


def _best(job: Mapping[str, Any]) -> str:
    """What is said of an adapter that is not that of the last update."""
    steps, best = job.get("steps"), job.get("adapter_step")
    return (
        ""
        if best in (None, steps)
        else f"; this is the adapter of update {best}, with the least held-out loss"
    )


def protection_rows(run: RunRecord) -> list[tuple[str, str]]:
    """How a run was protected: names and figures."""
    job = run.job
    protection: Mapping[str, Any] = job["protection"]
    bits = protection["security_bits"]
    rejected, liars = int(run.total("rejected")), run.names("rejected_workers")
    rows = [
        ("engine", job["engine"]),
        ("workers saw", "ciphertexts only" if protection["hides"] else "everything in clear: NOT PROTECTED"),
    ]
    if protection["parameters"]:
        rows.append(("parameters", protection["parameters"]))
    if bits:
        rows.append(("security", ", ".join(f"{value:.0f} bits ({model})" for model, value in bits.items())))
    if headroom := protection["headroom_bits"].values():
        least = min(min(pair) for pair in headroom)
        rows.append(("noise headroom", f"at least {least:.1f} bits by the bound; nothing wraps above 0"))
    return [
        *rows,
        ("outsourced", ", ".join(job["outsourcing"]["outsource"])),
        (
            "products verified",
            f"{int(run.total('products'))}, each by {protection['verify_rows']} rows",
        ),
        ("results rejected", str(rejected)),
        ("workers rejected", ", ".join(liars) or "none"),
        ("workers", str(len(run.names("workers")))),
    ]
