"""Every error that segcli raises on purpose, and the process exit code each one means.

The one boundary in ``segcli.cli.app`` turns these into one line on stderr; the pipeline turns the
per-image branch into error records instead. Nothing else maps exceptions to exit codes.

    SegcliError
    |-- UsageError              2   flags, combinations, name collisions, no image found
    |-- ModelError              3
    |   |-- RegistryError           models.yaml says something that cannot be
    |   |-- ModelNotFound           unknown name, missing file, not on this machine
    |   |-- ArtifactError           an .onnx that is damaged or does not describe itself
    |   |-- CheckpointError         weights or config.json that cannot be honoured
    |   |-- DownloadError           the hub did not give the file
    |   `-- ExportError             tracing failed, or its result does not match the reference
    |-- DeviceError             4   provider not active, session does not start
    |-- OutputError             5   the output place cannot be written at all
    `-- ImageError              1   one image failed, the run goes on
        |-- ImageMissing            record code "missing"
        |   `-- ImageNotFound           the same
        |-- ImageDecodeError        record code "decode"
        |-- ImageTooLarge           record code "too_large"
        |-- InferenceError          record code "inference"
        |-- TruthError              record code "truth"
        |-- OutputExists            record code "exists"
        |-- OutputCollision         record code "collision"
        `-- OutputWriteError        record code "write"
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process exit status means; shown in every command's help."""

    OK = 0
    SOME_FAILED = 1
    USAGE = 2
    MODEL = 3
    DEVICE = 4
    OUTPUT = 5
    BUG = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class SegcliError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: One sentence, lower-case start, no full stop: what failed, on what, the value
            seen, what was expected.
        hint: What to do about it, or None.
    """

    exit_code = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(SegcliError):
    """The command line asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class ModelError(SegcliError):
    """The model is unknown, missing, damaged, not to be fetched, or its export failed."""

    exit_code = ExitCode.MODEL


class RegistryError(ModelError):
    """A registry file cannot be read or an entry in it is wrong."""


class ModelNotFound(ModelError):
    """No such model, or it is not on this machine and may not be fetched."""


class ArtifactError(ModelError):
    """An .onnx file that is damaged, uses external data, or carries no usable ModelCard."""


class CheckpointError(ModelError):
    """Weights or a config.json that cannot be honoured as they are."""


class DownloadError(ModelError):
    """The hub did not give the file."""


class ExportError(ModelError):
    """Tracing failed, or the graph does not reproduce the PyTorch reference."""


class DeviceError(SegcliError):
    """The provider asked for is not active, or the session does not start."""

    exit_code = ExitCode.DEVICE


class OutputError(SegcliError):
    """The output place cannot be written at all."""

    exit_code = ExitCode.OUTPUT


class ImageError(SegcliError):
    """One image failed; the run goes on.

    Attributes:
        code: The stable identifier in the record's ``error.code``.
    """

    exit_code = ExitCode.SOME_FAILED
    code = "error"


class ImageMissing(ImageError):
    """The path does not exist or cannot be read."""

    code = "missing"


class ImageNotFound(ImageMissing):
    """The path does not exist."""


class ImageDecodeError(ImageError):
    """The bytes are not a complete image of a supported format."""

    code = "decode"


class ImageTooLarge(ImageError):
    """The image exceeds the pixel limit."""

    code = "too_large"


class InferenceError(ImageError):
    """The session failed on this image."""

    code = "inference"


class TruthError(ImageError):
    """What an image is to be compared with is missing, unreadable, or of another label set."""

    code = "truth"


class OutputExists(ImageError):
    """The output exists and may not be replaced."""

    code = "exists"


class OutputCollision(ImageError):
    """This run has already written the file that this image would write."""

    code = "collision"


class OutputWriteError(ImageError):
    """This image's output could not be written."""

    code = "write"


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether Python, NumPy or OpenCV could not get memory."""
    # OpenCV raises one class for all its errors.
    return isinstance(error, MemoryError) or "Insufficient memory" in str(error)
