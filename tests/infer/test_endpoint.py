"""Asking an endpoint: what is sent, what is tried again, what is an end, and what is never said."""

from __future__ import annotations

import json
import socket
import threading
import time
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loopback import Loopback, Said, fail, say

from tunesmith.core.errors import EndpointFailed, SetupError
from tunesmith.infer.endpoint import Endpoint, Reply, ask_all

KEY = "sk-secret-0123456789"


def endpoint(loopback: Loopback, **settings: Any) -> Endpoint:
    given = {"timeout_seconds": 5.0, "first_wait_seconds": 0.01, "attempts": 4, **settings}
    return Endpoint(loopback.url, "large", **given)


def ask(where: Endpoint, *texts: str, **options: Any) -> list[Reply]:
    chats = [[{"role": "user", "content": text}] for text in texts or ("Hello",)]
    return [reply for _, reply in sorted(ask_all(where, chats, options=options), key=lambda pair: pair[0])]


def refuse(where: Endpoint, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        ask(where)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return str(caught.value)


def test_a_request_says_what_it_wants_and_each_reply_finds_its_chat(loopback: Loopback) -> None:
    loopback.answer = lambda _, body: Said(
        say(body["messages"][0]["content"].upper()),
        seconds=0.1 if body["messages"][0]["content"] == "a" else 0,
    )
    replies = ask(endpoint(loopback), "a", "b", "c", max_tokens=7)
    assert [reply.text for reply in replies] == ["A", "B", "C"]
    assert replies[0] == Reply("A", "answered", "", 8, 4)
    asked = loopback.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.body["model"] == "large"
    assert asked.body["max_tokens"] == 7
    assert "Authorization" not in asked.headers


def test_the_key_is_read_when_it_is_sent(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    where = endpoint(loopback, key_name="OTHER_KEY")
    monkeypatch.setenv("OTHER_KEY", f"{KEY}\n")
    ask(where)
    assert loopback.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(where)
    monkeypatch.setenv("OTHER_KEY", f"{KEY} {KEY}")
    assert refuse(where, SetupError).startswith("OTHER_KEY: holds what is no key")


def test_the_limit_of_tokens_goes_by_the_name_that_the_model_knows(loopback: Loopback) -> None:
    def answer(_: int, body: dict[str, Any]) -> Any:
        old = "max_tokens" in body
        return fail(400, "Unsupported parameter. Use 'max_completion_tokens' instead.") if old else say("yes")

    loopback.answer = answer
    replies = ask(endpoint(loopback, parallel=1), "a", "b", max_tokens=7)
    assert [reply.text for reply in replies] == ["yes", "yes"]
    assert [asked.body.get("max_completion_tokens") for asked in loopback.asked] == [None, 7, 7]


def test_requests_and_replies_are_those_of_the_published_schema(loopback: Loopback, shared: Path) -> None:
    from jsonschema import Draft202012Validator

    components = json.loads((shared / "api" / "openai_openapi_core.json").read_text())["components"]

    def check(name: str, value: Any) -> None:
        Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components}).validate(
            value
        )

    message = {"role": "assistant", "content": "yes", "refusal": None, "annotations": []}
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "large",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12},
    }
    check("CreateChatCompletionResponse", reply)
    loopback.script(reply)
    assert ask(endpoint(loopback), max_tokens=7, temperature=0.5) == [Reply("yes", "answered", "", 8, 4)]
    check("CreateChatCompletionRequest", loopback.asked[0].body)


def test_as_many_requests_as_asked_for_run_at_once(loopback: Loopback) -> None:
    loopback.answer = lambda *_: Said(say("yes"), seconds=0.1)
    ask(endpoint(loopback, parallel=4), *"abcdefghijkl")
    assert loopback.most_at_once == 4


@pytest.mark.parametrize(
    "fault",
    [
        fail(500),
        fail(503, "overloaded"),
        fail(429, "slow down"),
        fail(408),
        Said(hang_up=True),
        Said(say("cut off on the way"), promised=10_000),
        Said(say("late"), seconds=1.0),
    ],
    ids=["500", "503", "429", "408", "hangs up", "half an answer", "too late"],
)
def test_what_may_pass_is_tried_again(loopback: Loopback, fault: Said) -> None:
    loopback.script(fault, fault, say("at last"))
    assert [reply.text for reply in ask(endpoint(loopback, timeout_seconds=0.3))] == ["at last"]
    assert len(loopback.asked) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_it_waits_for_as_long_as_it_is_told_to(loopback: Loopback, as_date: bool) -> None:
    # A date has whole seconds: 2 from now is more than 1.
    wait = formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
    loopback.script(fail(429, Retry_After=wait), say("at last"))
    ask(endpoint(loopback))
    assert loopback.asked[1].at - loopback.asked[0].at > (0.9 if as_date else 0.4)


def test_waits_grow_and_end(loopback: Loopback) -> None:
    loopback.script(fail(500, "broken"))
    said = refuse(endpoint(loopback, first_wait_seconds=0.1), EndpointFailed)
    assert said.startswith(f"{loopback.url}: fails (500: broken), 4 times")
    times = [asked.at for asked in loopback.asked]
    waits = [after - before for before, after in pairwise(times)]
    # Half to all of 0.1, 0.2, 0.4 seconds.
    assert all(wait > least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True))


