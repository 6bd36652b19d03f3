"""transformers: ``AutoModelForCausalLM.from_pretrained(dir)`` onto fewbit's kernels.

transformers builds the model and loads what is float; each quantised Linear is an empty place until
then, and is filled from the checked directory one at a time. Taken over are the methods awq, gptq
and compressed-tensors, whose own backends need packages of 30 to 53 dependencies; ``unregister``
gives them back.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import formats
from ..errors import CheckpointError, FormatLimitError, UnsupportedError
from ..linear import PackedLinear
from ..linearise import Experts, linearise_known
from ..modules import build_linear, extras, format_for, module_tensors
from ..runtime import SECTION, hang, refuse_replaced_norms, settings
from ..shards import Shards
from ..stored import Stored, find
from ..transforms.rotate import marked_activations, plain_name

METHODS = ("fewbit", "awq", "gptq", "compressed-tensors", "smooth_quant")
FALLBACKS = ("compressed-tensors", "int-quantized", "llm-int8", "fewbit")
_before: dict[str, tuple] = {}


class FewbitConfig(QuantizationConfigMixin):
    """The ``quantization_config`` section as it stands in the file."""

    def __init__(self, **section) -> None:
        self.__dict__.update(section)


class Place(nn.Module):
    """Where a quantised Linear will be: its sizes, and the bias that transformers loads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)


class FewbitQuantizer(HfQuantizer):
    """Puts fewbit's modules in the place of the Linears that a checkpoint holds quantised."""

    requires_calibration = True  # nothing is quantised while loading

    def __init__(self, quantization_config, **kwargs) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = formats.parse(quantization_config.to_dict())
        self.places: dict[str, Stored] = {}
        self.shards: Shards | None = None
        self.marks: dict[str, str] = {}

    def update_attn_implementation(self, config):
        """The one place that sees the config before the model is built.

        Where plain loading was forbidden for what ``_hang`` puts back, the activation gets the name
        that transformers knows.
        """
        self.marks = marked_activations(config) if getattr(config, SECTION, None) else {}
        for name, value in self.marks.items():
            setattr(config, name, plain_name(value))
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise CheckpointError("a quantised model is loaded from a directory, not a state_dict")
        self.shards = Shards(Path(checkpoint_files[0]).parent)
        linearise_known(model)
        modules = dict(model.named_modules())
        for name, stored in find(self.shards, self.plan).items():
            place = _name_in_model(name, modules, model.base_model_prefix)
            if place is None:
                continue  # transformers reports it among the unexpected keys
            linear = modules[place]
            if not isinstance(linear, nn.Linear):
                raise UnsupportedError(f"{name} is quantised, but is no Linear in {type(model)}")
            _replace(model, place, Place(linear))
            # GPT-2 would draw its residual weights anew, by name: they come from the files.
            model.get_submodule(place.rpartition(".")[0])._is_hf_initialized = True
            self.places[place] = stored
        known = "|".join(re.escape(name) for name in self.places)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"(?:^|\.)(?:{known})\.",
            r"\.online_hadamard\.signs$",
        }

    def _process_model_after_weight_loading(self, model, **kwargs):
        fill(model, self.shards, self.places)
        self._hang(model)
        for name, value in self.marks.items():
            setattr(model.config, name, value)
        self.shards = None
        return model

    def _hang(self, model) -> None:
        """What runs beside the weights, under the names that the paths have in this model."""
        modules = dict(model.named_modules())
        for path, slots in self.shards.config.get(SECTION, {}).items():
            place = _name_in_model(path, modules, model.base_model_prefix) or path
            for name in hang(model, {place: slots}):
                stored = path + name.removeprefix(place)
                if stored not in self.shards:
                    raise CheckpointError(f"{stored!r} is missing, which the model needs")
                module, _, buffer = name.rpartition(".")
                fill_buffer(model.get_submodule(module), buffer, self.shards.read(stored), stored)

    def get_state_dict_and_metadata(self, model):
        return stored_state(model, self.plan.format), {}

    def is_serializable(self) -> bool:
        return self.plan.format.writable

    @property
    def is_trainable(self) -> bool:
        return False


