"""``qexp-dashboard``: publish the W&B workspace that shows a project's runs, or write it as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.core.errors import UserError
from qexp.tracking import workspace

HELP = """\
Make the W&B workspace of a project: gap per method, quality over bits, parallel coordinates, curves over the blocks.

  qexp-dashboard --entity my-team --project qexp                     # publishes; needs a login
  qexp-dashboard --entity my-team --project qexp --sweep demo        # the runs of one sweep or study
  qexp-dashboard --entity my-team --project qexp --json view.json    # writes what would be published; no network
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits 2 with one line on stderr for a user's mistake, a missing login or no answer."""
    arguments = _parser().parse_args(argv)
    view = workspace.View(
        entity=arguments.entity, project=arguments.project, sets=arguments.sets, sweeps=arguments.sweep
    )
    try:
        sys.stdout.write(f"{_made(view, arguments.json)}\n")
    except UserError as error:
        sys.stderr.write(f"qexp-dashboard: {error}\n")
        raise SystemExit(2) from None


def _made(view: workspace.View, file: Path | None) -> str:
    """Publish the view or write it; return where it is. Raises: UserError."""
    made = workspace.build(view)
    if file is None:
        return workspace.publish(made)
    try:
        file.write_text(json.dumps(workspace.as_json(made), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}", "a place that can be written") from error
    return f"wrote {file}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp-dashboard", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="qexp", help="the runs' project (qexp)")
    parser.add_argument("--sweep", metavar="NAME", nargs="+", default=[], help="only runs of these sweeps or studies")
    parser.add_argument("--sets", metavar="SET", nargs="+", default=["generated"], help="evaluated sets (generated)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write it instead of publishing it")
    return parser