def test_a_wait_of_hours_is_told_instead(loopback: Loopback) -> None:
    loopback.script(fail(429, "quota", Retry_After="7200"))
    assert "asks to wait for 7200 seconds (429: quota)" in refuse(endpoint(loopback), EndpointFailed)


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        (fail(401, "no key"), "asks for a key (401: no key). Set the environment variable OPENAI_API_KEY"),
        (fail(403), "asks for a key (403)"),
        (fail(404, "no such model"), "knows no model 'large', or no such path (404: no such model)"),
        (fail(405), "does not take requests (405)"),
        (Said(b"<html>Welcome</html>"), "what it answers is no chat completion: '<html>Welcome</html>'"),
        (Said({"error": "x"}), "what it answers is no chat completion"),
        (Said({"choices": []}), "what it answers is no chat completion"),
        (Said([1]), "what it answers is no chat completion"),
        (Said(b""), "what it answers is no chat completion: ''"),
        (Said(b'{"choices": [{"message": {"content": 5}}]}'), "what it answers is no chat completion"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_the_user_has_to_mend_is_told_at_once(loopback: Loopback, said: Said, finding: str) -> None:
    loopback.script(said)
    assert finding in refuse(endpoint(loopback), SetupError)
    assert len(loopback.asked) == 1


def test_a_key_that_is_refused_is_not_repeated(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    loopback.script(fail(401, f"Incorrect API key provided: {KEY}"))
    said = refuse(endpoint(loopback), SetupError)
    assert "refuses the key (401: Incorrect API key provided: [the key])" in said
    # Cut in the middle of the key, a message would still show most of it.
    for said in (fail(401, f"{'x' * 190} {KEY}"), Said(f"{'x' * 70} {KEY}".encode())):
        loopback.script(said)
        assert KEY[:5] not in refuse(endpoint(loopback), SetupError)


def test_a_redirect_is_not_followed_with_the_key(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    loopback.script(fail(302, Location=f"{loopback.url}/elsewhere"), say("caught"))
    assert "leads elsewhere (302)" in refuse(endpoint(loopback), SetupError)
    assert len(loopback.asked) == 1


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = Endpoint(f"http://127.0.0.1:{port}/v1", "large")
    started = time.monotonic()
    assert "cannot be reached" in refuse(where, SetupError)
    assert time.monotonic() - started < 1


def test_garbage_between_answers_is_an_accident(loopback: Loopback) -> None:
    loopback.script(say("one"), Said(b"<html>Bad gateway</html>"), say("two"))
    assert [reply.text for reply in ask(endpoint(loopback, parallel=1), "a", "b")] == ["one", "two"]


@pytest.mark.parametrize("said", [Said(say("late"), seconds=1.0), Said(say("bit by bit"), drip=0.02)])
def test_slowness_has_an_end(loopback: Loopback, said: Said) -> None:
    loopback.script(said)
    finding = refuse(endpoint(loopback, timeout_seconds=0.2, attempts=2), EndpointFailed)
    assert "did not answer within 0.2 seconds, 2 times" in finding


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (say("half", "length"), Reply("half", "cut", "", 8, 4)),
        (say(""), Reply("", "empty", "", 8, 4)),
        (say(None), Reply("", "empty", "", 8, 4)),
        (say(None, refusal="I won't"), Reply("", "refused", "I won't", 8, 4)),
        (say("so", "content_filter"), Reply("", "refused", "stopped by a content filter", 8, 4)),
        (say("a\0b"), Reply("", "refused", "the answer contains a NUL character", 8, 4)),
        (fail(400, "too long"), Reply("", "refused", "400: too long")),
        ({"choices": [{"message": {"content": "bare"}}]}, Reply("bare", "answered")),
    ],
)
def test_what_comes_of_a_chat(loopback: Loopback, said: Any, expected: Reply) -> None:
    loopback.script(said)
    assert ask(endpoint(loopback)) == [expected]


def test_what_is_under_way_when_another_request_fails_is_not_lost(loopback: Loopback) -> None:
    loopback.answer = lambda number, _: fail(401) if number == 1 else Said(say("paid for"), seconds=0.3)
    found: list[str] = []
    replies = ask_all(endpoint(loopback, parallel=3), [[{"role": "user", "content": "a"}]] * 9)
    with pytest.raises(SetupError):
        found.extend(reply.text for _, reply in replies)
    assert found == ["paid for", "paid for"]
    assert len(loopback.asked) == 3


def test_who_stops_listening_stops_the_asking(loopback: Loopback) -> None:
    before = threading.active_count()
    replies = ask_all(endpoint(loopback, parallel=2), [[{"role": "user", "content": "a"}]] * 500)
    next(replies)
    replies.close()
    time.sleep(0.3)
    asked = len(loopback.asked)
    assert asked < 100
    time.sleep(0.2)
    assert len(loopback.asked) == asked
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "http://host:port",
        "https://host/v1?x=1",
        "http://a b",
    ],
)
def test_a_url_that_is_none_is_told(url: str) -> None:
    with pytest.raises(SetupError, match="is no URL"):
        Endpoint(url, "large")


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SetupError, match="has a user or password in it") as caught:
        Endpoint("https://me:secret@host/v1", "large")
    assert "secret" not in str(caught.value)


def test_the_whole_address_is_taken_too() -> None:
    for url in ("http://host/v1", "http://host/v1/", "http://host/v1/chat/completions"):
        assert Endpoint(url, "large").address == "http://host/v1/chat/completions"
