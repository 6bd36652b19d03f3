"""Every error that a user can trigger, and the catalogue that ``fewbit explain`` prints.

A message is one sentence with the cause, the value and what is allowed, and ends in the id of its
class: two errors share a class when the same thing mends both. The first line of a class's
docstring says what happened, the rest is the fix; the first digit of an id is the family, whose own
class (FB100, FB200, ...) is raised where no finer one fits. An id is never given to something else.

The command line turns ``exit_code`` into the process's exit status: 2 wrong use, 3 stopped but
resumable, 4 not supported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator


class FewbitError(Exception):
    """Base class; never raised itself."""

    id = ""
    exit_code = 2

    @property
    def message(self) -> str:
        """The sentence without its id, to put into another sentence."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message} [{self.id}]"


# --- FB1xx: wrong use -----------------------------------------------------------------------------


class UsageError(FewbitError, ValueError):
    """An argument has a value that is not allowed.

    Use one of the values that the message allows. The operators of ``fewbit.ops`` say the same as
    a plain ValueError with this id.
    """

    id = "FB100"


class AlreadyQuantizedError(UsageError):
    """The model was quantised or rotated before, and doing it again would build on rounded weights.

    Start from the float model. ``fewbit.restore_(model)`` brings it back in the process that
    quantised it with keep_float=True; ``fewbit convert`` changes the format of a directory.
    """

    id = "FB101"


class NotQuantizedError(UsageError):
    """A quantised model is needed, and this one is float.

    Call ``fewbit.quantize_`` or ``fewbit quantize`` first, and pass what it made. After
    ``restore_``, or with keep_float=False, there is nothing left to undo.
    """

    id = "FB102"


class OutputError(UsageError):
    """The output exists, is not writable, or is the input: writing there could destroy a model.

    Choose a new directory, in a place where you may write.
    """

    id = "FB103"


class NonFiniteError(UsageError):
    """A weight holds NaN or infinity, so that no grid fits it.

    The file is usually damaged: load it again and compare its checksum. A model that overflowed in
    float16 has to be converted again from its bfloat16 or float32 original.
    """

    id = "FB104"


# --- FB2xx: calibration and evaluation text -------------------------------------------------------


class CalibrationError(FewbitError, ValueError):
    """Calibration or evaluation got something that is not text or token ids.

    Pass a string, a list of strings, the path of a UTF-8 text file, a list of token ids or an
    int64 tensor [samples, tokens]. Text needs ``tokenizer=`` too.
    """

    id = "FB200"


class MissingCalibrationError(CalibrationError):
    """The method learns from the inputs of each layer, and no calibration was given.

    Pass ``calibration=`` or ``--calibration FILE``: some thousand tokens of text like that which
    the model will see. Method "rtn" needs none.
    """

    id = "FB201"


class ShortTextError(CalibrationError):
    """The text holds fewer tokens than the windows asked for.

    Give more text, or ask for a smaller ``window`` or fewer ``samples``.
    """

    id = "FB202"


class TextFileError(CalibrationError):
    """The text file does not exist or cannot be read as UTF-8.

    Check the path and the permissions; convert the file with ``iconv -t utf-8``.
    """

    id = "FB203"


class VocabularyError(CalibrationError):
    """A token id is outside the model's vocabulary, so text and model do not belong together.

    Use the tokenizer that was saved with this model.
    """

    id = "FB204"


class NonFiniteInputError(CalibrationError):
    """The float model itself computes NaN or infinity on a calibration sample.

    Run the model in bfloat16 or float32: float16 overflows above 65504. If it stays, the weights
    are damaged.
    """

    id = "FB205"


class HessianError(CalibrationError):
    """The Gram matrix of a layer's inputs cannot be used as it is: zero, or not positive definite.

    Give more and more varied calibration text, or more damping (``damp=0.05``). Without
    ``strict=True`` the solver damps in steps, and the report says how far it went.
    """

    id = "FB206"


# --- FB3xx: model directories ---------------------------------------------------------------------


class CheckpointError(FewbitError, ValueError):
    """The config and the tensors of a checkpoint contradict each other or their format.

    The directory is incomplete, was edited, or comes from a writer with another convention: load it
    again, or write it again. ``fewbit inspect DIR`` shows what is there.
    """

    id = "FB300"


