"""Rows of one shape -> one .npy or .npz file, however many: they wait on disk, not in memory."""

import shutil
from collections.abc import Sequence
from io import BufferedWriter
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Self
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from segcli.atomic import open_atomic
from segcli.errors import InferenceError, OutputError

SUFFIXES = (".npy", ".npz")


class Rows:
    """Collects float32 arrays of one shape; a context manager.

    Args:
        folder: Where they wait, in a file without a name.

    Raises:
        OutputError: There is no place for that file.
    """

    def __init__(self, folder: str) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"cannot write into {folder!r}: {error.strerror}") from error
        self._shape: tuple[int, ...] | None = None
        self.count = 0

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes what waits."""
        self._file.close()

    def add(self, row: npt.NDArray[np.float32]) -> None:
        """Appends one row.

        Raises:
            InferenceError: It has another shape than the first.
            OutputError: It cannot be written.
        """
        self._shape = self._shape or row.shape
        if row.shape != self._shape:
            raise InferenceError(
                f"features of shape {row.shape}, those before have {self._shape}",
                hint="--resize WxH shows the model every image at one size; --pool mean makes "
                "vectors",
            )
        try:
            self._file.write(np.ascontiguousarray(row, np.float32).data)
        except OSError as error:
            raise OutputError(f"cannot keep the features: {error.strerror}") from error
        self.count += 1

    def save(self, path: str, names: Sequence[str]) -> None:
        """Puts the rows into a file: ``.npy`` is the array (N, …), ``.npz`` has names as well.

        Args:
            path: Ends in ``.npy`` or ``.npz``; the latter holds ``embeddings`` and ``paths``.
            names: One per row.

        Raises:
            OutputWriteError: It cannot be written.
        """
        with open_atomic(path) as file:
            out = BufferedWriter(file)
            if path.endswith(".npz"):
                with ZipFile(out, "w") as archive:
                    with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                        self._write(member)
                    with archive.open("paths.npy", "w") as member:
                        npy.write_array(member, np.array(names, np.str_), allow_pickle=False)
            else:
                self._write(out)
            # Not closed: the file takes its name first.
            out.detach()

    def _write(self, out: IO[bytes] | BufferedWriter) -> None:
        header = {
            "descr": npy.dtype_to_descr(np.dtype(np.float32)),
            "fortran_order": False,
            "shape": (self.count, *(self._shape or ())),
        }
        npy.write_array_header_1_0(out, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, out)