class LiveQuantizer(FewbitQuantizer):
    """For models quantised or loaded in this process, so that ``save_pretrained`` writes them."""

    def __init__(self, section: dict | None) -> None:
        self.section = section
        self.pre_quantized = True
        self.quantization_config = FewbitConfig(**(section or {"quant_method": "fewbit"}))

    def get_state_dict_and_metadata(self, model):
        if any(isinstance(m, Experts) for m in model.modules()):
            raise FormatLimitError(
                "save_pretrained renames experts and would lose quantised ones: use fewbit.save"
            )
        refuse_replaced_norms(model)
        packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        beside = settings(model)
        format = formats.get("fewbit") if beside else _fitting(packed, self.section)
        format = format_for(format, packed.values())
        if beside:
            setattr(model.config, SECTION, beside)
        linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        section = format.config({n: m.scheme for n, m in packed.items()}, list(linears))
        model.config.quantization_config = self.quantization_config = FewbitConfig(**section)
        return stored_state(model, format), {}

    def is_serializable(self) -> bool:
        return True


def attach(model: nn.Module, section: dict | None = None) -> None:
    """Make ``model.save_pretrained`` write the quantised form, as ``section`` says or as fits."""
    model.hf_quantizer = LiveQuantizer(section)
    model.is_quantized = True
    model.quantization_method = model.hf_quantizer.quantization_config.quant_method
    if section is not None:
        model.config.quantization_config = model.hf_quantizer.quantization_config


def _fitting(packed: dict[str, PackedLinear], section: dict | None) -> formats.Format:
    """The format that the model came from, or the first that holds every Linear."""
    wanted = [formats.parse(section).format] if section else []
    for format in (*wanted, *map(formats.get, FALLBACKS)):
        linears = packed.values()
        if format.writable and not any(
            extras(m).keys() - set(format.holds)
            or format.refuse(m.scheme, m.out_features, m.in_features)
            for m in linears
        ):
            return format
    raise FormatLimitError("no format holds this model")  # fewbit's own refuses nothing


def fill(model: nn.Module, shards: Shards, places: dict[str, Stored]) -> None:
    """Read every quantised Linear, in file order, and put its module into its place."""
    by_file = sorted(
        places, key=lambda p: (shards.entries[next(iter(places[p].names.values()))].file, p)
    )
    devices = getattr(model, "hf_device_map", None)
    for place in by_file:
        bias = model.get_submodule(place).bias
        module = build_linear(places[place], shards, bias, model.get_submodule(place))
        module = module.to(_device(place, devices, model))
        _replace(model, place, module)


def fill_buffer(module: nn.Module, name: str, tensor: Tensor, stored: str) -> None:
    """One stored tensor into the empty buffer of the same shape and type."""
    empty = getattr(module, name)
    if tensor.shape != empty.shape or tensor.dtype != empty.dtype:
        raise CheckpointError(
            f"{stored} is {tensor.dtype} {list(tensor.shape)}, the model needs {empty.dtype} "
            f"{list(empty.shape)}"
        )
    setattr(module, name, tensor.to(empty.device))


def stored_state(model: nn.Module, format: formats.Format) -> dict[str, Tensor]:
    """A state dict in which the quantised Linears are as the format stores them."""
    state, packed = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for buffer, _ in module.named_buffers(recurse=False):
                if buffer != "bias":
                    state.pop(f"{name}.{buffer}", None)
            tensors = module_tensors(module, format, name)
            packed |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return state | packed


def register() -> None:
    """Take the methods over; a second call changes nothing."""
    for method in METHODS:
        if method not in _before:
            tables = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
            _before[method] = tuple(table.pop(method, None) for table in tables)
            auto.register_quantization_config(method)(FewbitConfig)
            auto.register_quantizer(method)(FewbitQuantizer)


def unregister() -> None:
    """Give transformers its own loaders back."""
    for method, entries in _before.items():
        tables = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
        for table, entry in zip(tables, entries, strict=True):
            table.pop(method, None)
            if entry is not None:
                table[method] = entry
    _before.clear()


def _name_in_model(name: str, modules: dict[str, nn.Module], prefix: str) -> str | None:
    """A base model has no prefix, its checkpoint may; and the other way round."""
    for candidate in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}"):
        if candidate in modules:
            return candidate
    return None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _device(place: str, devices: dict | None, model: nn.Module):
    if not devices:
        return model.device
    best = max(
        (p for p in devices if place == p or place.startswith(f"{p}." if p else "")), key=len
    )
    return devices[best]


register()
