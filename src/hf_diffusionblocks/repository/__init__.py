"""A model's repository on the Hub: what a push of some blocks, or of all, sends."""

from .block_table import complete_card, register_task
from .pushed_blocks import PushedBlocks
from .pushing import Push, SentFile, push_directory

__all__ = ["Push", "PushedBlocks", "SentFile", "complete_card", "push_directory", "register_task"]
