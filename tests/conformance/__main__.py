"""Ask a server what it conforms to: `python -m tests.conformance --http URL [--grpc HOST:PORT]`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance import probes
from tests.conformance.environments import environment
from tests.conformance.own import own
from tests.conformance.peers import PEERS
from tests.conformance.point import Result, ask
from tests.conformance.registry import LIGHT, POINTS
from tests.conformance.results import keep, markdown
from tests.conformance.subject import Subject


def main(arguments: list[str]) -> int:
    """Ask, print the table, keep the results; 1 where a point fails."""
    given = _parser().parse_args(arguments)
    if given.write_models:
        probes.write(given.write_models)
        print(f"models to load into the server that is asked: {given.write_models}")
        return 0
    if given.table:
        print(markdown(given.table), end="")
        return 0
    chosen = [
        one
        for one in (LIGHT if given.light else POINTS)
        if not given.only or any(text in one.group for text in given.only)
    ]
    if given.list:
        for one in chosen:
            print(f"{one.group}: {one.name}")
        return 0
    if given.own:
        python = str(environment("protobuf7") / "bin" / "python") if given.protobuf7 else sys.executable
        opened, name = own("--grpc-port", "0", python=python), "serving"
    elif given.peer:
        opened, name = PEERS[given.peer](), given.peer
    elif given.http:
        opened, name = closing(Subject(given.http, given.grpc, models=tuple(given.model), key=given.key)), given.http
    else:
        print("which server? --http URL, --own, or --peer NAME")
        return 2
    with opened as subject:
        results = ask(subject, chosen)
    show(results, quiet=given.quiet)
    if given.results:
        keep(given.results, given.name or name, results)
    return 1 if any(one.verdict == "no" for one in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--http", help="URL of the server")
    parser.add_argument("--own", action="store_true", help="start this project's server, and ask it")
    parser.add_argument("--protobuf7", action="store_true", help="with protobuf 7, in an environment of its own")
    parser.add_argument("--peer", choices=sorted(PEERS), help="start another server from PyPI, and ask it")
    parser.add_argument("--grpc", help="host:port of its gRPC; left out, nothing is asked there")
    parser.add_argument("--model", action="append", default=[], help="ask with this model; may be repeated")
    parser.add_argument("--key", help="bearer key for what changes the server")
    parser.add_argument("--only", action="append", default=[], help="ask only groups whose name has this in it")
    parser.add_argument("--light", action="store_true", help="leave out perf_analyzer and KServe's client")
    parser.add_argument("--list", action="store_true", help="list the points and ask nothing")
    parser.add_argument("--quiet", action="store_true", help="print only what is not kept")
    parser.add_argument("--results", type=Path, help="keep the results in this JSON file, beside those of others")
    parser.add_argument("--table", type=Path, help="print the servers of such a file side by side as Markdown, and end")
    parser.add_argument("--name", help="what to call the server there")
    parser.add_argument("--write-models", type=Path, help="write the probes into this model repository and end")
    return parser


def show(results: list[Result], *, quiet: bool = False) -> None:
    """Print the table."""
    table = Table(title="conformance", title_justify="left")
    for column in ("", "point", "", "seen"):
        table.add_column(column, overflow="fold")
    group = ""
    for one in results:
        if quiet and one.verdict == "yes":
            continue
        table.add_row("" if one.group == group else one.group, one.name, one.verdict, one.note[:300], end_section=False)
        group = one.group
    console = Console(width=170, highlight=False, markup=False)
    console.print(table)
    count = {verdict: sum(one.verdict == verdict for one in results) for verdict in ("yes", "no", "not asked")}
    console.print(", ".join(f"{verdict}: {number}" for verdict, number in count.items()))


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # not sys.exit, which would wait for the threads of clients that wait for ever
