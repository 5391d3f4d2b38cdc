"""Answers from an endpoint of OpenAI's shape (`POST URL/chat/completions`), by the standard library alone.

The key is read from the environment when it is sent. No object here holds it, so none can write it down.
"""

from __future__ import annotations

import email.utils
import http.client
import itertools
import json
import os
import queue
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from tunesmith.core.errors import DataError, EndpointFailed, SetupError
from tunesmith.core.jsonl import parse_json

Chat = Sequence[Mapping[str, Any]]
Status = Literal["answered", "cut", "empty", "refused"]

_TRY_AGAIN = {408, 409, 425, 429}
_REFUSED = {400, 413, 422}
_LONGEST_WAIT_SECONDS = 600.0
_LONGEST_BACKOFF_SECONDS = 60.0
_MAX_REPLY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who is asked, and how patiently.

    url:      what `/chat/completions` is added to; as a rule it ends with `/v1`.
    key_name: environment variable with the key; unset sends none, which is what local servers want.
    parallel: requests at a time.
    timeout_seconds:    of one attempt. attempts: of one request.
    first_wait_seconds: before the second attempt; doubled before each that follows, with some chance in it.
    Raises SetupError for a URL that is none.
    """

    url: str
    model: str
    key_name: str = "OPENAI_API_KEY"
    parallel: int = 8
    timeout_seconds: float = 120.0
    attempts: int = 6
    first_wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        cure = "Give what stands before /chat/completions, such as http://localhost:8000/v1"
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise SetupError(self.url, "is no URL", cure=cure) from None
        if parts.username or parts.password:
            place = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
            rule = "a URL is written into records, a key never is"
            raise SetupError(place, "has a user or password in it", rule=rule, cure=f"Set {self.key_name}")
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not plain:
            raise SetupError(self.url, "is no URL of an endpoint", cure=cure)

    @property
    def address(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one chat.

    status: `cut` ran into the limit of tokens; `refused` by the model, a filter, or as a request that is too long.
    reason: of a refusal, in the endpoint's words.
    """

    text: str
    status: Status
    reason: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def ask_all(
    endpoint: Endpoint, chats: Sequence[Chat], *, options: Mapping[str, Any] | None = None
) -> Generator[tuple[int, Reply]]:
    """(number of the chat, reply) as they come, `endpoint.parallel` at a time.

    options: further keys of the requests (`max_tokens`, `temperature`).
    Close it (contextlib.closing) where it may be left early, or the asking goes on.
    Raises SetupError for what the user can mend (address, key, model), EndpointFailed after the last attempt; what is
    under way then is waited for and given first, so that no answer that was paid for is lost.
    """
    caller = _Caller(endpoint, options or {})
    found: queue.SimpleQueue[tuple[int, Reply] | BaseException | None] = queue.SimpleQueue()
    numbers, lock = iter(range(len(chats))), threading.Lock()

    def work() -> None:
        try:
            while not caller.stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                found.put((number, caller.ask(chats[number])))
        except BaseException as error:
            caller.stop.set()
            found.put(error)
        finally:
            found.put(None)

    working = min(endpoint.parallel, len(chats))
    for _ in range(working):
        # Nobody waits for these when the program ends.
        threading.Thread(target=work, daemon=True).start()
    failure: BaseException | None = None
    try:
        while working:
            item = found.get()
            if item is None:
                working -= 1
            elif isinstance(item, BaseException):
                failure = failure if failure is not None or isinstance(item, _Stopped) else item
            else:
                yield item
    finally:
        caller.stop.set()
    if failure is not None:
        raise failure


# --- one request ------------------------------------------------------------------------------------------------------


class _Again(Exception):
    """An attempt that failed in a way that may pass."""

    def __init__(self, finding: str, wait_seconds: float | None = None) -> None:
        super().__init__(finding)
        self.finding, self.wait_seconds = finding, wait_seconds


