"""What a model computes beside its weights (online.py, kv.py), as data: saved and put back.

A directory holds it as ``fewbit_online`` in config.json: path -> slot -> settings. The random signs
of an online Hadamard transform are a tensor of the model and lie with the others.
"""

from __future__ import annotations

from torch import Tensor, nn

from .errors import CheckpointError, FewbitError, FormatLimitError
from .hadamard import plan
from .integrations import SECTION
from .kv import attach_kv
from .online import KV_SLOT, SLOTS, ActivationQuant, OnlineHadamard, attach, online_paths
from .orthogonal import Rotation
from .transforms.fold import RMSNorm

BESIDE = (
    "computes more at run time than its linears (an online rotation R3 or R4, activations or a KV "
    'cache on a grid), which only format="fewbit" can say'
)


def settings(model: nn.Module) -> dict[str, dict[str, dict]]:
    """Path -> slot -> the arguments that ``hang`` needs; empty for a model of weights alone."""
    found: dict[str, dict[str, dict]] = {}
    for path in online_paths(model):
        module = model.get_submodule(path)
        children = {slot: getattr(module, slot, None) for slot in (*SLOTS, KV_SLOT)}
        found[path] = {s: child.settings() for s, child in children.items() if child is not None}
    return found


def hang(model: nn.Module, section: dict) -> list[str]:
    """Put back what ``settings`` has described; returns the names of tensors still to be filled.

    Raises CheckpointError for a section that does not fit the model.
    """
    wanted: list[str] = []
    try:
        for path, slots in section.items():
            module = model.get_submodule(path)
            for slot, values in slots.items():
                if slot == KV_SLOT:
                    attach_kv(module, **values)
                elif slot == "online_quant":
                    attach(module, slot, ActivationQuant(**values))
                else:
                    attach(module, slot, _hadamard(module, **values))
                    wanted += [f"{path}.{slot}.signs"] if values["signs"] else []
    except (TypeError, ValueError, KeyError, AttributeError, FewbitError) as error:
        reason = getattr(error, "message", error)
        message = f"{SECTION} of config.json does not fit the model: {reason}"
        raise CheckpointError(message) from error
    return wanted


def refuse_replaced_norms(model: nn.Module) -> None:
    """FormatLimitError for a norm that no config.json can ask for."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            raise FormatLimitError(
                f"{name} is an RMSNorm where this architecture has a LayerNorm, so that a loaded "
                "model would compute something else; rotate with keeps_mean=True to save"
            )


def _hadamard(linear: nn.Module, width: int, signs: bool) -> OnlineHadamard:
    if width != linear.in_features:
        raise CheckpointError(f"a transform of {width} before {linear.in_features} inputs")
    empty = Tensor([0.0]).expand(width) if signs else None
    return OnlineHadamard(Rotation(width, plan(width), empty))
