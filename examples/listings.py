"""How soon and in how much memory S3 clients list a bucket: python examples/listings.py [KEYS].

Needs ``pip install 'moto[server]' obstore s3fs``, in an environment of their own. The server is
moto on this machine, which answers 1,000 keys at a time; each client is a process of its own.
"""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

BUCKET = "photos"


def obstore() -> Iterator[str]:
    """Pages as they come; what segcli uses."""
    from obstore.store import S3Store

    options = {"client_options": {"allow_http": True}, "virtual_hosted_style_request": False}
    store = S3Store(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], **options)
    for page in store.list("in", chunk_size=1000):
        yield from (entry["path"] for entry in page)


def s3fs_find() -> Iterator[str]:
    """All keys below a folder, held as a whole and cached."""
    from s3fs import S3FileSystem

    yield from S3FileSystem().find(f"{BUCKET}/in")


def s3fs_walk() -> Iterator[str]:
    """Folder by folder, each held as a whole."""
    from s3fs import S3FileSystem

    for folder, _, names in S3FileSystem().walk(f"{BUCKET}/in"):
        yield from (f"{folder}/{name}" for name in names)


def boto3() -> Iterator[str]:
    """Pages as they come."""
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=BUCKET, Prefix="in/"):
        yield from (entry["Key"] for entry in page["Contents"])


CLIENTS: dict[str, Callable[[], Iterator[str]]] = {
    "obstore list": obstore,
    "s3fs find": s3fs_find,
    "s3fs walk": s3fs_walk,
    "boto3 paginator": boto3,
}


def measure(client: str, count: int) -> None:
    """Lists the bucket with one client and prints its line of the table."""
    package = client.split()[0]
    started = time.perf_counter()
    keys = CLIENTS[client]()
    next(keys)
    first = time.perf_counter() - started
    found = 1 + sum(1 for _ in keys)
    total = time.perf_counter() - started
    if found != count:
        raise SystemExit(f"{client}: {found} keys, expected {count}")
    # Of this program alone; what getrusage returns begins with the parent's.
    peak = int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    line = f"{client:16} {version(package):>10} {first:9.2f} s {total:7.1f} s {peak:6.0f} MB"
    sys.stdout.write(line + "\n")


def main(count: int) -> None:
    """Serves a bucket of small objects, and lets each client list it."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Put in place without the network: that would take minutes.
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    # In as many subfolders as photos have that come by day.
    for i in range(count):
        backend.put_object(BUCKET, f"in/{i // 1000:04}/{i:06}.jpg", b"x")
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    sys.stdout.write(f"{f'{count} keys':16}    version   first key  all keys      peak\n")
    sys.stdout.flush()
    try:
        for client in CLIENTS:
            command = [sys.executable, __file__, client, str(count)]
            subprocess.run(command, env=environment, check=True)
    finally:
        server.stop()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 100_000)