class _Stopped(Exception):
    """Another request has failed for good."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever it is led."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class _Caller:
    """What the threads of one `ask_all` share."""

    def __init__(self, endpoint: Endpoint, options: Mapping[str, Any]) -> None:
        self.endpoint, self.options = endpoint, options
        self.stop = threading.Event()
        # Until the first answer, an address where nobody listens or something else answers is a slip of the user's.
        self.has_answered = threading.Event()

    def ask(self, chat: Chat) -> Reply:
        endpoint = self.endpoint
        for attempt in itertools.count(1):
            body = {"model": endpoint.model, "messages": list(chat), **self.options}
            try:
                reply = self._post(json.dumps(body).encode())
                if "max_tokens" in body and "max_completion_tokens" in reply.reason:
                    # What newer models of OpenAI call it; others know the old name alone.
                    renamed = {key: value for key, value in self.options.items() if key != "max_tokens"}
                    self.options = renamed | {"max_completion_tokens": body["max_tokens"]}
                    continue
                return reply
            except _Again as again:
                if attempt >= endpoint.attempts:
                    finding = f"{again.finding}, {attempt} times"
                    cure = "Run the command again later; what was answered is kept"
                    raise EndpointFailed(endpoint.url, finding, cure=cure) from None
                backoff = min(_LONGEST_BACKOFF_SECONDS, endpoint.first_wait_seconds * 2 ** (attempt - 1))
                # Threads that failed together do not come back together.
                wait = again.wait_seconds
                if self.stop.wait(backoff * random.uniform(0.5, 1) if wait is None else wait):
                    raise _Stopped from None
        raise AssertionError

    def _post(self, data: bytes) -> Reply:
        key = self._read_key()
        headers = {"Content-Type": "application/json", "User-Agent": "tunesmith"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.endpoint.address, data, headers)  # noqa: S310 (http or https alone)
        timeout = self.endpoint.timeout_seconds
        try:
            with _OPENER.open(request, timeout=timeout) as response:
                raw = _read_all(response, deadline=time.monotonic() + timeout)
        except urllib.error.HTTPError as error:
            with error:
                return self._explain_status(error, key)
        except urllib.error.URLError as error:
            raise self._explain_connection(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._explain_connection(error) from None
        return self._parse(raw, key)

    def _read_key(self) -> str:
        name = self.endpoint.key_name
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise SetupError(name, "holds what is no key", rule="a key is one word", cure="Set it again")
        return key

    def _parse(self, raw: bytes, key: str) -> Reply:
        url = self.endpoint.url
        try:
            value = parse_json(raw, place=url, whole=True)
            choice = value["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text = message.get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (DataError, LookupError, TypeError, AttributeError):
            begin = _shorten(raw.decode(errors="replace"), 80, without=key)
            finding = f"what it answers is no chat completion: {begin!r}"
            if self.has_answered.is_set():
                raise _Again(finding) from None
            raise SetupError(
                url, finding, cure="Check the URL: what stands before /chat/completions"
            ) from None
        self.has_answered.set()
        tokens = _count_tokens(value.get("usage"))
        if "\0" in text:
            return Reply("", "refused", "the answer contains a NUL character", *tokens)
        if message.get("refusal") or finish == "content_filter":
            return Reply("", "refused", str(message.get("refusal") or "stopped by a content filter"), *tokens)
        if not text.strip():
            return Reply("", "empty", "", *tokens)
        return Reply(text, "cut" if finish == "length" else "answered", "", *tokens)

    def _explain_status(self, error: urllib.error.HTTPError, key: str) -> Reply:
        """What an answer other than 200 means: a refused request, one to repeat, or an end."""
        endpoint, code = self.endpoint, error.code
        told = _shorten(_read_message(error), 200, without=key)
        told = f"{code}: {told}" if told else str(code)
        if code in _REFUSED:
            return Reply("", "refused", told)
        if code in _TRY_AGAIN or code >= 500:
            wait = _read_wait(error.headers.get("Retry-After"))
            if wait is not None and wait > _LONGEST_WAIT_SECONDS:
                finding = f"asks to wait for {wait:.0f} seconds ({told})"
                raise EndpointFailed(endpoint.url, finding, cure="Run the command again later")
            raise _Again(f"fails ({told})", wait)
        if code in (401, 403):
            finding = f"refuses the key ({told})" if key else f"asks for a key ({told})"
            cure = f"Set the environment variable {endpoint.key_name}, or name the one that holds the key"
        elif code == 404:
            finding, cure = (
                f"knows no model {endpoint.model!r}, or no such path ({told})",
                "Check URL and model",
            )
        elif code < 400:
            finding, cure = f"leads elsewhere ({told})", "Give the URL that it leads to"
        else:
            finding, cure = f"does not take requests ({told})", "Check URL and model"
        raise SetupError(endpoint.url, finding, cure=cure)

    def _explain_connection(self, reason: Any) -> Exception:
        finding = f"cannot be reached ({' '.join(str(reason).split()) or type(reason).__name__})"
        if isinstance(reason, TimeoutError):
            finding = f"did not answer within {self.endpoint.timeout_seconds:g} seconds"
        is_slip = (
            isinstance(reason, ConnectionRefusedError | socket.gaierror) and not self.has_answered.is_set()
        )
        if is_slip or isinstance(reason, ssl.SSLCertVerificationError):
            return SetupError(self.endpoint.url, finding, cure="Check the URL, and that the server runs")
        return _Again(finding)


def _read_all(response: Any, *, deadline: float) -> bytes:
    """The body. A server that sends a byte now and then is as silent as one that sends none."""
    raw = bytearray()
    while part := response.read1(1 << 16):
        raw += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(raw) > _MAX_REPLY_BYTES:
            raise http.client.HTTPException("more than 64 MB in one answer")
    if response.length:  # what was promised and has not come
        raise http.client.IncompleteRead(bytes(raw), response.length)
    return bytes(raw)


def _read_message(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words."""
    try:
        raw = error.read(1 << 14)
    except (OSError, http.client.HTTPException):
        return ""
    try:
        value: Any = json.loads(raw)
        found = value.get("error", value)
        text = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        text = raw.decode(errors="replace")
    return str(text)


def _shorten(text: str, limit: int, *, without: str) -> str:
    """The beginning of what an endpoint said, in one line. Some repeat the key."""
    words = " ".join(text.split())
    words = words.replace(without, "[the key]") if without else words
    return words if len(words) <= limit else f"{words[:limit]} ..."


def _read_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _count_tokens(usage: Any) -> tuple[int, int]:
    """Tokens of prompt and answer, where the endpoint tells."""
    counts = cast("dict[str, Any]", usage) if isinstance(usage, dict) else {}
    found = (counts.get("prompt_tokens"), counts.get("completion_tokens"))
    return tuple(value if isinstance(value, int) else 0 for value in found)  # pyright: ignore[reportReturnType]
