"""The kinds of inputs, by their names."""

from tests.fuzz.commands import conversion, flags, models, parts, runs, streams, tools, training
from tests.fuzz.inputs import Kind
from tests.fuzz.readers import archives, configs, images, records, safetensors, settings, tokenizers

KINDS: dict[str, Kind] = {
    module.KIND.name: module.KIND
    for module in (
        safetensors, configs, tokenizers, records, images, archives, settings,
        models, parts, flags, training, runs, tools, streams, conversion,
    )
}  # fmt: skip
