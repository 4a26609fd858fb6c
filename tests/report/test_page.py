"""The page: one file that loads nothing, small, with everything in it, in any browser."""

from __future__ import annotations

import argparse
import html.parser
import re
from pathlib import Path

import pytest

from lpexp import compare, report
from lpexp.errors import ConfigError
from tests import made_up_runs as made_up

LIMIT = 5_000_000  # bytes, of 20 runs
VOID = ("meta", "br", "use", "path", "rect", "circle", "line", "stop")


class Reader(html.parser.HTMLParser):
    """What the page would fetch, its open tags, its text, its pictures' names."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.fetched += [
            f"{tag} {k}={v}"
            for k, v in attrs
            if k in ("src", "href", "xlink:href", "srcset", "data", "action") and not (v or "").startswith("#")
        ]
        self.fetched += [tag] * (tag in ("script", "link", "iframe", "object", "embed", "base"))
        if tag == "svg":
            self.pictures.append(at["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five arms of four seeds, one of them mixed, and a run that failed."""
    at = tmp_path_factory.mktemp("twenty")
    arms = ((), ("precision=fp8",), ("precision=int4_qat",), ("precision=int4_qat", "precision.group_size=32"))
    for seed in (1, 2, 3, 4):
        for number, words in enumerate(arms):
            made_up.run(at / f"{number}{seed}", *words, seed=seed, accuracy=0.7 - 0.05 * number)
        made_up.run(
            at / f"9{seed}",
            "rollout.precision=int4_qat",
            seed=seed,
            gap=0.03,
            events=({"kind": "alarm", "message": "<b>band & more</b>"},),
        )
    made_up.run(at / "broken", "precision=fp8", seed=9)
    (at / "broken" / "metrics.jsonl").write_text("{")
    return at


@pytest.fixture(scope="module")
def page(twenty: Path) -> str:
    return report.write([twenty]).read_text()


def test_the_page_of_twenty_runs_is_small_and_refers_to_nothing_outside_itself(page: str) -> None:
    assert len(page.encode()) < LIMIT
    reader = Reader(page)
    assert reader.fetched == [] and reader.open == []
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_what_is_fetched_or_left_open_would_be_found() -> None:
    assert Reader('<img src="a.png"><a href="#x"></a><script></script>').fetched == ["img src=a.png", "script"]
    with pytest.raises(AssertionError):
        Reader("<p><b></p>")


def test_it_says_question_verdict_alarm_failure_advice_and_provenance(page: str) -> None:
    text = " ".join(" ".join(Reader(page).text).split())
    for said in (
        "What do these runs say?",
        "below bf16",
        "4 alarms",
        "<b>band & more</b>",
        "has no step yet",
        "Smaller groups",
        "precision.group_size=64",
        "How it was judged",
        "Student's t over the seeds",
        "aaaaaaaaaaaa",
    ):
        assert said in text, said
    assert text.index("below bf16") < text.index("4 alarms") < text.index("Curves") < text.index("Provenance")


def test_each_picture_says_what_it_shows_and_takes_its_colours_from_the_page(page: str) -> None:
    pictures = Reader(page).pictures
    assert "Held-out accuracy minus that of bf16, 95 %" in pictures and len(pictures) == len(set(pictures)) > 8
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert all("var(--" in svg and not re.search(r"#[0-9a-f]{6}\b", svg) for svg in svgs)
    used, defined = set(re.findall(r"var\(--(\w+)\)", page)), set(re.findall(r"--(\w+):", page))
    assert used <= defined
    light, dark = page[: page.index("prefers-color-scheme")], page[page.index("prefers-color-scheme") :]
    for name in used - {"apart"}:
        assert f"--{name}:" in light and f"--{name}:" in dark, name


def test_ids_of_one_picture_are_not_those_of_another(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_longer_run_makes_no_larger_picture(tmp_path: Path) -> None:
    sizes = [
        len(report.write([made_up.run(tmp_path / str(steps), f"steps={steps}")]).read_bytes()) for steps in (200, 2000)
    ]
    assert sizes[1] < 1.1 * sizes[0]


def test_compare_prints_the_same_answer_and_tables(twenty: Path, page: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert compare.main(parser.parse_args([str(twenty)])) == 0
    printed = capsys.readouterr().out
    shown = " ".join(" ".join(Reader(page).text).split())
    for line in printed.splitlines():
        if line.startswith(("  note:", "  broken:")):
            assert line.partition(": ")[2].split(" ")[0] in shown
    for title in ("What sets the arms apart", "Learning", "Mismatch", "Speed and memory", "Smaller groups"):
        assert f"\n{title}" in printed and title in shown
    assert " ".join(printed.splitlines()[0].split()) in shown


def test_the_page_is_written_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up.run(tmp_path / "a")
    assert report.write([run]) == run / "report.html"
    assert f"report  {run / 'report.html'}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--out: .* is no directory"):
        report.write([run], tmp_path / "none" / "page.html")
