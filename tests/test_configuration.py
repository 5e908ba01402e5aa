"""The config: its defaults, its errors, and that config.json holds everything."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from transformers import AutoConfig

from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.families.dit import BlockedDiTConfig
from hf_diffusionblocks.partition import BlockPartition
from hf_diffusionblocks.preconditioning import EDMPreconditioning, VPEpsilonPreconditioning
from tiny import as_users_run, tiny_dit_config

SCHEDULE = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def config_of(**settings) -> DiffusionBlocksConfig:
    return DiffusionBlocksConfig(**({"base_config": {"num_layers": 12}} | settings))


SETTINGS = [
    {},
    {"num_blocks": 4, "overlap": 0.0},
    {"partition": "uniform", "noise": {"p_mean": -0.4, "sigma_max": 60.0}},
    {"partition": "log_uniform", "layers_per_block": [3, 6, 3]},
    {"partition": "explicit", "edges": [80.0, 1.5, 0.1, 0.002]},
    {"preconditioning": "vp_epsilon", "noise_schedule": SCHEDULE, "num_blocks": 2},
    {"preconditioning": "vp_epsilon", "noise_schedule": {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]}},
    {"preconditioning": "rectified_flow", "noise_schedule": {"num_train_timesteps": 500, "shift": 3.0}},
    {"sigma_data": 0.7, "noise_scale": 250.0},
]


def test_the_defaults_are_the_papers():
    config = config_of()
    assert config.make_partition() == BlockPartition.equal_probability(3, 12, overlap=0.05)
    assert config.make_preconditioning() == EDMPreconditioning(0.5, 1.0)
    assert config.noise == {"p_mean": -1.2, "p_std": 1.2, "sigma_min": 0.002, "sigma_max": 80.0}
    assert config.layers_per_block == [4, 4, 4]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_json_holds_everything(settings, tmp_path):
    config = BlockedDiTConfig(base_config={"num_layers": 12}, **settings)
    config.save_pretrained(tmp_path)
    for loaded in (BlockedDiTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is BlockedDiTConfig
        assert loaded.make_partition() == config.make_partition()
        assert loaded.make_preconditioning() == config.make_preconditioning()
        ignored = {"_name_or_path", "transformers_version"}
        saved = {k: v for k, v in loaded.to_dict().items() if k not in ignored}
        assert saved == {k: v for k, v in config.to_dict().items() if k not in ignored}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_edges_are_stored_so_that_nothing_is_computed_again(settings):
    config = config_of(**settings)
    saved = json.loads(config.to_json_string(use_diff=False))
    assert tuple(saved["edges"]) == config.make_partition().edges
    moved = [saved["edges"][0], *[e * 1.01 for e in saved["edges"][1:-1]], saved["edges"][-1]]
    again = DiffusionBlocksConfig(**(saved | {"edges": moved}))
    assert list(again.make_partition().edges) == moved


def test_vp_noise_levels_are_the_schedules():
    config = config_of(preconditioning="vp_epsilon", noise_schedule=SCHEDULE)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    assert isinstance(config.make_preconditioning(), VPEpsilonPreconditioning)
    torch.testing.assert_close(config.make_preconditioning().sigmas, sigmas)
    assert config.edges[0] == pytest.approx(float(sigmas[-1])) and config.edges[-1] == pytest.approx(float(sigmas[0]))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_config_may_be_built_under_any_device(device):
    for settings in SETTINGS:
        expected = config_of(**settings)
        with torch.device(device):
            config = config_of(**settings)
            assert config.make_partition() == expected.make_partition()
            assert config.make_preconditioning() == expected.make_preconditioning()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"partition": "equal_probabilty"}, "unknown partition 'equal_probabilty': did you mean 'equal_probability'"),
        ({"preconditioning": "vp"}, "unknown preconditioning 'vp'.*Allowed: edm, rectified_flow, vp_epsilon"),
        ({"sigma_data": 0}, "sigma_data=0 must be positive"),
        ({"sigma_data": float("nan")}, "sigma_data=nan must be a finite number"),
        ({"noise_scale": -1.0}, "noise_scale=-1.0 must be positive"),
        ({"preconditioning": "vp_epsilon"}, "needs noise_schedule"),
        ({"preconditioning": "vp_epsilon", "noise_schedule": {"beta": 1}}, "unknown noise_schedule setting 'beta'"),
        ({"noise": {"p_men": 1.0}}, "unknown noise setting 'p_men': did you mean 'p_mean'"),
        ({"noise": {"p_std": 0.0}}, "p_std=0.0 must be positive"),
        ({"noise": {"sigma_min": 3.0, "sigma_max": 1.0}}, "must satisfy 0 < sigma_min < sigma_max"),
        ({"num_blocks": 13}, "num_blocks=13 is more than the 12 layers"),
        ({"num_blocks": 0}, "num_blocks=0 must be a whole number of at least 1"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 must be a whole number"),
        ({"layers_per_block": [4, 4]}, r"layers_per_block=\[4, 4\] must name 3 numbers"),
        ({"layers_per_block": [12, 0, 0]}, "every block needs at least one layer"),
        ({"overlap": 1.0}, r"overlap=1.0 must lie in \[0, 1\)"),
        ({"overlap": -0.1}, r"overlap=-0.1 must lie in \[0, 1\)"),
        ({"partition": "explicit"}, "partition='explicit' needs edges"),
        ({"edges": [80.0, 0.002]}, r"has 2 values for num_blocks=3: B blocks need B \+ 1 edges"),
        ({"edges": [80.0, 0.1, 1.0, 0.002]}, "strictly descending"),
        ({"edges": [70.0, 1.0, 0.1, 0.002]}, "the outer edge 70.0 must equal sigma_max=80.0"),
    ],
    ids=str,
)
def test_values_that_are_refused(settings, message):
    with as_users_run(), pytest.raises(ValueError, match=message):
        config_of(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_dropout": 1.0}, r"label_dropout=1.0 must lie in \[0, 1\)"),
        ({"label_dropout": -0.1}, "label_dropout=-0.1"),
        ({"base_config": {"patch_size": 3}}, "sample_size=8 is not a multiple of patch_size=3"),
        ({"base_config": {"attention_head_dim": 3}}, "= 6 must be a multiple of 4"),
        ({"base_config": {"out_channels": 3}}, "out_channels=3 must be in_channels=1, or twice that"),
        ({"base_config": {"num_heads": 3}}, "unknown DiT setting 'num_heads'"),
    ],
    ids=str,
)
def test_dit_values_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit_config(**settings)


def test_a_dit_config_fills_in_diffusers_defaults():
    config = BlockedDiTConfig()
    assert config.num_layers == 28 and config.num_classes == 1000 and config.sample_size == 32
    assert (config.in_channels, config.out_channels) == (4, 4)
    assert BlockedDiTConfig(base_config={"out_channels": 8}).out_channels == 8


def test_a_config_does_not_change_what_it_was_given():
    base, noise, edges = {"num_layers": 12}, {"p_mean": -1.0}, [80.0, 1.0, 0.1, 0.002]
    BlockedDiTConfig(base_config=base, noise=noise, edges=edges)
    assert (base, noise, edges) == ({"num_layers": 12}, {"p_mean": -1.0}, [80.0, 1.0, 0.1, 0.002])
