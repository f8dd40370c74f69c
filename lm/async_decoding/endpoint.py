# SPDX-License-Identifier: Apache-2.0
"""A client of OpenAI-compatible chat endpoints, for annotators and judges.

What is asked for is known before anything is sent: `Endpoint.fetch` says what it may cost, refuses
what is above the limit, asks for what is not in the file of replies yet, and files every reply as
it comes. A rerun of the same requests sends nothing.

The key is read from an environment variable and goes into one header; no message, file or exception
holds it. Redirects are refused, since they would carry the key to wherever they point.
"""

import concurrent.futures
import dataclasses
import email.utils
import hashlib
import http.client
import json
import math
import os
import pathlib
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lm.config import require_positive
from lm.errors import RunError, UserError
from lm.progress import Progress, say

CHARACTERS = 4  # of a token, as far as an estimate goes
_OVERHEAD = 8  # tokens of a message's frame
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_OWN = (400, 413, 422)  # may be one request's fault, such as a text that is too long
_SAME = 8  # requests refused so, and none answered: then it is not theirs
_CHUNK = 1 << 16  # bytes of a reply
_SHOWN = 200  # characters of what an endpoint says


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Where to ask, and what may be spent.

    url: up to and without `/chat/completions`. key_env: name of the environment variable with the
    key; "" sends none. timeout: seconds of one attempt, its whole reply included. Waits between
    attempts double from `first_wait` seconds to at most `longest_wait`, each drawn between half of
    it and all of it; an endpoint's own Retry-After wins, up to `longest_wait`. Prices are per
    million tokens. max_cost: of all that a run asks for, as estimated; more than that is not
    started. workers: requests under way at once.
    """

    url: str
    model: str
    key_env: str = ""
    timeout: float = 60.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float = math.inf
    workers: int = 4

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("--url must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query:
            raise UserError("--url must not hold a user, a password or a query: keys go elsewhere")
        require_positive("attempts", self.attempts)
        require_positive("workers", self.workers)
        for name in ("timeout", "first_wait", "longest_wait"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0 seconds, and finite")
        if not all(x >= 0 for x in (self.price_in, self.price_out, self.max_cost)):
            raise UserError("prices and --max_cost must be numbers that are not negative")
        if math.isfinite(self.max_cost) and not self.price_in + self.price_out:
            raise UserError("--max_cost needs prices: give --price_in and --price_out")
        if self.key_env:
            key = os.environ.get(self.key_env, "")
            if not key:
                raise UserError(f"the environment variable {self.key_env} is not set")
            if not (key.isascii() and key.isprintable()) or " " in key:
                # a header cannot hold it, and the refusal of the library would quote it
                raise UserError(f"the environment variable {self.key_env} holds no usable key")


@dataclasses.dataclass(frozen=True)
class Request:
    """Messages to answer. options: further fields of the body, such as `logprobs`."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int
    temperature: float = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            **self.options,
        }

    @property
    def tokens(self) -> int:
        """Of the messages, estimated."""
        return sum(_OVERHEAD + -(-len(text) // CHARACTERS) for _, text in self.messages)


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back. finish: "stop", or "length" when `max_tokens` cut it off.

    top: per token of the text the likeliest tokens with their log-probabilities, where the
    endpoint gives them.
    """

    text: str
    finish: str = "stop"
    top: tuple[Mapping[str, float], ...] = ()
    tokens_in: int = 0
    tokens_out: int = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of the requests that would be sent; tokens_out is what they may take at most."""

    requests: int
    tokens_in: int
    tokens_out: int
    cost: float


class _Failed(Exception):
    """An attempt that may be repeated. wait: seconds that the endpoint asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """A request that the endpoint will not take."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # the status then arrives as an HTTPError


class Endpoint:
    """An endpoint and the file of its replies. `sleep` and `rng` decide the waits."""

    def __init__(
        self,
        config: EndpointConfig,
        file: str | os.PathLike[str],
        *,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ):
        self.config, self._file = config, pathlib.Path(file)
        if not self._file.parent.is_dir():  # before replies are paid for that could not be kept
            raise UserError(f"{self._file}: no such directory")
        self._key = os.environ.get(config.key_env, "") if config.key_env else ""
        self._sleep, self._rng = sleep, rng or random.Random()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._cost = 0.0  # of what was sent, as estimated
        self._answered, self._refusals = False, 0
        self._torn = False  # the file ends in a line that a kill cut short
        self._known = self._read()

    def estimate(self, requests: Sequence[Request]) -> Estimate:
        """What the requests that have no reply yet may cost."""
        return self._estimate(self._missing(requests).values())

    def _estimate(self, missing: Collection[Request]) -> Estimate:
        tokens_in = sum(one.tokens for one in missing)
        tokens_out = sum(one.max_tokens for one in missing)
        cost = (tokens_in * self.config.price_in + tokens_out * self.config.price_out) / 1e6
        return Estimate(len(missing), tokens_in, tokens_out, cost)

    def fetch(self, requests: Sequence[Request]) -> list[Reply | None]:
        """The reply to each request, from the file where it is there; None where all attempts
        failed or the endpoint refuses just that request, which a rerun tries again.

        Raises:
          UserError: the estimate is above what is left of `max_cost`, or the endpoint refuses what
            others would share: a status such as 401, 403 or 404, or eight requests (or all) before
            it answered any.
          RunError: the file cannot be written.
        """
        digests = [self._digest(one) for one in requests]
        missing = self._missing(requests, digests)
        if missing:
            estimate = self._estimate(missing.values())
            self._announce(estimate, len(requests))
            self._cost += estimate.cost
            self._answered |= len(missing) < len(set(digests))
            self._send(list(missing.values()))
        return [self._known.get(digest) for digest in digests]

    def _announce(self, estimate: Estimate, count: int) -> None:
        config = self.config
        priced = f", at most {estimate.cost:.2f}" if config.price_in + config.price_out else ""
        say(
            f"{estimate.requests} of {count} requests to {config.model}: about "
            f"{estimate.tokens_in:,} tokens in, at most {estimate.tokens_out:,} out{priced}"
        )
        if estimate.cost + self._cost > config.max_cost:
            before = f" after {self._cost:.2f} before" if self._cost else ""
            raise UserError(
                f"the requests may cost {estimate.cost:.2f}{before}, above "
                f"--max_cost={config.max_cost:g}"
            )

    def _send(self, requests: Sequence[Request]) -> None:
        failed: list[str] = []
        with (
            concurrent.futures.ThreadPoolExecutor(self.config.workers) as pool,
            Progress(self.config.model, len(requests)) as progress,
        ):
            futures = [pool.submit(self._ask, request, len(requests)) for request in requests]
            try:
                for future in concurrent.futures.as_completed(futures):
                    reason = future.result()
                    failed += [reason] if reason else []
                    progress.advance()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        if failed:
            say(f"{len(failed)} requests got no reply; the last: {failed[-1]}")

    def _ask(self, request: Request, beside: int) -> str:
        """Asks until there is a reply, and files it; else why there is none. beside: requests of
        the same fetch."""
        wait = self.config.first_wait
        for attempt in range(1, self.config.attempts + 1):
            try:
                reply = self._attempt(request)
            except _Refused as error:
                with self._lock:
                    self._refusals += 1
                    shared = not self._answered and self._refusals >= min(beside, _SAME)
                if shared:
                    raise UserError(f"the endpoint refuses the request: {error}") from None
                return str(error)
            except _Failed as error:
                if attempt == self.config.attempts:
                    return f"{error} ({attempt} attempts)"
                asked = wait * self._rng.uniform(0.5, 1.0) if error.wait is None else error.wait
                self._sleep(min(asked, self.config.longest_wait))
                wait = min(2 * wait, self.config.longest_wait)
                continue
            self._keep(request, reply)
            return ""
        raise AssertionError("unreachable: the last attempt returns")

    def _attempt(self, request: Request) -> Reply:
        began = time.monotonic()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sent = urllib.request.Request(
            f"{self.config.url.rstrip('/')}/chat/completions",
            data=json.dumps(request.body(self.config.model)).encode(),
            headers=headers,
            method="POST",
        )
        try:
            with self._opener.open(sent, timeout=self.config.timeout) as response:
                data = self._body(response, began)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise _Failed(f"no reply within {self.config.timeout:g} s") from None
        except urllib.error.URLError as error:
            raise _Failed(self._hidden(f"cannot be reached: {error.reason}")) from None
        except (http.client.HTTPException, OSError) as error:
            raise _Failed(self._hidden(f"the connection broke: {error!r}")) from None
        try:
            return _parsed(json.loads(data))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _Failed("the reply is no chat completion") from None

    def _body(self, response: http.client.HTTPResponse, began: float) -> bytes:
        """What is replied; TimeoutError also where it comes byte by byte for too long."""
        parts = []
        while part := response.read1(_CHUNK):
            parts.append(part)
            if time.monotonic() - began > self.config.timeout:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """The exception of a status; none of them holds more than a short, cleaned text."""
        with error:
            try:
                said = " ".join(error.read(4096).decode(errors="replace").split())[:_SHOWN]
            except OSError:
                said = ""
        reason = self._hidden(f"status {error.code}: {said or error.reason}")
        if error.code in _RETRIED:
            return _Failed(reason, _seconds(error.headers.get("Retry-After")))
        if error.code in _OWN:
            return _Refused(reason)
        return UserError(f"the endpoint refuses the request: {reason}")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    # --- the file of replies

    def _digest(self, request: Request) -> str:
        body = {"url": self.config.url.rstrip("/"), **request.body(self.config.model)}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def _missing(
        self, requests: Sequence[Request], digests: Sequence[str] | None = None
    ) -> dict[str, Request]:
        """Those without a reply by their digests, each once."""
        digests = digests or [self._digest(one) for one in requests]
        by_digest = dict(zip(digests, requests, strict=True))
        return {digest: one for digest, one in by_digest.items() if digest not in self._known}

    def _read(self) -> dict[str, Reply]:
        known: dict[str, Reply] = {}
        if not self._file.exists():
            return known
        text = self._file.read_text(encoding="utf-8")
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):  # replies may hold other characters that end lines
            try:
                row = json.loads(line)
                fields = row["reply"] | {"top": tuple(row["reply"]["top"])}
                known[row["request"]] = Reply(**fields)
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut short: asked for again
        return known

    def _keep(self, request: Request, reply: Reply) -> None:
        digest = self._digest(request)
        row = {"request": digest, "reply": dataclasses.asdict(reply)}
        with self._lock:
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write("\n" * self._torn + json.dumps(row) + "\n")
                    self._torn = False
            except OSError as error:
                raise RunError(f"cannot write {self._file}: {error.strerror}") from error
            self._known[digest], self._answered = reply, True


def _parsed(data: Mapping[str, Any]) -> Reply:
    choice, usage = data["choices"][0], data.get("usage") or {}
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text")
    listed = ((choice.get("logprobs") or {}).get("content")) or []
    return Reply(
        text=text,
        finish=str(choice.get("finish_reason") or "stop"),
        top=tuple(
            {one["token"]: float(one["logprob"]) for one in token.get("top_logprobs") or [token]}
            for token in listed
        ),
        tokens_in=int(usage.get("prompt_tokens") or 0),
        tokens_out=int(usage.get("completion_tokens") or 0),
    )


def _seconds(header: str | None) -> float | None:
    """A Retry-After, which is seconds or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        pass
    else:
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
