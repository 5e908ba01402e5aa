"""The page of ``diffusionblocks demo``, in Gradio: sample a blocked DiT and watch which block works at each step.

Nothing leaves the machine: the page is served on the loopback address unless one is asked for, without a share link or
analytics, and a policy in its headers forbids the browser to load anything from elsewhere.
"""

import contextlib
import html
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..partition import BlockPartition
from ..pipelines import BlockedDiTPipeline
from ..sampling import SOLVERS
from ..streaming import stream_blocks
from .steps import DenoisingStep, denoising_steps

if TYPE_CHECKING:
    import gradio
    from PIL.Image import Image

HOST = "127.0.0.1"
_SHOWN = 256  # pixels, at least, of the side of a sheet: an 8x8 digit would be a dot
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "base-uri 'self'; form-action 'self'; object-src 'none'"
)


def import_gradio() -> Any:
    """The module ``gradio``, told not to send statistics.

    Raises:
        ValueError: if it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the demo needs Gradio ({error}): pip install 'hf-diffusionblocks[demo]'.") from error
    return gradio


def sheet(images: Tensor) -> "Image":
    """Images [batch, channels, height, width] in [0, 1] side by side, enlarged without smoothing if they are small."""
    from PIL import Image

    columns = min(len(images), 5)
    rows = -(-len(images) // columns)
    n, channels, height, width = images.shape
    cells = torch.ones(rows * columns, channels, height, width)
    cells[:n] = images
    tiled = cells.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = tiled.reshape(rows * height, columns * width, channels).mul(255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :3])
    factor = -(-_SHOWN // min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def block_strip(partition: BlockPartition, active: int | None = None) -> str:
    """The blocks as a row of HTML boxes with their layers and noise levels; the one that works is marked."""
    boxes = []
    for block in range(partition.num_blocks):
        layers, (low, high) = partition.layers(block), partition.range(block)
        works = block == active
        look = "border:2px solid currentColor;font-weight:700" if works else "border:2px solid transparent;opacity:.6"
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        text = f"block {block}{' works' if works else ''}\n{span}\nsigma {high:.3g} to {low:.3g}"
        current = ' aria-current="step"' if works else ""
        boxes.append(
            f'<li{current} style="{look};flex:1 1 8em;padding:.5em;border-radius:.5em;list-style:none;'
            f'white-space:pre-line">{html.escape(text)}</li>'
        )
    row = "display:flex;flex-wrap:wrap;gap:.5em;margin:0;padding:0"
    return f'<ol aria-label="blocks, in the order in which sampling visits them" style="{row}">{"".join(boxes)}</ol>'


def describe(step: DenoisingStep) -> str:
    """A step in words."""
    span = f"layer {step.layers[0]}" if len(step.layers) == 1 else f"layers {step.layers[0]} to {step.layers[-1]}"
    return f"Step {step.number} of {step.total}: block {step.block} ({span}) works at noise level {step.sigma:.4g}."


def make_app(
    pipe: BlockedDiTPipeline,
    title: str = "A blocked DiT at work",
    class_names: Sequence[str] | None = None,
    max_steps: int = 100,
) -> "gradio.Blocks":
    """The page, not yet served; ``launch_app`` serves it on this machine, ``app.launch()`` as Gradio does.

    Args:
        pipe: the pipeline, with all blocks loaded or streamed.
        title: of the page.
        class_names: names of the classes; "class 3" and so on by default.
        max_steps: the most steps that a visitor can ask for.

    Raises:
        ValueError: if Gradio is not installed, or there is not a name for each class.
    """
    gr = import_gradio()
    partition, count = pipe.model.partition, pipe.model.config.num_classes
    names = [f"class {label}" for label in range(count)] if class_names is None else list(class_names)
    if len(names) != count:
        raise ValueError(f"class_names has {len(names)} names for {count} classes: give one for each.")

    def sample(chosen: list[int], steps: float, scale: float, seed: float, solver: str) -> Iterator[tuple]:
        log: list[list] = []
        try:
            for step in denoising_steps(pipe, chosen, int(steps), float(scale), int(seed), solver):
                row = [step.number, f"{step.sigma:.4g}", step.block, f"{step.layers[0]}-{step.layers[-1]}"]
                log = [*log, row]
                pictures = sheet(step.noisy), sheet(step.denoised)
                yield describe(step), block_strip(partition, step.block), *pictures, log
            yield f"Done: {step.total} steps.", block_strip(partition), sheet(step.images), sheet(step.images), log
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(
            f"# {title}\n\nEach step of the sampler runs one of {partition.num_blocks} blocks: the one that owns its "
            "noise level (DiffusionBlocks, arXiv 2506.14202)."
        )
        with gr.Row():
            with gr.Column(scale=1):
                choices = [(name, label) for label, name in enumerate(names)]
                chosen = gr.Dropdown(choices, value=list(range(min(5, count))), multiselect=True, label="Classes")
                steps = gr.Slider(1, max_steps, value=min(18, max_steps), step=1, label="Steps")
                scale = gr.Slider(0, 5, value=1, step=0.1, label="Guidance scale (1: none)")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                solver = gr.Radio(list(SOLVERS), value=SOLVERS[0], label="Solver")
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=2):
                said = gr.Markdown("Choose classes and press Sample.")
                strip = gr.HTML(block_strip(partition))
                with gr.Row():
                    noisy = gr.Image(label="What the block is given", format="png", interactive=False)
                    denoised = gr.Image(label="What it makes of it", format="png", interactive=False)
                heads = ["step", "noise level", "block", "layers"]
                log = gr.Dataframe(headers=heads, label="Steps so far", interactive=False)
        inputs = [chosen, steps, scale, seed, solver]
        # One at a time: the model is one, and its blocks may be streamed.
        button.click(sample, inputs, [said, strip, noisy, denoised, log], api_name="sample", concurrency_limit=1)
    return app


def launch_app(
    app: "gradio.Blocks", port: int | None = None, open_browser: bool = False, host: str = HOST, **settings: Any
) -> tuple[Any, str]:
    """Serve a page that ``make_app`` made, to this machine only and with nothing from elsewhere.

    Args:
        app: the page.
        port: of the page; by default a free one.
        open_browser: also open it.
        host: the address to listen on.
        **settings: of Gradio's ``launch``, such as ``prevent_thread_lock=True`` to go on meanwhile.

    Returns:
        The server's application and the page's address.

    Raises:
        OSError: if the port is taken.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    given = {
        "server_name": host,
        "server_port": port,
        "inbrowser": open_browser,
        "share": False,
        "quiet": True,
        "ssr_mode": False,
        "theme": gr.themes.Default(**fonts),
        "footer_links": [],
        "app_kwargs": {"middleware": [Middleware(_Headers)]},
    }
    served, url, _ = app.launch(**given | settings)
    return served, url


