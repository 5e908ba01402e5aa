"""A run's report and live page: what they say, that nothing in a run can script them, and what the server answers."""

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_diffusionblocks.cli import main
from hf_diffusionblocks.likelihood import likelihood_bound
from hf_diffusionblocks.likelihood.shares import has_bound
from hf_diffusionblocks.report import RunReader, RunServer, write_report
from hf_diffusionblocks.report.charts import log_ticks, loss_chart, thinned, ticks
from hf_diffusionblocks.report.page import (
    SECTIONS,
    TEMPLATES,
    format_duration,
    percent_in_tens,
    sections,
    served_at,
)
from hf_diffusionblocks.report.shares import chosen_shares
from hf_diffusionblocks.training import run_status
from hf_diffusionblocks.training.run_files import overwrite_run
from report_runs import NASTY, make_run, row, serving, write_status
from runs import make_trainer
from tiny import tiny_dit
from tiny_masked import blocked_mlm
from tiny_text import TokenRows, new_lm


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def get(server: RunServer, path: str, host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


# -- reading a run -----------------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_grows_and_anew_when_replaced(tmp_path):
    reader, log = RunReader(tmp_path / "run"), tmp_path / "run" / "updates.jsonl"
    assert reader.read().state == "waiting"
    log.parent.mkdir()
    log.write_text(row(0, 1, 5.0) + row(1, 1, 4.0)[:20])
    assert reader.read().losses == {0: ([1], [5.0])}
    with open(log, "a") as file:
        file.write(row(1, 1, 4.0)[20:] + "not json\n" + '{"block": 0}\n' + row(0, 2, float("nan")) + row(0, 3, 2.0))
    assert reader.read().losses == {0: ([1, 3], [5.0, 2.0]), 1: ([1], [4.0])}
    (tmp_path / "new").write_text(row(0, 1, 5.0) * 40)
    os.replace(tmp_path / "new", log)  # as a run that resumes does
    assert reader.read().losses == {0: ([1] * 40, [5.0] * 40)}


def test_what_the_status_says(tmp_path):
    write_status(tmp_path)
    run = RunReader(tmp_path).read(now=1002.0)
    assert (run.state, run.iteration, run.iterations, run.done) == ("training", 12, 30, 0.4)
    assert run.left == 18 * 2.0 - 2.0 and run.seconds == 26.0
    assert [b.place for b in run.blocks] == ["device", "host", "disk"]
    assert [b.active for b in run.blocks] == [True, False, False]
    assert RunReader(tmp_path).read(now=1121.0).state == "quiet"
    write_status(tmp_path, seconds_per_update=50.0, logging_steps=10)  # a word every 500 s
    assert RunReader(tmp_path).read(now=2000.0).state == "training"
    write_status(tmp_path, state="stopped")
    run = RunReader(tmp_path).read(now=5000.0)
    assert (run.state, run.left, run.seconds) == ("stopped", None, 24.0)
    assert [b.place for b in run.blocks] == [None] * 3  # its memory was given back


@pytest.mark.parametrize("text", ["[]", "{", '{"blocks": 3}', '{"blocks": [1, {}], "iteration": "x"}', "1" * 5000])
def test_a_status_that_is_none_is_no_error(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    (tmp_path / "updates.jsonl").write_text(row(2, 7, 1.5))
    run = RunReader(tmp_path).read()
    assert run.state == "unknown" and [(b.block, b.updates, b.loss) for b in run.blocks] == [(2, 7, 1.5)]


def test_jobs_of_a_run_are_one_page(tmp_path):
    for block in (0, 1):
        job = tmp_path / f"blocks-{block:02d}"
        job.mkdir()
        (job / "updates.jsonl").write_text(row(block, 1, 1.0 + block))
        rows = [{"block": block, "layers": [block], "range": [1, 2], "updates": 1, "of": 10, "place": "device"}]
        write_status(job, blocks=rows, state="training" if block else "finished", iteration=6, iterations=10)
    run = RunReader(tmp_path).read(now=1000.0)
    assert (run.state, run.iteration, run.iterations, run.left) == ("training", 12, 20, 8.0)
    assert [(b.block, b.place, b.loss) for b in run.blocks] == [(0, None, 1.0), (1, "device", 2.0)]


def test_shares_prefer_the_bound_and_fall_back_on_the_last_evaluation(tmp_path):
    log = tmp_path / "evaluations.jsonl"
    log.write_text('{"iteration": 5, "eval_loss/block_0": 0.5, "eval_loss/block_1": 0.25}\n{"iteration": 6, "eva')
    assert RunReader(tmp_path).read().shares[1:] == ("held-out loss after iteration 5", False, [0.5, 0.25])
    run = RunReader(make_run(tmp_path / "run")).read()
    assert run.shares == ("Share of the likelihood by block", "bound bits per character", True, [1.0, 3.0])


def trained_text(run: Path, model, **settings):
    """A trainer of a language model after a run that it evaluated twice."""
    held_out = TokenRows(6, seed=1)
    trainer = make_trainer(
        run, model, dataset=TokenRows(), eval_dataset=held_out, max_steps=2, eval_steps=3, **settings
    )
    trainer.train()
    return trainer, held_out


def test_an_evaluation_measures_the_share_of_each_block_in_the_likelihood(tmp_path):
    trainer, held_out = trained_text(tmp_path, blocked_mlm("llama"), train_shared="all")
    run = RunReader(tmp_path).read()
    assert run.shared_out and run.shares.whole and run.shares.title == "Share of the likelihood by block"
    assert run.shares.unit == "bound on the negative log-likelihood, nats per token, after iteration 6"
    last = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert sum(run.shares.values) == pytest.approx(last["eval_loss"], rel=1e-12)  # the masked objective is the bound
    assert [share * 3 for share in run.shares.values] == pytest.approx([last[f"eval_loss/block_{b}"] for b in range(3)])


@pytest.mark.parametrize("settings", [{"readout": "exact"}, {"context": "independent"}], ids=["exact", "independent"])
def test_of_a_causal_model_the_shares_are_those_of_its_bound(tmp_path, settings):
    trainer, held_out = trained_text(tmp_path, new_lm(**settings), seed=5)
    with trainer.averaged_weights():
        bound = likelihood_bound(trainer.model, held_out, num_draws=1, seed=5)
    assert RunReader(tmp_path).read().shares.values == pytest.approx(list(bound.nats_per_block), rel=1e-6)


def test_where_the_likelihood_is_not_shared_out_the_losses_stand(tmp_path):
    trained_text(tmp_path, new_lm(readout="clean", context="cascade"))
    run = RunReader(tmp_path).read()
    assert not run.shared_out and run.shares.title == "Held-out loss by block"
    assert "likelihood_share" not in (tmp_path / "evaluations.jsonl").read_text()
    assert has_bound(tiny_dit(3).config) is False


def test_before_they_are_measured_the_page_says_so(tmp_path):
    write_status(tmp_path, likelihood_shares=True, updated=time.time())
    run = RunReader(tmp_path).read()
    assert run.shares is None and "Not yet measured" in sections(run, served_at, True)["shares"]
    write_status(tmp_path, likelihood_shares=True, state="finished")
    assert "Not measured: the run had no evaluation" in sections(RunReader(tmp_path).read(), served_at, True)["shares"]
    write_status(tmp_path, likelihood_shares=False)
    assert sections(RunReader(tmp_path).read(), served_at, True)["shares"] == ""
    figures = {"local_bits_per_character_per_block": [9.0, 8.0]}
    row = {"iteration": 5, "likelihood_share/block_0": 0.5, "likelihood_share/block_1": -0.25, "eval_loss/block_0": 1}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    assert chosen_shares(figures, tmp_path / "evaluations.jsonl").values == [0.5, -0.25]
    assert chosen_shares(figures, tmp_path / "none").values == [9.0, 8.0]


# -- charts and words --------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_losses():
    svg = loss_chart({0: ([1, 2], [1.0, 2.0])}, 164, 150)  # the plot: 52 to 152 across, 10 to 110 down
    assert 'points="102.0,110.0 152.0,10.0"' in svg and "linear scale" in svg
    assert 'points="102.0,110.0 152.0,10.0"' in loss_chart({0: ([1, 2], [0.1, 100.0])}, 164, 150)
    assert "<circle" in loss_chart({3: ([1], [1.0])}, 164, 150) and loss_chart({}, 164, 150) == ""


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.35, 1.2) == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.2])
    assert log_ticks(0.3, 30) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(1, 1e5) == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5])


