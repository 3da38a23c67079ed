"""`fastsnn report`: tables and pictures of runs."""

from __future__ import annotations

import argparse

from . import Parser, guarded, positive

__all__ = ["add"]


def add(commands) -> Parser:
    parser = commands.add_parser("report", help="tables and pictures of runs", description="Tables and pictures of one or several runs, as a page in HTML and Markdown.")
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders that `fastsnn train` made")
    parser.add_argument("--out", default="report", metavar="DIR", help="where the page and the pictures go (default: report)")
    parser.add_argument("--data", metavar="PATH", help="where the test images lie now (default: where each run found them)")
    parser.add_argument("--device", default="auto", help="device: cpu, cuda ...; auto: a GPU where there is one (default: auto)")
    parser.add_argument("--images", type=positive, default=512, metavar="N", help="so many test images for the membranes (default: 512)")
    text = "so many test images are attacked, for pictures of them and of the loss around them; 0: none (default: 8)"
    parser.add_argument("--attacked", type=whole, default=8, metavar="N", help=text)
    parser.add_argument("--quiet", action="store_true", help="do not say what is done")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def whole(text: str) -> int:
    """A whole number >= 0 of the command line."""
    return 0 if text == "0" else positive(text)


def run(arguments: argparse.Namespace) -> int:
    import json

    from ..report import report, text_table

    page = report(arguments.folders, arguments.out, arguments.data, arguments.device, arguments.images, arguments.attacked, progress=not arguments.quiet)
    print(f"{text_table(json.loads((page.parent / 'table.json').read_text(encoding='utf-8'))['rows'])}\n\n{page}")
    return 0
