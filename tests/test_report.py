"""The report: self-contained, escaped, honest about noise, and drawn without a request or an error."""

import re
import shutil

import pandas as pd
import pytest

from oprd_nb.plots.page import clipped
from oprd_nb.plots.report import EMBEDDED, SYNTHETIC, headline, lead, rollouts_html, write_report
from oprd_nb.runs import as_runs, read_settings, summary_table, synthetic_run, write_about, write_settings

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
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)|https?://|url\(", outside_scripts(page))
    assert SYNTHETIC in page
    assert EMBEDDED in page
    assert page.count("<article>") == 30


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


def test_rollouts_pair_the_same_problem(runs):
    run = as_runs(runs)[0]
    html = rollouts_html(run, count=4)
    before = run.evals["before"].set_index("problem")["prompt"]
    assert re.findall(r"class='problem'><b>(.*?)</b>", html) == [before[i] for i in (0, 20, 39, 59)]
    assert html.count("class='answer") == 8


def test_long_answers_keep_their_ends():
    text = clipped("start " + "x" * 5000 + " \\boxed{7}")
    assert text.startswith("start")
    assert text.endswith("\\boxed{7}")
    assert "left out" in text
    assert len(text) < 1600


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
        for width in (1200, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(page_file.as_uri())
            page.wait_for_function("document.querySelectorAll('.plot svg.main-svg').length >= 5")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
                f"scrolls sideways at {width} px"
            )
            assert page.evaluate("window.hacked") is None
        browser.close()
    assert complaints == []
    assert set(requests) == {page_file.as_uri()}