def test_long_lines_are_thinned_by_medians():
    x, y = thinned(range(1, 361), [1.0, 9.0, 2.0] * 120)
    assert len(x) == 120 and x[:2] == [2, 5] and set(y) == {2.0}


def test_words_for_numbers():
    assert [format_duration(s) for s in (41.6, 200, 3600 * 5 + 420, 86400 * 2 + 3 * 3600)] == [
        "42 s",
        "3 min 20 s",
        "5 h 07 min",
        "2 d 3 h",
    ]
    assert [percent_in_tens(d) for d in (0, 0.0999, 0.3, 0.7, 0.999, 1)] == [0, 0, 30, 70, 90, 100]


def test_colours_of_both_schemes_have_contrast():
    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        dark, pale = sorted((light(a), light(b)))
        return (pale + 0.05) / (dark + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in _css().split("@media")[:2]]
    assert len(schemes) == 2 and all(len(scheme) == 15 for scheme in schemes)
    for scheme in schemes:
        for name, color in scheme.items():
            least = 4.5 if name in ("ink", "soft", "link") else 3.0 if name[0] == "c" and name[1:].isdigit() else 0
            least = 3.0 if name == "focus" else least
            for ground in ("page", "card"):
                assert contrast(color, scheme[ground]) >= least, (name, ground)