class NotAModelError(CheckpointError):
    """The path is no model directory: config.json, safetensors or tokenizer are not there.

    Pass the directory itself, not a file in it or the name of a model on a hub: fewbit loads
    nothing from the network. ``huggingface-cli download NAME --local-dir DIR`` makes one.
    """

    id = "FB301"


class DamagedFileError(CheckpointError):
    """A file of the checkpoint is cut short, unreadable or not what its name says.

    The transfer stopped early, or a pointer file of Git LFS took the place of the data
    (``git lfs pull``): load the file again and compare its checksum.
    """

    id = "FB302"


class UnsafeFileError(CheckpointError):
    """A file was refused because opening it could run code, leave its directory or fill the memory.

    Get the model as safetensors, or convert pickled weights yourself if you trust their origin.
    The limits on headers, names and patterns are far above those of any real model.
    """

    id = "FB303"


# --- FB4xx: not supported -------------------------------------------------------------------------


class UnsupportedError(FewbitError):
    """fewbit refuses this combination by name instead of guessing.

    The message says what is supported. Another method, scheme or format may do.
    """

    id = "FB400"
    exit_code = 4


class UnknownFamilyError(UnsupportedError):
    """No file in ``fewbit/families`` describes this architecture, or this variant of it.

    A family is data, about thirty lines: where embeddings, norms and linears sit. Copy the one that
    is nearest, or convert the model to an architecture that is there.
    """

    id = "FB401"


class FormatLimitError(UnsupportedError):
    """The target format has no place for these codes, this scheme or this model.

    compressed-tensors holds the most. Otherwise choose the scheme that the message allows before
    quantising, for example another group size, ``sym``, or ``scale_dtype="float16"``.
    """

    id = "FB402"


class UnreadFormatError(UnsupportedError):
    """The checkpoint uses a format, version or option that fewbit does not read.

    Write it again with a supported one, or quantise the float model with fewbit.
    """

    id = "FB403"


class RotationLimitError(UnsupportedError):
    """This model cannot be rotated in this way without changing what it computes.

    Leave out the rotation that the message names (``r3=None``, ``r4=None``), or use a method
    without rotation: "awq", "gptq".
    """

    id = "FB404"


# --- FB5xx to FB7xx -------------------------------------------------------------------------------


class TransformError(FewbitError):
    """A transform that must keep the function changed it beyond what rounding explains.

    Nothing was saved. Run the model in float32 or bfloat16 and try again; if it stays, the family
    describes this architecture wrongly: please report the layer that the message names.
    """

    id = "FB500"


class InstallError(FewbitError, ImportError):
    """The native module does not load: it is not built, or made for another Python or torch.

    Install torch 2.10 or newer, then fewbit again in the same environment; in a clone,
    ``pip install .`` builds it. ``python -m pip list`` shows what is there.
    """

    id = "FB600"


class MissingExtraError(InstallError):
    """An optional package is needed for this step and is not installed.

    Run the install command in the message; ``fewbit doctor`` lists all of them.
    """

    id = "FB601"


class ResumableStop(FewbitError):
    """The run stopped before its end, and what is finished is kept.

    Mend what the message names and run the same command again: it goes on from there.
    """

    id = "FB700"
    exit_code = 3


class StorageError(ResumableStop):
    """The disk refused a write: full, read-only, over quota or broken.

    Free the bytes that the message names, or mend the disk, and run the same command again. Nothing
    is half-written, and finished layers are kept.
    """

    id = "FB701"


class OutOfMemoryError(ResumableStop):
    """The system gave no more memory.

    Close other programs, or choose fewer or shorter calibration windows, and run the same command
    again: finished layers are kept. ``fewbit estimate`` says what a run needs, and ``--memory``
    refuses one that needs more before it starts.
    """

    id = "FB702"


def catalogue() -> dict[str, type[FewbitError]]:
    """Every error class by its id, in the order of the ids."""

    def below(kind: type[FewbitError]) -> Iterator[type[FewbitError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return {kind.id: kind for kind in sorted(below(FewbitError), key=lambda kind: kind.id)}


def explain(id: str) -> str:
    """What happened and how to mend it, for an id such as "FB103"; UsageError if there is none."""
    kinds = catalogue()
    kind = kinds.get(id.strip("[]").upper())
    if kind is None:
        raise UsageError(f"there is no error {id!r}; {', '.join(kinds)} are")
    happened, _, fix = inspect.getdoc(kind).partition("\n\n")
    return f"{kind.id} {kind.__name__} (exit code {kind.exit_code})\n{happened}\n\nFix: {fix}"
