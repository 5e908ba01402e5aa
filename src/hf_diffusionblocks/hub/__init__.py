"""The model card of a saved model. What a push sends to the Hub is in ``hf_diffusionblocks.repository``."""

from .card import model_card, write_model_card
from .card_texts import register_card

__all__ = ["model_card", "register_card", "write_model_card"]
