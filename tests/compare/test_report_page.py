"""The report as a page: nothing from outside, nothing of the data is markup, and in Chromium its choices work."""

import html.parser
import json
import re

import pytest

from llava.compare.report import write_report
from llava.compare.report_questions import disagreements, verdicts
from tests.compare.fake_comparison import TOWERS, comparison, failed_tower
from tests.support import chromium

HOSTILE = '</script><img src=x onerror="window.hacked=1">\'&amp;<b>'

needs_chromium = pytest.mark.skipif(
    chromium.binary() is None, reason=f"no Chromium on PATH ({', '.join(chromium.NAMES)}), which opens the page"
)


class Elements(html.parser.HTMLParser):
    """All start tags of a page, and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page's path, results, details) of a comparison in which every text of the data is hostile somewhere."""
    folder = tmp_path_factory.mktemp("page")
    results, details = comparison(folder / "pictures", seeds=(0, 1, 2))
    results["notes"].append(HOSTILE)
    results["towers"].append(failed_tower(HOSTILE, error=f"error: {HOSTILE}"))
    results["towers"].append(failed_tower("x" * 120, error="y" * 300))
    results["differences"].append({"what": HOSTILE, "values": {"clip": HOSTILE}})
    rows = details["heldout"]["questions"]
    chosen = [row for row in rows if {True, False} <= set(verdicts(row).values())]
    chosen[0] |= {"question": HOSTILE, "image": "gone/away.png"}
    chosen[0]["predictions"]["clip"]["0"] = HOSTILE
    chosen[1] |= {"image": None, "question": f"{chosen[1]['question']} {'z' * 200}"}
    chosen[2] |= {"image": ["0.png", "1.png", "2.png", "3.png", "4.png"]}
    write_report(folder / "out", results, details)
    return folder / "out" / "report.html", results, details


def counted(details: dict, a: str, b: str, fits=lambda row: True) -> int:
    """Directly: how many questions more than half of a's seeds get right and less than half of b's."""
    total = 0
    for row in filter(fits, details["heldout"]["questions"]):
        shares = {name: sum(row["correct"][name].values()) / len(row["correct"][name]) for name in (a, b)}
        total += shares[a] > 0.5 > shares[b]
    return total


def test_nothing_comes_from_outside(made):
    elements = Elements(made[0].read_text())
    for tag, attributes in elements.found:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            address = attributes.get(name) or "#"
            assert address.startswith(("data:", "#")), (tag, name, address)
        assert tag not in ("iframe", "object", "embed", "base", "form action")
    style = re.search("<style>(.*?)</style>", made[0].read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style


def test_text_of_the_data_is_text(made):
    elements = Elements(made[0].read_text())
    assert sum(tag == "script" for tag, _ in elements.found) == 2
    assert not [tag for tag, attributes in elements.found if any(name.startswith("on") for name in attributes)]
    data = json.loads(elements.scripts[0])
    assert HOSTILE in [row["question"] for row in data["questions"]] and "<" not in elements.scripts[0]


def test_tables_have_headings_and_pictures_words(made):
    elements = Elements(made[0].read_text()).found
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in elements if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert sum(tag == "table" for tag, _ in elements) == sum(tag == "caption" for tag, _ in elements) > 5
    assert ("html", {"lang": "en"}) in elements


def test_what_cannot_be_read_is_a_placeholder(made):
    data = json.loads(Elements(made[0].read_text()).scripts[0])
    without = [picture["name"] for picture in data["pictures"] if picture["data"] is None]
    assert without == ["gone/away.png"]
    assert data["total"] == len(data["questions"]) == len(disagreements(made[2]))
    assert data["questions"][1]["pictures"] == [] and data["questions"][2]["more"] == 2


@needs_chromium
def test_an_address_holds_the_choice(made):
    page = chromium.dumped(
        f"{made[0].as_uri()}#a=clip&b=dinov2&evaluation=heldout&kind=left+digit&q=DIGIT+is+at+the+left&sort=question"
    )
    expected = counted(made[2], "clip", "dinov2", lambda row: "left of" in row["question"])
    assert expected > 3 and f"clip right, dinov2 wrong: {expected} questions." in page
    cards = page[page.index('<ol id="cards">') :]
    assert cards.count("<h3>") == expected and "right digit" not in cards.split("<script")[0]


@pytest.fixture(scope="module")
def tab(made, tmp_path_factory):
    if chromium.binary() is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(chromium.NAMES)}), which opens the page")
    with chromium.Tab(str(tmp_path_factory.mktemp("profile"))) as found:
        found.open(made[0].as_uri())
        yield found


CHOOSE = """(() => {{ const form = document.getElementById("choice");
  for (const [name, value] of Object.entries({}))  form.elements[name].value = value;
  form.dispatchEvent(new Event("input")); return document.getElementById("count").textContent; }})()"""
QUESTIONS = "[...document.querySelectorAll('#cards h3')].map(node => node.textContent)"


