"""What blocked training is compared with, and where each rival is.

- End to end with L layers and with L / B: recipes with one block (``end_to_end``). Activation checkpointing is a
  setting of these, ``training.gradient_checkpointing``, and so are 8-bit and factored optimizers, ``training.optim``.
- Greedy local cross-entropy (each block with a head of its own, the gradient stopped between blocks) is a blocked model
  by settings: ``readout="clean"``, ``context="cascade"``, no auxiliary layers, trained with ``order="simultaneous"``.
- Forward-Forward and Contrastive Forward-Forward on a vision transformer: ``forward_forward``.
- NoProp in its three forms, backpropagation through its network (``noprop``), and DiffusionBlocks on that network
  (``blocked_cnn``). These and Forward-Forward share one loop, ``local_training``, with the arguments, optimizers,
  schedules and sample order of the library's trainer.
- Block-coordinate updates with the whole network's forward pass, BAdam and LISA: ``block_coordinate``. The library's
  own ``gradient="exact"`` is their relative that streams frozen blocks.
"""
