"""Text metrics: values computed by hand, invariances, batches that change nothing, and clear errors."""

import importlib.util
import math
import random
import sys

import evaluate
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torchmetrics.functional.text import bleu_score
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_diffusionblocks.metrics import DistinctN, GenerativePerplexity, Mauve, Repetition, SelfBLEU, TextFeatures
from hf_diffusionblocks.metrics import mauve as mauve_module

WORDS = [f"w{i}" for i in range(20)]
needs_mauve = pytest.mark.skipif(
    importlib.util.find_spec("mauve") is None,
    reason="mauve-text is not installed (pip install 'hf-diffusionblocks[text]')",
)
few_samples = pytest.mark.filterwarnings("ignore:MAUVE of:UserWarning")


def word_tokenizer(bos: bool = True, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*(["<s>"] if bos else []), *WORDS, *extra])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({"bos_token": "<s>"} if bos else {}))


def tiny_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"vocab_size": 21, "max_position_embeddings": 64, "initializer_range": 0.5} | sizes | settings
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def sentences(count: int, longest: int = 12, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


class Bigrams(nn.Module):
    """A judge whose next-token probabilities are a table [V, V] of the last token alone."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(probabilities.log())

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"logits": self.table(input_ids)})


def probabilities(size: int, given: dict[tuple[int, int], float]) -> torch.Tensor:
    """A table [V, V] with these entries; the rest of each row is shared equally."""
    table = torch.full((size, size), 1 / size)
    for (last, following), p in given.items():
        table[last] = (1 - p) / (size - 1)
        table[last, following] = p
    return table


def close(result: dict, rel: float = 1e-6) -> dict:
    """The same with its numbers approximate; NaN equals NaN."""
    return {k: pytest.approx(v, rel=rel, nan_ok=True) if isinstance(v, float) else v for k, v in result.items()}


# -- distinct-n, repetition, self-BLEU ---------------------------------------------------------------------------


def test_distinct_n_is_the_share_of_distinct_n_grams_over_all_texts():
    # Unigrams a b a b | a b c: 3 of 7. Bigrams ab ba ab | ab bc: 3 of 5. Trigrams aba bab | abc: 3 of 3.
    assert DistinctN((1, 2, 3, 5)).compute(predictions=["a b a b", "a b c"]) == {
        "distinct_1": 3 / 7,
        "distinct_2": 3 / 5,
        "distinct_3": 1.0,
        "distinct_5": None,
        "num_texts": 2,
        "num_tokens": 7,
        "tokenizer": "whitespace",
    }


def test_no_n_gram_reaches_over_two_texts():
    assert DistinctN([2]).compute(predictions=["a b", "b a"])["distinct_2"] == 1.0
    assert DistinctN([2]).compute(predictions=["a", "b"])["distinct_2"] is None


def test_repetition_is_the_mean_over_texts_of_what_occurred_before():
    # Bigrams of "a b a b a": ab ba ab ba, 2 of 4 are repeats. "a b c": none. "a": has no bigram and is left out.
    assert Repetition(2).compute(predictions=["a b a b a", "a b c", "a"]) == {
        "repetition": 0.25,
        "repetition_n": 2,
        "num_scored": 2,
        "num_texts": 3,
        "num_tokens": 9,
        "tokenizer": "whitespace",
    }
    assert Repetition().compute(predictions=["the " * 103])["repetition"] == pytest.approx(0.99)  # 1 - 1 / 100
    assert Repetition().compute(predictions=["a b c"])["repetition"] is None


def test_self_bleu_by_hand():
    # Each text shares 3 of 4 words and 2 of 3 bigrams with the other, of equal length: sqrt(3/4 * 2/3).
    result = SelfBLEU(2).compute(predictions=["a b c d", "a b c e"])
    assert result["self_bleu"] == pytest.approx(math.sqrt(1 / 2)) and result["self_bleu_n"] == 2
    # "a a" against "a": one of its two words counts. "a" against "a a": all of it, brevity penalty exp(1 - 2/1).
    assert SelfBLEU(1).compute(predictions=["a a", "a"])["self_bleu"] == pytest.approx((1 / 2 + math.exp(-1)) / 2)
    assert SelfBLEU().compute(predictions=["a b c d e"] * 3)["self_bleu"] == pytest.approx(1.0)
    assert SelfBLEU(1).compute(predictions=["a b", "c d"])["self_bleu"] == 0.0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_torchmetrics_bleu_against_all_others(n):
    rng = random.Random(n)
    texts = [" ".join(rng.choices("abc", k=rng.randint(0, 14))) for _ in range(24)]
    # torchmetrics takes the first of two equally close reference lengths; sorted, that is the shorter one.
    others = [sorted(texts[:i] + texts[i + 1 :], key=len) for i in range(len(texts))]
    expected = [bleu_score([text], [rest], n_gram=n).item() for text, rest in zip(texts, others, strict=True)]
    assert 0 < np.mean(expected) < 1
    assert SelfBLEU(n).compute(predictions=texts)["self_bleu"] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("metric", [DistinctN(), Repetition(2), SelfBLEU(2)], ids=lambda m: type(m).__name__)
def test_order_and_batches_of_the_texts_do_not_matter(metric):
    texts = sentences(40)
    expected = metric.compute(predictions=texts)
    assert metric.compute(predictions=texts[::-1]) == close(expected, rel=1e-12)
    metric.add_batch(predictions=texts[:7])
    for text in texts[7:20]:
        metric.add(prediction=text)
    assert metric.compute(predictions=texts[20:]) == close(expected, rel=1e-12)


def test_tokens_may_come_from_a_function_or_a_tokenizer():
    texts = ["w1 w1", "w1w2"]
    characters = DistinctN([1], tokenizer=list).compute(predictions=texts)
    assert (characters["distinct_1"], characters["num_tokens"], characters["tokenizer"]) == (4 / 9, 9, "list")
    tokenizer = word_tokenizer()
    for given in (tokenizer, tokenizer.backend_tokenizer):  # "w1w2" is unknown to both, and so w0
        result = DistinctN([1], tokenizer=given).compute(predictions=texts)
        assert (result["distinct_1"], result["num_tokens"]) == (2 / 3, 3)
        assert result["tokenizer"] != "whitespace"


def test_metrics_combine_as_those_of_evaluate_do():
    combined = evaluate.combine([Repetition(2), SelfBLEU(1)])
    result = combined.compute(predictions=["a b a b a", "a b c"])
    assert result["repetition"] == 0.25 and 0 < result["self_bleu"] < 1
    with_references = combined.compute(predictions=["a b a b a", "a b c"], references=["a", "b"])
    assert with_references == result


# -- generative perplexity ---------------------------------------------------------------------------------------


def test_a_uniform_judge_gives_the_size_of_its_vocabulary():
    judge = tiny_llama()
    nn.init.zeros_(judge.lm_head.weight)
    result = GenerativePerplexity(judge, word_tokenizer(), name="uniform").compute(predictions=["w1 w2 w3", "w4"])
    assert result == {
        "generative_perplexity_uniform": pytest.approx(21, rel=1e-6),
        "name": "generative_perplexity_uniform",
        "nll_per_token": pytest.approx(math.log(21), rel=1e-6),
        "num_tokens": 4,
        "num_texts": 2,
        "distinct_1": 1.0,
        "distinct_2": 1.0,
        "distinct_3": 1.0,
        "distinct_4": None,
        "repetition": None,
        "judge": "uniform",
        "ngram_tokenizer": "whitespace",
    }


def test_diversity_stands_beside_a_low_perplexity():
    table = probabilities(21, {(last, 1): 0.8 for last in range(21)})
    judge = GenerativePerplexity(Bigrams(table), word_tokenizer(), name="parrot")
    result = judge.compute(predictions=["w0 " * 103])
    assert result["generative_perplexity_parrot"] == pytest.approx(1 / 0.8)
    assert result["distinct_1"] == pytest.approx(1 / 103) and result["repetition"] == pytest.approx(0.99)


def test_tokens_weigh_equally_whatever_the_length_of_their_text():
    table = probabilities(21, {(0, 1): 0.5, (1, 2): 0.25})  # p(w0 | <s>) and p(w1 | w0)
    judge = GenerativePerplexity(Bigrams(table), word_tokenizer(), name="b")
    result = judge.compute(predictions=["w0 w1", "w0"])
    assert result["nll_per_token"] == pytest.approx((math.log(2) + math.log(4) + math.log(2)) / 3, rel=1e-6)


def test_prompts_condition_and_are_not_scored():
    table = probabilities(21, {(3, 1): 0.5})  # p(w0 | w2)
    judge = GenerativePerplexity(Bigrams(table), word_tokenizer(), name="b")
    result = judge.compute(predictions=[" w0", " w0"], prompts=["w5 w2", ""])
    assert result["num_tokens"] == 2
    assert result["nll_per_token"] == pytest.approx((math.log(2) + math.log(21)) / 2, rel=1e-6)
    assert result["distinct_1"] == 0.5  # of the texts, without their prompts
    judge.add_batch(predictions=["w0"])
    judge.add(prediction=" w0", prompt="w5 w2")
    assert judge.compute() == close(result)


def test_a_token_across_the_end_of_a_prompt_is_scored():
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), bos_token="<s>"
    )
    table = probabilities(4, {(1, 3): 0.125})  # p(ab | a)
    judge = GenerativePerplexity(Bigrams(table), tokenizer, name="b")
    result = judge.compute(predictions=["b"], prompts=["aa"])  # "aab" is a ab
    assert (result["num_tokens"], result["nll_per_token"]) == (1, pytest.approx(math.log(8)))


def test_without_a_first_token_to_condition_on_the_first_one_is_not_scored():
    judge = GenerativePerplexity(tiny_llama(), word_tokenizer(bos=False), name="llama")
    assert judge.compute(predictions=["w1 w2 w3", "w1 w2"])["num_tokens"] == 3
    with pytest.raises(ValueError, match=r"predictions\[1\]='w1' leaves llama no token to score"):
        judge.compute(predictions=["w1 w2 w3", "w1"])
    assert judge.compute(predictions=[" w2"], prompts=["w1"])["num_tokens"] == 1


def test_a_batch_equals_its_texts_one_by_one_and_in_any_order():
    texts, model, tokenizer = sentences(17), tiny_llama(), word_tokenizer()
    batched = GenerativePerplexity(model, tokenizer, name="llama", batch_size=5)
    single = GenerativePerplexity(model, tokenizer, name="llama", batch_size=1)
    expected = []
    for text in texts:
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits.log_softmax(-1)
        expected.append(-log_p[0, :-1].gather(1, ids[0, 1:, None]).double().sum().item())
        result = single.compute(predictions=[text])
        assert result["nll_per_token"] * result["num_tokens"] == pytest.approx(expected[-1], rel=1e-5)
    result = batched.compute(predictions=texts)
    assert result["num_tokens"] == sum(len(text.split()) for text in texts)
    assert result["nll_per_token"] == pytest.approx(sum(expected) / result["num_tokens"], rel=1e-5)
    assert batched.compute(predictions=texts[::-1])["nll_per_token"] == result["nll_per_token"]


@pytest.mark.parametrize("prompt_words", [0, 3, 20])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_long_texts_are_scored_in_windows_each_token_once(stride, prompt_words):
    model, tokenizer, window = tiny_llama(), word_tokenizer(), 8
    words = random.Random(0).choices(WORDS, k=prompt_words + 25)
    prompt, text = " ".join(words[:prompt_words]), " ".join(["", *words[prompt_words:]])
    ids = torch.tensor([0, *tokenizer(prompt + text, add_special_tokens=False)["input_ids"]])
    expected = []
    for i in range(prompt_words + 1, len(ids)):
        begin = max(0, stride * math.ceil((i + 1 - window) / stride))  # the first window that reaches token i
        with torch.no_grad():
            expected.append(-model(input_ids=ids[None, begin:i]).logits[0, -1].log_softmax(-1)[ids[i]].item())
    judge = GenerativePerplexity(model, tokenizer, name="llama", max_length=window, stride=stride, batch_size=3)
    result = judge.compute(predictions=[text], prompts=[prompt])
    assert result["num_tokens"] == 25
    assert result["nll_per_token"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_judge_and_tokenizer_may_be_a_folder_and_lend_it_their_name(tmp_path):
    folder = tmp_path / "tiny-judge"
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    result = GenerativePerplexity(str(folder)).compute(predictions=["w1 w2"])
    direct = GenerativePerplexity(tiny_llama(), word_tokenizer(), name="tiny-judge").compute(predictions=["w1 w2"])
    assert result["name"] == "generative_perplexity_tiny-judge"
    assert result == close(direct)
    assert TextFeatures(str(folder)).name == "tiny-judge"


def test_windows_and_texts_end_where_the_model_does():
    judge = GenerativePerplexity(tiny_llama(), word_tokenizer(), name="llama")
    assert (judge.max_length, judge.stride) == (64, 32)
    assert judge.compute(predictions=[" ".join(WORDS * 10)])["num_tokens"] == 200
    assert TextFeatures(tiny_llama(max_position_embeddings=4096), word_tokenizer(), name="x").max_length == 1024


# -- MAUVE -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_text_features_are_the_pooled_last_hidden_states(pooling):
    texts, model, tokenizer = sentences(11), tiny_llama(), word_tokenizer()
    features = TextFeatures(model, tokenizer, name="llama", pooling=pooling, batch_size=4, max_length=9)
    got = features(texts)
    assert got.shape == (11, 16)
    for text, row in zip(texts, got, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:9]])
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, states[-1] if pooling == "last" else states.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(texts[::-1]), got.flip(0), rtol=0, atol=0)
    # Another batch size takes other kernels, which round differently.
    alone = TextFeatures(model.model, tokenizer, name="base", pooling=pooling, max_length=9)(texts[:1])
    torch.testing.assert_close(alone, got[:1], rtol=1e-5, atol=1e-5)


def test_the_fingerprint_tells_settings_apart():
    model, tokenizer = tiny_llama(), word_tokenizer()
    settings = [{}, {"pooling": "mean"}, {"max_length": 5}]
    prints = {TextFeatures(model, tokenizer, name="llama", **s).fingerprint for s in settings}
    prints.add(TextFeatures(model, word_tokenizer(bos=False), name="llama").fingerprint)
    assert len(prints) == 4
    assert TextFeatures(model, word_tokenizer(), name="llama").fingerprint in prints


@needs_mauve
@few_samples
@pytest.mark.parametrize("scaling_factor", [5.0, 0.2])
def test_mauve_of_a_set_with_itself_is_1_and_of_disjoint_ones_its_floor(scaling_factor):
    near = torch.randn(200, 6) * 0.1 + torch.tensor([1.0, 0, 0, 0, 0, 0])
    far = torch.randn(200, 6) * 0.1 - torch.tensor([1.0, 0, 0, 0, 0, 0])
    metric = Mauve("gaussians", scaling_factor=scaling_factor)
    same, apart = (metric.compute(predictions=near, references=other) for other in (near, far))
    assert same["mauve_gaussians"] == pytest.approx(1.0, abs=1e-9)
    assert apart["mauve_gaussians"] == pytest.approx(apart["floor"], rel=1e-6)
    # Without a shared bucket the curve is x^(1/c) + y^(1/c) = 1, with the area Gamma(c+1)^2 / Gamma(2c+1) below it;
    # 25 points on it leave an error.
    assert apart["floor"] == pytest.approx({5.0: 1 / 252, 0.2: 0.9502}[scaling_factor], rel=0.03)


@needs_mauve
@few_samples
@pytest.mark.parametrize("scaling_factor", [5.0, 1.0])
def test_mauve_is_that_of_mauve_text(scaling_factor):
    from mauve import compute_mauve

    near, shifted = torch.randn(300, 4), torch.randn(300, 4) + 0.7
    result = Mauve("x", scaling_factor=scaling_factor, num_buckets=12).compute(predictions=shifted, references=near)
    rows = [np.stack(sorted(r.double().numpy(), key=lambda row: row.tobytes())) for r in (near, shifted)]
    expected = compute_mauve(*rows, num_buckets=12, mauve_scaling_factor=scaling_factor).mauve
    assert result["floor"] + 0.02 < result["mauve_x"] < 0.98
    assert result["mauve_x"] == pytest.approx(expected, rel=1e-9)


@needs_mauve
@few_samples
def test_mauve_of_texts_goes_through_the_named_network_and_not_by_their_order():
    likely, rare = [" ".join(random.Random(i).choices(WORDS[:4], k=6)) for i in range(60)], sentences(60, 6, seed=1)
    network = TextFeatures(tiny_llama(), word_tokenizer(), name="llama")
    metric = Mauve(network, num_buckets=6, seed=3)
    result = metric.compute(predictions=likely, references=rare)
    assert {k: v for k, v in result.items() if not k.startswith("mauve")} == {
        "name": "mauve_llama",
        "feature_network": "llama",
        "floor": pytest.approx(1 / 252, rel=0.03),
        "num_predictions": 60,
        "num_references": 60,
        "num_buckets": 6,
        "scaling_factor": 5.0,
        "seed": 3,
    }
    assert 0.004 < result["mauve_llama"] < 0.9
    assert metric.compute(predictions=likely[::-1], references=rare[30:] + rare[:30]) == result
    features = Mauve("llama", num_buckets=6, seed=3)
    assert features.compute(predictions=network(likely), references=network(rare).numpy()) == result
    # Features, not texts: other batches of texts go through other kernels, whose last bits the clustering amplifies.
    for row in network(likely)[:20]:
        features.add(prediction=row)
    features.add_batch(references=network(rare))
    features.add_batch(predictions=network(likely)[20:].numpy())
    assert features.compute() == result


@needs_mauve
def test_mauve_warns_of_its_bias_below_a_thousand_samples(recwarn):
    rows = torch.randn(1000, 4)
    metric = Mauve("x", num_buckets=4)
    with pytest.warns(UserWarning, match="999 predictions and 1000 references is biased"):
        metric.compute(predictions=rows[:999], references=rows)
    recwarn.clear()
    assert metric.compute(predictions=rows, references=rows)["num_predictions"] == 1000
    assert not [w for w in recwarn if "biased" in str(w.message)]


def test_without_mauve_text_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match=r"GPLv3.*pip install 'hf-diffusionblocks\[text\]'"):
        Mauve("gpt2")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judge() -> GenerativePerplexity:
    return GenerativePerplexity(tiny_llama(), word_tokenizer(), name="llama")


@pytest.fixture
def mauve_metric(monkeypatch) -> Mauve:
    monkeypatch.setattr(mauve_module, "_load_mauve", lambda: None)  # bad input is found before it is needed
    return Mauve(TextFeatures(tiny_llama(), word_tokenizer(), name="llama"))


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "predictions are empty"),
        ("a b", "predictions must be a list of texts, not str"),
        (7, "predictions must be a list of texts, not int"),
        (["a", 3], r"predictions\[1\] is int, not str"),
        ([None], r"predictions\[0\] is NoneType, not str"),
    ],
)
@pytest.mark.parametrize("name", ["distinct", "repetition", "self_bleu", "judge", "mauve"])
def test_what_is_not_a_list_of_texts_is_refused(name, texts, message, judge, mauve_metric):
    made = {"distinct": DistinctN(), "repetition": Repetition(), "self_bleu": SelfBLEU(), "judge": judge}
    metric = made.get(name, mauve_metric)
    more = {"references": ["w1", "w2"]} if name == "mauve" else {}
    metric.add_batch(predictions=["w1 w2"] * 5)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=texts, **more)
    if name != "mauve":  # a refused compute leaves nothing behind, also of what was added before
        with pytest.raises(ValueError, match="missing"):
            metric.compute()
        assert metric.compute(predictions=["w1 w2 w3"] * 2)["num_texts"] == 2


def test_single_empty_and_unmatched_texts_are_refused(judge, mauve_metric):
    with pytest.raises(ValueError, match="1 prediction is too few"):
        SelfBLEU().compute(predictions=["a"])
    with pytest.raises(ValueError, match=r"predictions\[1\] is an empty text"):
        judge.compute(predictions=["w1", ""])
    with pytest.raises(ValueError, match=r"predictions\[0\]='  ' leaves llama no token"):
        judge.compute(predictions=["  "])
    with pytest.raises(ValueError, match="2 predictions have 1 prompts"):
        judge.compute(predictions=["w1", "w2"], prompts=["w3"])
    with pytest.raises(ValueError, match="predictions must be a list"):
        judge.compute(prompts=["w3"])
    with pytest.raises(ValueError, match=r"references\[0\] is an empty text"):
        mauve_metric.compute(predictions=["w1", "w2"], references=["", "w1"])
    with pytest.raises(ValueError, match=r"texts\[0\]=' ' has no tokens"):
        mauve_metric.compute(predictions=[" "], references=["w1", "w2"])
    with pytest.raises(ValueError, match="1 predictions are too few"):
        mauve_metric.compute(predictions=["w1"], references=["w1", "w2"])
    with pytest.raises(ValueError, match="predictions or references are missing"):
        mauve_metric.compute(predictions=["w1", "w2"])


def test_mauve_refuses_what_it_cannot_cluster(mauve_metric):
    rows = torch.randn(10, 16)
    with pytest.raises(ValueError, match="width 16, references of width 8"):
        mauve_metric.compute(predictions=rows, references=rows[:, :8])
    with pytest.raises(ValueError, match="1 of 10 feature vectors of references hold NaN"):
        mauve_metric.compute(predictions=rows, references=rows.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match="num_buckets=21 exceeds the 20 samples"):
        Mauve("x", num_buckets=21).compute(predictions=rows, references=rows)
    with pytest.raises(ValueError, match="only the name of a feature network, 'gpt2'"):
        Mauve("gpt2").compute(predictions=["w1"], references=rows)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m, t: GenerativePerplexity(m, t, name="x", max_length=65), "max_length=65 must lie between 1 and"),
        (lambda m, t: GenerativePerplexity(m, t, name="x", max_length=8, stride=8), "stride=8 lie between 1 and"),
        (lambda m, t: GenerativePerplexity(m, t, name="x", batch_size=0), "batch_size=0"),
        (lambda m, t: GenerativePerplexity(m, t), "the model has no name of its own"),
        (lambda m, t: GenerativePerplexity(m, t.backend_tokenizer, name="x"), "PreTrainedTokenizerFast"),
        (lambda m, t: GenerativePerplexity(m, name="x"), "tokenizer=NoneType is neither"),
        (lambda m, t: GenerativePerplexity(len, t, name="x"), "neither a transformers model nor"),
        (lambda m, t: TextFeatures(m, t, name="x", pooling="first"), "pooling='first' must be"),
        (lambda m, t: TextFeatures(m, t, name="x", max_length=0), "max_length=0"),
        (lambda m, t: Mauve(m), "features=LlamaForCausalLM must be TextFeatures"),
        (lambda m, t: Mauve("x", scaling_factor=0), "scaling_factor=0"),
        (lambda m, t: Mauve("x", num_buckets="many"), "num_buckets='many'"),
        (lambda m, t: DistinctN((0,)), "n=0 must be"),
        (lambda m, t: DistinctN(()), "n is empty"),
        (lambda m, t: Repetition(1.5), "n=1.5 must be"),
        (lambda m, t: SelfBLEU(tokenizer=3), "tokenizer=3 must be"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_llama(), word_tokenizer())


def test_a_tokenizer_of_another_model_and_broken_weights_are_refused():
    foreign = word_tokenizer(extra=("new",))
    for call in (
        lambda: GenerativePerplexity(tiny_llama(), foreign, name="x").compute(predictions=["w1 new"]),
        lambda: TextFeatures(tiny_llama(), foreign, name="x")(["w1 new"]),
    ):
        with pytest.raises(ValueError, match=r"gave id 21, but the model knows 0 \.\. 20"):
            call()
    broken = tiny_llama()
    nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="is nan: x gives NaN"):
        GenerativePerplexity(broken, word_tokenizer(), name="x").compute(predictions=["w1 w2"])
    with pytest.raises(ValueError, match="Bigrams.* returns no last_hidden_state"):
        TextFeatures(Bigrams(torch.ones(21, 21)), word_tokenizer(), name="x")(["w1"])
