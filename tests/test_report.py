"""The report: self-contained, escaped, honest about noise, and drawn without a request or an error."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from oprd_nb.cli.demo import embedded_config
from oprd_nb.objectives import Representation
from oprd_nb.plots.answers import anchor, answered, answers_html, chosen_problems
from oprd_nb.plots.page import clipped
from oprd_nb.plots.report import EMBEDDED, SYNTHETIC, headline, lead, measured_html, report_html, write_report
from oprd_nb.runs import (
    RunPaths,
    as_runs,
    read_run,
    read_settings,
    summary_table,
    synthetic_run,
    teacher_accuracy,
    write_about,
    write_settings,
)
from oprd_nb.training.experiment import distil_pair

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture
def runs(tmp_path):
    return [
        synthetic_run(tmp_path / method, method, steps=20, problems=60)
        for method in ("oprd", "opd-full", "opd-sampled")
    ]


def outside_scripts(page):
    """The page without the plotting library and the figures' data."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_one_file_without_a_reference_to_elsewhere(runs, tmp_path):
    path = write_report(runs, tmp_path / "new" / "report.html")
    page = path.read_text("utf-8")
    assert path.stat().st_size <= 6_000_000
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:|#)|https?://|url\(", outside_scripts(page))
    assert SYNTHETIC in page
    assert EMBEDDED in page
    assert page.count("<article data-spaced") == 10


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    first = write_report(runs, tmp_path / "a.html").read_text("utf-8")
    assert first == write_report(runs, tmp_path / "b.html").read_text("utf-8")


