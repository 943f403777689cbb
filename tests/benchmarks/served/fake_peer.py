"""A peer's program for tests: takes a peer's options, and answers a text with itself in capitals.

The environment can make it fail: FAKE_PEER names a directory; with a file "taken" in it, the port "is in use", once;
with a file "broken" it always ends with an error, with a file "stubborn" it does not end when it is asked to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PAGE = """\
# TYPE mosec_service_batch_size histogram
mosec_service_batch_size_bucket{le="+Inf",stage="a"} %(requests)d
mosec_service_batch_size_count{stage="a"} %(requests)d
mosec_service_batch_size_sum{stage="a"} %(requests)d
# TYPE mosec_service_throughput counter
mosec_service_throughput_total{code="200"} %(requests)d
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests = 0

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["text"]
        Handler.requests += 1
        self._answer(json.dumps({"text": text.upper()}).encode())

    def do_GET(self) -> None:
        self._answer((_PAGE % {"requests": Handler.requests}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    address, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--address", "--port"))
    if "FAKE_PEER" in os.environ:
        directory = Path(os.environ["FAKE_PEER"])
        if (directory / "taken").exists():
            (directory / "taken").unlink()
            sys.exit(f"{address}:{port} is in use")
        if (directory / "broken").exists():
            sys.exit("no such model")
        if (directory / "stubborn").exists():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ThreadingHTTPServer((address, int(port)), Handler) as server:
        server.daemon_threads = True
        server.serve_forever()


if __name__ == "__main__":
    main()
