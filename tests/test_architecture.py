"""Who may import whom: the drawing in the architecture note, held by walking the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segcli

PACKAGE = Path(segcli.__file__).parent
EXPORT = PACKAGE.parent / "export"

# From the bottom; a room may use rooms of its own group and of those before it.
GROUPS = (
    {
        "errors",
        "results",
        "machine",
        "in_order",
        "cuda_libraries",
        "urls",
        "own_png",
        "shards",
        "formats",
    },
    {
        "store",
        "hub",
        "registry",
        "strict_yaml",
        "artifact",
        "onnx_file",
        "labels",
        "resize",
        "lettering",
        "palettes",
        "atomic",
        "ownership",
        "array_file",
        "image_bytes",
        "samples",
        "remote",
        "web",
    },
    {
        "storage",
        "object_folder",
        "image_io",
        "preprocess",
        "session",
        "postprocess",
        "fields",
        "pooling",
        "render",
        "coco",
        "document",
        "confidence",
        "annotate",
        "selfcheck",
        "measurements",
        "sample_images",
        "thumbnail",
        "report_figures",
    },
    {
        "model",
        "network",
        "file_lists",
        "inputs",
        "writers",
        "claims",
        "encode",
        "protocol",
        "report",
        "report_page",
    },
    {
        "jobs",
        "reading",
        "pipeline",
        "ray_worker",
        "shared_files",
        "ray_cluster",
        "ray_engine",
        "evaluate",
        "evaluation",
        "comparison",
        "cross_entropy",
        "eval_state",
        "confusion_picture",
        "datasets",
        "class_truth",
        "benchmark",
        "diagnose",
    },
    {"cli"},
)
# Segmentation.overlay() is drawn by render and its classes are counted by postprocess, each
# imported when it is called: the records themselves need no OpenCV.
EXCEPTIONS = {("results", "render"), ("results", "postprocess")}

PURE = (
    "preprocess",
    "postprocess",
    "fields",
    "pooling",
    "render",
    "coco",
    "document",
    "confidence",
    "annotate",
    "lettering",
    "palettes",
    "evaluate",
    "cross_entropy",
    "confusion_picture",
    "thumbnail",
    "report_figures",
)
HEAVY = (
    "numpy",
    "cv2",
    "PIL",
    "onnxruntime",
    "torch",
    "onnx",
    "huggingface_hub",
    "yaml",
    "jinja2",
    "obstore",
)


class Import:
    def __init__(self, module: str, *, lazy: bool, typing: bool) -> None:
        self.module, self.lazy, self.typing = module, lazy, typing

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str | None:
        """The room of segcli that this names, None for other packages and segcli itself."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "segcli" and len(parts) > 1 else None


def imports(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, lazy=lazy, typing=typing) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inner = node.module in ("segcli", "segcli.cli", "segcli.export")
                inner = inner and not alias.name.startswith("__")
                found.append(Import(name if inner else node.module, lazy=lazy, typing=typing))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, lazy, True)
            return
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy, typing)

    visit(ast.parse(path.read_text("utf-8")), False, False)
    return found


def rooms() -> dict[str, list[Path]]:
    files = {p.stem: [p] for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")}
    return {**files, "cli": [PACKAGE / "__main__.py", *sorted((PACKAGE / "cli").glob("*.py"))]}


def own_files() -> list[Path]:
    return [path for paths in rooms().values() for path in paths]


def level(room: str) -> int:
    for i, group in enumerate(GROUPS):
        if room in group:
            return i
    raise AssertionError(f"the room {room!r} is not in the drawing")


def test_every_room_is_drawn_and_every_drawn_room_is_there():
    assert set().union(*GROUPS) == set(rooms())


@pytest.mark.parametrize("room", sorted(set().union(*GROUPS)))
def test_rooms_know_only_rooms_below(room):
    for path in rooms()[room]:
        for found in imports(path):
            other = found.room
            if other in (None, "export", "data") or (room, other) in EXCEPTIONS:
                continue
            assert level(other) <= level(room), f"{path.name} imports {found.module}"


def test_no_circles():
    below: dict[str, set[str]] = {
        room: {
            i.room
            for path in paths
            for i in imports(path)
            if not i.typing and i.room not in (None, "export", "data", room)
            if (room, i.room) not in EXCEPTIONS
        }
        for room, paths in rooms().items()
    }
    while below:
        free = {room for room, others in below.items() if not others & below.keys()}
        assert free, f"these import each other: {sorted(below)}"
        below = {room: others for room, others in below.items() if room not in free}


def test_exception_of_results_is_lazy():
    found = [i for i in imports(PACKAGE / "results.py") if i.room == "render"]
    assert len(found) == 1
    assert found[0].lazy


# precision.py has no session of its own, it uses the converters that ONNX Runtime ships.
@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("onnxruntime", {"session.py", "precision.py"}),
        ("huggingface_hub", {"hub.py"}),
        ("ray", {"ray_cluster.py", "ray_worker.py"}),
        ("obstore", {"remote.py"}),
        ("boto3", {"remote.py"}),
    ],
)
def test_only_importer(package, rooms):
    files = [*own_files(), *EXPORT.glob("*.py")]
    assert {p.name for p in files if any(i.top == package for i in imports(p))} == rooms


