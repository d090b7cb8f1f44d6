"""Which tensor of a checkpoint is which parameter: they differ in prefixes, tied copies and old spellings."""

from __future__ import annotations

from collections import defaultdict

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from hetrain.public.model.files import ModelFiles


def tensor_names(causal: PreTrainedModel, checkpoint: ModelFiles) -> dict[str, str]:
    """Name in the checkpoint by name in the model, for each parameter and persistent buffer that it has.

    The renamings are those of transformers' own loader. Tensors that it would split, merge or transpose on
    loading are left out: a worker reads them as they are.
    """
    conversions = get_model_conversion_mapping(causal)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if not isinstance(conversion, WeightRenaming)]
    known = causal.state_dict()
    found: dict[str, str] = {}
    for tensor in sorted(checkpoint.tensors):
        name, converted = rename_source_key(tensor, renamings, converters, causal.base_model_prefix, known)
        if name in known and converted is None:
            found[name] = tensor
    for aliases in _tied(causal):
        for source in [found[alias] for alias in aliases if alias in found][:1]:
            found.update({alias: source for alias in aliases if alias not in found})
    return found


def _tied(causal: PreTrainedModel) -> list[list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in causal.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [aliases for aliases in names.values() if len(aliases) > 1]
