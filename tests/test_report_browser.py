"""The pages in a real Chromium: width, contrast, silence, paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploykit.report.html import render_html
from deploykit.report.matrix import build_matrix
from deploykit.report.matrix_page import render_matrix_html
from deploykit.report.model import LayerError, Report
from deploykit.report.sensitivity_model import Collapse, LayerRow, SensitivityReport
from deploykit.report.sensitivity_page import render_page as render_sensitivity
from deploykit.report.split_model import PartRow, SplitReport
from deploykit.report.split_page import render_page as render_split
from deploykit.types import PassRecord, WeightsOrigin
from tests.browser import Browser, Page, chromium
from tests.factories import (
    TARGET,
    make_accuracy,
    make_artifact,
    make_measurement,
    make_parity,
    make_report,
)
from tests.test_report import EVIL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine"),
]

LONG = "blocks.0.attention." + "x" * 300
ARABIC = "نموذج الرؤية \u202e للهاتف"
WIDTHS = (390, 1200)
CONTRAST = 4.5
"""What WCAG 2.2, 1.4.3, asks of text that is not large."""

# Each text's colour against the nearest background below it, by the formulas of WCAG 2.2.
_CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c[3] === 255) return c;
    }
    return rgba('Canvas');
  };
  document.querySelectorAll('details').forEach((d) => { d.open = true; });
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
    if (e.closest('title, style')) continue;
    const text = luminance(rgba(e.closest('svg') ? style.fill : style.color));
    const back = luminance(ground(e));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    found.push([ratio, walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()"""


def hard_report() -> Report:
    """Names without an end, from right to left, and of an attacker."""
    base = make_report()
    return make_report(
        model=LONG,
        bits="w4a8",
        weights=WeightsOrigin(kind="file", source=f"/data/{LONG}"),
        verdict_reasons=[EVIL, LONG],
        calibration=ARABIC,
        artifacts=[
            *base.artifacts,
            make_artifact(name="nncf", algorithm=LONG, precision="w8a8", integer=[LONG, EVIL]),
        ],
        measurements=[
            *base.measurements,
            make_measurement(artifact="nncf", p50_ms=6.0, noisy=True),
            make_measurement(target=ARABIC, p50_ms=9.0),
        ],
        accuracy=[make_accuracy(), make_accuracy(artifact="nncf", data=LONG, drop=9, top1=70)],
        parity=[make_parity(runtime=LONG), make_parity(batch=8, tolerance=LONG, passed=False)],
        layers=[LayerError(layer=name, op=LONG, bits="w4a8", sqnr_db=9) for name in (LONG, EVIL)],
        passes=[PassRecord(name=EVIL, summary=LONG, details={LONG: LONG, EVIL: [EVIL]})],
        warnings=[EVIL, LONG, ARABIC, "4", "5", "6"],
        environment={EVIL: LONG},
    )


def sensitivity() -> SensitivityReport:
    rows = [
        LayerRow(layer=name, op="linear", weights=9, scores={"w4a8": 0.2}, sqnr_db={"w4a8": 9.0},
                 chosen="w8a8")
        for name in (LONG, EVIL, "head")
    ]  # fmt: skip
    lost = Collapse(
        layer=LONG, bits="w4a8", score=0.2, share=0.3, sqnr_db=9, reason="loses most", keep="w8a8"
    )
    return SensitivityReport(
        deploykit_version="0", command="c", started="s", seconds=1, model=LONG,
        weights=WeightsOrigin(kind="file", source=EVIL), metric="kl", metric_text="KL",
        calibration=LONG, images=8, bits=["w4a8"], layers=rows, collapse=[lost],
        base_bits="w4a8", layer_bits={LONG: "w8a8"}, warnings=[EVIL],
    )  # fmt: skip