def test_precision_uses_no_session_but_ours():
    found = {i.module for i in imports(EXPORT / "precision.py") if i.top == "onnxruntime"}
    assert all(m.startswith(("onnxruntime.quant", "onnxruntime.transformers.")) for m in found)


def test_pillow_decodes_and_resizes():
    users = {p.name for p in own_files() if any(i.top == "PIL" for i in imports(p))}
    assert users == {"image_io.py", "samples.py", "image_bytes.py", "resize.py"}


def test_export_is_imported_by_two_rooms_inside_functions():
    for path in own_files():
        for found in imports(path):
            if found.room == "export":
                assert path in (PACKAGE / "store.py", PACKAGE / "cli" / "export.py")
                assert found.lazy or found.typing, f"{path.name} imports {found.module} on import"


def test_nothing_outside_export_imports_its_packages():
    for path in own_files():
        tops = {i.top for i in imports(path)}
        packages = {"torch", "onnx", "onnxscript", "safetensors", "h5py", "tflite", "transformers"}
        assert not tops & packages, path.name


def test_export_uses_few_rooms():
    allowed = {"artifact", "errors", "session", "labels", "onnx_file", "export"}
    # It compares answers, from the image file on.
    more = {"agreement.py": {"image_io", "preprocess", "postprocess", "storage"}}
    for path in EXPORT.glob("*.py"):
        rooms = {None} | allowed | more.get(path.name, set())
        for found in imports(path):
            assert found.room in rooms, f"{path.name}: {found.module}"


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_use_numpy_and_opencv_only(room):
    for found in imports(PACKAGE / f"{room}.py"):
        allowed = found.top in ("numpy", "cv2", "segcli") or found.top in sys.stdlib_module_names
        assert allowed, f"{room} imports {found.module}"
        assert found.top not in ("os", "pathlib", "io", "sys"), f"{room} has no business with files"


def test_only_the_console_prints_and_only_the_app_exits():
    for path in own_files():
        calls = {
            ast.unparse(n.func)
            for n in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(n, ast.Call)
        }
        if path.name != "console.py":
            assert not calls & {"print", "sys.stdout.write", "sys.stderr.write"}, path.name
        if path.name not in ("app.py", "__main__.py"):
            assert not calls & {"sys.exit", "exit", "os._exit"}, path.name


def test_library_knows_no_command_line():
    for room, paths in rooms().items():
        if room != "cli":
            text = paths[0].read_text("utf-8")
            assert "sys.argv" not in text, room
            assert "isatty" not in text, room
            tops = {i.top for i in imports(paths[0])}
            assert not tops & {"typer", "click", "rich"}, room


def loaded_after(args: list[str], cwd: Path) -> set[str]:
    code = (
        "import sys\nfrom segcli.cli.app import run\n"
        "code = run(sys.argv[1:])\nassert code == 0, code\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, cwd=cwd, check=True, text=True
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["segment", "--help"], ["bench", "--help"]]
)
def test_help_imports_nothing_heavy(args, tmp_path):
    assert not loaded_after(args, tmp_path) & set(HEAVY)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    code = "import segcli, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=tmp_path, check=True, text=True
    )
    assert not set(done.stdout.split()) & {*HEAVY, "typer", "rich"}


def test_segment_runs_without_the_export_extra_and_the_network(tmp_path, picture):
    loaded = loaded_after(["segment", str(picture()), "-o", "out.png"], tmp_path)
    assert "onnxruntime" in loaded
    assert not loaded & {
        *("torch", "onnx", "onnxscript", "safetensors", "h5py", "tflite", "transformers"),
        *("huggingface_hub", "httpx", "requests", "obstore", "boto3", "segcli.export"),
    }
