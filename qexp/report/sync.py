"""``qexp-report DIR --sync``: upload the W&B runs below a folder that were kept offline. W&B's own command does it.

``wandb sync`` writes a mark beside the log of a run that arrived, so what is uploaded twice is nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.core.errors import UserError


def offline_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of offline W&B runs below ``folders`` that were not uploaded yet, oldest first."""
    found = {log.parent.resolve() for folder in folders for log in folder.rglob("offline-run-*/*.wandb")}
    waiting = [run for run in found if not any(run.glob("*.wandb.synced"))]
    return sorted(waiting, key=lambda run: (run.name, run))


def upload(runs: Sequence[Path]) -> None:
    """Upload ``runs``; never asks anything. Raises: UserError without a login, or if one of them did not arrive."""
    if not runs:
        return
    import wandb

    need = "a W&B account on this machine (`wandb login`, or WANDB_API_KEY) and a server that answers"
    try:  # asks the server, for half a minute at most; without an answer `wandb sync` would wait for much longer
        logged_in = wandb.login(prompt=False, verify=True)
    except wandb.errors.Error as error:
        told = str(error).splitlines()[0]
        raise UserError(f"{len(runs)} W&B runs wait: {told}", need) from error
    if not logged_in:
        raise UserError(f"{len(runs)} W&B runs wait, and nobody is logged in", need)
    command = [sys.executable, "-m", "wandb", "sync", *map(str, runs)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    left = [run for run in runs if not any(run.glob("*.wandb.synced"))]
    if done.returncode or left:
        raise UserError(f"{len(left)} of {len(runs)} W&B runs were not uploaded", "to be told again: the same command")