def choose(tab, **values) -> str:
    everything = {"a": "", "b": "", "evaluation": "", "kind": "", "q": "", "sort": "file"}
    return tab.run(CHOOSE.format(json.dumps(everything | values)))


def number(words: str) -> int:
    return int(re.search(r": (\d+) question", words)[1])


def test_towers_are_chosen_and_swapped(made, tab):
    total = len(disagreements(made[2]))
    assert number(choose(tab)) == total
    expected, back = counted(made[2], "siglip", "adaptive"), counted(made[2], "adaptive", "siglip")
    assert number(choose(tab, a="siglip", b="adaptive")) == expected != back
    tab.run("document.getElementById('swap').click()")
    assert number(tab.run("document.getElementById('count').textContent")) == back
    assert "a=adaptive&b=siglip" in tab.run("location.hash")
    assert number(choose(tab, q="no such words")) == 0
    assert "different" in choose(tab, a="clip", b="clip")
    names = "[...document.querySelectorAll('#cards li:first-child .said tbody th')].map(node => node.textContent)"
    choose(tab)
    assert tab.run(names) == list(TOWERS)
    # a wrong prediction is not told by its colour alone
    choose(tab, a="clip", b="dinov2")
    row = "document.querySelector('#cards .said tr.chosen:last-child')"
    assert "✗" in tab.run(f"{row}.textContent") and "wrong" in tab.run(f"{row}.textContent")
    assert tab.run(f"{row}.lastChild.textContent") in ("0 of 3", "1 of 3")


def test_sorted_by_question_and_by_gap(tab):
    choose(tab, sort="question")
    found = tab.run(QUESTIONS)
    assert found[1:] == sorted(found[1:]) and len(set(found)) > 1
    choose(tab, a="clip", b="dinov2", sort="gap")
    shares = tab.run("""[...document.querySelectorAll('#cards > li')].map(card => [...card.querySelectorAll(
        'tr.chosen td:last-child')].map(node => parseInt(node.textContent)))""")
    gaps = [clip - dino for clip, dino in shares]
    assert gaps == sorted(gaps, reverse=True) and len(set(gaps)) > 1


def test_by_keyboard(made, tab):
    choose(tab)
    tab.run("document.querySelector('input[name=q]').focus()")
    tab.type("the left")
    expected = sum("the left" in row["question"] for _, row in disagreements(made[2]))
    assert number(tab.run("document.getElementById('count').textContent")) == expected > 3
    assert "q=the+left" in tab.run("location.hash")
    tab.press("Tab", 9)
    assert tab.run("document.activeElement.name") == "sort"
    tab.press("Tab", 9)
    assert tab.run("document.activeElement.id") == "swap"
    assert tab.run("[...document.querySelectorAll('select, input')].every(node => node.labels.length)")
    assert tab.run("[...document.querySelectorAll('.box')].every(node => node.tabIndex === 0)")


def test_pictures_and_placeholders_show(made, tab):
    choose(tab, q="onerror")
    assert tab.run(QUESTIONS) == [HOSTILE]
    assert tab.run("document.querySelector('#cards .gone').textContent") == "cannot be read: gone/away.png"
    assert HOSTILE in tab.run("document.querySelector('#cards .said').textContent")
    choose(tab)
    decoded = "[...document.querySelectorAll('#cards img')].map(node => node.decode().then(() => node.naturalWidth))"
    widths = tab.run(f"Promise.all({decoded})")
    assert len(widths) > 10 and set(widths) == {56}
    assert tab.run("document.querySelectorAll('#cards li')[1].querySelector('.gone').textContent") == "no picture"
    assert "and 2 more" in tab.run("document.querySelectorAll('#cards li')[2].textContent")


def test_no_page_scroll_on_a_narrow_screen(tab):
    choose(tab)
    tab.narrow(375)
    try:
        assert tab.run("innerWidth") == 375 and tab.run("document.documentElement.scrollWidth") <= 375
        inside = "[...document.querySelectorAll('#cards li, form, p')]"
        assert tab.run(f"{inside}.every(node => node.getBoundingClientRect().right <= 375)")
        assert tab.run("[...document.querySelectorAll('.box')].some(node => node.scrollWidth > node.clientWidth)")
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")


def test_the_page_follows_the_colour_scheme(tab):
    found = []
    for scheme in ("light", "dark"):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert found == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


def test_nothing_was_asked_for_and_nothing_failed(made, tab):
    """After all of the above; a page that has nothing to load asks for itself alone."""
    choose(tab, a="clip")
    assert tab.run("window.hacked") is None
    asked = [
        event["params"]["request"]["url"] for event in tab.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert made[0].as_uri() in asked
    assert [url for url in asked if not url.startswith("data:")] == [made[0].as_uri()]
    bad = ("Runtime.exceptionThrown", "Log.entryAdded")
    assert not [event for event in tab.events if event["method"] in bad]
