"""An S3-compatible server on loopback that counts the requests it gets."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

BUCKET = "bucket"


class S3Server:
    """Use as a context manager: a server with an empty bucket `BUCKET`, whose files live in this process's memory.

    `environment` is what a process needs to find it by `s3://bucket/...`; `requests` counts by kind: GET, HEAD, PUT,
    POST (a multipart upload is two of them and a PUT), DELETE and LIST. `refuse` makes it answer as an overloaded store
    does.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        """By kind and path, for those who look for what to save."""
        self.num_refused = 0
        """Requests that are still to be refused."""
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server("127.0.0.1", 0, self._count, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __enter__(self) -> S3Server:
        self._thread.start()
        # What moto holds belongs to the process: a server before this one has left its files.
        place = self.environment["AWS_ENDPOINT_URL"]
        urllib.request.urlopen(urllib.request.Request(f"{place}/moto-api/reset", method="POST")).close()
        self.filesystem().create_dir(BUCKET)
        self.reset()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def filesystem(self) -> fs.S3FileSystem:
        """For the test itself, whatever its environment is."""
        return fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            region="us-east-1",
            scheme="http",
            endpoint_override=f"127.0.0.1:{self._server.port}",
            allow_bucket_creation=True,
        )

    def uri(self, path: str) -> str:
        """A URI that needs no environment."""
        place = f"127.0.0.1:{self._server.port}"
        return f"s3://key:secret@{BUCKET}/{path}?endpoint_override={place}&scheme=http&region=us-east-1"

    def refuse(self, count: int) -> None:
        """Answers the next `count` requests with 503, slow down."""
        with self._lock:
            self.num_refused = count

    def reset(self) -> None:
        with self._lock:
            self.requests.clear()
            self.paths.clear()

    def _count(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        kind = environ["REQUEST_METHOD"]
        if kind == "GET" and "list-type" in environ.get("QUERY_STRING", ""):
            kind = "LIST"
        with self._lock:
            self.requests[kind] += 1
            self.paths[f"{kind} {environ['PATH_INFO']}"] += 1
            is_refused = self.num_refused > 0
            self.num_refused -= is_refused
        if is_refused:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self._app(environ, start_response)
