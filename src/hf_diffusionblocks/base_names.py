"""What each family is cut from, by name: for help and errors, without importing a family."""

CUT_FROM = {
    "dit": "DiT, PixArt, SD3 or Flux transformer, or a diffusers pipeline of one",
    "causal_lm": "Llama, Mistral, Qwen2, Qwen3 and decoders of the same pieces",
    "recurrent": "the same decoders, made a recurrent core",
    "image_classification": "ViT, DeiT, DINOv2 with a classifier's head",
    "masked_lm": "BERT, RoBERTa, ModernBERT with a masked language model's head, or a decoder, made bidirectional",
}


def what_can_be_cut() -> str:
    """One line that names all of it, by family."""
    return "What can be cut: " + "; ".join(f"{family}: {bases}" for family, bases in CUT_FROM.items()) + "."


__all__ = ["CUT_FROM", "what_can_be_cut"]
