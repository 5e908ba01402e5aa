"""The demo: its steps are the pipeline's, its page shows them, and it asks nobody else for anything."""

import ast
import json
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from hf_diffusionblocks import BlockedDiTPipeline
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.demo import denoising_steps, make_app, write_space
from hf_diffusionblocks.demo.app import block_strip, describe, launch_app, sheet
from needed import needed
from tiny import tiny_dit, tiny_vae


def quiet(pipe: BlockedDiTPipeline) -> BlockedDiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> BlockedDiTPipeline:
    return quiet(BlockedDiTPipeline(tiny_dit()))


def drawn(pipe: BlockedDiTPipeline, labels: list[int], steps: int, scale: float, seed: int, **how: str) -> torch.Tensor:
    return pipe(labels, steps, scale, torch.Generator().manual_seed(seed), output_type="pt", **how).images


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_last_step_has_the_pipelines_images_bit_for_bit(pipe, solver, scale):
    steps = list(denoising_steps(pipe, [3, 10, 7], 5, scale, seed=4, solver=solver))
    assert torch.equal(steps[-1].images, drawn(pipe, [3, 10, 7], 5, scale, 4, solver=solver))


def test_the_equal_probability_grid_and_latents_too():
    pipe = quiet(BlockedDiTPipeline(tiny_dit(base_config={"in_channels": 4}), vae=tiny_vae()))
    steps = list(denoising_steps(pipe, [1], 4, grid="equal_probability"))
    assert torch.equal(steps[-1].images, drawn(pipe, [1], 4, 1.0, 0, grid="equal_probability"))


def test_steps_follow_the_partition_from_the_noisiest_block_down(pipe):
    steps, partition = list(denoising_steps(pipe, [0], 18)), pipe.model.partition
    assert [step.number for step in steps] == list(range(1, 19)) and {step.total for step in steps} == {18}
    assert [step.block for step in steps] == [partition.block_of(step.sigma) for step in steps]
    assert [step.block for step in steps] == sorted(step.block for step in steps)
    assert {step.block for step in steps} == {0, 1, 2}
    assert steps[0].layers == (0, 1) and steps[-1].layers == (4, 5)
    assert steps[0].sigma == 80 and steps[-1].sigma_next == 0
    assert all(a.sigma_next == b.sigma for a, b in zip(steps, steps[1:], strict=False))


def test_what_a_step_shows_is_what_the_block_was_given_and_made(pipe):
    seen: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def look(_, step, sigma, tensors):
        seen.append((sigma, tensors["noisy"], tensors["denoised"]))
        return {}

    names = ["latents", "noisy", "denoised"]
    pipe(
        [2],
        4,
        1.0,
        torch.Generator().manual_seed(0),
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )
    for step, (sigma, noisy, denoised) in zip(denoising_steps(pipe, [2], 4), seen, strict=True):
        assert step.sigma == sigma
        assert_close(step.denoised, (denoised / 2 + 0.5).clamp(0, 1))
        scaled = noisy * 0.5 / (sigma**2 + 0.25) ** 0.5  # the data's variance, sigma_data = 0.5
        assert_close(step.noisy, (scaled / 2 + 0.5).clamp(0, 1))


def test_the_model_goes_back_to_its_mode_also_when_nobody_waits_for_the_end(pipe):
    pipe.model.train()
    steps = denoising_steps(pipe, [0], 6)
    next(steps)
    assert not pipe.model.training
    steps.close()
    assert pipe.model.training and torch.is_grad_enabled()


