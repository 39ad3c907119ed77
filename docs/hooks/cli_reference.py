"""Writes every command and option of ``resting`` into the page ``cli.md``, from the command line itself."""

from __future__ import annotations

from typing import Any

import typer

MARK = "<!-- Every command stands here in the built documentation. -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the reference in the place of `MARK`, on the one page that has it."""
    return markdown.replace(MARK, reference()) if page.file.src_uri == "cli.md" else markdown


def reference() -> str:
    """Write one section per command, with a table of its arguments and options."""
    from resting.benchmarks.cli.main import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(section(name, group.commands[name]) for name in sorted(group.commands))


def section(name: str, command: Any) -> str:
    """Write what a command does, how it is called, and what it takes."""
    context = command.context_class(command, info_name=f"resting {name}")
    usage = " ".join(["resting", name, *command.collect_usage_pieces(context)])
    lines = [f"### resting {name}", "", command.help, "", f"    {usage}", ""]
    records = [(parameter, parameter.get_help_record(context)) for parameter in command.params]
    rows = [(_called(parameter, shown[0]), shown[1]) for parameter, shown in records if shown]
    if rows:
        lines += ["| argument or option | what it does |", "|---|---|"]
        lines += [f"| `{called}` | {_cell(said)} |" for called, said in rows]
    return "\n".join(lines)


def _called(parameter: Any, shown: str) -> str:
    """Name an option with its short form and its type, as ``--help`` does; pipes would end a cell of the table."""
    return shown.replace("|", " or ") if parameter.param_type_name == "option" else shown.split(" ")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