def serve(
    model: str | os.PathLike,
    port: int | None = None,
    open_browser: bool = True,
    block_streaming: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """``diffusionblocks demo``: load a model and show its page until Ctrl-C.

    Args:
        model: directory or Hub id of a blocked DiT.
        port: of the page; by default a free one.
        open_browser: also open the page, where there is a screen.
        block_streaming: ``host`` or ``disk``, to keep one block's weights on the device.
        say: prints.

    Raises:
        ValueError: if Gradio is not installed, or the model cannot be loaded or sampled.
        OSError: if the port is taken.
    """
    import_gradio()  # before a model is loaded for nothing
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with stream_blocks(block_streaming, device=device) if block_streaming else contextlib.nullcontext():
        pipe = BlockedDiTPipeline.from_pretrained(model)
    if block_streaming is None:
        pipe.to(device)
    has_screen = sys.platform in ("darwin", "win32") or any(n in os.environ for n in ("DISPLAY", "WAYLAND_DISPLAY"))
    app = make_app(pipe, f"{Path(model).resolve().parent.name if Path(model).is_dir() else model}: blocks at work")
    _, url = launch_app(app, port, open_browser and has_screen, prevent_thread_lock=True)
    say(f"showing {model} on {url} (Ctrl-C ends it)")
    sys.stdout.flush()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("")
    finally:
        app.close(verbose=False)


class _Headers:
    """Adds the security policy to every answer (an ASGI middleware)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")
                message = {**message, "headers": [*message.get("headers", []), *policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


__all__ = ["block_strip", "describe", "launch_app", "make_app", "serve", "sheet"]
