"""``MixinBase``: what mixins derive from.

When the package runs it is ``object``. To a type checker it is a module, so that a mixin may use what stands behind it
among the bases of a model: weights, config, saving.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module as MixinBase
else:
    MixinBase = object

__all__ = ["MixinBase"]
