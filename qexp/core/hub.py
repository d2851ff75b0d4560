"""Is the hub there? Asked once, with a short patience, before anything waits for it."""

from __future__ import annotations

import functools
import os
import socket
import urllib.parse
import urllib.request

from qexp.core.errors import UserError

PROBE_SECONDS = 2.0


def need_hub(what: str, override: str) -> None:
    """Raise UserError unless the hub answers; with HF_HUB_OFFLINE=1 the user vouches for the local cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}:
        return
    if not hub_answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        raise UserError(f"{what}, which does not answer", "the hub, or HF_HUB_OFFLINE=1 and a filled cache", override)


@functools.cache
def hub_answers(endpoint: str) -> bool:
    """Return whether a connection to the hub, or to the proxy in front of it, opens within two seconds."""
    target = urllib.parse.urlsplit(urllib.request.getproxies().get("https") or endpoint)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True