def _css() -> str:
    return (TEMPLATES / "style.css").read_text()


# -- the report --------------------------------------------------------------------------------------------------


def test_a_report_holds_the_run_and_needs_nothing_else(tmp_path):
    run = make_run(tmp_path / "run")
    page = Elements(write_report(run).read_text(encoding="utf-8"))
    for said in (
        "a-recipe",
        "Loss per block",
        "75.0 %",
        "accuracy",
        "max steps",
        "Once plain",
        "load('plain')",
        "torch",
    ):
        assert said in page.text, said
    assert "script" not in {tag for tag, _ in page.found}
    links = [value for _, attrs in page.found for name, value in attrs.items() if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in links)
    assert "@import" not in _css() and "url(" not in _css()
    images = [attrs for tag, attrs in page.found if tag == "img"]
    assert len(images) == 3 and all(image["alt"] for image in images)
    drawn = (run / "figures" / "losses.png").read_bytes()
    assert drawn in [base64.b64decode(image["src"].partition(",")[2]) for image in images]
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == ["recipe.json", "report.html", "updates.jsonl"]


def test_a_page_can_be_read_aloud(tmp_path):
    page = Elements(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.found]
    assert [tags.count(tag) for tag in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    ids = {attrs["id"] for _, attrs in page.found if "id" in attrs}
    shown = [attrs for tag, attrs in page.found if tag == "section" and "hidden" not in attrs]
    assert len(shown) == len(SECTIONS) and {attrs["aria-labelledby"] for attrs in shown} <= ids
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.found if tag == "th")
    assert all("aria-label" in attrs or "aria-hidden" in attrs for tag, attrs in page.found if tag == "svg")
    assert ("html", {"lang": "en"}) in page.found
    assert next(attrs for tag, attrs in page.found if attrs.get("id") == "announcement")["aria-live"] == "polite"


def all_pages(run: Path) -> list[Elements]:
    """The report, the live page and what it asks for later."""
    with serving(run) as server:
        live, state = get(server, "/")[1].decode(), json.loads(get(server, "/state.json")[1])
    report = write_report(run).read_text(encoding="utf-8")
    return [Elements(html) for html in (report, live, "".join(state["sections"].values()))]


def test_nothing_in_a_run_becomes_markup(tmp_path):
    nasty = all_pages(make_run(tmp_path / "<b>run", NASTY, NASTY))
    plain = all_pages(make_run(tmp_path / "run", "name", "word"))
    for page, other in zip(nasty, plain, strict=True):
        assert "onerror" in page.text and "<b>run" in page.text
        elements = ([(tag, sorted(attrs)) for tag, attrs in which.found] for which in (page, other))
        assert sorted(next(elements)) == sorted(next(elements))
        assert [attrs.get("src") for tag, attrs in page.found if tag == "script"] in ([], ["watch.js"])


