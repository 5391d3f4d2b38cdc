"""Why uv or pip failed, in one line, and what to do."""

from __future__ import annotations

import re

# In this order: without a network pip also says 'No matching distribution', a line later.
_CAUSES = (
    (r"No space left on device", "the disk is full", "Free some space and run it again"),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError|invalid peer certificate|UnknownIssuer",
        "the index's certificate is not trusted",
        "Set PIP_CERT",
    ),
    (
        r"DO NOT MATCH THE HASHES|[Hh]ash mismatch",
        "a package is not the one that was locked (its hash differs)",
        "Look at the index that it came from",
    ),
    (r"ProxyError|407 Proxy", "the proxy refuses", "Correct HTTPS_PROXY, or pip's proxy setting"),
    (
        r"NewConnectionError|NameResolutionError|[Nn]ame resolution|Network is unreachable|ConnectTimeoutError"
        r"|ReadTimeoutError|ConnectionResetError|Connection refused|Max retries exceeded|Failed to fetch"
        r"|error sending request|dns error",
        "no package index could be reached",
        "Connect to the network, or set pip's index-url to a mirror",
    ),
    (
        r"Permission denied|Read-only file system",
        "a folder cannot be written",
        "Set TUNESMITH_HOME to one that can",
    ),
    (
        r"No matching distribution found for (?P<what>\S+)|Because (?P<named>\S+) (?:was not found|has no)"
        r"|no version of (?P<version>\S+)",
        "there is no {what} for this Python and machine",
        "Try another --python, or another index",
    ),
)


def explain_failure(said: str, *, otherwise: str) -> tuple[str, str]:
    """(cause, cure) from what uv or pip printed."""
    for pattern, cause, cure in _CAUSES:
        if match := re.search(pattern, said):
            what = next((value for value in match.groupdict().values() if value), "")
            return cause.format(what=what), cure
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if errors := [line for line in lines if line.lower().startswith("error")]:
        return errors[-1][:300], ""
    return "; it last said: ".join([otherwise, *lines[-1:]])[:300], ""
