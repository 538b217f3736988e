"""Runs that are interrupted at any moment, and resumed."""

import contextlib
import io
import random
import signal
import subprocess
import time
from collections import Counter
from typing import NamedTuple

import pytest
from PIL import Image

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: 137}
SAID = (b"", b"segcli: interrupted\n", b"segcli: terminated\n")


class Size(NamedTuple):
    interruptions: int
    images: int


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(Size(10, 40), id="few"),
        pytest.param(Size(200, 600), id="many", marks=pytest.mark.slow_chaos),
    ],
)
def test_any_interruption_can_be_resumed(
    size, start, tree, tiny_model, contents, parts, takes_over, shell_code
):
    rng = random.Random(size.interruptions)
    run = ("segment", tree(size.images), "-r", "-m", tiny_model(), "-q")
    began = time.monotonic()
    assert start(*run, "-o", "calm", stdout=subprocess.DEVNULL).wait(timeout=120) == 0
    seconds = time.monotonic() - began
    calm = contents("calm")
    assert len(calm) == size.images
    for data in calm.values():
        Image.open(io.BytesIO(data)).load()

    seen: Counter[tuple[str, int]] = Counter()
    finished, wrong = 0, []
    while seen.total() < size.interruptions:
        number, torn = seen.total(), f"torn{finished}"
        before = parts(torn)
        sent = list(CODES)[number % 3]
        process = start(*run, "-o", torn, "--skip-existing", "--workers", rng.choice((1, 2, 5)))
        if number % 2:
            # Among the images, where most of a short run is its start.
            for _ in range(rng.randint(1, size.images // 4)):
                process.stdout.readline()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0, seconds))
        started, ended = takes_over(process), process.poll() is not None
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        code = shell_code(process.returncode)
        if not ended:
            seen[sent.name, process.returncode] += 1
        # A run may end before the signal meets it; and Ctrl-C may meet Python before it has come
        # to the first line of segcli.
        early = {1} if sent == signal.SIGINT and not started else set()
        if code not in {0, CODES[sent], *early} or (started and err not in SAID):
            wrong.append((sent.name, process.returncode, err.decode()[-2000:]))

        visible = contents(torn)
        assert visible.items() <= calm.items()
        if sent != signal.SIGKILL:
            assert set(parts(torn)) <= set(before)
        if code == 0:
            assert visible == calm
            assert not parts(torn)
            finished += 1
    assert not wrong
    print(f"{seen.total()} interruptions, {finished} runs completed: {dict(seen)}")

    assert start(*run, "-o", torn, "--skip-existing", stdout=subprocess.DEVNULL).wait(120) == 0
    assert contents(torn) == calm
    assert not parts(".")
