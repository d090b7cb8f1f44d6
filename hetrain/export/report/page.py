"""One self-contained HTML page on a run: inline SVG, no script, nothing from the network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from hetrain.export.report.sections import Section, sections
from hetrain.public.disk import reason_of, replace_text
from hetrain.public.errors import UsageError
from hetrain.train.records import RunRecord, dataset_label, read_run

# Okabe and Ito's colours, which the colour-blind tell apart; lighter ones on a dark ground.
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --ground: #fff; --card: #f6f8fa;
  --grid: #d8dee4; --alarm: #d1242f;
  --c1: #0072b2; --c2: #e69f00; --c3: #009e73; --c4: #cc79a7; --c5: #56b4e9; --c6: #8c8c8c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --ground: #0d1117;
  --card: #161b22; --grid: #30363d; --alarm: #ff7b72;
  --c1: #4aa3df; --c2: #f0b429; --c3: #2fc59a; --c4: #e29ac4; --c5: #8fd0f5; --c6: #a6a6a6; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  max-width: 860px; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 8px; }
p, ul { margin: 0 0 10px; } ul { padding-left: 20px; }
section { margin: 28px 0 0; padding-top: 20px; border-top: 1px solid var(--grid); }
.dim { color: var(--dim); fill: var(--dim); } svg .dim, svg text { font-size: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px;
  margin: 18px 0 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: 10px 12px; }
.tiles dt { color: var(--dim); font-size: 12px; } .tiles dd { margin: 0; font-size: 19px; }
svg { display: block; width: 100%; height: auto; margin: 6px 0; } svg text { fill: var(--ink); }
svg text.dim { fill: var(--dim); } svg text.alarm { fill: var(--alarm); font-weight: bold; }
.grid { stroke: var(--grid); } polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
circle.dots { opacity: .75; } circle.marks { stroke: var(--ground); stroke-width: 1.5; }
.legend span { margin-right: 14px; } .legend .key { margin-right: 6px; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
table { border-collapse: collapse; width: 100%; } td { padding: 4px 10px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; } td:first-child { min-width: 170px; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } summary { cursor: pointer; }
@media print { section { break-inside: avoid; } }
"""
_COLOURS = "".join(
    f".f{i} {{ fill: var(--c{i}); }} .s{i} {{ stroke: var(--c{i}); }} .b{i} {{ background: var(--c{i}); }}\n"
    for i in range(1, 7)
)


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Writes the page on a run; see `hetrain.api.report`."""
    path = output or directory / "report.html"
    text = page(read_run(directory))
    try:
        replace_text(path, text)
    except OSError as error:
        raise UsageError(f"cannot be written: {reason_of(error)}", where=str(path)) from error
    return path


def page(run: RunRecord) -> str:
    """The page's HTML."""
    title = f"{run.job.get('base_model', run.job['model'])}, {run.job['status']}"
    body = "".join(_section(each) for each in sections(run))
    origin = f"{dataset_label(run.job)}, hetrain {run.job['hetrain']}, engine {run.job['engine']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{_COLOURS}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="dim">{escape(origin)}</p>{_tiles(run)}{body}</body></html>\n'
    )


def _section(section: Section) -> str:
    return f"<section><h2>{escape(section.title)}</h2>{section.text}{section.body}</section>"


def _tiles(run: RunRecord) -> str:
    losses = [r["loss"] for r in run.micro_batches if r.get("loss") is not None]
    seconds = max((r["elapsed_s"] for r in run.micro_batches), default=0.0)
    evaluated = [r["loss"] for r in run.evaluations]
    figures = [
        ("updates", f"{run.job.get('steps', 0)} of {run.job['total_steps']}"),
        ("tokens", f"{run.total('tokens'):,.0f}"),
        ("time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"),
        ("loss, first to last", f"{losses[0]:.2f} → {losses[-1]:.2f}" if losses else "none"),
        ("last evaluation", f"{evaluated[-1]:.3f}" if evaluated else "none"),
        ("workers", str(len(run.names("workers")))),
        ("verified products", f"{run.total('products'):,.0f}"),
        ("rejected results", f"{run.total('rejected'):,.0f}"),
    ]
    tiles = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    return f'<dl class="tiles">{tiles}</dl>'
