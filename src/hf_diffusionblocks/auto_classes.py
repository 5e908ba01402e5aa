"""transformers' Auto classes know the families from ``import hf_diffusionblocks`` on, which imports none of them.

Importing a family means importing torch, transformers' models and diffusers: seconds. So the Auto classes get a
stand-in for each config, which becomes the real class when it is first used; the family's module then registers config
and model itself. If transformers' registry has not been imported yet, a finder waits for that and removes itself.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGS = {
    "blocked_dit": ("hf_diffusionblocks.families.dit", "BlockedDiTConfig"),
    "blocked_image_classification": (
        "hf_diffusionblocks.families.image_classification",
        "BlockedImageClassificationConfig",
    ),
    "blocked_causal_lm": ("hf_diffusionblocks.families.causal_lm", "BlockedCausalLMConfig"),
    "blocked_masked_lm": ("hf_diffusionblocks.families.masked_lm", "BlockedMaskedLMConfig"),
    "blocked_recurrent": ("hf_diffusionblocks.families.recurrent", "BlockedRecurrentConfig"),
}
_REGISTRY = "transformers.models.auto.configuration_auto"


class LazyConfig:
    """Stands for a config class until it is used: called, or asked for an attribute."""

    def __init__(self, module: str, name: str):
        self.__dict__.update(_module=module, __name__=name, __module__=module)

    def _resolve(self) -> type:
        return getattr(importlib.import_module(self._module), self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resolve(), name)


def register(registry: ModuleType) -> None:
    """Put the stand-ins into transformers' registry, where the families have not registered themselves yet."""
    for model_type, (module, name) in CONFIGS.items():
        if model_type not in registry.CONFIG_MAPPING:
            registry.CONFIG_MAPPING.register(model_type, LazyConfig(module, name))


class _WaitForRegistry(importlib.abc.MetaPathFinder):
    """Registers the stand-ins as soon as transformers' registry has been imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader object
        return spec


def register_families() -> None:
    """Make the families known to the Auto classes, now or when transformers' registry is imported."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and hasattr(registry, "CONFIG_MAPPING"):
        register(registry)
    elif not any(isinstance(finder, _WaitForRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForRegistry())