def split() -> SplitReport:
    part = PartRow(
        name="part1", classes=list(range(300)), report=Path("r"), artifact=make_artifact(),
        scale=1, offset=0, accuracy=make_accuracy(), measurement=make_measurement(),
    )  # fmt: skip
    return SplitReport(
        deploykit_version="0", command=LONG, started="s", seconds=1, model=LONG,
        weights=WeightsOrigin(kind="file", source=EVIL), bits="w8a8", target=TARGET,
        fitted_on=ARABIC, original=make_artifact(name="original"), original_measurement=None,
        parts=[part, part], accuracy=make_accuracy(), warnings=[LONG],
    )  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, as a file."""
    folder = tmp_path_factory.mktemp("pages")
    hard = hard_report()
    matrix = build_matrix([(LONG, hard), (EVIL, make_report()), ("c", make_report(seconds=1))])
    texts = {
        "report": render_html(hard),
        "untrained": render_html(
            make_report(weights=WeightsOrigin(kind="random", source="seed 0"), verdict="failed")
        ),
        "matrix": render_matrix_html(matrix),
        "sensitivity": render_sensitivity(sensitivity()),
        "split": render_split(split()),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests: it takes a second to start."""
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def text(page: Page) -> str:
    seen = page.evaluate("document.body.innerText")
    assert isinstance(seen, str)
    return seen


NAMES = ("report", "untrained", "matrix", "sensitivity", "split")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_its_window_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    for width in WIDTHS:
        page = browser.open(pages[name], width)
        assert page.evaluate("innerWidth") == width
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.complaints() == []
        assert page.requests() == []
        assert page.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, dark: bool
) -> None:
    page = browser.open(pages[name], 1200, dark=dark)
    found = page.evaluate(_CONTRASTS)
    assert len(found) > 30
    assert [one for one in found if one[0] < CONTRAST] == []
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark


def test_the_instruments_see_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<body style='background:#fff'><p style='color:#767676'>just enough</p>"
        "<p style='color:#777'>too pale</p><div style='width:500px'>wide</div>"
        "<img src='missing.png'><script>console.error('no')</script>",
        encoding="utf-8",
    )
    page = browser.open(tmp_path / "bad.html", 390)
    pale = [one for one in page.evaluate(_CONTRASTS) if one[0] < CONTRAST]
    assert pale == [[pytest.approx(4.478, abs=0.001), "too pale"]]
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    assert [url.rsplit("/", 1)[1] for url in page.requests()] == ["missing.png"]
    assert len(page.complaints()) == 2  # the picture that isn't there, the script's word


def test_dark_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.open(pages["report"], 1200).evaluate(colour)
    assert light != browser.open(pages["report"], 1200, dark=True).evaluate(colour)


def test_pictures_are_drawn_in_the_page_s_colours_and_have_names(
    browser: Browser, pages: dict[str, Path]
) -> None:
    page = browser.open(pages["report"], 390)
    names = page.evaluate("[...document.querySelectorAll('svg')].map((s) => s.ariaLabel)")
    assert len(names) == len(set(names)) >= 6
    widths = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().width)"
    )
    assert all(300 < width <= 390 for width in widths)
    # On a phone, the smallest writing in them is still readable.
    sizes = page.evaluate("""[...document.querySelectorAll('svg text')].map((t) =>
        t.getBoundingClientRect().height)""")
    assert min(sizes) >= 9


def test_a_first_look_shows_what_counts_and_folds_the_rest(
    browser: Browser, pages: dict[str, Path]
) -> None:
    seen = text(browser.open(pages["report"], 1200))
    assert "w4a8 is 7.25× smaller" in seen
    assert seen.index("7.25× smaller") < seen.index("What did I gain?")
    assert "<script>alert(1)</script>" in seen  # as text
    assert "sha256 5c5c" not in seen  # folded
    assert "p99 needs 662 samples" in seen


def test_paper_shows_no_folded_things_and_no_handles(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = browser.open(pages["report"], 800, media="print")
    seen = text(page)
    assert "Every measurement in full" not in seen
    assert "Recipe" not in seen.splitlines()
    assert "\n6\n" in f"{seen}\n"  # the warnings that a screen folds
    assert LONG[:40] in seen  # a step's summary stays
    page.paper(tmp_path / "report.pdf")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 12
