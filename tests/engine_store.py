"""An S3-compatible store on loopback for tests: `python engine_store.py <folder>` writes its port to `<folder>/port`
and serves until its standard input closes. While `<folder>/fail` is there, half of the requests get 503 or lose their
answer (the request is carried out, the client hears an error), by a seeded coin."""

import random
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def main(folder: Path, port: int) -> None:
    store = DomainDispatcherApplication(create_backend_app)
    coin = random.Random(0)

    def failing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not (folder / "fail").exists() or coin.random() < 0.5:
            return store(environ, start_response)
        with (folder / "failed").open("a") as failed:
            failed.write("x")
        if coin.random() < 0.5:
            for _ in store(environ, lambda *arguments, **keywords: None):
                pass
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
        return [BUSY]

    server = make_server("127.0.0.1", port, failing, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
