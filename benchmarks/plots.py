"""Figures in pictures: one function for each measurement, from its JSON to a drawing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_GREY = "0.5"


def step_parts(encrypted: Mapping[str, Any]) -> dict[str, float]:
    """The parts of one micro-batch's seconds, from its means; they add up to its wall time."""
    means = encrypted["per_micro_batch"]
    own = means["seconds"] - means["encrypt_s"] - means["wait_s"] - means["decrypt_s"]
    return {
        "plain part of the client": own,
        "encrypt": means["encrypt_s"],
        "worker computes": means["server_s"],
        "queue and transfer": means["wait_s"] - means["server_s"] - means["verify_s"],
        "verify": means["verify_s"],
        "decrypt": means["decrypt_s"],
    }


def step(figures: Mapping[str, Any]) -> Figure:
    """Seconds, their parts and memory of a whole update."""
    encrypted, name = figures["encrypted"], figures["engine"]
    drawing, axes = _panels(1, 3, f"A micro-batch of {figures['tokens']} tokens, {figures['shape']}")
    seconds = {name: encrypted["seconds_per_micro_batch"]}
    memory = {f"{name},\n{side}": encrypted["peak_rss_bytes"][side] / 1e9 for side in ("client", "worker")}
    if "plain_s" in figures:
        seconds = {"plain PEFT": figures["plain_s"], **seconds}
        memory = {"plain PEFT": figures["plain_peak_rss_bytes"] / 1e9, **memory}
    _bars(axes[0], seconds, "seconds per micro-batch")
    below = 0.0
    for part, height in step_parts(encrypted).items():
        axes[1].bar([name], [height], bottom=below, label=part)
        below += height
    axes[1].set_ylabel("seconds of one micro-batch")
    axes[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    _bars(axes[2], memory, "peak resident set, GB")
    return drawing


def gemm(figures: Mapping[str, Any]) -> Figure:
    """Ratios of every product to plain fp32, and what share of the bare int8 products is reached."""
    products = figures["products"]
    labels = [f"{one['model']}, {one['group']}, {one['direction']}" for one in products]
    drawing, axes = _panels(2, 1, f"The worker's part, {figures['tokens']} tokens", width=10)
    shown = (("encrypted / fp32", 0.75), ("bare int8 / encrypted", 0.85))
    for axis, (name, goal) in zip(axes, shown, strict=True):
        _grouped(axis, labels, {name: [one["ratios"][name] for one in products]})
        axis.axhline(goal, color=_GREY, linestyle="--", linewidth=1)
        axis.tick_params(axis="x", labelsize="x-small", labelrotation=90)
        axis.set_ylabel("ratio")
    axes[0].tick_params(axis="x", labelbottom=False)  # as below
    return drawing


def client(figures: Mapping[str, Any]) -> Figure:
    """Nanoseconds per coefficient of each part, by instruction set; their sum is twice the average."""
    cases = figures["ns_per_coefficient"]
    drawing, (axis,) = _panels(1, 1, f"The client's cryptography, {figures['width']} features")
    below = dict.fromkeys(cases, 0.0)
    for part in next(iter(cases.values())):
        if part == "average":
            continue
        axis.bar(list(cases), [one[part] for one in cases.values()], bottom=list(below.values()), label=part)
        below = {name: bottom + cases[name][part] for name, bottom in below.items()}
    axis.set_ylabel("ns for a coefficient up and one down")
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return drawing


def growth(figures: Mapping[str, Any]) -> Figure:
    """Seconds and bytes against tokens, matrix size and layers."""
    names = {"tokens": "tokens", "size": "K = N", "layers": "layers"}
    drawing, axes = _panels(2, 3, "Growth")
    for column, (axis_name, label) in enumerate(names.items()):
        cases = [one for one in figures["cases"] if one["axis"] == axis_name]
        values = [one["value"] for one in cases]
        seconds, megabytes = axes[column], axes[column + len(names)]
        seconds.plot(values, [one["seconds"] for one in cases], marker="o")
        megabytes.plot(values, [(one["bytes_up"] + one["bytes_down"]) / 1e6 for one in cases], marker="o")
        for axis, unit in ((axes[column], "seconds"), (axes[column + len(names)], "MB up and down")):
            axis.set(xlabel=label, ylabel=unit, xticks=sorted({one["value"] for one in cases}))
            axis.set_ylim(bottom=0)
    return drawing


def engines(figures: Mapping[str, Any]) -> Figure:
    """Weight·tokens per second of every engine, the best of its numbers of tokens."""
    shapes = list(dict.fromkeys(one["shape"] for one in figures["figures"]))
    drawing, (axis,) = _panels(1, 1, "Engines")
    for shape in shapes:
        best: dict[str, float] = {}
        for one in figures["figures"]:
            if one["shape"] == shape:
                best[one["engine"]] = max(best.get(one["engine"], 0.0), one["weight_tokens_per_s"])
        axis.plot(list(best.values()), list(best), "o", label=shape)
    axis.set(xscale="log", xlabel="weight·tokens per second")
    axis.grid(axis="x")
    axis.legend(fontsize="x-small")
    return drawing


def scaling(figures: Mapping[str, Any]) -> Figure:
    """For each part: efficiency against workers, and throughput with what limits it."""
    parts, worker_s = figures["parts"], figures["mean_product"]["worker_s"]
    drawing, axes = _panels(len(parts), 2, f"One client and many workers, {figures['shape']}")
    for row, (name, one) in enumerate(parts.items()):
        efficiency, rate = axes[2 * row : 2 * row + 2]
        counts = sorted({cell["workers"] for cell in one["cells"]})
        for in_flight in dict.fromkeys(cell["in_flight"] for cell in one["cells"]):
            line = [cell for cell in one["cells"] if cell["in_flight"] == in_flight]
            workers = [cell["workers"] for cell in line]
            efficiency.plot(workers, [cell["efficiency"] for cell in line], marker="o", label=in_flight)
            reached = [cell["efficiency"] * cell["workers"] / worker_s for cell in line]
            rate.plot(workers, reached, marker="o")
        efficiency.axhline(0.9, color=_GREY, linestyle="--", linewidth=1)
        rate.plot(counts, [count / worker_s for count in counts], color=_GREY, linestyle=":")
        rate.axhline(min(one["client_limits_per_s"].values()), color=_GREY, linestyle="--", linewidth=1)
        rate.set_ylim(top=1.25 * min(one["client_limits_per_s"].values()))
        for axis, label in ((efficiency, f"{name}: efficiency"), (rate, f"{name}: mean products per second")):
            axis.set(xscale="log", xlabel="workers", ylabel=label)
            axis.set_xticks(counts, [str(count) for count in counts], minor=False)
            axis.set_ylim(bottom=0)
        efficiency.legend(title="in flight", fontsize="x-small")
    return drawing


def lockstep(figures: Mapping[str, Any]) -> Figure:
    """Throughput of modes here, and the share of free throughput that lock step reaches with a fleet."""
    drawing, (modes, shares) = _panels(1, 2, "Lock step and overlapping updates", width=12)
    one = figures["here"]
    rates = {name: one["micro_batches"] / statistics.median(runs) for name, runs in one["seconds"].items()}
    modes.barh([_wrapped(name) for name in rates], list(rates.values()))
    modes.set_xlabel("micro-batches per second, here")
    for each in figures["fleet"]:
        counts = [cell["in_flight"] for cell in each["cells"]]
        ratios = [cell["lock_step_per_s"] / cell["free_per_s"] for cell in each["cells"]]
        shares.plot(counts, ratios, marker="o", label=f"{each['gbit']:g} Gbit/s")
    shares.axhline(0.9, color=_GREY, linestyle="--", linewidth=1)
    shares.set(xlabel="micro-batches of an update", ylabel="lock step / free", ylim=(0, 1.1))
    shares.legend(fontsize="x-small")
    return drawing


def learning(figures: Mapping[str, Any]) -> Figure:
    """Training losses update by update, a panel for each data set and size, seed 1; means of five updates."""
    groups: dict[str, dict[str, list[float]]] = {}
    for name, run in figures["runs"].items():
        what, seed, rest = name.partition(", seed 1")
        if seed and rest[:1] in {",", ":"}:
            groups.setdefault(what, {})[rest[2:]] = run["losses"]
    drawing, axes = _panels(1, len(groups), "Training loss", width=5 * len(groups))
    for axis, (what, curves) in zip(axes, groups.items(), strict=True):
        for how, losses in curves.items():
            means = [statistics.mean(losses[max(0, end - 5) : end]) for end in range(1, len(losses) + 1)]
            axis.plot(range(1, len(losses) + 1), means, label=how)
        axis.set(xlabel="update", ylabel="loss", title=what)
        axis.legend(fontsize="x-small")
    return drawing


def _wrapped(name: str) -> str:
    return name.replace(": ", ":\n").replace(", ", ",\n")


def convergence(figures: Mapping[str, Any]) -> Figure:
    """Losses step by step."""
    drawing, (axis,) = _panels(1, 1, f"Loss, {figures['tokens']} tokens of {figures['data']} a step")
    for name, losses in figures["losses"].items():
        axis.plot(range(1, len(losses) + 1), losses, marker="o", label=name)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    return drawing


def _panels(rows: int, columns: int, title: str, width: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A drawing, inches wide as given or as its columns need, and its panels row by row."""
    drawing = Figure(figsize=(width or 4 + 3 * columns, 1 + 3 * rows), layout="constrained")
    drawing.suptitle(title)
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


def _bars(axis: Axes, values: Mapping[str, float], label: str) -> None:
    drawn = axis.bar(list(values), list(values.values()))
    axis.bar_label(drawn, fmt="%.3g")
    axis.set_ylabel(label)
    axis.margins(y=0.15)
    axis.tick_params(axis="x", labelsize="x-small")


def _grouped(axis: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(labels))]
        axis.bar(places, values, width, label=name)
    axis.set_xticks(range(len(labels)), labels)
    axis.legend(fontsize="x-small")
