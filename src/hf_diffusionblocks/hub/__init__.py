"""The model card of a saved model. What a push sends to the Hub is in ``hf_diffusionblocks.repository``."""

from .card import PAPER, model_card, write_model_card

__all__ = ["PAPER", "model_card", "write_model_card"]
