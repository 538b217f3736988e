"""URLs as inputs and outputs, against servers of their own on this machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest
from PIL import Image

NAMES = [
    "a.png",
    "a b%20c.png",
    "b#1?x=y&z.jpg",
    "sub/a.png",
    "sub/deep er/é+ü.jpg",
    "sub-/[0]{1}.png",
]
HIDDEN = [".h.png", ".git/a.png", "sub/.x/a.png", "notes.txt"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def seg(segcli, tiny_model):
    model = tiny_model()
    return lambda *args, **more: segcli("segment", "-m", model, *args, **more)


@pytest.fixture
def tree(bucket):
    """The same images in in/ of this folder and of the bucket; returns the bucket."""
    for i, name in enumerate([*NAMES, *HIDDEN]):
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.effect_noise((8 + i, 6), 90).convert("RGB")
        image.save(path, "JPEG" if name.endswith(".jpg") else "PNG")
        bucket.put(f"in/{name}", path.read_bytes())
    return bucket


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def files(folder):
    paths = (p for p in Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def objects(bucket, prefix):
    keys = (key for key in bucket.list() if key.startswith(prefix))
    return {key.removeprefix(prefix): bucket.get(key) for key in keys}


@pytest.mark.parametrize("recursive", [["-r"], []])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_bucket_is_a_folder(seg, tree, recursive, slash):
    args = (*recursive, "-f", "mask", "-f", "overlay", "-f", "json", "--jsonl", "--no-timing")
    local = seg("in", *args, "-o", "out")
    remote = seg(f"{tree.url}/in{slash}", *args, "-o", f"{tree.url}/out{slash}")
    assert (local.code, remote.code) == (0, 0)
    assert remote.out.replace(f"{tree.url}/", "") == local.out
    assert len(records(local.out)) == (len(NAMES) if recursive else 3)
    assert objects(tree, "out/") == files("out")


def test_either_side_may_be_local(seg, tree):
    assert seg("in", "-r", "-o", "out").code == 0
    assert seg("in", "-r", "-o", tree.url + "/up").code == 0
    ran = seg(tree.url + "/in/", "-r", "-o", "down")
    assert ran.out.splitlines() == [
        f"down/{Path(name).with_suffix('.png')}" for name in sorted(NAMES, key=str.encode)
    ]
    assert objects(tree, "up/") == files("down") == files("out")


def test_one_object(seg, tree, segcli_process, tiny_model):
    source = f"{tree.url}/in/b#1?x=y&z.jpg"
    assert seg(source).out == "b#1?x=y&z.mask.png\n"
    assert seg(source, "-o", tree.url + "/one.png").out == f"{tree.url}/one.png\n"
    assert tree.get("one.png") == Path("b#1?x=y&z.mask.png").read_bytes()
    done = segcli_process("segment", "-m", str(tiny_model()), source, "-o", "-")
    assert done.stdout == tree.get("one.png")


def test_a_list_and_its_root(seg, tree):
    lines = [f"{tree.url}/in/{name}" for name in NAMES] + [Path("in/a.png").absolute().as_uri()]
    Path("list").write_text("\n".join(lines))
    args = ("--files-from", "list", "--jsonl", "--no-timing")
    ran = seg(*args, "--root", tree.url + "/in", "-o", "out/")
    assert [r["status"] for r in records(ran.out)] == ["ok"] * len(NAMES) + ["error"]
    assert sorted(files("out")) == sorted(str(Path(n).with_suffix(".png")) for n in NAMES)
    # Without a root a name is all that is left, so that two collide.
    found = records(seg(*args, "-o", "flat/").out)
    assert [r["error"]["code"] for r in found if r["status"] == "error"] == ["collision"] * 2


def test_a_list_does_not_write_over_what_it_may_name_later(seg, tree):
    photo = tree.get("in/a.png")
    tree.put("in/a.jpg", tree.get("in/sub/deep er/é+ü.jpg"))
    listing = f"{tree.url}/in/a.jpg\n{tree.url}/in/a.png\n".encode()
    ran = seg("--files-from", "-", "-o", f"{tree.url}/in/", "--jsonl", stdin=listing)
    assert records(ran.out)[0]["error"]["code"] == "write"
    assert tree.get("in/a.png") == photo
    for _ in range(2):
        ran = seg("--files-from", "-", "-o", f"{tree.url}/out/", stdin=listing.partition(b"\n")[0])
        assert ran.code == 0, ran.err


def test_skip_existing_resumes(seg, tree):
    args = (f"{tree.url}/in/", "-r", "-o", f"{tree.url}/out/", "--jsonl", "--skip-existing")
    tree.put("out/a.png", b"kept")
    tree.put("out/sub/a.png", b"kept")
    found = {r["path"].removeprefix(tree.url): r["status"] for r in records(seg(*args).out)}
    assert [n for n, s in found.items() if s == "skipped"] == ["/in/a.png", "/in/sub/a.png"]
    assert set(found.values()) == {"ok", "skipped"}
    assert tree.get("out/a.png") == b"kept"
    assert {r["status"] for r in records(seg(*args).out)} == {"skipped"}


def test_no_clobber_leaves_what_is_there(seg, tree):
    tree.put("out/a.png", b"kept")
    ran = seg(tree.url + "/in/", "-o", tree.url + "/out/", "--jsonl", "--no-clobber")
    found = {Path(r["path"]).name: r for r in records(ran.out)}
    assert ran.code == 1
    assert found["a.png"]["error"]["code"] == "exists"
    assert [r["status"] for r in found.values()].count("ok") == 2
    assert tree.get("out/a.png") == b"kept"


def test_bad_objects_are_records(seg, tree, check_record):
    tree.put("in/b#1?x=y&z.jpg", tree.get("in/b#1?x=y&z.jpg")[:-20])
    args = (f"{tree.url}/in/none.jpg", f"{tree.url}/in/b#1?x=y&z.jpg", f"{tree.url}/in/a.png")
    ran = seg(*args, "-o", "out/", "--jsonl")
    found = records(ran.out)
    for record in found:
        check_record(record)
    assert ran.code == 1
    assert [r.get("error", {}).get("code") for r in found] == ["missing", "decode", None]
    assert "no such object" in found[0]["error"]["message"]


def test_the_input_is_not_the_output(seg, tree):
    before = objects(tree, "")
    for output in ("in", "in/"):
        ran = seg(tree.url + "/in/", "-r", "-o", f"{tree.url}/{output}")
        assert (ran.code, "is the input folder" in ran.err) == (2, True)
    ran = seg(f"{tree.url}/in/a.png", "-o", tree.url + "/in/a.png")
    assert (ran.code, "is the input" in ran.err) == (2, True)
    # Below the output folder, and listed only after what would be written over it.
    Image.new("RGB", (4, 4)).save("x.png")
    tree.put("o/i/z.png", Path("x.png").read_bytes())
    tree.put("o/i/i/z.jpg", Path("x.png").read_bytes())
    before |= {f"o/i/{n}": Path("x.png").read_bytes() for n in ("z.png", "i/z.jpg")}
    ran = seg(tree.url + "/o/i/", "-r", "-o", tree.url + "/o/", "--jsonl")
    assert [r.get("error", {}).get("code") for r in records(ran.out)] == ["write", None]
    assert objects(tree, "").items() >= before.items()
    assert set(objects(tree, "")) - set(before) == {"o/z.png"}


def test_the_output_below_the_input_is_left_out(seg, tree):
    args = (tree.url + "/in/", "-r", "-o", tree.url + "/in/out", "-f", "mask", "-f", "overlay")
    first = seg(*args)
    assert seg(*args).out == first.out
    assert first.out.count("\n") == 2 * len(NAMES)


def test_equal_stems_collide(seg, tree):
    tree.put("in/a.jpg", Path("in/a.png").read_bytes())
    ran = seg(tree.url + "/in/", "-o", "out", "--jsonl")
    assert [r.get("error", {}).get("code") for r in records(ran.out)][:3] == [
        None,
        None,
        "collision",
    ]
    # Named one by one they stop the run, as files do.
    ran = seg(tree.url + "/in/a.jpg", tree.url + "/in/a.png", "-o", "out")
    assert (ran.code, "would both write 'out/a.png'" in ran.err) == (2, True)


def test_the_same_object_is_processed_once(seg, tree):
    ran = seg(f"{tree.url}/in/a.png", f"{tree.url}/in/", f"{tree.url}/in/a.png", "-o", "out")
    assert ran.out.count("out/a.png\n") == 1


def test_dry_run(seg, tree):
    tree.put("out/a.png", b"")
    args = (tree.url + "/in/", "-o", tree.url + "/out/", "--skip-existing")
    planned = seg(*args, "-n").out.splitlines()
    assert f"{tree.url}/in/a b%20c.png -> {tree.url}/out/a b%20c.png" in planned
    assert set(objects(tree, "out/")) == {"a.png"}
    assert [line.split(" -> ")[1] for line in planned] == seg(*args).out.splitlines()
    ran = seg(f"{tree.url}/in/a.png", f"{tree.url}/none.png", "-o", "out/", "-n")
    assert (ran.code, ran.out.count("->"), "none.png" in ran.err) == (1, 1, True)


def test_classify(segcli, tiny_model, tree):
    model = tiny_model("c.onnx", task="classification", palette=())
    local = segcli("classify", "-m", model, "in", "-r")
    remote = segcli("classify", "-m", model, tree.url + "/in", "-r")
    assert remote.code == 0
    assert remote.out.replace(tree.url + "/", "") == local.out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["{}-not/in/", "-o", "out"], 2, "cannot list 's3://.*-not/in/': no such bucket"),
        (["{}/none/", "-o", "out"], 2, "holds no image"),
        (["{}/none.jpg", "-o", "out"], 2, "no such file or folder: 's3://.*/none.jpg'"),
        (["{}empty", "-o", "out"], 2, "cannot list 's3://.*empty/': no such bucket"),
        (["in/a.png", "-o", "az://box/out/"], 2, "nothing is written to az://\nhint: s3:// and gs"),
        (["in/a.png", "-o", "file:///%00/"], 2, "is no file name"),
        (["{}/in/", "-o", "S3{}/in/"], 2, "is the input folder"),
        (["ftp://host/a.jpg", "-o", "out"], 2, "no such file .*\nhint: of URLs, s3, gs"),
        (["{}", "-o", "out"], 2, "its subfolders do\nhint: -r"),
        (["{}/in/"], 2, "needs -o"),
        (["{}/in/", "-o", "x.png"], 2, "takes one image"),
        (["in/a.png", "-o", "{}-not/"], 5, "cannot write 's3://.*-not/a.png': no such bucket"),
        (["in/a.png", "-o", "https://host/out/"], 2, "is a web address, which is only read"),
        (["in/a.png", "-o", "{}//out/"], 2, "cannot be written: its key has an empty part"),
        (["in/a.png", "-o", "{}/x.jpg"], 2, "mask cannot be written to"),
        (["in/a.png", "-o", "o/", "--report", "{}/r.html"], 2, "--report '.*' is a URL"),
        (["in/a.png", "-o", "o/", "-m", "{}/m.onnx"], 2, "-m '.*' is a URL"),
        (["--files-from", "{}/list", "-o", "o/"], 2, "the list .* is a URL, expected a file"),
        (["file://host/a.png", "-o", "o/"], 2, "names another host"),
    ],
)
def test_what_cannot_be(segcli, tiny_model, tree, args, code, message):
    model = [] if "-m" in args else ["-m", tiny_model()]
    args = [arg.format(tree.url).replace("S3s3", "S3") for arg in args]
    ran = segcli("segment", *model, *args)
    assert ran.code == code
    assert re.search(message, ran.err), ran.err
    assert len([line for line in ran.err.splitlines() if "error:" in line]) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [["eval", "--truth", "in"], ["bench"]])
def test_commands_that_read_files_say_so(segcli, tree, command):
    ran = segcli(*command, tree.url + "/in/")
    assert (ran.code, "is a URL, and this command reads files" in ran.err) == (2, True)


def test_refused_credentials(seg, tree, http_server, monkeypatch):
    body = b"<Error><Code>SignatureDoesNotMatch</Code><Message>Check it</Message></Error>"
    server = http_server(lambda method, path: (403, body))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    other = tree.url + "-other"
    for args, code in (
        ([other + "/in/", "-o", "out"], 2),
        (["in/a.png", "-o", other + "/out/"], 5),
    ):
        ran = seg(*args)
        assert ran.code == code
        assert "403 Forbidden, SignatureDoesNotMatch (Check it)" in ran.err
        assert "hint: set AWS_ACCESS_KEY_ID" in ran.err
        assert len(ran.err.splitlines()) == 2


def test_a_dead_endpoint_ends_soon(seg, tree, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    ran = seg(tree.url + "-other/in/", "-o", "out")
    assert (ran.code, "no answer from http://127.0.0.1:1" in ran.err) == (2, True)
    ran = seg("in/a.png", "in/sub/a.png", "-o", tree.url + "-other/x.png")
    assert ran.code == 2
    ran = seg("in/a.png", "-o", tree.url + "-other/x.png", "--jsonl")
    assert (ran.code, records(ran.out)[0]["error"]["code"]) == (1, "write")
    assert time.monotonic() - start < 30


def test_without_the_extra(seg, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    for args in (["s3://new/in/", "-o", "out"], [picture(), "-o", "s3://new/out/"]):
        ran = seg(*args)
        assert ran.code == 2
        assert "needs object storage support\nhint: pip install 'segcli[remote]'\n" in ran.err
        assert len(ran.err.splitlines()) == 2


def test_file_urls_are_paths(seg, picture, tmp_path):
    picture("in/a b.png")
    ran = seg((tmp_path / "in").as_uri(), "-o", (tmp_path / "o ut").as_uri() + "/", "--jsonl")
    (record,) = records(ran.out)
    assert record["path"] == str(tmp_path / "in" / "a b.png")
    assert record["outputs"] == [str(tmp_path / "o ut") + "/a b.png"]
    assert Path("o ut/a b.png").is_file()


def test_file_urls_of_single_files(seg, picture, tmp_path):
    picture("in.png")
    page = (tmp_path / "r e.html").as_uri()
    assert seg("in.png", "-o", "o/", "--report", page).code == 0
    assert Path("r e.html").is_file()
    ran = seg("in.png", "-o", "o/", "--report", "file://host/r.html")
    assert (ran.code, "names another host" in ran.err) == (2, True)


def test_an_empty_bucket_holds_no_image(seg, bucket):
    for url in (bucket.url, bucket.url + "/"):
        ran = seg(url, "-o", "out")
        assert (ran.code, "holds no image" in ran.err) == (2, True)


def test_a_listing_that_fails_late_leaves_its_report(seg, tree):
    tree.put("in/zz//a.png", b"")
    # The first page is worked on before the second is asked for.
    for i in range(1000):
        tree.put(f"in/n{i:04}.txt", b"")
    ran = seg(f"{tree.url}/in/", "-o", "out", "--report", "r.html", "--jsonl")
    assert ran.code == 2
    assert "it holds the key 'in/zz//a.png'" in ran.err
    assert len(records(ran.out)) == 3
    page = Path("r.html").read_text("utf-8")
    assert "in/a.png" in page
    assert "Ended early" in page


def test_a_list_by_file_url_and_odd_entries(seg, tree, tmp_path):
    lines = [
        "http://127.0.0.1:1/%00.jpg",
        "s3://",
        f"{tree.url}/in/a//b.png",
        f"{tree.url}/in/a.png",
    ]
    Path("list").write_text("\n".join(lines))
    args = ("--files-from", (tmp_path / "list").as_uri(), "-o", "out/")
    ran = seg(*args, "--jsonl")
    assert ran.code == 1
    codes = [record.get("error", {}).get("code") for record in records(ran.out)]
    assert codes == ["missing", "missing", "missing", None]
    planned = seg(*args, "--dry-run")
    assert planned.code == 1
    assert planned.out == f"{tree.url}/in/a.png -> out/a.png\n"
    assert planned.err.count("error:") == 3


def test_folders_in_a_list_are_missing(seg, tree):
    urls = [tree.url, f"{tree.url}/in/"]
    ran = seg("--files-from", "-", "-o", "out/", "--jsonl", stdin="\n".join(urls).encode())
    assert ran.code == 1
    for record in records(ran.out):
        assert record["error"]["code"] == "missing"
        assert "it is a folder" in record["error"]["message"]


def test_web_addresses(seg, http_server, picture):
    data = picture().read_bytes()

    def answer(method, path):
        return (200, data) if path.startswith("/p/a%20b.png") else (404, b"")

    server = http_server(answer)
    signed = f"{server.url}/p/a%20b.png?X-Signature=q%2Fsecret"
    ran = seg(signed, f"{server.url}/none.png", "-o", "out", "--jsonl")
    found = records(ran.out)
    assert [r.get("error", {}).get("code") for r in found] == [None, "missing"]
    assert found[0]["outputs"] == ["out/a b.png"]
    assert "404" in found[1]["error"]["message"]
    assert "GET /p/a%20b.png?X-Signature=q%2Fsecret" in server.asked
    # Below a root, too.
    Path("list").write_text(signed)
    seg("--files-from", "list", "--root", server.url, "-o", "tree")
    assert files("tree") == {"p/a b.png": files("out")["a b.png"]}


# A listing as long as a data set


def listing_server(http_server, keys, image, pause_s=0.0):
    """Starts a server of one bucket whose objects are all the same image."""
    places = {key: i for i, key in enumerate(keys)}

    def answer(method, path):
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if "list-type" not in query:
            return 200, image
        time.sleep(pause_s)
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        start = places[after] + 1 if after else 0
        page = keys[start : start + 1000]
        more = start + 1000 < len(keys)
        body = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(image)}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        return 200, (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}"
            "</ListBucketResult>"
        ).encode()

    return http_server(answer)


def test_work_starts_while_the_listing_goes_on(
    http_server, monkeypatch, bucket, picture, tiny_model, command
):
    keys = [f"in/{i:06}.jpg" for i in range(10_000)]
    server = listing_server(http_server, keys, picture().read_bytes(), pause_s=0.3)
    model = tiny_model("c.onnx", task="classification", palette=())
    with subprocess.Popen(
        [*command, "classify", "-m", str(model), "-k1", f"{bucket.url}-long/in/"],
        env={**os.environ, "AWS_ENDPOINT_URL": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        pages = sum("list-type" in asked for asked in server.asked)
        process.kill()
    assert first.startswith(f"{bucket.url}-long/in/000000.jpg\t".encode())
    # One page to see that there is an image, and few of the ten ahead of the first answer.
    assert pages <= 4


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_thousand_keys(
    http_server, monkeypatch, bucket, picture, tiny_model, command
):
    """Between the 20,000th and the last record, while the listing goes on."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc")
    keys = [f"in/{i:06}.jpg" for i in range(100_000)]
    server = listing_server(http_server, keys, picture().read_bytes())
    args = ("segment", "-m", str(tiny_model()), f"{bucket.url}-long/in/", "-o", "x/", "-n")
    with subprocess.Popen(
        [*command, *args],
        env={**os.environ, "AWS_ENDPOINT_URL": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        used_kb = []
        for i, _ in enumerate(process.stdout):
            if i in (20_000, 99_000):
                status = Path(f"/proc/{process.pid}/status").read_text()
                used_kb.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))
    assert (process.returncode, i + 1) == (0, 100_000)
    print(f"memory: {used_kb[0] / 1024:.1f} MB, 79,000 images later {used_kb[1] / 1024:.1f} MB")
    assert used_kb[1] - used_kb[0] < 4 * 1024
