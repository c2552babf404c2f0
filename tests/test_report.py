"""report.html, read as a browser would read it."""

import base64
import hashlib
import io
from html.parser import HTMLParser

import pytest
from conftest import make_score_rows
from PIL import Image
from test_panels import plain_panel

from models.evaluation.report import write_report
from models.evaluation.statistics import compare_runs, summarise

EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b's"]
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Every element as (name, attributes, text), and whether each beginning has its end."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> in {[name for name, *_ in self.open]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag: str, **attributes) -> list[tuple[dict, str]]:
        return [(attrs, text) for name, attrs, text in self.elements
                if name == tag and attributes.items() <= attrs.items()]  # fmt: skip


def written(folder, rows, panels=None, figures=None, facts=None) -> str:
    runs = list(dict.fromkeys(row["run"] for row in rows))
    if panels is None:
        panels = {run: {row["case"]: plain_panel("red") for row in rows if row["run"] == run} for run in runs}
    path = folder / "report.html"
    comparisons = compare_runs(rows) if rows else []
    write_report(path, rows, summarise(rows), comparisons, figures or {}, {}, panels, facts or {})
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Two runs and five cases, some of names that are markup, with a figure."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "figure.png").write_bytes(plain_panel("lime"))
    rows = make_score_rows(["unet", EVIL[1]], [*EVIL, "d", "e"])
    rows = [row | {"trained_on": row["run"] == "unet" and row["case"] == "d"} for row in rows]
    return written(folder, rows, figures={EVIL[0]: folder / "figure.png"}, facts={"Split": EVIL[2]})


@pytest.fixture(scope="module")
def page(text) -> Reader:
    return Reader(text)


def test_every_element_ends_where_it_should(page):
    assert page.open == [] and len(page.elements) > 100


def test_names_are_text_and_never_markup(page):
    assert len(page.all("script")) == 1
    assert not [attrs for _, attrs, _ in page.elements for name in attrs if name.startswith("on")]
    headings = [text for _, text in page.all("h3")]
    assert set(EVIL) <= set(headings)
    assert {attrs["alt"] for attrs, _ in page.all("img")} >= {EVIL[0], EVIL[1]}
    assert EVIL[2] in [text for _, text in page.all("dd")]


def test_nothing_is_loaded_from_anywhere(text, page):
    for _, attrs, _ in page.elements:
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert attrs.get("href", "#").startswith("#")
        assert not {"srcset", "action", "style", "data", "poster"} & attrs.keys()
    assert not page.all("link") and not page.all("iframe") and not page.all("base")
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text


def test_the_policy_admits_only_the_pictures_style_and_script_of_the_page(page):
    ((meta, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    policy = dict(part.strip().split(" ", 1) for part in meta["content"].split(";"))
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"
    for name, directive in (("style", "style-src"), ("script", "script-src")):
        ((_, content),) = page.all(name)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"


def test_pictures_are_whole_and_their_size_is_known(page):
    pictures = page.all("img")
    assert len(pictures) == 2 * 5 + 1
    for attrs, _ in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert picture.size == (int(attrs["width"]), int(attrs["height"]))


def test_every_case_has_an_article_that_the_table_of_cases_links_to(page):
    articles = {attrs["id"]: text for attrs, text in page.all("article")}
    links = {text: attrs["href"] for attrs, text in page.all("a") if attrs["href"].startswith("#case-")}
    assert set(links) == {*EVIL, "d", "e"} and len(articles) == 5
    for case, link in links.items():
        assert articles[link.removeprefix("#")].startswith(case)
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["href"].removeprefix("#") in ids for attrs, _ in page.all("a"))


def test_tables_can_be_sorted_by_what_their_cells_say(page):
    sortable = page.all("table", **{"class": "sort"})
    assert len(sortable) == 3 + 2  # means, differences, cases, and all measures of both runs
    for _, cell in page.all("td"):
        assert cell == "–" or float(cell.split()[0].strip("*[],")) < 1000
    assert len(page.all("th", scope="col")) > 50


def test_the_worst_case_comes_first(tmp_path):
    rows = [row | {"dice": {"1": 0.9, "2": 0.2, "3": 0.5}[row["case"]]} for row in make_score_rows(["a"], "123")]
    page = Reader(written(tmp_path, rows))
    assert [text for attrs, text in page.all("a") if attrs["href"].startswith("#case-")] == ["2", "3", "1"]
    assert [attrs["id"] for attrs, text in page.all("article")] == ["case-1", "case-2", "case-3"]
    assert page.all("article")[0][1].startswith("2")


def test_it_says_what_was_scored_and_by_which_standards(page):
    said = dict(zip((text for _, text in page.all("dt")), (text for _, text in page.all("dd")), strict=True))
    assert said["Space"].startswith("native space") and said["Cases"] == "5"
    assert said["Lesion-wise scores"] == "BraTS 2026 (brats-evaluation 0.0.10, gli) and BraTS 2023"
    heads = [text for _, text in page.all("th", scope="col")]
    assert "BraTS 2026 lesion Dice" in heads and "BraTS 2023 lesion Dice" in heads


def test_it_says_how_often_a_rule_decided_and_marks_those_scores(page):
    said = dict(zip((text for _, text in page.all("dt")), (text for _, text in page.all("dd")), strict=True))
    assert "decided 2 of 50 scores" in said["Empty masks"] and "Both masks empty: 2 " in said["Empty masks"]
    assert [text for _, text in page.all("td")].count("1.000*") == 2 * 2  # in the table of all cases and in the article


def test_patients_that_a_run_was_trained_on_are_marked(page):
    ((_, warning),) = page.all("p", **{"class": "warning"})
    assert warning.startswith("unet was trained on 1 of these cases")
    marked = [text for _, text in page.all("th", scope="row") if "trained on this patient" in text]
    assert len(marked) == 1 + 5  # in the table of all cases, and each target's row of the article


@pytest.mark.parametrize("space", ["native", "network"])
def test_the_space_of_the_scores_is_in_every_caption(tmp_path, space):
    page = Reader(written(tmp_path, make_score_rows("a", "12", space=space)))
    captions = [text for _, text in page.all("caption")]
    for beginning, count in (("Mean", 1), ("a in ", 1), ("1 in ", 1), ("2 in ", 1)):
        assert sum(text.startswith(beginning) and f"{space} space" in text for text in captions) == count


def test_a_single_case_has_no_interval(tmp_path):
    page = Reader(written(tmp_path, make_score_rows("a", "1")))
    means = page.all("table", **{"class": "sort"})[0][1]
    assert "[" not in means.partition("cases")[2]


def test_cases_without_a_truth_are_shown_without_scores(tmp_path):
    page = Reader(written(tmp_path, [], panels={"a": {"2": plain_panel("red"), "1": plain_panel("red")}}))
    assert [text[:1] for _, text in page.all("article")] == ["1", "2"] and len(page.all("img")) == 2
    assert not page.all("section", id="scores") and not page.all("section", id="comparisons")


def test_runs_that_have_other_cases_are_shown_side_by_side(tmp_path):
    page = Reader(written(tmp_path, make_score_rows("a", "12") + make_score_rows("b", "23")))
    assert len(page.all("article")) == 3
    assert len(page.all("img")) == 4
