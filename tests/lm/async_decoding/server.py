# SPDX-License-Identifier: Apache-2.0
"""A chat endpoint on this machine that does as a test tells it."""

import contextlib
import http.server
import json
import threading
import time


class Server:
    """Answers with `reply(body) -> text`, after the `script`: per request a status, "hang", "drop",
    "garbage", "trickle", or (status, headers). Keeps what it was asked."""

    def __init__(self, reply=lambda body: "yes", script=(), top=None):
        self.reply, self.script, self.top = reply, list(script), top
        self.bodies, self.headers = [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                with contextlib.suppress(OSError):  # whoever asked has gone
                    outer._serve(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            todo = self.script.pop(0) if self.script else 200
        status, headers = todo if isinstance(todo, tuple) else (todo, {})
        if status == "hang":
            time.sleep(1.0)
            status = 200
        if status == "drop":
            handler.close_connection = True
            handler.connection.close()
            return
        if status == "trickle":
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            for _ in range(20):
                time.sleep(0.05)
                handler.wfile.write(b" ")
            return
        sent = b"<html>not JSON" if status == "garbage" else self._content(status, body, handler)
        handler.send_response(200 if status == "garbage" else status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)

    def _content(self, status, body, handler):
        if status != 200:
            said = f"no, and your key {handler.headers.get('Authorization')} is known"
            return json.dumps({"error": said}).encode()
        choice = {"message": {"role": "assistant", "content": self.reply(body)},
                  "finish_reason": "stop"}  # fmt: skip
        if self.top is not None:
            listed = [{"token": t, "logprob": p} for t, p in self.top(body).items()]
            choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
        usage = {"prompt_tokens": 5, "completion_tokens": 1}
        return json.dumps({"choices": [choice], "usage": usage}).encode()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
