"""``qexp-report``: compare all runs below some folders, in the terminal, as Markdown, CSV and one HTML file."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits 2 with one line on stderr for a user's mistake."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        report(arguments)
    except UserError as error:
        sys.stderr.write(f"qexp-report: {error}\n")
        raise SystemExit(2) from None


def report(arguments: argparse.Namespace) -> None:
    """Read the records, print the table and write the files that were asked for. Raises: UserError."""
    from qexp.report import compare, record, rows, table, verdicts

    if not arguments.within >= 0:
        raise UserError(f"--within {arguments.within:g}", "percent, 0 or more")
    if arguments.sync or arguments.dry_run:
        _sync(arguments.folders, dry_run=arguments.dry_run)
        return
    records = record.find(arguments.folders)
    lines = rows.make(records, by_seed=arguments.by_seed)
    if arguments.baseline:
        compare.against(lines, arguments.baseline)
    held = verdicts.compare(lines, arguments.within)
    table.show(lines)
    verdicts.show(held)
    table.say(
        [*verdicts.summary(held), *compare.summary(lines), *table.failures(lines), *_unfinished(arguments.folders)]
    )
    for path, text in _files(arguments, records, lines).items():
        _save(path, text)
        table.say([f"wrote {path}"])


def _unfinished(folders: Sequence[Path]) -> list[str]:
    """Return a line for each index below ``folders`` that tells of runs which have not ended."""
    from qexp.core import sweep_index

    indices = {file for folder in folders for form in ("", "*/") for file in folder.glob(form + sweep_index.FILE)}
    return [told for file in sorted(indices) if (told := sweep_index.unfinished(file.parent))]


def _sync(folders: Sequence[Path], *, dry_run: bool) -> None:
    from qexp.report import sync, table

    runs = sync.offline_runs(folders)
    if dry_run:
        table.say(map(str, runs))
    else:
        sync.upload(runs)
    table.say([f"{len(runs)} W&B runs {'to upload' if dry_run else 'uploaded'}"])


def _files(arguments: argparse.Namespace, records: list, lines: list) -> dict[Path, str]:  # type: ignore[type-arg]
    from qexp.report import table, verdicts

    files: dict[Path, str] = {}
    if arguments.csv:
        files[arguments.csv] = table.comma_separated(lines)
    if arguments.markdown:
        files[arguments.markdown] = table.markdown(lines) + verdicts.markdown(verdicts.compare(lines, arguments.within))
    if arguments.html:
        from qexp.report import html  # matplotlib: only where it is needed

        files[arguments.html] = html.render(records, lines, arguments.baseline, arguments.within)
    return files


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "a place that can be written") from error


def _parser() -> argparse.ArgumentParser:
    from qexp.report import verdicts

    parser = argparse.ArgumentParser(prog="qexp-report", description="Compare all qexp runs found below some folders.")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="folder with runs, e.g. outputs")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write one self-contained HTML report")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the raw values")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table as Markdown")
    parser.add_argument("--baseline", metavar="METHOD", help="hold every row against this method's row")
    about = f"how far a reproduced perplexity may be off ({verdicts.WITHIN:g})"
    parser.add_argument("--within", metavar="PERCENT", type=float, default=verdicts.WITHIN, help=about)
    parser.add_argument("--sync", action="store_true", help="upload the W&B runs kept offline below DIR, nothing else")
    parser.add_argument("--dry-run", action="store_true", help="with --sync: say which, upload none")
    parser.add_argument("--by-seed", action="store_true", help="one row per run instead of one per setting")
    return parser


if __name__ == "__main__":
    main()
