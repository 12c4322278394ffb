"""What a caller can catch: one base class, and one subclass for each thing the user can do about it."""


class FlashHeadError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one sentence: the thing, what was found, what was expected, what to do next.
    """

    exit_code = 1


class CheckpointError(FlashHeadError):
    """A model folder, a weight file or an index cannot be used as it is: restore it or convert again."""

    exit_code = 2


class UnsupportedModelError(FlashHeadError):
    """The model has no output head that FlashHead can replace: choose another model."""

    exit_code = 2


class SettingsError(FlashHeadError, ValueError):
    """A setting, a prompt or a text is out of range: call again with another value."""

    exit_code = 2


class DeviceError(FlashHeadError):
    """A device, its driver or its memory does not allow what was asked: use another device."""


class ExportError(FlashHeadError):
    """A checkpoint cannot be expressed in the format asked for: choose another format or setting."""


class EngineError(FlashHeadError):
    """A runtime (vLLM, TensorRT, ONNX Runtime) refused or failed: see its message for the versions that work."""


# What a chat template raises beside jinja2's own errors: it is the model's code, and its faults are not ours.
TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next((line.strip().rstrip(":.") for line in str(error).splitlines() if line.strip()), type(error).__name__)
