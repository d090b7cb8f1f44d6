"""`python -m docs.environment_reference` writes docs/reference/environment.md from the settings' fields."""

from __future__ import annotations

from pathlib import Path

from hetrain.public.settings import ClientSettings, Settings, WorkerSettings, variable

PAGE = Path(__file__).parent / "reference" / "environment.md"
_HEAD = """\
# Environment variables

Written by `python -m docs.environment_reference` from the fields of `hetrain/public/settings.py`. An empty
variable counts as not set. A value that makes no sense ends the program with a message that names the
variable and what to write: a client and `hetrain worker` with exit code 2, a worker process with 78.

| variable | read by | meaning |
| --- | --- | --- |
"""


def page() -> str:
    """The whole page: a row for each field of each side, by name."""
    sides: dict[str, type[Settings]] = {"client": ClientSettings, "worker": WorkerSettings}
    rows: dict[tuple[str, str | None], list[str]] = {}
    for side, settings in sides.items():
        for name, field in settings.model_fields.items():
            rows.setdefault((variable(name), field.description), []).append(side)
    return _HEAD + "".join(
        f"| `{name}` | {', '.join(readers)} | {description} |\n"
        for (name, description), readers in sorted(rows.items(), key=lambda row: (row[0][0], row[1]))
    )


if __name__ == "__main__":
    PAGE.write_text(page())
