"""The model card parses, and says what the config and the figures say."""

from huggingface_hub import ModelCard

from hf_diffusionblocks.hub import model_card, write_model_card
from tiny import tiny_dit
from tiny_text import blocked_lm


def test_card_round_trips_with_metadata_and_figures(tmp_path):
    model = tiny_dit(num_blocks=3)
    card = model_card(
        model,
        title="tiny",
        usage="from hf_diffusionblocks import BlockedDiTModel",
        training={"learning_rate": 1e-3, "max_steps": 5},
        figures={"held_out_loss": 0.25, "updates_per_block": {0: 5}},
        dataset="uoft-cs/cifar10",
    )
    path = write_model_card(tmp_path, card)
    loaded = ModelCard.load(path)
    assert loaded.data.to_dict()["library_name"] == "hf-diffusionblocks"
    assert loaded.data.datasets == ["uoft-cs/cifar10"]
    assert loaded.data.eval_results[0].metric_value == 0.25
    assert [r.metric_type for r in loaded.data.eval_results] == ["held_out_loss"]
    text = path.read_text()
    for edge in model.partition.edges:
        assert f"{edge:.6g}" in text
    assert "held out loss | 0.25" in text and "learning rate | 0.001" in text
    assert not list(tmp_path.glob(".*"))


def test_card_without_figures_says_so(tmp_path):
    card = model_card(tiny_dit(num_blocks=1), title="tiny", usage="pass")
    assert "None were measured." in str(card)
    assert card.data.eval_results is None


def test_card_of_a_language_model_says_how_its_blocks_were_trained():
    text = str(model_card(blocked_lm(), title="tiny", usage="pass", pipeline_tag="text-generation"))
    assert "next token" in text and "auxiliary layer" in text and "Readout: clean. Context: cascade." in text
    assert "score matching" not in text
    independent = model_card(blocked_lm(preset="paper"), title="tiny", usage="pass", base_model="user/base")
    assert "user/base cut into 3 blocks" in str(independent) and "its own range of noise levels" in str(independent)
    assert independent.data.base_model == "user/base"