def test_a_report_of_nothing_is_a_page(tmp_path):
    page = Elements(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "waiting for the run to begin" in page.text


# -- the server --------------------------------------------------------------------------------------------------


def test_only_known_paths_are_answered(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    run = make_run(tmp_path / "run")
    (run / "figures" / "out.png").symlink_to(tmp_path / "secret.png")
    with serving(run) as server:
        for path in ("/", "/state.json", "/style.css", "/watch.js", "/file/figures/losses.png?1", "/?x=1"):
            assert get(server, path)[0] == 200, path
        picture = get(server, "/file/samples/iteration-01.png")
        assert picture[1] == (run / "samples" / "iteration-01.png").read_bytes()
        assert picture[2]["Content-Type"] == "image/png"
        for path in (
            "/recipe.json",
            "/updates.jsonl",
            "/report.html",
            "/file/",
            "/file/recipe.json",
            "/file/figures/figures.json",
            "/file/figures/out.png",
            "/../secret.png",
            "/file/../secret.png",
            "/file/figures/../../secret.png",
            "/file/figures/%2e%2e/%2e%2e/secret.png",
            "/file/figures%2F..%2F..%2Fsecret.png",
            f"/file/{tmp_path}/secret.png",
            "/file/figures/losses.png%00",
            "/page.html",
        ):
            status, content, _ = get(server, path)
            assert status == 404 and b"secret" not in content.replace(b"secret.png", b""), path
        write_report(run)
        status, content, headers = get(server, "/report.html")
        assert status == 200 and content == (run / "report.html").read_bytes()
        assert "script-src" not in headers["Content-Security-Policy"]


def test_this_machine_only(tmp_path):
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
        answers = {host: get(server, "/", host)[0] for host in ("localhost:80", "127.0.0.1", "evil.example", "[::1")}
        assert list(answers.values()) == [200, 200, 403, 403]
        policy = get(server, "/")[2]["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy


def test_the_page_follows_the_run(tmp_path):
    with serving(tmp_path / "run") as server:

        def state():
            return json.loads(get(server, "/state.json")[1])

        assert state()["state"] == "waiting" and state()["sections"]["losses"] == ""
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "updates.jsonl").write_text(row(0, 1, 3.0))
        first = state()["sections"]
        assert "block 0" in first["losses"] and "block 1" not in first["losses"]
        with open(tmp_path / "run" / "updates.jsonl", "a") as file:
            file.write(row(1, 1, 2.0))
        assert "block 1" in state()["sections"]["losses"]


# -- commands and training ---------------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "hf_diffusionblocks", "watch", str(tmp_path / "run"), "--no-browser"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    try:
        url = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        connection = http.client.HTTPConnection("127.0.0.1", int(url.group(1)), timeout=10)
        connection.request("GET", "/")
        assert b"waiting for the run" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()


def test_bad_input_to_the_command(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["watch", str(tmp_path / "file"), "--no-browser"]) == 2
    assert "is a file: give a run's directory" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["watch", str(tmp_path), "--no-browser", "--port", str(taken.getsockname()[1])]) == 1
    assert "Give another --port" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path), "--port", "70000"])
    assert "from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("report", [True, False])
def test_a_training_ends_in_a_report(tmp_path, capsys, report):
    few = ["training.max_steps=2", "training.warmup_steps=0", "training.per_device_train_batch_size=2"]
    out = tmp_path / "run"
    options = ["--block", "1", "--output-dir", str(out), *([] if report else ["--no-report"])]
    assert main(["train", "digits-dit", *few, "model.attention_head_dim=4", *options]) == 0
    assert (f"report: {out / 'report.html'}" in capsys.readouterr().out) == report == (out / "report.html").is_file()
    if report:
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "finished" in page and "2 of 2" in page and "from hf_diffusionblocks import" in page


def test_the_trainer_says_where_its_blocks_are(tmp_path):
    make_trainer(tmp_path / "run", residency="host", residency_dir=str(tmp_path / "r")).train()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["iteration"], status["iterations"], status["device"]) == ("finished", 9, 9, "cpu")
    assert [(b["block"], b["updates"], b["of"]) for b in status["blocks"]] == [(0, 3, 3), (1, 3, 3), (2, 3, 3)]
    assert [b["layers"] for b in status["blocks"]] == [
        list(b.layers) for b in RunReader(tmp_path / "run").read().blocks
    ]


def test_places_while_it_trains_and_the_state_of_a_stopped_run(tmp_path, monkeypatch):
    seen = []

    class Stop(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            seen.append(json.loads((tmp_path / "status.json").read_text()))
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_status, "_SECONDS_BETWEEN", 0.0)
    trainer = make_trainer(tmp_path, callbacks=[Stop()], residency="host", logging_steps=2)
    with pytest.raises(KeyboardInterrupt, match="saved in"):
        trainer.train()
    places = {b["block"]: b["place"] for b in seen[0]["blocks"]}
    assert places == {b: "device" if b == seen[0]["active"] else "host" for b in range(3)}
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert RunReader(tmp_path).read().state == "stopped"


def test_a_new_run_leaves_no_report_of_an_earlier_one(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    write_report(tmp_path)
    make_trainer(tmp_path, max_steps=1).train()
    assert not (tmp_path / "report.html").exists() and (tmp_path / "previous-1" / "report.html").is_file()
    write_report(tmp_path)
    overwrite_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["previous-1"]


def test_a_live_page_needs_no_torch():
    code = "import sys, hf_diffusionblocks.report; print('torch' in sys.modules, 'jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_templates_come_with_the_package():
    names = {path.name for path in Path(TEMPLATES).iterdir()}
    assert names == {"page.html", "sections.html", "style.css", "watch.js"}
    assert '"report/templates/*"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