def test_a_folder_that_is_no_run_leaves_nothing_behind(runs, tmp_path):
    with pytest.raises(ValueError, match="no config.yaml"):
        write_report([*runs, tmp_path / "nowhere"], tmp_path / "out" / "report.html")
    with pytest.raises(ValueError, match="runs="):
        write_report([], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_text_from_runs_cannot_become_markup(runs, tmp_path):
    for name in ("before", "after"):
        table = pd.read_parquet(runs[0] / "eval" / f"{name}.parquet")
        table.assign(response=EVIL, prompt=EVIL, answer=EVIL).to_parquet(runs[0] / "eval" / f"{name}.parquet")
    settings, about = read_settings(runs[0])
    write_settings(runs[0], settings | {"student": EVIL, "note": EVIL})
    write_about(runs[0], about | {"label": EVIL, "command": EVIL, "note of a fact": EVIL})
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert EVIL not in page
    assert page.count("<script>") == page.count("</script>") == 2
    assert "<img" not in outside_scripts(page)


def test_no_evaluation_and_no_curves_still_make_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: oprd\n")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text("utf-8")
    assert "have not been evaluated" in page
    assert page.count("Not drawn:") == 5
    assert SYNTHETIC not in page


def test_the_headline_says_noise_where_there_is_noise(tmp_path):
    close = as_runs(
        [
            synthetic_run(tmp_path / name, "oprd", seed, steps=5, problems=40, about={"label": name})
            for seed, name in enumerate(("A", "B"))
        ]
    )
    assert "within noise" in headline(close, summary_table(close))[1]
    far = as_runs([synthetic_run(tmp_path / m, m, steps=5, problems=200) for m in ("opd-sampled", "oprd")])
    result, comparison = headline(far, summary_table(far))
    gap, low, high = lead(far[1:], far[:1])
    assert result.startswith("OPRD takes")
    assert "ahead of OPD sampled token" in comparison
    assert 0 < low < gap < high
    assert headline(far[:1], summary_table(far[:1]))[1] == ""


def test_a_student_that_got_worse_is_called_that(runs):
    table = summary_table(as_runs(runs)).assign(before=0.99)
    assert headline(as_runs(runs), table)[0].startswith(
        "No method improved the student: the best, OPRD takes the student from 99.0% to"
    )


def test_a_lead_over_seeds_is_welchs(tmp_path):
    runs = as_runs(
        [
            synthetic_run(tmp_path / f"{m}{s}", m, s, steps=5, problems=100)
            for m in ("oprd", "opd-full")
            for s in range(3)
        ]
    )
    table = summary_table(runs).set_index("method")["accuracy"]
    gap, low, high = lead(runs[:3], runs[3:])
    assert gap == pytest.approx(table["oprd"] - table["opd-full"])
    assert low < gap < high


def test_answers_to_the_same_problem_are_next_to_each_other(runs):
    html = answers_html(runs, count=4)
    before = as_runs(runs)[0].evals["before"].set_index("problem")["prompt"]
    spaced = re.findall(r"<article data-spaced[^>]*><p class='problem'><b>(.*?)</b>", html)
    assert spaced == [before[i] for i in (0, 20, 39, 59)]
    cards = html.count("<article")
    assert html.count("class='answer") == 4 * cards  # before, and after three methods
    assert html.count(" hidden") == cards - 4


def test_a_filter_finds_what_was_gained_and_what_was_lost(runs):
    read = as_runs(runs)
    together = answered(read)
    first = {
        name: read[1].evals[name].query("sample == 0")["correct"].to_numpy() for name in ("before", "after")
    }
    assert (together.changes(read[1].label) == "wr").tolist() == (~first["before"] & first["after"]).tolist()
    assert (together.changes(read[1].label) == "rw").tolist() == (first["before"] & ~first["after"]).tolist()
    html = answers_html(runs)
    assert f"data-wr='{(~first['before'] & first['after']).sum()}'" in html
    assert len(chosen_problems(together, count=10, of_each=0)) == 10


def test_each_problem_has_an_anchor_of_its_own(runs):
    html = answers_html(runs)
    names = re.findall(r"<article[^>]* id='(problem-\d+)'", html)
    assert len(set(names)) == html.count("<article")
    assert re.findall(r"href='#(problem-\d+)'", html) == names
    assert anchor(("AIME 2024", 7)) == "problem-AIME-2024-7"


def test_runs_on_other_problems_are_named_and_not_mixed(runs, tmp_path):
    other = synthetic_run(tmp_path / "other", "readout", steps=5, problems=60)
    path = RunPaths(other).eval("after")
    table = pd.read_parquet(path)
    table.assign(prompt="another problem").to_parquet(path)
    assert "Not shown: Readout bridge" in answers_html([*runs, other])
    assert "Readout bridge" not in answered(as_runs([*runs, other])).columns


def test_the_teacher_has_a_line_a_row_a_column_and_a_sentence(runs):
    for run in runs:
        after = pd.read_parquet(RunPaths(run).eval("after"))
        after.assign(correct=[i % 20 != 0 for i in range(len(after))]).to_parquet(
            RunPaths(run).eval("teacher")
        )
    read = as_runs(runs)
    assert teacher_accuracy(read)["accuracy"] == pytest.approx(0.95)
    page = report_html(read)
    assert "The teacher answers 95.0% right." in page
    assert page.count("teacher: 95.0%") == 3  # accuracy against steps, against time, and what it costs
    assert "Teacher</td><td>–</td><td>95.0%" in page
    assert list(answered(read).columns)[-1] == "Teacher"


def test_on_which_problems_is_said_where_they_differ(runs):
    text = measured_html(as_runs(runs))
    assert "60 test problems, 1 responses each" in text
    assert "100 validation problems" in text
    assert "other problems" in text


def test_a_report_and_its_summary_agree_in_every_number_they_share(tmp_path, same):
    folder = tmp_path / "run"
    args = embedded_config(folder, 3e-4, steps=6, seed=0, eval_steps=3)
    args.per_device_train_batch_size = 8
    validation = same.task.validation.select(range(6))
    distil_pair(same, Representation(), args, {}, held_out=12, measure_teacher=True, eval_dataset=validation)
    summary = json.loads((folder / "summary.json").read_text())
    run = read_run(folder)
    row = summary_table([run]).iloc[0]
    assert row["seconds"] == summary["seconds"]
    assert row["before"] == summary["before/avg@4"]["value"]
    for name, part in (("accuracy", "value"), ("low", "low"), ("high", "high")):
        assert row[name] == pytest.approx(summary["avg@4"][part], abs=1e-12)
        assert teacher_accuracy([run])[name] == pytest.approx(summary["teacher/avg@4"][part], abs=1e-12)
    assert row["length"] == pytest.approx(summary["length/mean"]["value"])
    assert row["truncated"] == pytest.approx(summary["truncated"]["value"])
    # Resident memory of a process on a CPU is no measure of a method: neither shows any.
    assert "memory/delta_peak" not in summary
    assert row["delta_peak"] != row["delta_peak"]
    page = report_html([run])
    assert "memory that the update adds" not in page
    assert run.method == "oprd"
    assert "hidden states of all layers" in page


def test_long_answers_keep_their_ends():
    text = clipped("start " + "x" * 5000 + " \\boxed{7}")
    assert text.startswith("start")
    assert text.endswith("\\boxed{7}")
    assert "left out" in text
    assert len(text) < 1600


def try_its_problems(page) -> None:
    """A search leaves the problems with its words, keys go from one to the next, an address opens one."""
    address = page.url
    chosen = page.locator("article:target")
    cards = page.locator("article:visible")
    words = page.locator("article .problem b").nth(3).inner_text()
    page.fill("#search", words.upper())
    assert words in cards.first.inner_text()
    assert 0 < cards.count() < 10
    page.fill("#search", "no problem says this")
    assert cards.count() == 0
    assert page.locator("#count").inner_text().startswith("0 problems")
    page.fill("#search", "")
    assert cards.count() == 10

    names = [card.get_attribute("id") for card in cards.all()]
    page.locator("#count").click()
    for key, place in (("Right", 0), ("Right", 1), ("Left", 0), ("Left", -1)):
        page.keyboard.press(f"Arrow{key}")
        page.wait_for_function(f"location.hash === '#{names[place]}'")
        assert chosen.is_visible()
    hidden = page.locator("article:not(:visible)").first.get_attribute("id")
    page.goto(f"{address}#{hidden}")
    page.wait_for_function("document.querySelector('article:target')?.hidden === false")
    page.goto(f"{address}#problem-9999")
    page.wait_for_function("document.getElementById('count').textContent.includes('problem-9999 is not')")


def try_its_controls(page, narrow: bool) -> None:
    """A legend hides and shows a line, a menu chooses problems, numbers are saved, tables say they scroll."""
    lines = "document.querySelectorAll('#accuracy .scatterlayer .trace').length"
    before = page.evaluate(lines)
    button = page.locator("figure.accuracy button[data-entry]").first
    button.click()
    page.wait_for_function(f"{lines} < {before}")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    page.wait_for_function(f"{lines} === {before}")
    assert page.locator("article:visible").count() == 10
    page.select_option("#change", "wr")
    assert page.locator("article:visible").count() > 0
    assert "of 60 problems" in page.locator("#count").inner_text()
    with page.expect_download() as saved:
        page.locator("figure.accuracy button[data-save='csv']").click()
    rows = Path(saved.value.path()).read_text().splitlines()
    assert rows[0] == '"series","points or line","Training step","Accuracy (Avg@1)"'
    assert len(rows) > 10
    with page.expect_download() as saved:
        page.locator("button[data-table='methods']").click()
    assert '"Method","Before","After"' in Path(saved.value.path()).read_text()
    assert page.locator(".goes-on").first.is_visible() == narrow


@pytest.mark.browser
def test_a_browser_draws_it_without_a_request_or_an_error(runs, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    table = pd.read_parquet(runs[0] / "eval" / "after.parquet")
    table.assign(response=EVIL).to_parquet(runs[0] / "eval" / "after.parquet")
    page_file = write_report(runs, tmp_path / "report.html")
    requests = []
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((1400, "light"), (800, "dark"), (390, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(page_file.as_uri())
            page.wait_for_function("document.querySelectorAll('.plot svg.main-svg').length >= 5")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
                f"scrolls sideways at {width} px"
            )
            assert page.evaluate("window.hacked") is None
            try_its_controls(page, narrow=width < 1000)
            page.select_option("#change", "spaced")
            try_its_problems(page)
        browser.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("blob:")} == {page_file.as_uri()}
