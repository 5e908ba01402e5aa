"""What a language model's loss keeps for the backward pass when the vocabulary is large: no logits of all tokens."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import CohereConfig, CohereForCausalLM

from hf_diffusionblocks import BlockedForCausalLM
from hf_diffusionblocks.losses import CHUNK_ELEMENTS, linear_cross_entropy, linear_divergence
from hf_diffusionblocks.objectives.next_token import NextTokenPrediction
from tiny_text import base_config

VOCAB, TOKENS, WIDTH = 49_152, 256, 16  # SmolLM2's vocabulary
ALL_LOGITS = 4 * 2 * TOKENS * VOCAB  # bytes of two rows' in float32: 96 MiB, more than a chunk


def saved(loss: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of each storage that autograd keeps for a loss's backward pass, which then runs."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (tensor, storage.nbytes())  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    sizes = {key: size for key, (_, size) in storages.items()}
    storages.clear()
    value.backward()
    return sizes


def features_and_head(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(VOCAB, WIDTH)).requires_grad_()
    return torch.randn(tokens, WIDTH, requires_grad=True), weight, torch.randint(VOCAB, (tokens,))


def test_the_probe_sees_the_logits_that_a_plain_loss_keeps():
    x, weight, labels = features_and_head(2 * TOKENS)
    sizes = saved(lambda: F.cross_entropy(F.linear(x, weight), labels))
    assert max(sizes.values()) == ALL_LOGITS


def test_the_chunked_loss_keeps_features_and_weights_only():
    x, weight, labels = features_and_head(2 * TOKENS)
    sizes = saved(lambda: linear_cross_entropy([(x, weight)], labels).mean())
    assert max(sizes.values()) == weight.nbytes
    assert sum(sizes.values()) < weight.nbytes + 4 * x.nbytes + 2 * labels.nbytes < ALL_LOGITS / 25
    assert torch.isfinite(x.grad).all() and weight.grad.abs().sum() > 0


def test_at_most_one_chunk_of_logits_is_kept_and_a_smaller_one_if_asked_for():
    """256 tokens of this vocabulary are one chunk, whose logits the backward pass begins with either way."""
    x, weight, labels = features_and_head(TOKENS)
    whole = saved(lambda: linear_cross_entropy([(x, weight)], labels).mean())
    assert max(whole.values()) == 4 * TOKENS * VOCAB <= 4 * CHUNK_ELEMENTS
    expected, x.grad = x.grad, None
    chunks = saved(lambda: linear_cross_entropy([(x, weight)], labels, chunk_elements=1 << 20).mean())
    assert max(chunks.values()) == weight.nbytes and sum(chunks.values()) < ALL_LOGITS / 25
    torch.testing.assert_close(x.grad, expected)


def test_the_divergence_from_a_teacher_keeps_features_and_weights_only():
    x, weight, _ = features_and_head(2 * TOKENS)
    hidden, head = torch.randn(2 * TOKENS, WIDTH), torch.randn(VOCAB, WIDTH)
    sizes = saved(lambda: linear_divergence([(x, weight)], [(hidden, head)]).mean())
    assert max(sizes.values()) == weight.nbytes and sum(sizes.values()) < ALL_LOGITS / 10
    chunked, x.grad = x.grad, None
    p = F.linear(hidden, head).softmax(-1)
    mine = F.linear(x, weight).log_softmax(-1)
    expected = (p * (p.log() - mine)).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(chunked, x.grad, rtol=1e-4, atol=1e-7)
    each = linear_divergence([(x, weight)], F.linear(hidden, head), chunk_elements=1 << 22)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_whose_logits_are_scaled_is_taken_at_its_word():
    config = CohereConfig(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        logit_scale=3.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    teacher = CohereForCausalLM(config)
    base = base_config(num_layers=2, vocab_size=64, hidden_size=WIDTH)
    model = BlockedForCausalLM.from_base(base, 2, auxiliary_layers=0)
    ids = torch.randint(3, 64, (2, 9))
    parts = NextTokenPrediction(teacher=teacher, distillation_weight=1.0)(model, 1, {"input_ids": ids}).parts
    with torch.no_grad():
        own, theirs = model(ids).logits[:, :-1].log_softmax(-1), teacher(ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(parts["distillation_loss"], (theirs.exp() * (theirs - own)).sum(-1).mean())


@pytest.mark.parametrize("readout", ["clean", "exact", "edm"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_of_a_block_keeps_no_logits(readout, tied):
    torch.manual_seed(0)
    base = base_config(
        num_layers=2, vocab_size=VOCAB, max_position_embeddings=TOKENS, tie_word_embeddings=tied, hidden_size=WIDTH
    )
    auxiliary = 1 if readout == "clean" else 0
    model = BlockedForCausalLM.from_base(base, 2, readout=readout, context="cascade", auxiliary_layers=auxiliary)
    batch = {"input_ids": torch.randint(3, VOCAB, (2, TOKENS))}
    for block in range(2):
        sizes = saved(lambda block=block: NextTokenPrediction()(model, block, batch).loss)
        table = 4 * VOCAB * WIDTH
        assert max(sizes.values()) <= table  # the head and the table of targets
        assert sum(sizes.values()) < ALL_LOGITS / 4, sum(sizes.values())
        assert readout == "edm" or model.head_weight(block).grad is not None