def test_bad_requests_are_told_before_anything_is_computed(pipe):
    wrong = [
        (([], 5), "class_labels is empty"),
        (([11], 5), "class_labels"),
        (([0], 0), "num_inference_steps"),
        (([0], 5, float("nan")), "guidance_scale"),
        (([0], 5, 1.0, 0, "eul"), "euler"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            next(denoising_steps(pipe, *arguments))
    part = quiet(BlockedDiTPipeline(tiny_dit(blocks=[0, 2])))
    with pytest.raises(ValueError, match="block 1 is not loaded"):
        next(denoising_steps(part, [0], 18))


def test_streamed_blocks_draw_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    streamed = BlockedDiTPipeline.from_pretrained(tmp_path / "model", block_streaming="disk")
    for a, b in zip(denoising_steps(pipe, [5], 5), denoising_steps(streamed, [5], 5), strict=True):
        assert torch.equal(a.denoised, b.denoised)


def test_a_sheet_has_the_images_in_order_and_large_enough():
    images = torch.stack([torch.full((1, 8, 8), i / 10) for i in range(7)])
    picture = np.asarray(sheet(images))
    assert min(picture.shape) >= 256 and picture.shape[1] / picture.shape[0] == 5 / 2
    side = picture.shape[0] // 2
    cells = [picture[(i // 5) * side + side // 2, (i % 5) * side + side // 2] for i in range(10)]
    assert cells == [*(round(25.5 * i) for i in range(7)), 255, 255, 255]


def test_the_strip_marks_the_block_that_works(pipe):
    strip = block_strip(pipe.model.partition, 1)
    assert strip.count("aria-current") == 1 and strip.count("<li") == 3
    assert "block 1 works\nlayers 2 to 3\nsigma 0.505 to 0.18" in strip
    assert "aria-current" not in block_strip(pipe.model.partition)
    step = next(denoising_steps(pipe, [0], 3))
    assert describe(step) == "Step 1 of 3: block 0 (layers 0 to 1) works at noise level 80."


def test_without_gradio_the_steps_work_and_the_page_says_what_to_install(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert len(list(denoising_steps(pipe, [0], 2))) == 2
    with pytest.raises(ValueError, match=r"pip install 'hf-diffusionblocks\[demo\]'"):
        make_app(pipe)
    pipe.save_pretrained(tmp_path / "model")
    assert main(["demo", str(tmp_path / "model")]) == 2
    assert "the demo needs Gradio" in capsys.readouterr().err
    assert main(["demo", str(tmp_path / "nothing")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_a_spaces_files_are_what_the_hub_reads(tmp_path):
    gradio = needed("gradio")
    app, requirements, readme = write_space("user/digits-dit", tmp_path / "space", title='Digits: "blocks"')
    assert sorted(p.name for p in (tmp_path / "space").iterdir()) == ["README.md", "app.py", "requirements.txt"]
    _, front, body = readme.read_text().split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["sdk"] == "gradio" and values["sdk_version"] == gradio.__version__
    assert values["title"] == 'Digits: "blocks"' and values["models"] == ["user/digits-dit"]
    assert (tmp_path / "space" / values["app_file"]) == app and "user/digits-dit" in body
    tree = ast.parse(app.read_text())
    assert "user/digits-dit" in [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    assert requirements.read_text().startswith("hf-diffusionblocks==")
    with pytest.raises(ValueError, match="not an empty directory"):
        write_space("user/digits-dit", tmp_path / "space")
    with pytest.raises(ValueError, match="push it first"):
        write_space("runs/digits-dit/model", tmp_path / "other")
    assert main(["demo", "user/model", "--space", str(tmp_path / "third"), "--quiet"]) == 0
    assert (tmp_path / "third" / "app.py").is_file()


def test_a_spaces_app_makes_the_page(pipe, tmp_path, monkeypatch):
    needed("gradio")
    app, *_ = write_space("user/digits-dit", tmp_path / "space")
    monkeypatch.setattr(BlockedDiTPipeline, "from_pretrained", lambda name: pipe if name == "user/digits-dit" else None)
    namespace = {"__name__": "app"}
    exec(app.read_text(), namespace)
    assert namespace["demo"].title == "digits-dit"


@pytest.fixture
def page(pipe, monkeypatch):
    """The served page's address."""
    needed("gradio")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    app = make_app(pipe, "Digits at work", [f"digit {i}" for i in range(10)], max_steps=20)
    _, url = launch_app(app, prevent_thread_lock=True)
    yield url
    app.close(verbose=False)


def test_a_visitor_sees_every_step_and_the_pipelines_images(page, pipe, tmp_path):
    client = needed("gradio_client").Client(page, verbose=False, download_files=tmp_path)
    job = client.submit([3, 7], 5, 1.0, 4, "euler", api_name="/sample")
    job.result(timeout=60)
    shown = job.outputs()
    assert len(shown) == 6
    blocks = [pipe.model.partition.block_of(step.sigma) for step in denoising_steps(pipe, [3, 7], 5)]
    for number, (said, strip, _, _, log) in enumerate(shown[:5]):
        assert said.startswith(f"Step {number + 1} of 5: block {blocks[number]} ")
        assert f"block {blocks[number]} works" in strip and strip.count("works") == 1
        assert [row[2] for row in log["data"]] == blocks[: number + 1]
    from PIL import Image

    picture = np.asarray(Image.open(shown[-1][3]).convert("L"))
    assert np.array_equal(picture, np.asarray(sheet(drawn(pipe, [3, 7], 5, 1.0, 4))))
    with pytest.raises(Exception, match="class_labels is empty"):
        client.predict([], 5, 1.0, 0, "euler", api_name="/sample")


def test_the_page_is_this_machines_alone(page):
    assert page.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(page, timeout=20) as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    with urllib.request.urlopen(page + "config", timeout=20) as answer:
        config = json.load(answer)
    assert config["analytics_enabled"] is False and config["title"] == "Digits at work"
    assert "fonts.googleapis.com/css" not in text


def test_a_browser_samples_and_asks_nobody_else(page):
    sync_api = needed("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None or not Path(chromium).exists():
        pytest.skip("there is no browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, answered = browser.new_page(), []
        tab.on("response", lambda response: answered.append(response.url))
        tab.goto(page)
        tab.get_by_role("button", name="Sample").click()
        tab.get_by_text("Done: 18 steps.").wait_for(timeout=90000)
        assert tab.locator("li[aria-current]").count() == 0 and tab.locator("img").count() >= 2
        browser.close()
    assert [url for url in answered if not url.startswith((page, "data:", "blob:"))] == []


def test_class_names_must_be_of_all_classes(pipe):
    needed("gradio")
    with pytest.raises(ValueError, match="class_names has 2 names for 10 classes"):
        make_app(pipe, class_names=["a", "b"])
