"""`python reward_worker.py FD`: a job's own reward functions, in a process where they can hang or crash alone.

Requests and replies are JSON lines on the socket FD, one reply to each. What functions print goes to the log that the
parent keeps of this process. Standard library only: this file is run, not imported, so nothing else need be there.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import queue
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

_RULE = "a reward function returns a list with a number, or None, for each completion"
_AS_TRL = "it is called with keywords, as TRL calls it"


class Fault(Exception):
    """What is wrong with a function, for the person who wrote it: finding, rule, cure."""


class Functions:
    """The functions of a job by the number of their reward; each file is run once."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}
        self._found: dict[int, tuple[Callable[..., Any], str, frozenset[str] | None]] = {}

    def load(self, number: int, file: str, name: str, given: Sequence[str]) -> None:
        """Import a function. given: the names that it can ask for. Raises Fault."""
        module = self._import(file)
        function = getattr(module, name, None)
        if not callable(function):
            own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            finding = f"has no function {name!r}" if function is None else f"{name} is no function"
            raise Fault(finding, "", f"Functions there: {', '.join(own) or 'none'}")
        self._found[number] = (function, file, _read_parameters(function, given))

    def call(self, number: int, arguments: Mapping[str, Any]) -> list[float | None]:
        """One value for each completion. Raises Fault."""
        function, file, wanted = self._found[number]
        taken = {key: value for key, value in arguments.items() if wanted is None or key in wanted}
        try:
            values = _as_list(_wait_for(function(**taken)))
        # SystemExit, too: a function that gives up is told like one that fails.
        except BaseException as error:
            raise _explain(error, file) from None
        expected = len(arguments["completions"])
        if values is None or len(values) != expected:
            given = "no list" if values is None else f"{len(values)} values for {expected} completions"
            raise Fault(f"returned {given}", _RULE)
        return [_read_number(value, n) for n, value in enumerate(values)]

    def _import(self, file: str) -> ModuleType:
        if file not in self._modules:
            folder, base = os.path.split(file)
            # Files beside it are there for it to import, as they would be if it were run.
            sys.path.insert(0, folder)
            name = f"{os.path.splitext(base)[0]}_{len(self._modules)}"
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException as error:
                raise _explain(error, file, "cannot be imported: ") from None
            self._modules[file] = module
        return self._modules[file]


def _read_parameters(function: Callable[..., Any], given: Sequence[str]) -> frozenset[str] | None:
    """Names that a function takes, None for any. Raises Fault for one that it needs and nobody gives."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    for each in parameters:
        needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        if needed and each.kind is each.POSITIONAL_ONLY:
            raise Fault(f"takes {each.name} by position", _AS_TRL, "Remove the slash")
        if needed and each.name not in given:
            raise Fault(
                f"asks for {each.name!r}",
                f"{_AS_TRL}: {', '.join(given)}",
                "Add the column to the rows, or give it a default",
            )
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters)


def _wait_for(found: Any) -> Any:
    """What an async function comes to."""
    if not inspect.iscoroutine(found):
        return found
    import asyncio

    return asyncio.run(found)


def _as_list(found: Any) -> list[Any] | None:
    """What a function has returned as a list, None if it is none. Arrays and tensors are lists, too."""
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        return None
    return list(found)


def _read_number(value: Any, number: int) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise Fault(f"value {number} is {type(value).__name__} ({repr(value)[:40]})", _RULE)
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Fault(f"value {number} is {found}", "a reward is a finite number")
    return found


def _explain(error: BaseException, file: str, finding: str = "") -> Fault:
    """An exception of a person's code in one line, with the line of their file; its traceback goes to the log."""
    traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    place, line = file, next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
    if isinstance(error, SyntaxError) and error.filename is not None:
        place, line = error.filename, error.lineno
    where = "" if line is None else f" ({os.path.basename(place)}, line {line})"
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())[:300]
    raised = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Fault(f"{finding or 'raised '}{raised}{where}")


def main(argv: list[str]) -> None:
    channel = socket.socket(fileno=int(argv[1]))
    channel.set_inheritable(False)
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_requests, args=(channel, requests), daemon=True).start()
    functions = Functions()
    # In the main thread, where functions may set alarms.
    while True:
        request = json.loads(requests.get())
        try:
            values = _serve(functions, **request)
            reply: dict[str, Any] = {"values": values}
        except Fault as fault:
            reply = {"fault": list(fault.args)}
        channel.sendall(json.dumps(reply).encode() + b"\n")


def _serve(functions: Functions, *, do: str, **wanted: Any) -> list[float | None] | None:
    if do == "load":
        functions.load(**wanted)
        return None
    if do == "search":
        pattern = re.compile(wanted["pattern"])
        return [float(pattern.search(text) is not None) for text in wanted["texts"]]
    return functions.call(**wanted)


def _read_requests(channel: socket.socket, requests: queue.Queue[bytes]) -> None:
    with channel.makefile("rb") as lines:
        for line in lines:
            requests.put(line)
    # The parent is gone: whatever a function is doing, and has started, ends with it.
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv)
