"""An S3 server of the test's own, on loopback; what it holds outlives a stop, as a real one's does."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


@dataclass
class S3Server:
    """`stop` and `start` again as often as wanted, on the same port. Servers of one process share what they hold."""

    port: int = 0
    _server: ThreadedMotoServer | None = field(default=None, repr=False)

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def url(self, path: str = BUCKET) -> str:
        return f"s3://{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def ask(self, what: str, body: str = "") -> None:
        """One of the server's own commands."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/moto-api/{what}", data=body.encode(), method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request).close()

    @property
    def client(self) -> Any:
        """Another library's way to the same objects."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )

    def held(self, prefix: str = "") -> list[str]:
        """Of all objects, without the empty ones that stand for folders."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return sorted(key for key in found if not key.endswith("/"))

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with a bucket, and the environment that gives access to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = S3Server()
        server.start()
        try:
            server.client.create_bucket(Bucket=BUCKET)
            yield server
        finally:
            server.stop()
