"""All results in tables and pictures: ``python -m benchmarks.report``.

Reads what is there of benchmarks/results/*.json, writes report.md and PNG files beside them. A file that is
missing or cannot be used is named in the report and on standard output, and left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import asynchrony, client, corrections, engines, gemm, growth, lockstep, plots, scaling
from benchmarks.output import markdown

RESULTS = Path(__file__).parent / "results"
_DPI = 110
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One file of results: what it is called in the report, what makes it, and how it is shown."""

    name: str
    title: str
    module: str
    options: str
    text: Callable[[Figures], str]
    draw: Callable[[Figures], Figure]

    @property
    def file(self) -> str:
        """The file of figures; the picture has the same name."""
        return f"{self.name}.json"

    def command(self, options: str) -> str:
        """The command that makes the file."""
        return (
            f"`{' '.join(('python -m', f'benchmarks.{self.module}', *options.split(), '--json', self.file))}`"
        )


def step(figures: Figures) -> str:
    """The cost of an update, and the parts of a micro-batch's time."""
    one, ratio = figures["encrypted"], figures.get("ratio_to_plain_peft")
    rows = [
        (
            figures["engine"],
            f"{one['seconds_per_micro_batch']:.2f}",
            f"{one['seconds_per_token']:.4f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{one['mb_per_token']:.2f}",
            _gigabytes(one["peak_rss_bytes"]["client"]),
            _gigabytes(one["peak_rss_bytes"]["worker"]),
        )
    ]
    if "plain_s" in figures:
        plain_s, memory = figures["plain_s"], _gigabytes(figures["plain_peak_rss_bytes"])
        rows.append(
            ("plain PEFT, fp32", f"{plain_s:.2f}", f"{plain_s / figures['tokens']:.4f}", "1", "", memory, "")
        )
    header = ("", "s per micro-batch", "s per token", "× plain", "MB per token", "client, GB", "worker, GB")
    parts = plots.step_parts(one)
    return "\n\n".join(
        (
            f"{figures['shape']}, {figures['tokens']} tokens per micro-batch; measured updates: "
            f"{one['updates']}, each of {one['in_flight']} micro-batches.",
            markdown(header, rows),
            "Seconds of one micro-batch, which runs beside the others in flight:",
            markdown(tuple(parts), [tuple(f"{seconds:.2f}" for seconds in parts.values())]),
        )
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def convergence(figures: Figures) -> str:
    """Losses of the first and last step, and how far they are apart."""
    rows = []
    for name, losses in figures["losses"].items():
        difference = figures["largest_difference"].get(name)
        apart = "" if difference is None else f"{100 * difference:.2f} %"
        rows.append((name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", apart))
    cosines = ", ".join(f"{name} {value:.4f}" for name, value in figures["gradient_cosine"].items())
    return "\n\n".join(
        (
            markdown(("", "first loss", "last loss", "largest difference from plain"), rows),
            f"Cosine similarity of the first step's gradients: {cosines}.",
        )
    )


SECTIONS = (
    Section("step", "A whole update", "step", "", step, plots.step),
    Section(
        "step-llama",
        "A whole update of the Llama-3.2-1B shape, random weights",
        "step",
        "--shape llama-3.2-1b --no-plain --in-flight 1 --updates 1",
        step,
        plots.step,
    ),
    Section("gemm", "The worker's part against plain products", "gemm", "", gemm.table, plots.gemm),
    Section(
        "client",
        "The client's cryptography",
        "client",
        "",
        lambda figures: client.table(figures["ns_per_coefficient"]),
        plots.client,
    ),
    Section("growth", "Growth", "growth", "", growth.table, plots.growth),
    Section(
        "engines",
        "Engines and concrete-ml-extensions",
        "engines",
        "--all",
        lambda figures: engines.table(figures["figures"]),
        plots.engines,
    ),
    Section(
        "scaling",
        "One client and many workers",
        "scaling",
        "",
        scaling.table,
        plots.scaling,
    ),
    Section("lockstep", "What lock step costs", "lockstep", "", lockstep.table, plots.lockstep),
    Section(
        "asynchrony",
        "Encrypted jobs against stock PEFT",
        "asynchrony",
        "",
        lambda figures: asynchrony.table(figures["runs"]),
        plots.learning,
    ),
    Section(
        "corrections",
        "Corrections of staleness",
        "corrections",
        "",
        lambda figures: corrections.table(figures["runs"]),
        plots.learning,
    ),
    Section(
        "convergence", "Agreement with plain training", "convergence", "", convergence, plots.convergence
    ),
)


def chapter(section: Section, folder: Path) -> tuple[str, Figure]:
    """A section's text and picture.

    Raises:
        OSError: there is no such file.
        ValueError, KeyError, TypeError, StopIteration: it has not the figures that it should have.
    """
    figures = json.loads((folder / section.file).read_text(encoding="utf-8"))
    options = " ".join(figures["options"]) if "options" in figures else section.options
    text = "\n\n".join(
        (
            f"## {section.title}",
            section.command(options),
            section.text(figures),
            f"![{section.title}]({section.name}.png)",
            _environment(figures["environment"]),
        )
    )
    return text, section.draw(figures)


def _environment(about: Figures) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    load = ", ".join(f"{value:.1f}" for value in about["load_before"])
    return (
        f"{about['processor']}, {about['cores']} cores, {about['torch_threads']} torch threads by default; "
        f"Python {about['python']}, {versions}; load before: {load}."
    )


def write_report(folder: Path) -> Iterator[str]:
    """Writes report.md and the pictures; says which files are left out, and why."""
    texts, pictures, missing = ["# Results"], {}, []
    for section in SECTIONS:
        try:
            text, picture = chapter(section, folder)
        except FileNotFoundError:
            missing.append(f"{section.file} is not there: {section.command(section.options)} makes it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            missing.append(
                f"{section.file} cannot be used ({type(error).__name__}: {error}): "
                f"{section.command(section.options)} makes it anew"
            )
        else:
            texts.append(text)
            pictures[f"{section.name}.png"] = picture
    if missing:
        texts.append("\n".join(("## Left out", "", *(f"- {reason}" for reason in missing))))
    for name, picture in pictures.items():
        picture.savefig(folder / name, dpi=_DPI)
    (folder / "report.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    yield from missing


def main() -> None:
    """Parses arguments, reads, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of JSON files")
    arguments = parser.parse_args()
    if not arguments.results.is_dir():
        parser.error(f"--results: there is no directory {arguments.results}")
    for reason in write_report(arguments.results):
        print(f"left out: {reason}")
    print(arguments.results / "report.md")


if __name__ == "__main__":
    main()
